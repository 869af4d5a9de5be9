"""Keeps the last tokens and those that got most weight so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...card import Card
from ...errors import PlanError
from ..rule import Budget, Evict, Parts, Seen

CARD = Card(
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    year=2023,
    room="cache",
    source=(
        "arXiv:2306.14048, algorithm 1, and the authors' code that drops: the sum of the weights that a token got from all "
        "queries so far, those of the prompt included; half of the budget for the largest sums, half for the last tokens. A sum "
        "favours old tokens; kvpress divides by the number of queries, once, after the prompt, which is another ranking. A share "
        "is one of the tokens so far and grows with them; the code takes it of the prompt and fixes it. Sums are float32. The "
        "paper has no shared keys: the mean over the query heads of a key/value head is our own. Keys keep their true positions, "
        "as in the code without streaming"
    ),
)


@dataclass(frozen=True, eq=False)
class H2o(Evict):
    """After a prompt and after each new token, keeps the last tokens and those with the largest sum of weights from all queries.

    budget: see `Evict`; heavy hitters and last tokens together. recent: how many of them are the last ones, in tokens (an
    integer) or as a share of the budget (a float). What is evicted never returns.
    """

    every: ClassVar[bool] = True
    carries: ClassVar[tuple[str, ...]] = ("mass",)
    budget: Budget
    recent: float = 0.5

    def __post_init__(self) -> None:
        if self.recent < 0 or (isinstance(self.recent, float) and self.recent > 1):
            raise PlanError(
                f"H2o has {self.recent} as recent; give tokens (an integer) or a share of the budget (a float up to 1.0)"
            )

    def carry(self, seen: Seen) -> Parts:
        """mass: the weight that each token got from all queries so far, mean over the query heads of its key/value head."""
        new = seen.weights()[:, :, 0] if seen.q.shape[2] == 1 else seen.received()
        return {"mass": seen.carried["mass"] + seen.by_group(new).mean(2).float()}

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        tokens = self.tokens(seen)
        share = isinstance(self.recent, float)
        recent = (self.recent * tokens.double()).floor() if share else tokens.clamp(max=int(self.recent))
        return seen.carried["mass"].masked_fill(seen.age < recent[..., None], torch.inf)


def example(heads: int) -> H2o:
    """Other budgets for other heads."""
    return H2o(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8))


def whole(heads: int) -> H2o:
    """Room for everything."""
    return H2o(1.0)
