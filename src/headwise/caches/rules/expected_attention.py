"""Keeps the tokens that queries to come are expected to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...card import Card
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    year=2025,
    room="cache",
    source=(
        "arXiv:2510.00636 and the authors' code (in kvpress): queries of the prompt behind the sinks, before their rotation, as a "
        "normal distribution; its mean and covariance under the mean rotation of the next positions; log of the expected "
        "exponential score of each key, softmax over keys behind the sinks, mean over the query heads of a key/value head, times "
        "(share + epsilon) the values' norm. The code adds the epsilon as here; its default there is 0, which is taken. Queries "
        "are turned back from what the attention read, so that query norms are included; the code makes them anew from hidden "
        "states. Soft caps and sink logits of a model are left out, as there"
    ),
)
CHUNK = 32  # positions turned at once


@dataclass(frozen=True, eq=False)
class ExpectedAttention(Evict):
    """After a prompt, keeps the first tokens and those with most expected weight, times the length of their values.

    budget: see `Evict`. sinks: first tokens, always kept. future: positions to come. covariance: whether queries spread around
    their mean. values: whether the length of values counts. epsilon: what is added to weights before that.
    """

    turns: ClassVar[bool] = True
    budget: Budget
    sinks: int = 4
    future: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        k = seen.k.to(wide)
        behind = seen.position >= self.sinks
        mean, spread = self.queries(seen)
        logits = torch.einsum("bgrd,bgmd->bgrm", seen.by_group(mean), k) * seen.scale
        if self.covariance:
            quadratic = torch.einsum("bgmd,bgrde,bgme->bgrm", k, seen.by_group(spread), k)
            logits = logits + quadratic * (0.5 * seen.scale**2)
        weights = logits.masked_fill(~behind[:, :, None], -torch.inf).softmax(-1).mean(2)
        if self.values:
            weights = (weights + self.epsilon) * seen.v.to(wide).norm(dim=-1)
        return weights.masked_fill(~behind, torch.inf)

    def queries(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(b, h, d) mean and (b, h, d, d) covariance of queries at the positions to come."""
        q = seen.q.to(torch.promote_types(seen.q.dtype, torch.float32))
        b, _, n, d = q.shape
        position = torch.arange(seen.total - n, seen.total, device=q.device) - seen.pads[:, None]  # (b, n)
        counted = (position >= self.sinks).to(q.dtype)
        if seen.rotary is not None:
            q = seen.rotary.turned_back(q, position.clamp(min=0))
        number = counted.sum(1).clamp(min=1)[:, None, None]
        mean = (q * counted[:, None, :, None]).sum(2) / number
        apart = (q - mean[:, :, None]) * counted[:, None, :, None]
        covariance = apart.transpose(2, 3) @ apart / number[..., None]
        if seen.rotary is None:
            return mean, covariance
        basis = torch.eye(d, dtype=q.dtype, device=q.device)[None, :, None]  # (1, d, 1, d)
        turn = q.new_zeros(b, d, d)
        for start in range(0, self.future, CHUNK):
            ahead = seen.real[:, None] + torch.arange(start, min(start + CHUNK, self.future), device=q.device)
            turn += seen.rotary.turned(basis.expand(b, d, ahead.shape[1], d), ahead).sum(2)
        turn = turn[:, None] / self.future  # rows: what becomes of each direction
        return (mean[:, :, None] @ turn)[:, :, 0], turn.transpose(2, 3) @ covariance @ turn


def example(heads: int) -> ExpectedAttention:
    """Other budgets for other heads."""
    return ExpectedAttention(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8), future=40, epsilon=0.01)


def whole(heads: int) -> ExpectedAttention:
    """Room for everything."""
    return ExpectedAttention(1.0)
