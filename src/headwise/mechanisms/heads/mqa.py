"""Multi-query attention: one key/value head for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...stages.causal import Causal
from .._caches import KeyValues
from .._mixer import Attention, largest

CARD = Card(
    paper="Fast Transformer Decoding: One Write-Head is All You Need",
    year=2019,
    room="heads",
    source=(
        "arXiv:1911.02150, sec. 3. Its listings leave out 1 / sqrt(d), which the projections can hold; here it is applied. "
        "Pooling a checkpoint's heads (`headwise.mechanisms.heads.gqa.pool`) is of another paper"
    ),
)


def mqa(width: int, heads: int, **options: Any) -> Attention:
    """Multi-head attention in which all query heads share one key/value head. options: as for `Attention`.

    The cache holds 1 / heads of the bytes.
    """
    return Attention(width, heads, kv_heads=1, **options)


def oracle(mixer: Attention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), by the paper's einsums: keys and values (n, d) have no head axis."""
    p = mixer.projections
    weights_q = p.q.weight.view(p.heads, p.head_dim, -1)
    weights_o = p.out.weight.view(-1, p.heads, p.head_dim)
    q = torch.einsum("nc,hdc->hnd", x, weights_q)
    k, v = x @ p.k.weight.T, x @ p.v.weight.T
    scores = torch.einsum("hnd,md->hnm", q, k) / p.head_dim**0.5
    a = torch.softmax(scores + torch.where(visible, 0.0, -torch.inf), -1)
    return torch.einsum("hnm,md,chd->nc", a, v, weights_o)


def examples(heads: int, size: int) -> list[Attention]:
    """Settings that the conformance checks run."""
    return [mqa(heads * size, heads)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Attention:
    """It has no settings of its own."""
    return mqa(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What sharing promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    one, many = mqa(32, 4).double(), Attention(32, 4).double()
    with torch.no_grad():
        for name in ("q", "k", "v", "out"):
            own, value = getattr(many.projections, name).weight, getattr(one.projections, name).weight
            own.copy_(value.repeat(4, 1) if name in "kv" else value)
    yield "it is multi-head attention with tied keys and values", largest(many(x, Causal()) - one(x, Causal()))
    caches = [KeyValues(), KeyValues()]
    for mixer, cache in zip((many, one), caches, strict=True):
        mixer(x, Causal(), cache=cache)
    yield "the cache holds 1 / heads of the bytes", float(abs(caches[1].nbytes / caches[0].nbytes - 1 / 4))
    parameters = [sum(p.numel() for p in mixer.parameters()) for mixer in (many, one)]
    yield "it has 2 c d (h - 1) parameters less", float(abs(parameters[0] - parameters[1] - 2 * 32 * 8 * 3))
