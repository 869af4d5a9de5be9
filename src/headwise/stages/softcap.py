"""Soft capping of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Places, Score
from ..card import Card

CARD = Card(
    paper="Gemma 2: Improving Open Language Models at a Practical Size",
    year=2024,
    room="softmax",
    source="arXiv:2408.00118, sec. 2",
)


@dataclass(frozen=True)
class Softcap(Score):
    """Keeps scores within (-cap, cap): cap * tanh(score / cap)."""

    cap: float

    def score(self, scores: Tensor, places: Places) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def softcap(self) -> float:
        return self.cap


def oracle(stage: Softcap, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    return stage.cap * math.tanh(score / stage.cap)


def examples(heads: int, size: int) -> list[Softcap]:
    """Settings that the conformance checks run."""
    return [Softcap(1.5)]
