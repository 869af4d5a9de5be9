"""Prefix masks: the first tokens of each row, read by all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mask import FAR, Interval, Mask, Pattern, Ranges
from ..attention.stage import Places
from ..card import Card

CARD = Card(
    paper="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    year=2019,
    room="softmax",
    source="arXiv:1910.10683, sec. 3.1.1: a prefix language model is `Causal() | Prefix(length)`",
)


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Shows the first `length` tokens: `Causal() | Prefix(length)` reads its prefix both ways. length: one, or (b,)."""

    length: int | Tensor

    def _length(self, device: torch.device) -> Tensor:
        return torch.as_tensor(self.length, device=device).reshape(-1)

    def visible(self, places: Places) -> Tensor:
        length = self._length(places.j.device)
        return places.j < (length[0] if len(length) == 1 else length[places.batch])

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        length = self._length(ranges.j_low.device)[:, None, None, None]
        return ranges.j_low < length, ranges.j_high < length

    def reach(self, low: int, high: int) -> list[Interval]:
        longest = self.length if isinstance(self.length, int) else int(self.length.max())
        return [(0, min(longest, FAR))]

    def pattern(self) -> Pattern | None:
        return Pattern(window=0, sink=self.length) if isinstance(self.length, int) else None


def oracle(stage: Prefix, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return j in range(stage.length if isinstance(stage.length, int) else int(stage.length.reshape(-1)[0]))


def examples(heads: int, size: int) -> list[Prefix]:
    """Settings that the conformance checks run."""
    return [Prefix(3), Prefix(torch.tensor([4]))]


def neutral(heads: int, size: int) -> list[Prefix]:
    """Settings that change nothing."""
    return [Prefix(100)]
