"""Checks for probes, on the planted model. A probe's module says which planted head it must find: `PLANTED`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..models.interface import MODULES
from ..models.subject import Subject
from ..probes import Probe, measure
from ..probes._probe import Planted
from ..types import HeadTable
from ._check import Item, require
from .planted import ROLES, PlantedConfig, PlantedModel

RANGES = {
    "probability": (0.0, 1.0),
    "share of sequences": (0.0, 1.0),
    "share of needle tokens": (0.0, 1.0),
    "tokens": (0.0, torch.inf),
}


@lru_cache(maxsize=2)
def planted_subject(swapped: bool = False, massive: float = 0.0) -> Subject:
    """The planted model; with its heads in reverse order in each layer if swapped."""
    roles = [list(reversed(layer)) if swapped else list(layer) for layer in ROLES]
    return Subject(PlantedModel(PlantedConfig(roles=roles, massive=massive)).eval(), name="planted")


def _planted(item: Item) -> Planted:
    planted = getattr(item.module, "PLANTED", None)
    require(isinstance(planted, Planted), "its module has no PLANTED, so nothing says which head it must find")
    return planted  # type: ignore[return-value]


def _measure(item: Item, *, swapped: bool = False) -> HeadTable:
    return _measured(item.value, swapped, _planted(item).massive)


@lru_cache(maxsize=64)
def _measured(kind: type[Probe], swapped: bool, massive: float) -> HeadTable:
    measured = measure(planted_subject(swapped, massive), [kind()], show_progress=False)
    require(not measured.skipped, f"skipped on a plain decoder: {next(iter(measured.skipped.values()), '')}")
    return next(iter(measured.tables.values()))


def _place(role: str) -> tuple[int, int]:
    return next((i, layer.index(role)) for i, layer in enumerate(ROLES) if role in layer)


def check_planted(item: Item) -> None:
    """The head that was planted for it stands out."""
    planted, table = _planted(item), _measure(item)
    layer, head = _place(planted.role)
    value = table[layer, head]
    others = table.values.clone()
    others[layer, head] = -torch.inf
    rest = float(others.max()) if not planted.by_size else float(others.abs().nan_to_num(posinf=0).max())
    own = abs(value) if planted.by_size else value
    require(own >= planted.at_least, f"the planted {planted.role} head has {value:.4g}, at least {planted.at_least:g} was due")
    if planted.lowest is not None:
        low = table[_place(planted.lowest)]
        require(low <= float(table.values.min()), f"the planted {planted.lowest} head has {low:.4g}, another less")
        return
    require(own > rest, f"the planted {planted.role} head has {value:.4g}, another has {rest:.4g}")
    if planted.others_at_most is not None:
        require(
            rest <= planted.others_at_most, f"a head without the role has {rest:.4g}, at most {planted.others_at_most:g} was due"
        )


def check_range(item: Item) -> None:
    """Values are numbers within what their unit allows."""
    table = _measure(item)
    require(bool(table.values.isfinite().all()), "values are missing or not finite")
    low, high = RANGES.get(table.unit, (-torch.inf, torch.inf))
    inside = bool((table.values >= low - 1e-6).all() and (table.values <= high + 1e-6).all())
    require(
        inside, f"values from {float(table.values.min()):.4g} to {float(table.values.max()):.4g} {table.unit} leave [{low}, {high}]"
    )
    require(
        table.name == item.name or not item.module.__name__.startswith("headwise."),
        f"the table is named {table.name!r}, not {item.name!r}",
    )


def check_repeatable(item: Item) -> None:
    """Measuring again gives the same bits."""
    again = measure(planted_subject(False, _planted(item).massive), [item.value()], show_progress=False)
    require(torch.equal(next(iter(again.tables.values())).values, _measure(item).values), "measuring again gives another result")


def check_equivariant(item: Item) -> None:
    """Reordering a layer's heads reorders the table, and does nothing else."""
    error = float((_measure(item, swapped=True).values.flip(1) - _measure(item).values).abs().max())
    require(error < 1e-4, f"reordering heads changes their values by {error:.2g}")


def check_no_trace(item: Item) -> None:
    """The model is left as it was."""
    subject = planted_subject(False, _planted(item).massive)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before: Any = subject.model(ids).logits
        measure(subject, [item.value()], show_progress=False)
        after: Any = subject.model(ids).logits
    require(torch.equal(before, after), "the model's outputs changed")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
    require(hooks == 0, f"{hooks} hooks are left on the model")
    require(not any("forward" in vars(m) for m in subject.model.modules()), "a module's forward is still replaced")
    require(subject.model.config._attn_implementation == "sdpa", "the attention implementation was not restored")
    require(not any(module in MODULES for module in subject.model.modules()), "modules are still registered")
    require(all(p.grad is None for p in subject.model.parameters()), "gradients are left on the parameters")
