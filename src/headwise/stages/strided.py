"""Strided attention: every so many tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.mask import Mask, Ranges
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Generating Long Sequences with Sparse Transformers",
    year=2019,
    room="sparse",
    source=(
        "arXiv:1904.10509, sec. 4.3: the strided pattern's second head, (i - j) mod l = 0; its first head is a window of l, and "
        "their union `Window(l) | Strided(l)` is the pattern read at once"
    ),
)


@dataclass(frozen=True)
class Strided(Mask):
    """Shows places at multiples of `stride` from the query, one's own included: (i - j) mod stride = 0."""

    stride: int

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ShapeError(f"a stride of {self.stride} tokens steps nowhere; it must be at least 1")

    def visible(self, places: Places) -> Tensor:
        return places.distance() % self.stride == 0

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        nearest, farthest = ranges.i_low - ranges.j_high, ranges.i_high - ranges.j_low
        multiple = farthest.div(self.stride, rounding_mode="floor") * self.stride
        return multiple >= nearest, (nearest == farthest) & (multiple == nearest) | (self.stride == 1)


def oracle(stage: Strided, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return abs(i - j) in range(0, 10_000, stage.stride)


def examples(heads: int, size: int) -> list[Strided]:
    """Settings that the conformance checks run."""
    return [Strided(2), Strided(5)]


def neutral(heads: int, size: int) -> list[Strided]:
    """Settings that change nothing."""
    return [Strided(1)]
