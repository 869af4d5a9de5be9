"""Cog attention: weights that may be negative."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from ...attention import attend, attention_weights
from ...attention.stage import Stage
from ...card import Card
from ...stages.signed_softmax import SignedSoftmax
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="More Expressive Attention with Negative Weights",
    year=2024,
    room="softmax",
    source=(
        "arXiv:2411.07176, and the authors' code: sign(s) softmax(|s|), the mask before the softmax. Their models keep plain "
        "softmax in the first and the last layer"
    ),
    exempt={"half_precision": "weights jump where a score changes its sign, and rounding changes signs near zero"},
)


class CogAttention(Mechanism):
    """Weighs keys by sign(s) softmax(|s|), so that one head can take away what it finds as well as add it."""

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        return attend(q, k, v, *stages, SignedSoftmax(), **places)


def oracle(mechanism: CogAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a query at a time."""
    group = q.shape[0] // k.shape[0]
    out = []
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            seen = visible[i].nonzero().flatten()
            s = k[head // group, seen] @ q[head, i] / q.shape[-1] ** 0.5
            size = torch.exp(s.abs())
            weights = torch.where(s > 0, size, torch.where(s < 0, -size, 0.0)) / size.sum()
            out.append(weights @ v[head // group, seen])
    return torch.stack(out).view(*q.shape[:2], -1)


def examples(heads: int, size: int) -> list[CogAttention]:
    """Settings that the conformance checks run."""
    return [CogAttention()]


def sized(heads: int, size: int, tokens: int, **options: Any) -> CogAttention:
    """It has no settings."""
    return CogAttention(**options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 7, 8, generator=generator, dtype=torch.float64)
    cog = CogAttention()
    weights = attention_weights(q, k, SignedSoftmax())
    yield "the magnitudes of a row's weights sum to one", largest(weights.abs().sum(-1) - 1)
    yield "it is odd in the queries", largest(cog(-q, k, v) + cog(q, k, v))
    yield "queries and keys may both change their sign", largest(cog(-q, -k, v) - cog(q, k, v))
    positive = cog(q.abs(), k.abs(), v) - attend(q.abs(), k.abs(), v)
    yield "with positive scores it is softmax attention", largest(positive)
