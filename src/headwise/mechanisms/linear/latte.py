"""Latte: each token reads a few latents, and each latent reads the tokens, both by a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Tokens, largest
from .._states import Pass, Reading, StateMixer, begin
from ._carried import CarryCache
from ._prefix import prefix_softmax

CARD = Card(
    paper="Latent Attention for Linear Time Transformers",
    year=2024,
    room="linear",
    source=(
        "arXiv:2402.17512, and the authors' code: p(l | t) is a softmax over a head's latents, p(s | l) one over tokens, up to t "
        "if causal; both from linear maps without bias, no scale (one form of the code divides by sqrt(d), the stable one does "
        "not). Their recurrence keeps a running maximum, ours a running log of sums; the output is the same. Dropout on p(l | t), "
        "and what later versions add (a window as one more latent, recurrent maps), are left out"
    ),
)


class Latte(StateMixer):
    """out_t = sum_l p(l | t) sum_(s <= t) p(s | l) v_s: weights of rank `latents` a head, whose rows sum to one.

    Args:
        latents: of each head; as many as its channels by default.
    """

    def __init__(self, width: int, heads: int, *, latents: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        latents = width // heads if latents is None else latents
        if latents < 1:
            raise ShapeError(f"latents {latents} must be 1 or more")
        self.width, self.heads, self.latents = width, heads, latents
        self.of_token, self.of_latent = (nn.Linear(width, heads * latents, bias=False) for _ in range(2))
        self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        parts = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.of_token, self.of_latent, self.v))
        q, k, v = parts
        prefix = prefix_softmax(k, now)
        return Reading(q.to(prefix.key.dtype).softmax(-1), prefix.key, v, prefix.decay)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(out.to(x.dtype).transpose(1, 2).flatten(2))
        return mapped

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


def oracle(mixer: Latte, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), latent by latent."""
    count, d = mixer.latents, mixer.width // mixer.heads
    rows = []
    for t in range(len(x)):
        read, seen = [], visible[t].nonzero().flatten().tolist()
        for head in range(mixer.heads):
            values = mixer.v.weight[head * d : head * d + d]
            shares = torch.exp(mixer.of_token.weight[head * count : head * count + count] @ x[t])
            out = torch.zeros(d, dtype=x.dtype)
            for latent in range(count):
                row = mixer.of_latent.weight[head * count + latent]
                e = {s: torch.exp(row @ x[s]) for s in seen}
                out = out + shares[latent] / shares.sum() * sum(e[s] * (values @ x[s]) for s in seen) / sum(e.values())
            read.append(out)
        rows.append(mixer.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Latte]:
    """Settings that the conformance checks run."""
    return [Latte(heads * size, heads), Latte(heads * size, heads // 2, latents=3)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Latte:
    """As many latents as channels, as in the paper's language models."""
    return Latte(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 14, 32, dtype=torch.float64)
    mixer = Latte(32, 4, latents=3).double()
    causal, full = mixer.weights(x, Causal()), mixer.weights(x)
    yield "causal: rows of weights sum to one", largest(causal.sum(-1) - 1)
    yield "both sides: rows of weights sum to one", largest(full.sum(-1) - 1)
    yield "no weight is negative", largest(torch.stack([causal, full]).clamp(max=0.0))
    yield "both sides: weights have rank 3, as many as latents", largest(torch.linalg.svdvals(full)[..., 3:])
    yield "causal: blocks below the diagonal have rank 3", largest(torch.linalg.svdvals(causal[..., 7:, :7])[..., 3:])
    q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (mixer.of_token, mixer.of_latent, mixer.v))
    latents = torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3)
    twice = attend(q, latents, attend(latents, k, v, scale=1.0), scale=1.0)
    yield "both sides: softmax attention of latents, then of tokens", largest(mixer.read(x) - twice)
    single = Latte(32, 4, latents=1).double()
    k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (single.of_latent, single.v))
    pooled = attend(torch.ones_like(k), k, v, Causal(), scale=1.0)
    yield "one latent: pooling by a softmax of what was read so far", largest(single.read(x, Causal()) - pooled)
    shifted = k + torch.randn(3, dtype=torch.float64)
    one, other = (prefix_softmax(t, begin(CarryCache(), x, (Causal(),), None)) for t in (k.expand_as(shifted), shifted))
    yield "a number added to a latent's scores of all tokens changes no key", largest(one.key - other.key)
    yield "and no decay, but that of nothing", largest((one.decay - other.decay)[:, :, 1:])  # type: ignore[operator]
