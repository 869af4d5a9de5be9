"""Attention sinks: the first tokens, always visible."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.mask import Interval, Mask, Pattern, Ranges
from ..attention.stage import Places
from ..card import Card

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="cache",
    source="arXiv:2309.17453, sec. 3; keys keep their true positions (the paper renumbers positions inside the cache)",
)


@dataclass(frozen=True)
class Sink(Mask):
    """Shows the first `size` tokens. Joined with a window, `Window(w) | Sink(s)`, it is a streaming head's view."""

    size: int

    def visible(self, places: Places) -> Tensor:
        return places.j < self.size

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        return ranges.j_low < self.size, ranges.j_high < self.size

    def reach(self, low: int, high: int) -> list[Interval]:
        return [(0, self.size)]

    def pattern(self) -> Pattern:
        return Pattern(window=0, sink=self.size)


def oracle(stage: Sink, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return j in range(stage.size)


def examples(heads: int, size: int) -> list[Sink]:
    """Settings that the conformance checks run."""
    return [Sink(2), Sink(0)]


def neutral(heads: int, size: int) -> list[Sink]:
    """Settings that change nothing."""
    return [Sink(100)]
