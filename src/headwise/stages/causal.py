"""Causal masking."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.mask import Interval, Mask, Pattern, Ranges
from ..attention.stage import Places
from ..card import Card

CARD = Card(
    paper="Attention Is All You Need",
    year=2017,
    room="softmax",
    source="arXiv:1706.03762, sec. 3.2.3",
)


@dataclass(frozen=True)
class Causal(Mask):
    """Hides later keys: a query at position i reads keys at positions j <= i."""

    is_causal = True

    def visible(self, places: Places) -> Tensor:
        return places.i >= places.j

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        return ranges.i_high >= ranges.j_low, ranges.i_low >= ranges.j_high

    def reach(self, low: int, high: int) -> list[Interval]:
        return [(0, high)]

    def pattern(self) -> Pattern:
        return Pattern(causal=True)


def oracle(stage: Causal, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return j <= i


def examples(heads: int, size: int) -> list[Causal]:
    """Settings that the conformance checks run."""
    return [Causal()]
