"""Based's linear attention: the second-order Taylor expansion of exp, on small queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attention_weights
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Tokens, largest
from .._states import Pass, Reading, StateMixer, begin
from ._taylor import size_of, taylor

CARD = Card(
    paper="Simple linear attention language models balance the recall-throughput tradeoff",
    year=2024,
    room="linear",
    source=(
        "arXiv:2402.18668, sec. 4, and the authors' code: queries and keys of 16 channels a head, features 1, x / d^(1/4) and "
        "x x^T / sqrt(2 d), denominators with 1e-12 more, no rotary embedding, gate or decay. Packed by default: each product "
        "of two channels once, 153 features instead of 273. Other orders are the expansion that On the Expressiveness of Softmax "
        "Attention: A Recurrent Neural Network Perspective takes apart; odd ones may have weights below zero. The hybrid's other "
        "layers are softmax in a window and gated convolutions, for a stack to place"
    ),
)


class Based(StateMixer):
    """Weights 1 + s + s^2 / 2 with s = q . k / sqrt(d), divided by their sum.

    Args:
        feature_dim: d, the channels of queries and keys; values have width / heads. order: how many terms of exp come after the 1.
        packed: whether each monomial is a feature once; the weights are the same.
    """

    epsilon = 1e-12

    def __init__(self, width: int, heads: int, *, feature_dim: int = 16, order: int = 2, packed: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if feature_dim < 1 or order < 0:
            raise ShapeError(f"feature_dim {feature_dim} must be 1 or more, and order {order} 0 or more")
        self.width, self.heads, self.feature_dim, self.order, self.packed = width, heads, feature_dim, order, packed
        self.q, self.k = (nn.Linear(width, heads * feature_dim, bias=False) for _ in range(2))
        self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))

    @property
    def features(self) -> int:
        """How many features a head's queries and keys have: rows of its state."""
        return size_of(self.feature_dim, self.order, self.packed)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = (taylor(t.to(wide) * self.feature_dim**-0.25, self.order, self.packed) for t in (q, k))
        return Reading(q, k, v)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(out.to(x.dtype).transpose(1, 2).flatten(2))
        return mapped


def oracle(mixer: Based, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), weight by weight."""
    d, dv = mixer.feature_dim, mixer.width // mixer.heads
    rows = []
    for i in range(len(x)):
        read = []
        for head in range(mixer.heads):
            own, values = slice(head * d, head * d + d), slice(head * dv, head * dv + dv)
            query = mixer.q.weight[own] @ x[i]
            total, out = torch.zeros((), dtype=x.dtype), torch.zeros(dv, dtype=x.dtype)
            for j in visible[i].nonzero().flatten().tolist():
                s = query @ (mixer.k.weight[own] @ x[j]) / math.sqrt(d)
                weight = torch.ones_like(s)
                for term in range(mixer.order, 0, -1):
                    weight = 1 + weight * s / term
                total, out = total + weight, out + weight * (mixer.v.weight[values] @ x[j])
            read.append(out / total)
        rows.append(mixer.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Based]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        Based(width, heads, feature_dim=6),
        Based(width, heads // 2, feature_dim=4, packed=False),
        Based(width, heads, feature_dim=3, order=4),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Based:
    """The paper's 16 channels, second order."""
    return Based(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 11, 5, dtype=torch.float64)
    s = q @ k.mT
    yield "features of order 2 multiply to 1 + s + s^2 / 2", largest(taylor(q, 2) @ taylor(k, 2).mT - (1 + s + s * s / 2))
    for order in range(5):
        packed, whole = (taylor(q, order, p) @ taylor(k, order, p).mT for p in (True, False))
        yield f"packed as unpacked, order {order}", largest(packed - whole)
    counts = [taylor(q.new_zeros(16), 2, packed).shape[0] for packed in (True, False)]
    yield "16 channels have 153 features packed, 273 unpacked", float(abs(counts[0] - 153) + abs(counts[1] - 273))
    told = [
        Based(32, 4, order=order, packed=p).features - len(taylor(q.new_zeros(16), order, p))
        for order in (0, 3)
        for p in (False, True)
    ]
    yield "as many features as are told", float(sum(map(abs, told)))
    mixer = Based(32, 4).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    now = begin(mixer.new_cache(), x, (), None)
    given = mixer.reading(4 * x, now)
    yield "no weight is below a half before it is divided", largest((given.q @ given.k.mT - 0.5).clamp(max=0.0))
    with torch.no_grad():
        mixer.q.weight.zero_()
    even = torch.ones(11, 11, dtype=torch.float64).tril()
    yield "queries of zero: a running mean", largest(mixer.weights(x, Causal()) - even / even.sum(-1, keepdim=True))
    mixer = Based(32, 4, feature_dim=2, order=20).double()
    q, k = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (mixer.q, mixer.k))
    yield "order 20 is softmax attention", largest(mixer.weights(x, Causal()) - attention_weights(q, k, Causal()))
