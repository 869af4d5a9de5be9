"""Heads that read what another layer holds, all of it or the keys of distant tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import PlanError
from .arena import Sequences
from .groups import Group, Keep, Ring, View
from .rule import Codec, Parts, Rule


@dataclass(frozen=True, eq=False)
class Sharing(Rule):
    """Reads something of the same key/value heads of layer `layer`, which comes earlier and whose heads are as large."""

    alone: ClassVar[bool] = True
    layer: int

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise PlanError(f"there is no layer {self.layer} to share with; layers are counted from 0")


class _Values(Codec):
    def encode(self, k: Tensor, v: Tensor) -> Parts:
        return {"v": v}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return parts["v"], parts["v"]


class _Keys(Codec):
    def encode(self, k: Tensor, v: Tensor) -> Parts:
        return {"k": k}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return parts["k"], parts["k"]


VALUES, NEAR_KEYS = _Values(), _Keys()


def of_heads(views: Sequence[View], heads: Sequence[int]) -> list[View]:
    """The views of some key/value heads, of those of a whole layer."""
    found = []
    for view in views:
        places = [place for place, head in enumerate(view.heads) if head in heads]
        if len(places) == len(view.heads):
            found.append(view)
        elif places:
            number = view.number if view.number.dim() < 3 else view.number[:, places]
            own = tuple(view.heads[place] for place in places)
            found.append(replace(view, heads=own, k=view.k[:, places], v=view.v[:, places], number=number))
    return found


class Split(Group):
    """Keeps the values of all tokens, and keys only of the first and the last; `source` is to be given before each call."""

    croppable = False

    def __init__(self, heads: tuple[int, ...], segments: Sequence[Sequences], places: Sequence[int], rule: Any) -> None:
        self._inner: tuple[Group, Group] = (
            Group(heads, segments[0], places, VALUES),
            Ring(heads, segments[1], places, NEAR_KEYS, Keep(rule.sink, rule.recent)),
        )
        super().__init__(heads, segments[0], places, VALUES)
        self.rule = rule
        self.source: Mapping[int, Sequence[View]] = {}

    @property
    def segments(self) -> list[tuple[Sequences, Codec]]:
        return [pair for group in self._inner for pair in group.segments]

    def extend(self, k: Tensor, v: Tensor, seen: int, read: bool = True) -> View:
        for group in self._inner:
            group.pads, group.layout = self.pads, self.layout
        values, keys = (group.extend(k, v, seen) for group in self._inner)
        assert values is not None
        assert keys is not None
        undo = [group.undo for group in self._inner]
        self.undo = lambda: [each() for each in undo if each]  # type: ignore[assignment, return-value]
        far = self._far(values)
        first = seen == 0 and k.shape[2] > 1  # all tokens are there, with their keys
        own = keys.k if first else self._placed(keys, far)
        both = k.shape[2] > 1 or self.rule.skip is not None
        return replace(values, k=own, far=far if both else None, near=self.rule if both else None)

    def _far(self, values: View) -> Tensor:
        """(b, heads, slots, d): keys of the other layer, one for each value."""
        found = of_heads(self.source.get(self.rule.layer, ()), self.heads)
        held = {head: view.k[:, place] for view in found for place, head in enumerate(view.heads)}
        fits = all(view.number.shape == values.number.shape and torch.equal(view.number, values.number) for view in found)
        if not fits or len(held) != len(self.heads):
            raise PlanError(f"layer {self.rule.layer} does not hold the keys of all tokens, which SharedKeys reads")
        return torch.stack([held[head] for head in self.heads], 1)

    def _placed(self, keys: View, far: Tensor) -> Tensor:
        """The far keys, with own ones in the places of tokens that have them."""
        b, heads, slots, d = far.shape
        pads = torch.from_numpy(self.pads).to(far.device)[:, None]
        places = torch.where(keys.number >= 0, keys.number - pads, slots).expand(b, -1)  # -1: behind the end
        room = torch.cat([far, far[:, :, :1]], 2)
        room.scatter_(2, places[:, None, :, None].expand(b, heads, -1, d), keys.k)
        return room[:, :, :slots]
