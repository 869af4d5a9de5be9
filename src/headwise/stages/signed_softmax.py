"""Softmax of magnitudes, with the scores' signs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Normalizer, softmax
from ..card import Card

CARD = Card(
    paper="More Expressive Attention with Negative Weights",
    year=2024,
    room="softmax",
    source="arXiv:2411.07176: sign(s) softmax(|s|). A score of zero gets no weight, though it counts in the denominator",
)


@dataclass(frozen=True)
class SignedSoftmax(Normalizer):
    """Weighs a key by sign(s_j) exp(|s_j|) / sum exp(|s|): weights may be negative, and their magnitudes sum to one.

    It jumps where a score changes its sign, by twice the weight of a zero score: low precision can show there.
    """

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = torch.where(scores == -torch.inf, scores, scores.abs())
        weights, log_normalizer = softmax(magnitude)
        return weights * scores.sign(), log_normalizer


def oracle(stage: SignedSoftmax, scores: list[float], head: int) -> list[float]:
    """The weights of one row of scores, -inf where masked."""
    sizes = [0.0 if s == -math.inf else math.exp(abs(s)) for s in scores]
    return [(size if s > 0 else -size if s < 0 else 0.0) / sum(sizes) for s, size in zip(scores, sizes, strict=True)]


def examples(heads: int, size: int) -> list[SignedSoftmax]:
    """Settings that the conformance checks run."""
    return [SignedSoftmax()]
