"""Blocks: each reads itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.mask import Interval, Mask, Ranges
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Generating Long Sequences with Sparse Transformers",
    year=2019,
    room="sparse",
    source="arXiv:1904.10509, sec. 4.3: the fixed pattern's first head, floor(i / l) = floor(j / l)",
)


@dataclass(frozen=True)
class Blocks(Mask):
    """Shows the keys of the query's own block of `size` positions."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ShapeError(f"blocks of {self.size} tokens hold nothing; size must be at least 1")

    def visible(self, places: Places) -> Tensor:
        return self._of(places.i) == self._of(places.j)

    def _of(self, position: Tensor) -> Tensor:
        return position.div(self.size, rounding_mode="floor")

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        i_low, i_high, j_low, j_high = (self._of(p) for p in (ranges.i_low, ranges.i_high, ranges.j_low, ranges.j_high))
        return (i_low <= j_high) & (j_low <= i_high), (i_low == i_high) & (j_low == j_high) & (i_low == j_low)

    def reach(self, low: int, high: int) -> list[Interval]:
        return [(max(0, low // self.size * self.size), -(-high // self.size) * self.size)]


def oracle(stage: Blocks, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    start = i - i % stage.size
    return start <= j < start + stage.size


def examples(heads: int, size: int) -> list[Blocks]:
    """Settings that the conformance checks run."""
    return [Blocks(2), Blocks(4)]


def neutral(heads: int, size: int) -> list[Blocks]:
    """Settings that change nothing."""
    return [Blocks(100)]
