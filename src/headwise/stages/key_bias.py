"""Scaling the weight of chosen keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Bias, Block
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

    def bias(self, block: Block) -> Tensor:
        position = block.key_position
        inside = (position >= self.start) & (position < self.stop)
        return (inside * torch.tensor(math.log(self.factor), dtype=block.dtype))[:, None, None, :]


def oracle(stage: KeyBias, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    return score + (math.log(stage.factor) if stage.start <= j < stage.stop else 0.0)


def examples(heads: int, size: int) -> list[KeyBias]:
    """Settings that the conformance checks run."""
    return [KeyBias(2, 5, 3.0), KeyBias(0, 1, 0.1)]


def neutral(heads: int, size: int) -> list[KeyBias]:
    """Settings that change nothing."""
    return [KeyBias(2, 5, 1.0)]
