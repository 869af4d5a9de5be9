"""Uniform attention: a head that no longer chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Places, Score
from ..card import Card

CARD = Card(
    paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
    year=2024,
    room="probe",
    source="arXiv:2404.15574, sec. 4; the authors' code sets q = 0, so that a masked head averages over what it may read",
)


@dataclass(frozen=True)
class Uniform(Score):
    """Sets every score to zero, so that all visible keys weigh the same: an ablation milder than a closed gate."""

    def score(self, scores: Tensor, places: Places) -> Tensor:
        return torch.zeros_like(scores)

    def factor(self) -> Tensor:
        return torch.zeros(1)


def oracle(stage: Uniform, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    return 0.0


def examples(heads: int, size: int) -> list[Uniform]:
    """Settings that the conformance checks run."""
    return [Uniform()]
