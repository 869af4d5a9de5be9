"""Probes on stacks of `headwise.nn`: heads that keep a state are seen by the weights that it implies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import registry
from ..attention import attend
from ..errors import SelectionError
from ..mechanisms import Attention, KeyValues, Mixer
from ..mechanisms._states import StateMixer
from ..mechanisms.side_by_side import SideBySide
from ..models.call import Call, Reading
from ..models.layout import Site
from ..models.masks import DenseBias
from ..nn import Transformer
from ..prompts import repeated_rows
from ..types import HeadTable, Statistics
from ._material import Batch
from ._probe import CallProbe

KINDS = ("any", "repeats")  # of rows that need no tokenizer


def measure_layers(
    model: Transformer, probes: Sequence[str | CallProbe] | None = None, *, rows: int = 4, length: int | None = None, seed: int = 0
) -> dict[str, HeadTable]:
    """Tables of the probes that look at weights, on random tokens that repeat, for any causal stack of `headwise.nn`.

    A state's weights may be negative and need not sum to one; probes are given their magnitudes, divided by their sum. Layers
    whose mixer implies no weights (or mixes other than values) are NaN.

    Args:
        probes: by name or as objects; None for all that look at weights. rows, length: how much is read; the length is the
            model's context, or 256 tokens where that is longer.

    Raises: SelectionError for a probe that needs text or a tokenizer, or a stack that reads both sides.
    """
    if not model.causal:
        raise SelectionError("probes of layers are for causal stacks; this one reads both sides")
    chosen = _chosen(probes)
    length = min(model.context, 256) if length is None else length
    ids, periods = repeated_rows(np.arange(model.vocabulary), rows, length, seed=seed)
    device = next(model.parameters()).device
    batch = Batch({"input_ids": torch.from_numpy(ids).to(device)}, periods=torch.from_numpy(periods).to(device))
    tables = {probe.name: torch.full((len(model.order), model.heads), torch.nan, dtype=torch.float64) for probe in chosen}
    with torch.no_grad():
        for depth, weights in enumerate(head_weights(model, batch.ids)):
            if weights is None:
                continue
            call = _call(depth, weights)
            for probe in chosen:
                seen = probe.observe(Statistics(call.statistics(probe.wants(batch, call))), batch, call)
                tables[probe.name][depth, : weights.shape[1]] = (seen.total / seen.count).cpu()
    return {probe.name: HeadTable(tables[probe.name], probe.name, "decoder", probe.unit) for probe in chosen}


def head_weights(model: Transformer, ids: Tensor) -> list[Tensor | None]:
    """(b, heads, n, n) of each layer: the weights by which its heads mix values; None where it implies none."""
    found: list[Tensor | None] = []

    def look(mixer: Mixer, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(_weights(mixer, given[0], given[1:]))

    hooks = [block.mixer.register_forward_pre_hook(look, with_kwargs=True) for _, block in _unique(model)]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _unique(model: Transformer) -> list[tuple[int, Any]]:
    return list({id(block): (depth, block) for depth, block in model.layers()}.values())


def _weights(mixer: Mixer, x: Tensor, stages: tuple[Any, ...]) -> Tensor | None:
    if isinstance(mixer, StateMixer):
        return mixer.weights(x, *stages)
    if isinstance(mixer, SideBySide):
        own = zip(mixer.turning(), mixer.inward(x).split(mixer.widths, -1), mixer.stages, strict=True)
        parts = [_weights(part, y, (*stages, *more)) for part, y, more in own]
        known = [part for part in parts if part is not None]
        return torch.cat(known, 1) if len(known) == len(parts) else None
    if not isinstance(mixer, Attention):
        return None
    seen = KeyValues().extend(*mixer.projections.split(x), None, mixer.rotary)
    n, kv = seen.k.shape[2], seen.k.shape[1]
    each = torch.eye(n, dtype=x.dtype, device=x.device).expand(len(x), kv, n, n)  # values that tell tokens apart
    read: Any = mixer.mechanism or attend
    weights: Tensor = read(seen.q, seen.k, each, *stages, **seen.places)
    return weights


def _call(layer: int, weights: Tensor) -> Call:
    """A read that has just these weights, by their magnitudes: softmax of their logarithms divides them by their sum."""
    b, h, n, _ = weights.shape
    nothing = weights.new_zeros(b, h, n, 1, dtype=torch.float32)
    stages = (DenseBias(weights.abs().float().log()),)
    reading = Reading(tuple(range(h)), nothing, nothing, nothing, stages, 1.0)
    site = Site("decoder", layer, f"blocks.{layer}.mixer", f"blocks.{layer}", h, h, 1, None)
    return Call(site, nothing, nothing, nothing, (reading,), None)


def _chosen(probes: Sequence[str | CallProbe] | None) -> list[CallProbe]:
    if probes is None:
        all_of_them = [registry.load("probe", name)() for name in registry.names("probe")]
        return [probe for probe in all_of_them if isinstance(probe, CallProbe) and probe.request().kind in KINDS]
    made = [registry.load("probe", probe)() if isinstance(probe, str) else probe for probe in probes]
    for probe in made:
        if not isinstance(probe, CallProbe) or probe.request().kind not in KINDS:
            raise SelectionError(
                f"the probe {probe.name} looks at more than weights on tokens; layers can be asked for: {_names()}"
            )
    return made


def _names() -> str:
    return ", ".join(probe.name for probe in _chosen(None))
