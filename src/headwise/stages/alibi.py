"""Attention with linear biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Bias, Block
from ..card import Card

CARD = Card(
    paper="Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
    year=2021,
    room="softmax",
    source="arXiv:2108.12409, sec. 3; without a causal mask the penalty grows with the distance on both sides",
)


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """Takes slope * distance from every score, with one slope a head: s_ij - slope_h |i - j|. slopes: (heads,)."""

    slopes: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("slopes",)

    @staticmethod
    def geometric(heads: int) -> Alibi:
        """The paper's slopes for a power of two of heads: 2^(-8/h), 2^(-16/h), ..., 2^-8."""
        return Alibi(torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads))

    def bias(self, block: Block) -> Tensor:
        return -self.slopes.to(block.query.device, block.dtype)[:, None, None] * block.distance().abs()


def oracle(stage: Alibi, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    slope = float(stage.slopes[head if len(stage.slopes) > 1 else 0])
    return score - slope * (i - j if i > j else j - i)


def examples(heads: int, size: int) -> list[Alibi]:
    """Settings that the conformance checks run."""
    return [Alibi.geometric(heads), Alibi(torch.tensor([0.3]))]


def neutral(heads: int, size: int) -> list[Alibi]:
    """Settings that change nothing."""
    return [Alibi(torch.zeros(heads))]
