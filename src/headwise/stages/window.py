"""Windowed (local) attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.stage import Block, Interval, Mask, Pattern
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

    def visible(self, block: Block) -> Tensor:
        return block.distance().abs() < self.size

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
