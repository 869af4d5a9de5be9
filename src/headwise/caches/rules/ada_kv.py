"""Keeps what the last queries of a prompt look at, more of it in the heads of a layer where it matters more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...card import Card
from ...errors import PlanError
from ..rule import Seen
from ._votes import newest, ranked, votes
from .snap_kv import SnapKv

CARD = Card(
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    year=2024,
    room="cache",
    source=(
        "arXiv:2407.11550, algorithm 1, and the authors' code: SnapKV's votes of all heads of a layer, the best of them all at "
        "once; a head's budget is (1 - alpha) times how many of those are its own plus alpha times the mean, behind the window. "
        "`floor` is the other reading, of kvpress: each head is sure of alpha times the mean, the rest goes by votes. Alpha 0.2, "
        "window 32, kernel 7, max pooling, and the mean over query heads before pooling, as in the code. The code rounds each "
        "head by itself and may miss the total; here the largest remainders are rounded up, so that it is exact. kvpress counts "
        "the window in what it assures, here it is kept beside it"
    ),
)


@dataclass(frozen=True, eq=False)
class AdaKv(SnapKv):
    """After a prompt, keeps its window and what it looks at; heads of a layer share a budget by what gets most weight.

    budget: mean over the heads of a layer that have this rule, see `Evict`. window, kernel, pooling: as of `SnapKv`.
    alpha: how evenly: 1 gives each head its own budget, 0 goes by votes alone. floor: alpha is the share of its own budget that a
    head is sure of, not the weight of an even split. normalize: votes count times the part of a head's votes that its own
    budget would keep.
    """

    alpha: float = 0.2
    floor: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PlanError(f"AdaKv has an alpha of {self.alpha}; give 0 (by votes alone) to 1 (every head its own budget)")

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        worth = votes(seen, self.window, self.kernel, self.pooling, together=True)
        return worth.masked_fill(newest(seen, self.window, self.tokens(seen)), torch.inf)

    def counts(self, seen: Seen, scores: Tensor) -> Tensor:
        """(b, kv)."""
        tokens = self.tokens(seen)
        window = tokens.clamp(max=self.window)
        behind = seen.there & (seen.age >= self.window)
        return window + self.shared(scores, behind, torch.minimum(tokens - window, behind.sum(-1)))

    def shared(self, scores: Tensor, among: Tensor, budgets: Tensor) -> Tensor:
        """(b, kv): budgets of the same sum as `budgets` (b, kv), by the scores (b, kv, m) of the tokens `among` which to choose."""
        best = ranked(scores, among)
        rank = torch.arange(best.shape[-1], device=best.device)
        if self.normalize:
            mass = best.masked_fill(best.isinf(), 0.0)
            part = (mass * (rank < budgets[..., None])).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
            best = torch.where(best.isinf(), best, best * part[..., None])
        if self.floor:
            best = best.masked_fill(rank < (self.alpha * budgets.double()).floor()[..., None], torch.inf)
        total = budgets.sum(1, keepdim=True)
        head = best.flatten(1).sort(stable=True, descending=True).indices // best.shape[-1]
        chosen = torch.arange(head.shape[1], device=head.device) < total
        own = torch.zeros_like(budgets).scatter_add_(1, head, chosen.long())
        if self.floor:
            return own
        wanted = (1 - self.alpha) * own.double() + self.alpha * budgets.double()
        down = wanted.floor().long()
        order = (wanted - down).sort(stable=True, descending=True, dim=1).indices
        up = torch.arange(down.shape[1], device=down.device) < total - down.sum(1, keepdim=True)
        return down.scatter_add(1, order, up.long())


def example(heads: int) -> AdaKv:
    """A few of the tokens."""
    return AdaKv(64, window=16, kernel=5)


def whole(heads: int) -> AdaKv:
    """Room for everything."""
    return AdaKv(1.0)
