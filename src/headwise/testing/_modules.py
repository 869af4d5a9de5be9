"""Runs a plain module of the user's: forward(x), (x, mask), (hidden_states, attention_mask), (x, cache=...) and the like."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistryError
from ._conventions import ROWS, SQUARES, Form, influence, likeness
from .adapters import ADVICE, FLAGS, WIDTH, Runner, parameters_of

MASKS = (
    "mask",
    "attn_mask",
    "attention_mask",
    "key_padding_mask",
    "padding_mask",
    "src_key_padding_mask",
    "pad_mask",
    "src_mask",
)
CACHES = ("cache", "past_key_values", "past_key_value", "kv_cache", "layer_past", "past_kv", "past", "state", "layer_cache")
MAKERS = ("new_cache", "make_cache", "init_cache", "empty_cache", "create_cache", "new_state", "init_state", "allocate_cache")
ASKS = ("use_cache", "return_cache", "return_state", "return_kv")
PLACES = ("position_ids", "positions", "pos_ids", "position_id")
STARTS = ("start_pos", "offset", "input_pos", "start", "pos_offset")
WIDTHS = (
    "embed_dim",
    "d_model",
    "dim",
    "width",
    "hidden_size",
    "n_embd",
    "model_dim",
    "embed_size",
    "d_embed",
    "channels",
    "features",
)


class ModuleRunner(Runner):
    """Finds by name and by trying what a module takes: a flag, a mask and what it means, a cache, positions."""

    def __init__(self, module: nn.Module, about: str = "") -> None:
        super().__init__(module, width_of(module), about)
        names = parameters_of(module.forward)
        self.names = names
        self.flag = next((n for n in FLAGS if n in names), None)
        self.cache = next((n for n in CACHES if n in names), None)
        self.maker = next((n for n in MAKERS if callable(getattr(module, n, None))), None)
        self.ask = next((n for n in ASKS if n in names), None)
        self.places = next((n for n in PLACES if n in names), None)
        self.start = next((n for n in STARTS if n in names), None)
        self.mask: str | None = None
        self.form_name, self.form, self.square = "", ROWS["bool (b, m), True at tokens"], False
        self.row_mask: tuple[str, Form] | None = None  # of padding, where the mask above is one for all rows
        self.whole_mask = True  # in decoding, the mask is of all tokens so far, not of the new ones
        self._check_callable()
        self._learn_mask()
        self._learn_causality()
        self._learn_cache()

    # ---- calling ----------------------------------------------------------------------------------------------------

    def _call(
        self,
        x: Tensor,
        causal: bool,
        real: Tensor | None,
        before: int = 0,
        form: tuple[str, Form, bool] | None = None,
        **more: Any,
    ) -> Any:
        """Whatever the module returns. real (b, before + n) covers what the cache holds, too."""
        b, n = x.shape[:2]
        name, make, square = form or (self.mask, self.form, self.square)
        options = dict(more)
        if self.flag is not None:
            options[self.flag] = causal
        there = torch.ones(b, before + n, dtype=torch.bool, device=x.device) if real is None else real
        if name and square:
            visible = (there if self.row_mask is None else torch.ones_like(there))[:, None, :].expand(-1, n, -1)
            if causal:
                visible = visible & torch.ones(before + n, before + n, dtype=torch.bool, device=x.device).tril()[before:]
            options[name] = _cast(make(visible), x)
        elif name and real is not None:
            options[name] = _cast(make(there if self.whole_mask else there[:, before:]), x)
        elif name and self.names[name].default is inspect.Parameter.empty:
            options[name] = _cast(make(there), x)
        if self.row_mask is not None and real is not None:
            options[self.row_mask[0]] = _cast(self.row_mask[1](there), x)
        if self.places is not None:
            options[self.places] = (there.cumsum(1) - 1).clamp(min=0)[:, before:]
        if self.start is not None:
            options[self.start] = before
        return self.module(x, **options)

    def run(self, x: Tensor, *, causal: bool = True, real: Tensor | None = None) -> Tensor:
        """See `Runner.run`."""
        return _first(self._call(x, causal, real))

    def decode(self, x: Tensor, sizes: Sequence[int], *, real: Tensor | None = None) -> Tensor:
        """See `Runner.decode`."""
        assert self.cache is not None
        held = getattr(self.module, self.maker)() if self.maker else None
        options: dict[str, Any] = {self.ask: True} if self.ask else {}
        outs, start = [], 0
        for size in sizes:
            stop = start + size
            covered = None if real is None else real[:, :stop]
            found = self._call(x[:, start:stop].contiguous(), True, covered, start, **{self.cache: held}, **options)
            outs.append(_first(found))
            held, start = self._kept(found, held), stop
        return torch.cat(outs, 1)

    def _kept(self, found: Any, held: Any) -> Any:
        """The cache after a call: what came back, if something did, or the object that was given."""
        if isinstance(found, tuple | list):
            for part in reversed(found[1:]):
                if part is not None and (type(part) is type(held) or (held is None and not isinstance(part, Tensor))):
                    return part
            if held is None and len(found) > 1 and isinstance(found[-1], Tensor):
                return found[-1]
        return held

    # ---- finding out ------------------------------------------------------------------------------------------------

    def _check_callable(self) -> None:
        names = list(self.names)
        known = {*MASKS, *CACHES, *ASKS, *FLAGS, *PLACES, *STARTS}
        empty = inspect.Parameter.empty
        unknown = [
            n
            for n in names[1:]
            if self.names[n].default is empty and self.names[n].kind in (1, 3) and n not in known
        ]  # fmt: skip
        signature = f"{type(self.module).__name__}.forward({', '.join(names)})"
        if not names or unknown:
            what = f"needs {', '.join(unknown)}, and nothing says what that is" if unknown else "takes no tokens"
            raise RegistryError(f"cannot call {signature}: it {what}; {ADVICE}")
        self.given = [n for n in names[1:] if n in MASKS]
        needed: dict[str, Any] = {
            n: None for n in names[1:] if self.names[n].default is empty and n in (*MASKS, *CACHES) and n not in self.given
        }
        x = torch.randn(2, 6, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if any(self.names[n].default is empty for n in self.given):
            return
        try:
            with torch.no_grad():
                out = _first(self._call(x, True, None, **needed))
        except Exception as error:
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise RegistryError(f"cannot call {signature} with x (2, 6, {self.width}) in float64: {told}; {ADVICE}") from error
        if not isinstance(out, Tensor) or out.shape[:2] != x.shape[:2]:
            what = f"a tensor {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise RegistryError(f"{signature} returned {what} for x {tuple(x.shape)}; (b, n, width) is due. {ADVICE}")

    def _learn_mask(self) -> None:
        """Which form of mask hides what it should. If none does, the one that its name stands for: the checks will tell."""
        if not self.given:
            self.cannot["padding"] = f"forward({', '.join(self.names)}) takes no mask"
            return
        x = torch.randn(2, 6, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        real = torch.ones(2, 6, dtype=torch.bool)
        real[0, 1] = False
        ahead = torch.ones(6, 6, dtype=torch.bool).tril()
        full = real[:, None, :].expand(2, 6, 6)

        def run(form: tuple[str, Form, bool]) -> Callable[[int | None], Tensor]:
            def changed(j: int | None) -> Tensor:
                y = x.clone()
                if j is not None:
                    y[:, j] += torch.linspace(1.0, -2.0, self.width, dtype=torch.float64)
                return _first(self._call(y, True, real, form=form))

            return changed

        tried = []
        for name in self.given:
            padding_only = "padding" in name or "pad" in name
            forms: list[tuple[str, Form, bool]] = [(label, form, False) for label, form in ROWS.items()]
            if padding_only:  # PyTorch's own convention first
                forms.sort(key=lambda form: "True at padding" not in form[0])
            else:
                forms += [(label, form, True) for label, form in SQUARES.items()]
            if name in ("mask", "attn_mask", "src_mask"):
                forms.sort(key=lambda form: not form[2])
            for label, form, square in forms:
                found = influence(run((name, form, square)), 6)
                # per row before one for all rows, before padding only: the more a form can say, the better
                score = likeness(found, full & ahead)
                if square and "(n, m)" in label:
                    score = likeness(found, ahead.expand_as(full)) - 0.3
                elif not square:
                    score = max(score, likeness(found, full) - 0.5)
                tried.append((score, name, label, form, square))
        best = max(tried, key=lambda entry: entry[0])
        if best[0] < 0:
            self.cannot["padding"] = f"no form of `{self.given[0]}` that was tried runs: {', '.join([*ROWS, *SQUARES])}"
            return
        _, self.mask, self.form_name, self.form, self.square = best
        if "(n, m)" not in self.form_name:
            return
        others = [entry for entry in tried if entry[1] != self.mask and not entry[4] and entry[0] >= 0]
        if others:
            added = "added" in self.form_name  # two masks of one kind, where either does
            second = max(others, key=lambda entry: (round(entry[0], 3), ("added" in entry[2]) == added))
            self.row_mask = (second[1], second[3])
        else:
            self.cannot["padding"] = f"`{self.mask}` is one mask for all rows of a batch"

    def _learn_causality(self) -> None:
        """Whether it can, and must, hide the future."""
        module = self.module
        if self.flag is not None or (self.square and self.mask is not None):
            return
        declared = next((getattr(module, n) for n in FLAGS if isinstance(getattr(module, n, None), bool)), None)
        told = f"{type(module).__name__} {type(module).__doc__ or ''}".lower()
        word = re.search(r"(?<!non)(?<!non[- ])(?<!not )causal", told) is not None and "bidirectional" not in told
        x = torch.randn(1, 6, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        other = x.clone()
        other[:, 5] += torch.linspace(1.0, -2.0, self.width, dtype=torch.float64)
        with torch.no_grad():
            leaks = not torch.equal(self.run(x)[:, :1], self.run(other)[:, :1])
        if declared is False or (leaks and declared is None and not word and self.cache is None):
            told = (
                f"says {FLAGS[0]} = False" if declared is False else "no argument, attribute, name or cache says that it is causal"
            )
            self.cannot["causal"] = f"reads both sides, and {told}"
        else:
            self.cannot["full"] = "is always causal"

    def _learn_cache(self) -> None:
        if self.cache is None:
            self.cannot["decode"] = f"forward({', '.join(self.names)}) takes no cache"
            return
        if "causal" in self.cannot:
            self.cannot["decode"] = self.cannot["causal"]
            return
        x = torch.randn(2, 6, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        real = torch.ones(2, 6, dtype=torch.bool)
        real[0, :2] = False
        made, told = self.maker, ""
        for self.maker in (made, None) if made else (None,):
            try:
                with torch.no_grad():
                    self.decode(x, [3, 3])
                break
            except Exception as error:
                told = told or f"{type(error).__name__}: {str(error)[:120]}"
        else:
            self.maker = made  # a cache that it makes itself must work, so the check will say what goes wrong
            if not made:
                hint = f"it has none of {', '.join(MAKERS[:3])}, so it began with {self.cache}=None"
                self.cannot["decode"] = f"decoding with `{self.cache}` raised {told} ({hint})"
            return
        if self.mask is None or self.square:
            return
        errors = []
        for whole in (True, False):
            self.whole_mask = whole
            try:
                with torch.no_grad():
                    errors.append(float((self.decode(x, [3, 3], real=real) - self.run(x, real=real))[:, 2:].abs().max()))
            except Exception:
                errors.append(float("inf"))
        self.whole_mask = errors[0] <= errors[1]


def _first(found: Any) -> Tensor:
    """The output: the first tensor of what a module returned."""
    if isinstance(found, tuple | list) and found:
        return found[0]
    if isinstance(found, dict) and found:
        return next(iter(found.values()))
    return found


def _cast(mask: Tensor, x: Tensor) -> Tensor:
    return mask.to(x.dtype) if mask.is_floating_point() else mask


def width_of(module: nn.Module) -> int:
    """Its width, by attribute or from its first linear map."""
    for name in WIDTHS:
        found = getattr(module, name, None)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    linear = next((m for m in module.modules() if isinstance(m, nn.Linear)), None)
    return linear.in_features if linear is not None else WIDTH
