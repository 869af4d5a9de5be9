"""Attention with linear biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Bias, Block, Columns, Places
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
        """The paper's slopes: 2^(-8/h), 2^(-16/h), ..., 2^-8 for a power of two of heads.

        For other numbers, as in the authors' code: those of the power of two below, and every second one of the next.
        """
        power = 1 << (heads.bit_length() - 1)
        slopes = torch.exp2(-8.0 * torch.arange(1, power + 1) / power)
        between = torch.exp2(-4.0 * torch.arange(1, 2 * power + 1, 2) / power)
        return Alibi(torch.cat([slopes, between[: heads - power]]))

    def bias(self, places: Places) -> Tensor:
        return -places.of_head(self.slopes.to(places.dtype)) * places.distance().abs()

    def columns(self, block: Block, causal: bool) -> Columns | None:
        """With later keys hidden, -m (i - j) is m j up to a constant of the row: one column. |i - j| itself has full rank."""
        if not causal:
            return None
        middle = block.key_position.shape[1] // 2  # keeps the products small
        slopes = self.slopes.to(block.query.device, block.query.dtype)
        key = (block.key_position - middle).to(block.query.dtype)[:, None, :, None]
        return Columns(slopes[None, :, None, None].expand(-1, -1, block.query.shape[2], -1), key)

    def distance_slopes(self) -> Tensor:
        return self.slopes


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
