"""Selective self-attention: temperatures chosen by the token and its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest

CARD = Card(
    paper="Selective Attention: Enhancing Transformer through Principled Context Control",
    year=2024,
    room="softmax",
    source=(
        "arXiv:2411.12892: tau = tanh(f(x)) + 1 + sigmoid(alpha) log(place), places from 1, multiplying queries and, by the key's "
        "token, values. The authors' code has only the term of the place, for queries, with exp(-exp(beta)) for its coefficient; "
        "f(x) = w . gelu(W x) with the layer's own W, the shared weights of the paper, is as a third party reads it. Whether the "
        "values' temperature has the term of the place is left open: here it has not"
    ),
    status="the content term f follows a third party's reading of the paper; the authors' code does not hold it",
)


class SelectiveSelfAttention(Mixer):
    """Multiplies each query's scores, and each value, by a temperature that the token and its place choose.

    Args:
        heads, kv_heads, head_dim: as for `Attention`. content: whether tokens choose (f); place: whether places do; values:
            whether values have a temperature too.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        content: bool = True,
        place: bool = True,
        values: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim)
        self.query_weight = nn.Parameter(torch.zeros(self.projections.q.out_features)) if content else None
        self.value_weight = nn.Parameter(torch.zeros(self.projections.v.out_features)) if content and values else None
        self.alpha = nn.Parameter(torch.zeros(())) if place else None

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        q, k, v = self.projections.split(x)
        v = v * _content(v, self.value_weight)  # by the key's token, before it is kept
        cache = self.new_cache() if cache is None else cache
        seen = cache.extend(q, k, v, attention_mask, self.rotary)
        temperature = _content(q, self.query_weight) + self._place(seen.query_positions, len(cache), x)
        out = attend(seen.q * temperature, seen.k, seen.v, *stages, **seen.places)
        return self.projections.merge(out)

    def _place(self, positions: Tensor | None, total: int, x: Tensor) -> Tensor | float:
        """(b or 1, 1, n, 1): sigmoid(alpha) log(place)."""
        if self.alpha is None:
            return 0.0
        if positions is None:
            positions = torch.arange(total - x.shape[1], total, device=x.device)[None]
        return torch.sigmoid(self.alpha) * (positions.clamp(min=0)[:, None, :, None] + 1).to(x).log()

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding; it keeps values as they are read, with their temperature."""
        return KeyValues()


def _content(projected: Tensor, weight: Tensor | None) -> Tensor | float:
    """(b, 1, n, 1): 1 + tanh(w . gelu(projection)), one number a token for all heads."""
    if weight is None:
        return 1.0
    features = nn.functional.gelu(projected.transpose(1, 2).flatten(2))
    return 1 + torch.tanh(features @ weight)[:, None, :, None]


def oracle(mixer: SelectiveSelfAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""
    p = mixer.projections
    n, d, group = len(x), p.head_dim, p.heads // p.kv_heads
    wq, wk, wv = x @ p.q.weight.T, x @ p.k.weight.T, x @ p.v.weight.T

    def content(row: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return torch.ones((), dtype=x.dtype)
        half = row * 0.5 * (1 + torch.erf(row / 2**0.5))
        return 1 + torch.tanh((half * weight).sum())

    rows = []
    for i in range(n):
        tau = content(wq[i], mixer.query_weight)
        if mixer.alpha is not None:
            tau = tau + torch.log(torch.tensor(i + 1.0, dtype=x.dtype)) / (1 + torch.exp(-mixer.alpha))
        read = []
        for head in range(p.heads):
            own, kv = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            seen = visible[i].nonzero().flatten().tolist()
            s = torch.stack([tau * (wq[i, own] @ wk[j, kv]) / d**0.5 for j in seen])
            e = torch.exp(s - s.max().detach())
            values = torch.stack([content(wv[j], mixer.value_weight) * wv[j, kv] for j in seen])
            read.append((e / e.sum()) @ values)
        rows.append(torch.cat(read) @ p.out.weight.T)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[SelectiveSelfAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        SelectiveSelfAttention(width, heads),
        SelectiveSelfAttention(width, heads, kv_heads=heads // 2, values=False),
        SelectiveSelfAttention(width, heads, content=False),
    ]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in (w for mixer in made for w in (mixer.query_weight, mixer.value_weight) if w is not None):
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> SelectiveSelfAttention:
    """All three of its parts."""
    return SelectiveSelfAttention(heads * size, heads, **options)


def neutral(heads: int, size: int) -> list[SelectiveSelfAttention]:
    """Settings that are plain attention: at the start of training, without the term of the place."""
    return [SelectiveSelfAttention(heads * size, heads, place=False)]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    mixer = SelectiveSelfAttention(16, 2, content=False).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    p = mixer.projections
    q, k, v = p.split(x)
    factor = 1 + torch.sigmoid(mixer.alpha) * torch.arange(1, 10).double().log()  # type: ignore[arg-type]
    by_place = p.merge(attend(q * factor[:, None], k, v, Causal())) - mixer(x, Causal())
    yield "places multiply scores by 1 + c log(place)", largest(by_place)
    plain = SelectiveSelfAttention(16, 2, place=False).double()
    plain.projections = p
    attention = Attention(16, 2).double()
    attention.projections = p
    yield "a temperature of one is plain attention", largest(plain(x, Causal()) - attention(x, Causal()))
    sharp = 1e6 * q
    argmax = v.gather(2, (sharp @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 8))
    yield "an endless temperature reads one value", largest(attend(sharp, k, v) - argmax)
