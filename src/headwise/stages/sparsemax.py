"""Sparsemax: the weights nearest to the scores, most of them exactly zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.stage import Normalizer
from ..card import Card
from .entmax import entmax

CARD = Card(
    paper="From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
    year=2016,
    room="softmax",
    source="arXiv:1602.02068, sec. 2; only as many scores are sorted as the support needs",
)


@dataclass(frozen=True)
class Sparsemax(Normalizer):
    """The point of the simplex nearest to the scores: p_j = [s_j - tau]_+, with the threshold tau that makes them sum to 1.

    In place of the log-normalizer stands tau (b, h, c): weights are positive where s > tau; -inf for a row that sees no key.
    """

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return entmax(scores, 2.0)

    def entmax_alpha(self) -> float:
        return 2.0


def oracle(stage: Sparsemax, scores: list[float], head: int) -> list[float]:
    """The weights of one row of scores, -inf where masked: of all supports that could be, the longest that is one."""
    falling = sorted((s for s in scores if s > float("-inf")), reverse=True)
    taus = [(sum(falling[:k]) - 1.0) / k for k in range(1, len(falling) + 1)]
    fitting = [tau for tau, least in zip(taus, falling, strict=True) if least > tau]
    return [max(s - fitting[-1], 0.0) if fitting else 0.0 for s in scores]


def examples(heads: int, size: int) -> list[Sparsemax]:
    """Settings that the conformance checks run."""
    return [Sparsemax()]
