"""Rectified scores as weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Normalizer
from ..card import Card

CARD = Card(
    paper="Sparse Attention with Linear Units",
    year=2021,
    room="softmax",
    source="arXiv:2104.07012, sec. 3: ReLU in the place of softmax, nothing divides; the output has to be normalised after it",
)


@dataclass(frozen=True)
class Relu(Normalizer):
    """Takes max(score, 0) as the weight; rows do not sum to one, and may be empty. The log-normalizer is 0."""

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.relu(), torch.zeros_like(scores[..., 0])


def oracle(stage: Relu, scores: list[float], head: int) -> list[float]:
    """The weights of one row of scores, -inf where masked."""
    return [s if s > 0 else 0.0 for s in scores]


def examples(heads: int, size: int) -> list[Relu]:
    """Settings that the conformance checks run."""
    return [Relu()]
