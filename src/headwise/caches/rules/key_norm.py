"""Keeps the tokens whose keys are short."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...card import Card
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    year=2024,
    room="cache",
    source=(
        "arXiv:2406.11430, sec. 3, and the authors' code: the keys of smallest Euclidean norm, of each key/value head. No window, "
        "as there: the last tokens may go. Of equal norms the earlier token stays. The code keeps a share rounded up, and only of "
        "2048 tokens or more; here the share is rounded down and any prompt is cut"
    ),
)


@dataclass(frozen=True, eq=False)
class KeyNorm(Evict):
    """After a prompt, keeps the tokens with the smallest keys: those, sinks among them, tend to attract attention.

    budget: see `Evict`. Needs no queries. Of no use where a model normalizes its keys (query-key norm): all are about as long.
    The authors' examples leave the first two layers whole: give those no rule.
    """

    budget: Budget

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m)."""
        return -seen.k.to(torch.promote_types(seen.k.dtype, torch.float32)).norm(dim=-1)


def example(heads: int) -> KeyNorm:
    """Other budgets for other heads."""
    return KeyNorm(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8))


def whole(heads: int) -> KeyNorm:
    """Room for everything."""
    return KeyNorm(1.0)
