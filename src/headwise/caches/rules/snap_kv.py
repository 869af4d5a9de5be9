"""Keeps the tokens that the last queries of a prompt look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...card import Card
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    year=2024,
    room="cache",
    source=(
        "arXiv:2404.14469 and the authors' code: weights of the last `window` queries on earlier tokens, summed, pooled along the "
        "tokens; the window itself is always kept and counts in the budget. The code repeats keys for every query head first; here "
        "the mean over the query heads of a key/value head is taken after pooling"
    ),
)


@dataclass(frozen=True, eq=False)
class SnapKv(Evict):
    """After a prompt, keeps the window and the tokens that get most weight from it.

    budget: see `Evict`. window: queries that vote. kernel: odd width of the pooling, 1 for none. pooling: "max" or "mean".
    """

    budget: Budget
    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        votes = seen.weights(self.window).sum(2)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(votes, self.kernel, 1, self.kernel // 2)
        return seen.by_group(pooled).mean(2).masked_fill(seen.age < self.window, torch.inf)


def example(heads: int) -> SnapKv:
    """Other budgets for other heads."""
    return SnapKv(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8), window=16, kernel=5)


def whole(heads: int) -> SnapKv:
    """Room for everything."""
    return SnapKv(1.0)
