"""Efficient attention: keys are normalised over positions, so that they gather a few global vectors, which queries mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Real, Tokens, largest, shake
from .._states import Pass, Reading, StateMixer, begin
from ._carried import CarryCache
from ._prefix import prefix_softmax

CARD = Card(
    paper="Efficient Attention: Attention with Linear Complexities",
    year=2018,
    room="linear",
    source=(
        "arXiv:1812.01243, sec. 3, and cmsflash/efficient-attention: rho_q(Q) (rho_k(K)^T V), with softmax over the channels of "
        "queries and over the positions of keys, or both divided by the root of the number of tokens. Maps have biases, heads "
        "are contiguous channels, no scale and no positions, as in the code; its residual connection is the caller's. The "
        "causal form is our own: keys are normalised over the positions up to each token"
    ),
)
NORMALISERS = ("softmax", "scaling")


class EfficientAttention(StateMixer):
    """rho_q(q_i) . sum_j rho_k(k)_j v_j^T: each channel of keys is a map over all tokens, and gathers one global vector.

    Args:
        heads: each has channels of its own. normaliser: "softmax" or "scaling". key_size, value_size: of a head, width / heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        normaliser: str = "softmax",
        key_size: int | None = None,
        value_size: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if normaliser not in NORMALISERS:
            raise ShapeError(f"normaliser {normaliser!r} must be one of {', '.join(NORMALISERS)}")
        if width % heads and (key_size is None or value_size is None):
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give key_size and value_size")
        self.width, self.heads, self.normaliser = width, heads, normaliser
        self.key_size, self.value_size = key_size or width // heads, value_size or width // heads
        keys, values = heads * self.key_size, heads * self.value_size
        self.q, self.k, self.v = (nn.Linear(width, size, bias=bias) for size in (keys, keys, values))
        self.out = nn.Linear(values, width, bias=bias)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.normaliser == "softmax":
            share = prefix_softmax(k, now)
            return Reading(q.softmax(-1, dtype=share.key.dtype), share.key, v, share.decay)
        share = prefix_softmax(torch.zeros_like(k[..., :1]), now)  # one over the number of tokens
        return Reading(q, k * share.key, v, share.decay)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(out.to(x.dtype).transpose(1, 2).flatten(2))
        return mapped

    def maps(self, x: Tokens, attention_mask: Real | None = None) -> Float[Tensor, "b h d n"]:
        """The global attention maps: how much each token counts in the vector that a channel of keys gathers."""
        now = begin(self.new_cache(), x, (), attention_mask)
        found = self.reading(x, now).k
        return (found if now.real is None else found.where(now.real[:, None, :, None], 0.0)).mT

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


def oracle(mixer: EfficientAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every pair of tokens by itself."""
    q, k, v = (x @ part.weight.T + (0 if part.bias is None else part.bias) for part in (mixer.q, mixer.k, mixer.v))
    rows = []
    for i in range(len(x)):
        seen, read = [j for j in range(len(x)) if visible[i, j]], []
        for head in range(mixer.heads):
            own = slice(head * mixer.key_size, (head + 1) * mixer.key_size)
            query, keys = q[i, own], k[seen, own]
            if mixer.normaliser == "softmax":
                query, keys = torch.exp(query) / torch.exp(query).sum(), torch.exp(keys) / torch.exp(keys).sum(0)
            else:
                query, keys = query / len(seen) ** 0.5, keys / len(seen) ** 0.5
            values = v[seen, head * mixer.value_size : (head + 1) * mixer.value_size]
            read.append(sum((query @ keys[j]) * values[j] for j in range(len(seen))))
        bias = 0 if mixer.out.bias is None else mixer.out.bias
        rows.append(mixer.out.weight @ torch.cat(read) + bias)  # type: ignore[arg-type]
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[EfficientAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        EfficientAttention(width, heads),
        EfficientAttention(width, heads // 2, normaliser="scaling", bias=False),
        EfficientAttention(width, heads, key_size=3, value_size=5),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> EfficientAttention:
    """The paper's: softmax of both."""
    return EfficientAttention(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    scaled, mixer = EfficientAttention(32, 4, normaliser="scaling").double(), EfficientAttention(32, 4).double()
    q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (scaled.q, scaled.k, scaled.v))
    yield "scaling: dot-product attention, its scores divided by the number of tokens", largest(scaled.read(x) - q @ k.mT / 40 @ v)
    for stages, way in (((), "all tokens"), ((Causal(),), "those before")):
        weights = mixer.weights(x, *stages)
        yield f"softmax, {way}: implied rows sum to one", largest(weights.sum(-1) - 1)
        yield f"softmax, {way}: and are not negative", largest(weights.clamp(max=0))
    q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
    one = torch.eye(8, dtype=torch.float64).expand(2, 4, -1, -1)
    gathered = F.scaled_dot_product_attention(one, k, v, scale=1.0)
    spread = F.scaled_dot_product_attention(q, one, gathered, scale=1.0)
    yield "two reads of softmax attention, by and of identity matrices", largest(mixer.read(x) - spread)
    yield "maps times values are the vectors that were gathered", largest(mixer.maps(x) @ v - gathered)
    yield "maps sum to one", largest(mixer.maps(x).sum(-1) - 1)
    order = torch.randperm(40)
    yield "tokens in another order: so are outputs", largest(mixer(x[:, order]) - mixer(x)[:, order])
    before = mixer(x), mixer(x, Causal())
    mixer.k.bias.copy_(torch.randn(32) * 3)
    mixer.q.bias.add_(torch.randn(4, 1, dtype=torch.float64).expand(4, 8).flatten())
    yield "a constant added to a channel of keys, or to all of a query, changes nothing", largest(mixer(x) - before[0])
    yield "nor in the causal form", largest(mixer(x, Causal()) - before[1])
    yield "the causal form's last token reads what it reads of all", largest((mixer(x, Causal()) - mixer(x))[:, -1])
    shake([mixer.k.weight], seed=3, by=100.0)
    yield "keys of any size: rows still sum to one", largest(mixer.weights(x, Causal()).sum(-1) - 1)
