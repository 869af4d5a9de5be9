"""Dilated windows: near places with gaps between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..attention.mask import Interval, Mask, Ranges
from ..attention.stage import Places
from ..card import Card
from .strided import Strided
from .window import Window

CARD = Card(
    paper="Longformer: The Long-Document Transformer",
    year=2020,
    room="sparse",
    source="arXiv:2004.05150, sec. 3.1: a window with gaps of size d; size counts the places read on each side, one's own included",
)


@dataclass(frozen=True)
class Dilated(Mask):
    """Shows `size` places on each side, one's own included, `gap` apart: |i - j| < size * gap and (i - j) mod gap = 0."""

    size: int
    gap: int

    @cached_property
    def _both(self) -> Mask:
        return Window(self.size * self.gap) & Strided(self.gap)

    def visible(self, places: Places) -> Tensor:
        return self._both.visible(places)

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        return self._both.bounds(ranges)

    def reach(self, low: int, high: int) -> list[Interval]:
        return self._both.reach(low, high)


def oracle(stage: Dilated, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return j in [i + step * stage.gap for step in range(-stage.size + 1, stage.size)]


def examples(heads: int, size: int) -> list[Dilated]:
    """Settings that the conformance checks run."""
    return [Dilated(2, 3), Dilated(3, 2)]


def neutral(heads: int, size: int) -> list[Dilated]:
    """Settings that change nothing."""
    return [Dilated(100, 1)]
