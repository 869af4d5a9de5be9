"""Keeps the tokens that the last queries of a prompt look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...card import Card
from ..rule import Budget, Evict, Seen
from ._votes import check, newest, votes

CARD = Card(
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    year=2024,
    room="cache",
    source=(
        "arXiv:2404.14469, sec. 4, and the authors' code: weights of the last `window` queries on the tokens before them, summed "
        "and pooled along the tokens; the window is always kept and counts in the budget. Window 32, kernel 7 and max pooling "
        "are those of the experiments; the code's own defaults are 64 (or 32), 5 and mean. Mean pooling counts zeros beyond the "
        "ends, as the code's does, which puts the first token at a disadvantage. The code repeats keys for every query head "
        "first and so keeps them h times; here the mean over the query heads of a key/value head is taken after pooling, as in "
        "kvpress. A budget smaller than the window, which the code refuses, keeps the last tokens"
    ),
)


@dataclass(frozen=True, eq=False)
class SnapKv(Evict):
    """After a prompt, keeps its last `window` tokens and those before them that get most weight from their queries.

    budget: see `Evict`; the window is part of it. window: queries that vote. kernel: odd width of the pooling, 1 for none; a
    passage whose beginning gets the votes is kept for half a kernel, so longer answers need a wider one. pooling: "max" or "mean".
    """

    budget: Budget
    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        check(type(self).__name__, self.window, self.kernel, self.pooling)

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        worth = votes(seen, self.window, self.kernel, self.pooling)
        return worth.masked_fill(newest(seen, self.window, self.tokens(seen)), torch.inf)


def example(heads: int) -> SnapKv:
    """Other budgets for other heads."""
    return SnapKv(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8), window=16, kernel=5)


def whole(heads: int) -> SnapKv:
    """Room for everything."""
    return SnapKv(1.0)
