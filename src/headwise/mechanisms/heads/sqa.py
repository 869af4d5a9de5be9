"""Sparse query attention: fewer query heads than the width has room for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Attention, largest

CARD = Card(
    paper="Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads Reduction",
    year=2025,
    room="heads",
    source=(
        "arXiv:2510.01817, sec. 3, with the head counts of its experiments (16 heads: SQA 8 and 4, sSQA 8 and 8, xSQA 4 and 4, "
        "xSMQA 4 and 1). As in the authors' code, queries, keys and values have no bias, the output has one. Fewer query heads "
        "than key/value heads, which the paper leaves to later work, are not offered"
    ),
)
# the part of the heads that are query heads, and key/value heads; None: one head
VARIANTS: dict[str, tuple[float, float | None]] = {
    "SQA": (1 / 2, 1 / 4),
    "sSQA": (1 / 2, 1 / 2),
    "xSQA": (1 / 4, 1 / 4),
    "xSMQA": (1 / 4, None),
}


def sqa(
    width: int,
    heads: int,
    variant: str = "SQA",
    *,
    query_heads: int | None = None,
    kv_heads: int | None = None,
    out_bias: bool = True,
    **options: Any,
) -> Attention:
    """Grouped-query attention with fewer query heads, each of size width / heads: query_heads / heads of the work on scores.

    Args:
        heads: of the multi-head attention that it stands for. variant: "SQA", "sSQA" (symmetric), "xSQA" (extreme) or "xSMQA"
            (one key/value head). query_heads, kv_heads: instead of the variant's numbers. out_bias: whether the output has one.
            options: as for `Attention`.
    """
    if variant not in VARIANTS:
        raise ShapeError(f"there is no variant {variant!r} of sparse query attention; there are: {', '.join(VARIANTS)}")
    if width % heads:
        raise ShapeError(f"width {width} is no multiple of {heads} heads, which set the size of a head")
    of_queries, of_keys = VARIANTS[variant]
    queries = max(1, round(heads * of_queries)) if query_heads is None else query_heads
    if kv_heads is None:
        kv_heads = 1 if of_keys is None else math.gcd(queries, max(1, round(heads * of_keys)))
    if not kv_heads <= queries <= heads:
        raise ShapeError(f"{queries} query heads are not between {kv_heads} key/value heads and {heads} heads; give query_heads")
    made = Attention(width, queries, kv_heads=kv_heads, head_dim=width // heads, **options)
    made.projections.out = nn.Linear(queries * (width // heads), width, bias=out_bias)
    return made


def oracle(mixer: Attention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time: the heads that there are, joined, and mapped from their smaller width."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads
    rows = []
    for i in range(len(x)):
        seen, joined = visible[i].nonzero().flatten().tolist(), []
        for head in range(p.heads):
            q = p.q.weight[head * d : head * d + d] @ x[i]
            kv = slice(head // group * d, head // group * d + d)
            e = torch.stack([torch.exp(q @ (p.k.weight[kv] @ x[j]) / d**0.5) for j in seen])
            joined.append(sum(e[at] / e.sum() * (p.v.weight[kv] @ x[j]) for at, j in enumerate(seen)))
        rows.append(p.out.weight @ torch.cat(joined) + (0 if p.out.bias is None else p.out.bias))  # type: ignore[arg-type]
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Attention]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        sqa(width, heads),
        sqa(width, heads, "sSQA", out_bias=False),
        sqa(width, heads, "xSMQA"),
        sqa(width, heads, query_heads=heads, kv_heads=heads // 2),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Attention:
    """Half of the heads have queries, a quarter keys and values."""
    return sqa(heads * size, heads, **options)


class _Counted:
    """Plain attention that counts its multiply-adds on scores and values."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *stages: Any, **places: Any) -> Tensor:
        b, h, n, d = q.shape
        self.done += b * h * n * k.shape[2] * (d + v.shape[-1])
        return attend(q, k, v, *stages, **places)


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    all_there = sqa(32, 4, query_heads=4, kv_heads=2, out_bias=False).double()
    grouped = Attention(32, 4, kv_heads=2).double()
    grouped.load_state_dict(all_there.state_dict())
    yield "all query heads are grouped-query attention", largest(all_there(x, Causal()) - grouped(x, Causal()))

    half, whole = sqa(32, 4, "sSQA", out_bias=False).double(), Attention(32, 4).double()
    with torch.no_grad():
        whole.projections.out.weight[:, 16:] = 0.0
        whole.projections.out.weight[:, :16] = half.projections.out.weight
        for name in "qkv":
            getattr(whole.projections, name).weight[:16] = getattr(half.projections, name).weight
    yield "it is multi-head attention whose other heads are not read", largest(half(x, Causal()) - whole(x, Causal()))

    counts = {"MHA": 16, "SQA": 8, "sSQA": 8, "xSQA": 4, "xSMQA": 4}
    done = {}
    for name in counts:
        counted: Any = _Counted()
        made = Attention(256, 16, counted) if name == "MHA" else sqa(256, 16, name, mechanism=counted)
        made(torch.randn(1, 12, 256), Causal())
        done[name] = counted.done
    off = max(abs(done[name] / done["MHA"] - count / 16) for name, count in counts.items())
    yield "multiply-adds on scores and values fall to query heads / heads", off

    biased = [name for name, _ in sqa(32, 4).named_parameters() if name.endswith("bias")]
    yield "the output has a bias, and nothing else", float(biased != ["projections.out.bias"])

    weights = {"SQA": 98304, "sSQA": 131072, "xSQA": 65536, "xSMQA": 40960}
    for name, wanted in weights.items():
        made = sqa(256, 16, name)
        p = made.projections
        counted_weights = sum(w.numel() for w in made.parameters() if w.dim() == 2)
        formula = 2 * 256 * p.head_dim * (p.heads + p.kv_heads)
        yield (
            f"{name} at width 256 has {wanted} weights, 2 c d (query + key/value heads)",
            abs(counted_weights - wanted) + abs(wanted - formula),
        )
        cache = made.new_cache()
        made(torch.randn(1, 5, 256), Causal(), cache=cache)
        yield f"{name} keeps 2 d key/value heads numbers a token", abs(cache.nbytes / 4 / 5 - 2 * p.head_dim * p.kv_heads)
