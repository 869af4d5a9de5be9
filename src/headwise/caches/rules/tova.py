"""Keeps, in all heads of a layer, the tokens that the newest query looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...card import Card
from ...errors import PlanError
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="Transformers are Multi-State RNNs",
    year=2024,
    room="cache",
    source=(
        "arXiv:2401.06104, sec. 3.2 (TOVA), and the authors' code: weights of the newest query, mean over all query heads of the "
        "layer; all heads keep the same tokens. As there, no place is sure to be kept: the newest token itself may go; `newest` "
        "keeps it, as kvpress does. Keys keep their true positions"
    ),
)


@dataclass(frozen=True, eq=False)
class Tova(Evict):
    """After a prompt and after each new token, keeps those with most weight from the newest query, the same ones in all heads.

    All heads of a layer that have this rule vote together, so give it whole layers. budget: see `Evict`; the same for all heads of
    a layer. newest: whether the newest token is kept in any case.
    """

    every: ClassVar[bool] = True
    budget: Budget
    newest: bool = False

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m), the same in all heads.

        Raises: PlanError if heads of one layer have different budgets.
        """
        budgets = torch.as_tensor(self.budget).unique()
        if len(budgets) > 1:
            raise PlanError(
                f"heads of layer {seen.layer} have budgets from {budgets[0].item():g} to {budgets[-1].item():g} under Tova, which "
                "keeps the same tokens in all heads; give them the same budget"
            )
        worth = seen.weights(1)[:, :, 0].mean(1, keepdim=True)
        if self.newest:
            worth = worth.masked_fill(seen.age[:, :1] == 0, torch.inf)
        return worth.expand(seen.number.shape)


def example(heads: int) -> Tova:
    """A few of the tokens."""
    return Tova(56)


def whole(heads: int) -> Tova:
    """Room for everything."""
    return Tova(1.0)
