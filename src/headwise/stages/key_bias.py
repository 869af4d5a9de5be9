"""Scaling the weight of chosen keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Bias, Block, Columns, Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
    year=2023,
    room="steer",
    source=(
        "arXiv:2311.02262, eq. 2-3: multiply the weights of chosen tokens and renormalise, which is exactly an addition of "
        "log(factor) to their scores. The paper scales the other tokens down by alpha; that is factor = 1 / alpha here"
    ),
)


@dataclass(frozen=True)
class KeyBias(Bias):
    """Multiplies the weights of keys at positions start..stop-1 by `factor` and renormalises: scores + log(factor)."""

    start: int
    stop: int
    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ShapeError(f"factor {self.factor} has no logarithm; use a mask to hide keys altogether")

    def bias(self, places: Places) -> Tensor:
        inside = (places.j >= self.start) & (places.j < self.stop)
        return inside.to(places.dtype) * math.log(self.factor)

    def columns(self, block: Block, causal: bool) -> Columns:
        """A bias of the key alone: one column."""
        value = self.bias(block.places).transpose(-1, -2).to(block.query.dtype)
        return Columns(torch.ones_like(value[:, :, :1]).expand(-1, -1, block.query.shape[2], -1), value)


def oracle(stage: KeyBias, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    return score + (math.log(stage.factor) if stage.start <= j < stage.stop else 0.0)


def examples(heads: int, size: int) -> list[KeyBias]:
    """Settings that the conformance checks run."""
    return [KeyBias(2, 5, 3.0), KeyBias(0, 1, 0.1)]


def neutral(heads: int, size: int) -> list[KeyBias]:
    """Settings that change nothing."""
    return [KeyBias(2, 5, 1.0)]
