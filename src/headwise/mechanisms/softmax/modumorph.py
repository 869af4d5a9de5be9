"""Attention whose weights come from context alone, as in ModuMorph: what is read never chooses who is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest, shake
from .._norms import layer_norm

CARD = Card(
    paper="Universal Morphology Control via Contextual Modulation",
    year=2023,
    room="softmax",
    source=(
        "arXiv:2302.11070, the morphology-dependent attention, and the authors' code with FIX_ATTENTION: queries and keys of a "
        "layer-normed context, values of the tokens, biases everywhere, all layers' contexts from one encoder of each limb alone. "
        "The hypernetwork that makes embedding and decoder of another context is outside attention and left out; the layer norm "
        "before values, residual and feed-forward layer are a stack's. Without a context the tokens are their own"
    ),
    status="the attention of the paper; its hypernetwork is left out",
)


class ContextEncoder(nn.Module):
    """What queries and keys read, of each token's own context features: three linear maps with ReLU after each.

    Args:
        features: of a token's context. width: of the attention layers, all of which may share it.
    """

    def __init__(self, features: int, width: int = 128, *, layers: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        nn.init.uniform_(self.first.weight, -0.1, 0.1)
        nn.init.zeros_(self.first.bias)
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, features: Tensor) -> Tokens:
        """(b, n, features) -> (b, n, width)."""
        out = torch.relu(self.first(features))
        for linear in self.more:
            out = torch.relu(linear(out))
        return out


class Modumorph(Mixer):
    """Reads values of tokens by queries and keys of a context that is given beside them: the weights do not know the tokens.

    Args:
        heads, kv_heads, head_dim: as for `Attention`.
    """

    rotates = True

    def __init__(self, width: int, heads: int = 2, *, kv_heads: int | None = None, head_dim: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim, bias=True)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tokens,
        *stages: Stage,
        cache: KeyValues | None = None,
        attention_mask: Real | None = None,
        context: Tokens | None = None,
    ) -> Tokens:
        """See `Mixer.forward`. context: (b, n, width) of the given tokens, as from `ContextEncoder`; x without one."""
        context = x if context is None else context
        if context.shape != x.shape:
            raise ShapeError(f"context is {tuple(context.shape)}, the tokens are {tuple(x.shape)}; each token has one of its width")
        p = self.projections
        normed = layer_norm(self.norm, context)
        q, k, v = (f(t).unflatten(-1, (-1, p.head_dim)).transpose(1, 2) for f, t in ((p.q, normed), (p.k, normed), (p.v, x)))
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        return p.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding."""
        return KeyValues()


def oracle(mixer: Modumorph, x: Tensor, visible: Tensor, context: Tensor | None = None) -> Tensor:
    """One sequence (n, width), a query at a time."""
    p, group = mixer.projections, mixer.projections.heads // mixer.projections.kv_heads
    normed = []
    for row in x if context is None else context:
        centred = row - row.mean()
        normed.append(centred / torch.sqrt((centred**2).mean() + 1e-5) * mixer.norm.weight + mixer.norm.bias)
    rows = []
    for i in range(len(x)):
        read = []
        for head in range(p.heads):
            at, kv = (slice(h * p.head_dim, (h + 1) * p.head_dim) for h in (head, head // group))
            q = p.q.weight[at] @ normed[i] + p.q.bias[at]
            e, values = [], []
            for j in visible[i].nonzero().flatten().tolist():
                e.append(torch.exp((q * (p.k.weight[kv] @ normed[j] + p.k.bias[kv])).sum() / p.head_dim**0.5))
                values.append(p.v.weight[kv] @ x[j] + p.v.bias[kv])
            read.append(torch.stack(e) / torch.stack(e).sum() @ torch.stack(values))
        rows.append(p.out.weight @ torch.cat(read) + p.out.bias)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Modumorph]:
    """Settings that the conformance checks run."""
    made = [Modumorph(heads * size, heads), Modumorph(heads * size, heads, kv_heads=heads // 2)]
    shake((p for mixer in made for p in mixer.norm.parameters()), seed=1, by=0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Modumorph:
    """Tokens that are their own context, if none is given."""
    return Modumorph(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    mixer = examples(2, 8)[0].double()
    encoder = ContextEncoder(5, 16).double()
    state, other = torch.randn(2, 2, 7, 16, dtype=torch.float64)
    context = encoder(torch.randn(2, 7, 5, dtype=torch.float64))
    out = mixer(state, context=context)
    seen = torch.ones(7, 7, dtype=torch.bool)
    formula = torch.stack([oracle(mixer, state[row], seen, context[row]) for row in range(2)])
    yield "with a context it is the formula", largest(out - formula)
    nothing = mixer(0 * state, context=context)
    line = mixer(0.3 * state - 2 * other, context=context) - nothing
    parts = 0.3 * (out - nothing) - 2 * (mixer(other, context=context) - nothing)
    yield "weights do not know the state: the output is linear in it", largest(line - parts)
    plain = Attention(16, 2, bias=True).double()
    plain.projections = mixer.projections
    usual = mixer(mixer.norm(state), context=state) - plain(mixer.norm(state))
    yield "a context that is the state, normed alike, is self-attention", largest(usual)
    order = torch.randperm(7)
    yield "limbs may come in any order", largest(mixer(state[:, order], context=context[:, order]) - out[:, order])
    there = torch.arange(7) < 5
    short = mixer(state[:, :5], context=context[:, :5])
    padded = mixer(state, attention_mask=there.expand(2, -1), context=context)[:, :5]
    yield "missing limbs change no other", largest(padded - short)
    own = sum(parameter.numel() for parameter in mixer.parameters()) - sum(parameter.numel() for parameter in plain.parameters())
    yield "a layer has a layer norm more than attention", float(abs(own - 2 * 16))
    shared = sum(parameter.numel() for parameter in encoder.parameters())
    yield "and all share one encoder: c (features + 1) + 2 c (c + 1)", float(abs(shared - 16 * 6 - 2 * 16 * 17))
