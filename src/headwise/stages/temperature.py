"""Sharper or flatter heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Places, Score
from ..card import Card

CARD = Card(
    paper="Attention Is All You Need",
    year=2017,
    room="softmax",
    source="arXiv:1706.03762, sec. 3.2.1, whose 1 / sqrt(d) is one choice of temperature",
)


@dataclass(frozen=True, eq=False)
class Temperature(Score):
    """Divides scores by a temperature for each head: above 1 flattens, below 1 sharpens. value: (heads,)."""

    value: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("value",)

    def score(self, scores: Tensor, places: Places) -> Tensor:
        return scores / places.of_head(self.value.to(places.dtype))

    def factor(self) -> Tensor:
        return 1 / self.value.double()


def oracle(stage: Temperature, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    return score / float(stage.value[head if len(stage.value) > 1 else 0])


def examples(heads: int, size: int) -> list[Temperature]:
    """Settings that the conformance checks run."""
    return [Temperature(torch.linspace(0.5, 2.0, heads)), Temperature(torch.tensor([3.0]))]


def neutral(heads: int, size: int) -> list[Temperature]:
    """Settings that change nothing."""
    return [Temperature(torch.ones(heads))]
