"""Keeps only the first tokens of the first prompt, and everything that comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...card import Card
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="KVComm: Enabling Efficient LLM Communication through Selective KV Sharing",
    year=2025,
    room="cache",
    source=(
        "arXiv:2510.03346 and the authors' code: what layers hold that are not sent a context; the code still gives them its first "
        "token, the sink, and queries keep their places behind the context. The code's mask loses causality within the question in "
        "such layers; here each layer has its own"
    ),
)


@dataclass(frozen=True, eq=False)
class Withheld(Evict):
    """After the first call keeps `budget` tokens, the first ones; later tokens are all kept.

    budget: see `Evict`; 1 is the sink alone.
    """

    budget: Budget = 1
    carries: ClassVar[tuple[str, ...]] = ("kept",)

    def carry(self, seen: Seen) -> dict[str, Tensor]:
        """1 for tokens that stay: the first ones, and all of later calls."""
        if seen.q.shape[2] == seen.total:
            return {"kept": (seen.position < self.tokens(seen)[..., None]).float()}
        return {"kept": torch.ones_like(seen.carried["kept"])}

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m): inf for tokens that stay."""
        return torch.where(seen.carried["kept"] > 0, torch.inf, 0.0)

    def counts(self, seen: Seen, scores: Tensor) -> Tensor:
        """(b, kv)."""
        return (scores.isinf() & seen.there).sum(-1)


def example(heads: int) -> Withheld:
    """A few tokens of the prompt, not as many in every head."""
    return Withheld(torch.tensor([1, 5]).repeat_interleave(4).repeat(heads // 8))


def whole(heads: int) -> Withheld:
    """The whole prompt."""
    return Withheld(1.0)
