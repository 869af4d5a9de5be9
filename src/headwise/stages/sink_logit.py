"""A learned logit in the softmax denominator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Normalizer
from ..card import Card

CARD = Card(
    paper="gpt-oss-120b & gpt-oss-20b Model Card",
    year=2025,
    room="softmax",
    source="arXiv:2508.10925, sec. 2.2; with logit 0 it is softmax-off-by-one",
)


@dataclass(frozen=True, eq=False)
class SinkLogit(Normalizer):
    """Softmax with one more logit a head that leads nowhere: p_j = exp(s_j) / (exp(logit) + sum exp(s)). logit: (heads,)."""

    logit: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("logit",)

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        own = self.logit.to(scores).view(1, -1, 1)
        log_normalizer = torch.logaddexp(torch.logsumexp(scores, dim=-1), own)
        return torch.exp(scores - log_normalizer[..., None]), log_normalizer

    def extra_logit(self) -> Tensor:
        return self.logit


def oracle(stage: SinkLogit, scores: list[float], head: int) -> list[float]:
    """The weights of one row of scores, -inf where masked."""
    own = math.exp(float(stage.logit[head if len(stage.logit) > 1 else 0]))
    total = own + sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def examples(heads: int, size: int) -> list[SinkLogit]:
    """Settings that the conformance checks run."""
    return [SinkLogit(torch.linspace(-1.0, 1.0, heads)), SinkLogit(torch.zeros(1))]


def neutral(heads: int, size: int) -> list[SinkLogit]:
    """Settings that change nothing."""
    return [SinkLogit(torch.tensor([-1e4]))]
