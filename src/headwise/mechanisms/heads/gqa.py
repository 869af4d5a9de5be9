"""Grouped-query attention, and pooling heads into groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import KeyValues
from .._mixer import Attention, largest

CARD = Card(
    paper="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    year=2023,
    room="heads",
    source="arXiv:2305.13245, sec. 2: groups of query heads share one key/value head; conversion pools a group by its mean",
)


def gqa(width: int, heads: int, kv_heads: int, **options: Any) -> Attention:
    """Multi-head attention whose query heads share key/value heads in groups of heads / kv_heads, next to each other.

    options: as for `Attention`. The cache holds kv_heads / heads of the bytes.
    """
    return Attention(width, heads, kv_heads=kv_heads, **options)


def pool(attention: Attention, kv_heads: int) -> Attention:
    """The same attention with fewer key/value heads, each the mean of a group of those that it had. Queries stay as they are.

    Exact if the heads of each group were alike; otherwise what training goes on from.

    Raises: ShapeError if its key/value heads are no multiple of kv_heads.
    """
    of = attention.projections
    if kv_heads < 1 or of.kv_heads % kv_heads:
        raise ShapeError(f"{of.kv_heads} key/value heads do not pool into {kv_heads}")
    biased = of.q.bias is not None
    pooled = Attention(attention.width, of.heads, attention.mechanism, kv_heads=kv_heads, head_dim=of.head_dim, bias=biased)
    pooled.to(of.q.weight)
    with torch.no_grad():
        for name in ("q", "k", "v", "out"):
            mine, theirs = getattr(pooled.projections, name), getattr(of, name)
            for kind in ("weight", "bias") if biased else ("weight",):
                value = getattr(theirs, kind)
                getattr(mine, kind).copy_(_mean(value, kv_heads, of.head_dim) if name in "kv" else value)
    return pooled


def _mean(value: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """(heads * d, ...) -> (kv_heads * d, ...): means of neighbouring heads."""
    return value.unflatten(0, (kv_heads, -1, head_dim)).mean(1).flatten(0, 1)


def oracle(mixer: Attention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): multi-head attention whose key and value weights are repeated for each head of a group."""
    p = mixer.projections
    n, d, group = len(x), p.head_dim, p.heads // p.kv_heads
    rows = []
    for i in range(n):
        read, seen = [], visible[i].nonzero().flatten()
        for head in range(p.heads):
            kv = head // group
            q, k, v = (f.weight[at * d : at * d + d] for f, at in ((p.q, head), (p.k, kv), (p.v, kv)))
            e = torch.exp((x[seen] @ k.T) @ (q @ x[i]) / d**0.5)
            read.append((e / e.sum()) @ (x[seen] @ v.T))
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Attention]:
    """Settings that the conformance checks run."""
    return [gqa(heads * size, heads, heads // 2), gqa(heads * size, heads, heads)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Attention:
    """Four query heads share a key/value head, where there are as many."""
    return gqa(heads * size, heads, **{"kv_heads": max(1, heads // 4), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What sharing promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    shared = gqa(32, 4, 2).double()
    spread = Attention(32, 4).double()
    with torch.no_grad():
        for name in "qkv":
            own, value = getattr(spread.projections, name).weight, getattr(shared.projections, name).weight
            own.copy_(value if name == "q" else value.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1))
        spread.projections.out.weight.copy_(shared.projections.out.weight)
    yield "tied heads are shared ones", largest(spread(x, Causal()) - shared(x, Causal()))
    yield "and pool back into them", largest(pool(spread, 2)(x, Causal()) - shared(x, Causal()))
    caches = [KeyValues(), KeyValues()]
    for mixer, cache in zip((spread, shared), caches, strict=True):
        mixer(x, Causal(), cache=cache)
    yield "the cache holds kv_heads / heads of the bytes", float(abs(caches[1].nbytes / caches[0].nbytes - 2 / 4))
    (grad,) = torch.autograd.grad(shared(x, Causal()).square().sum(), shared.projections.k.weight)
    (apart,) = torch.autograd.grad(spread(x, Causal()).square().sum(), spread.projections.k.weight)
    summed = apart.unflatten(0, (2, 2, 8)).sum(1).flatten(0, 1)
    yield "a shared key's gradient is the sum of those of its heads", largest((grad - summed).abs().max() / grad)
