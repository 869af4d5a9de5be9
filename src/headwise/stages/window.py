"""Windowed (local) attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mask import Interval, Mask, Pattern, Ranges
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Longformer: The Long-Document Transformer",
    year=2020,
    room="sparse",
    source="arXiv:2004.05150, sec. 3.1; size counts the query's own place, as transformers' sliding_window does",
)


@dataclass(frozen=True)
class Window(Mask):
    """Shows the `size` nearest places on each side, one's own included: |i - j| < size. With Causal: the last `size` keys."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ShapeError(f"a window of {self.size} tokens reads nothing; size must be at least 1")

    def visible(self, places: Places) -> Tensor:
        return places.distance().abs() < self.size

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        after, before = ranges.i_low - ranges.j_high, ranges.j_low - ranges.i_high  # the least distance, to either side
        farthest = torch.maximum(ranges.i_high - ranges.j_low, ranges.j_high - ranges.i_low)
        return torch.maximum(after, before) < self.size, farthest < self.size

    def reach(self, low: int, high: int) -> list[Interval]:
        return [(max(0, low - self.size + 1), high + self.size - 1)]

    def pattern(self) -> Pattern:
        return Pattern(window=self.size)


def oracle(stage: Window, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return j - stage.size < i < j + stage.size


def examples(heads: int, size: int) -> list[Window]:
    """Settings that the conformance checks run."""
    return [Window(1), Window(3)]


def neutral(heads: int, size: int) -> list[Window]:
    """Settings that change nothing."""
    return [Window(100)]
