"""Fastmax: a polynomial in place of exp, whose powers of products factor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...attention import attention_weights
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Tokens, largest
from .._norms import rms_normed
from .._states import KernelAttention, Pass, Reading
from ._carried import CarryCache, running
from ._taylor import taylor

CARD = Card(
    paper="FAST: Factorizable Attention for Speeding up Transformers",
    year=2024,
    room="linear",
    source=(
        "arXiv:2402.07901: weights f(s) = sum over l <= p of s^l / l! over their sum, s = q . k of normalised tokens. The paper's "
        "normalisation is told by its reviews: less the mean of its channels, over their deviation (token, the default). The "
        "authors' code has two others: less the mean, over the longest token's length (longest), and none, s / (8 sqrt(d)). "
        "Longest reads the future; read causally, here it is the longest token so far, our own form. Only orders 1 and 2 are "
        "theirs. A rotary embedding, which they have not, turns after the normalisation. Each product of channels is one "
        "feature; dropout on them and the custom gradient are left out"
    ),
)
NORMS = ("token", "longest", "none")


class Fastmax(KernelAttention):
    """Weights sum_(l <= order) s^l / l!, divided by their sum.

    Args:
        order: of the polynomial; odd ones may have weights below zero, and sums of them near it. norm: "token", "longest" or
            "none", see the card. temperature: with "none", scores are divided by this times sqrt(d).
    """

    epsilon = 0.0

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        order: int = 2,
        norm: str = "token",
        temperature: float = 8.0,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        if norm not in NORMS:
            raise ShapeError(f"norm {norm!r} must be one of {', '.join(NORMS)}")
        if order < 1:
            raise ShapeError(f"order {order} must be 1 or more")
        self.order, self.norm, self.temperature = order, norm, temperature

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See `KernelAttention.features`; of normalised queries and keys."""
        return taylor(q, self.order), taylor(k, self.order)

    def normed(self, q: Tensor, k: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are scores. What keys are divided by goes into queries: they know how far they read."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        if self.norm == "none":
            return q / (self.temperature * math.sqrt(q.shape[-1])), k
        q, k = (t - t.mean(-1, keepdim=True) for t in (q, k))
        if self.norm == "token":
            q, k = (rms_normed(t, 1e-12) for t in (q, k))
            return q, k
        for name, t in (("q", q), ("k", k)):
            longest = running(name, t.norm(dim=-1, keepdim=True), now, largest=True)[:, :, -q.shape[2] :]
            longest = longest.where(longest > 0, 1.0)
            q = q / (longest if name == "q" else longest.repeat_interleave(q.shape[1] // k.shape[1], 1))
        return q, k

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.projections.split(x)
        q, k = self.normed(q, k, now)
        return Reading(*self.features(now.rotated(q, self.rotary), now.rotated(k, self.rotary)), v)

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


def oracle(mixer: Fastmax, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), weight by weight."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads

    def centred(t: Tensor) -> Tensor:
        return t if mixer.norm == "none" else t - t.sum() / d

    def deviation(t: Tensor) -> Tensor:
        return torch.sqrt((t * t).sum() / d + 1e-12)

    rows = []
    for i in range(len(x)):
        read, seen = [], visible[i].nonzero().flatten().tolist()
        for head in range(p.heads):
            own, shared = (slice(at * d, at * d + d) for at in (head, head // group))
            query, keys = centred(p.q.weight[own] @ x[i]), {j: centred(p.k.weight[shared] @ x[j]) for j in seen}
            total, out = torch.zeros((), dtype=x.dtype), torch.zeros(d, dtype=x.dtype)
            for j in seen:
                s = query @ keys[j]
                if mixer.norm == "none":
                    s = s / (mixer.temperature * d**0.5)
                elif mixer.norm == "token":
                    s = s / (deviation(query) * deviation(keys[j]))
                else:
                    s = s / torch.stack([centred(p.q.weight[own] @ x[t]).norm() for t in seen]).max()
                    s = s / torch.stack([keys[t].norm() for t in seen]).max()
                weight = sum(s**term / math.factorial(term) for term in range(mixer.order + 1))
                total, out = total + weight, out + weight * (p.v.weight[shared] @ x[j])
            read.append(out / total)
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Fastmax]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        Fastmax(width, heads),
        Fastmax(width, heads, kv_heads=heads // 2, order=1, norm="longest"),
        Fastmax(width, heads, head_dim=size // 2, order=3, norm="none", temperature=2.0),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Fastmax:
    """Second order, tokens normalised one by one."""
    return Fastmax(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    s = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    for order in (1, 2, 3, 6):
        error = (s.exp() - taylor(s, order) @ taylor(s.new_ones(1), order)[:, None]).abs()
        yield (
            f"order {order}: on [-1, 1] within e / {order + 1}! of exp",
            largest((error - math.e / math.factorial(order + 1)).clamp(min=0)),
        )
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    for norm in NORMS:
        weights = Fastmax(32, 4, norm=norm).double().weights(x, Causal())
        yield f"{norm}: rows of weights sum to one", largest(weights.sum(-1) - 1)
    for norm in ("token", "longest"):
        mixer = Fastmax(32, 4, norm=norm, bias=True).double()
        before = mixer(x, Causal())
        with torch.no_grad():
            mixer.projections.q.bias.add_(torch.tensor([1.0, -2.0, 3.0, 4.0]).double().repeat_interleave(8))
            mixer.projections.k.bias.add_(5.0)
        yield f"{norm}: a number added to all channels of a head changes nothing", largest(mixer(x, Causal()) - before)
    mixer = Fastmax(32, 4, norm="longest").double()
    weights = mixer.weights(x)
    bound = 2.5 / (2.5 + 11 / 2)
    yield "longest, order 2: no weight above 2.5 / (2.5 + (n - 1) / 2)", largest((weights - bound).clamp(min=0))
    before = mixer(x, Causal())
    with torch.no_grad():
        mixer.projections.q.weight.mul_(7.0)
        mixer.projections.k.weight.mul_(0.1)
    yield "longest: lengths that all queries or all keys share go", largest(mixer(x, Causal()) - before)
    mixer = Fastmax(16, 4, norm="longest", order=14).double()
    q, k, _ = mixer.projections.split(x[..., :16])
    q, k = (t - t.mean(-1, keepdim=True) for t in (q, k))
    q, k = (t / t.norm(dim=-1).amax(-1)[..., None, None] for t in (q, k))
    exact = attention_weights(q, k, scale=1.0)
    yield "order 14 is softmax of the same scores, scale one", largest(mixer.weights(x[..., :16]) - exact)
