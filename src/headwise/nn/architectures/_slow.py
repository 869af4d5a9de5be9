"""The parts of a transformer written out slowly, for oracles: one sequence, a token at a time, nothing of the fast code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...mechanisms import Attention, Mixer
from ...stages.window import Window
from ..transformer import Block, Transformer


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / sqrt(mean x^2 + epsilon), times the weight if there is one; over the last dimension."""
    normed = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + epsilon) ** 0.5
    return normed if weight is None else normed * weight


def normed(x: Tensor, norm: Any) -> Tensor:
    """x through an RMSNorm module, by its weight and epsilon."""
    return rms_norm(x, norm.weight, norm.eps)


def rotate(x: Tensor, place: int, base: float) -> Tensor:
    """One token's heads (h, d): the pairs (x_i, x_{i + d/2}) turned by place * base^(-2i/d)."""
    d = x.shape[-1]
    out = list(x.unbind(-1))
    for i in range(d // 2):
        angle = place * base ** (-2 * i / d)
        a, b = x[..., i], x[..., i + d // 2]
        out[i], out[i + d // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out, -1)


def heads_of(x: Tensor, linear: Any, heads: int) -> Tensor:
    """A linear map's output of x (n, width), in heads: (n, heads, d)."""
    out: Tensor = x @ linear.weight.T
    return (out if linear.bias is None else out + linear.bias).unflatten(-1, (heads, -1))


def turned(x: Tensor, base: float | None) -> Tensor:
    """Heads (n, h, d) at places 0, 1, ..., each rotated; as they are where base is None."""
    return x if base is None else torch.stack([rotate(token, place, base) for place, token in enumerate(x)])


def weights_row(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of one query (d,) over keys (m, d): (m,)."""
    scores = k @ q / k.shape[-1] ** 0.5
    e = torch.exp(scores - scores.max())
    return e / e.sum()


def attention_weights(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q (n, h, d), k (m, hk, d), visible (n, m): weights (h, n, m), 0 where not visible; rows that see nothing are 0."""
    n, h, group = len(q), q.shape[1], q.shape[1] // k.shape[1]
    rows = []
    for head in range(h):
        for i in range(n):
            seen = visible[i].nonzero().flatten()
            row = q.new_zeros(len(k))
            rows.append(row.index_put((seen,), weights_row(q[i, head], k[seen, head // group])) if len(seen) else row)
    return torch.stack(rows).view(h, n, -1)


def attention_rows(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention, q (n, h, d), k and v (m, hk, d), visible (n, m): (n, h, dv). Groups of heads share a key/value head."""
    return read(attention_weights(q, k, visible), v)


def read(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (h, n, m) on values (m, hk, dv): (n, h, dv)."""
    h, n, _ = weights.shape
    group = h // v.shape[1]
    return torch.stack([torch.stack([weights[head, i] @ v[:, head // group] for head in range(h)]) for i in range(n)])


def causal(n: int, window: int | None = None) -> Tensor:
    """(n, n): whether a query may read a key; the last `window` keys, its own included, if one is given."""
    return torch.tensor([[j <= i and (window is None or i - j < window) for j in range(n)] for i in range(n)])


def window_of(model: Transformer, at: int) -> int | None:
    """How many tokens a block reads back, None for all."""
    sizes = [stage.size for stage in _block(model, at).stages if isinstance(stage, Window)]
    return min(sizes) if sizes else None


def slots(model: Transformer, at: int, tokens: int) -> int:
    """How many of so many tokens a block still reads, by its window."""
    window = window_of(model, at)
    return tokens if window is None else min(tokens, window)


def visible_to(model: Transformer, at: int, n: int) -> Tensor:
    """(n, n): what a block's queries may read, by its window and whether the model reads both sides."""
    window = window_of(model, at)
    before = causal(n, window)
    return before if model.causal else before | before.T


def base_of(mixer: Mixer) -> float | None:
    """The base of a mixer's rotary embedding, None without one."""
    return None if mixer.rotary is None else mixer.rotary.base


def merged(read: Tensor, out: nn.Module) -> Tensor:
    """What heads have read (n, h, dv), mapped back: (n, width)."""
    return heads_of(read.flatten(1), out, 1).flatten(1)


def attention(model: Transformer, at: int, x: Tensor, base: float | None) -> Tensor:
    """What the plain attention of a block gives for normed tokens x (n, width), rotated by a base if there is one."""
    mixer = mixer_of(model, at)
    assert isinstance(mixer, Attention)
    p = mixer.projections
    q, k, v = (heads_of(x, f, heads) for f, heads in ((p.q, p.heads), (p.k, p.kv_heads), (p.v, p.kv_heads)))
    return merged(attention_rows(turned(q, base), turned(k, base), v, visible_to(model, at, len(x))), p.out)


def shake_norms(models: Iterable[nn.Module]) -> None:
    """Draws all vectors anew around one: norms, which begin with ones, and biases, which begin small."""
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0, 0.3)


def gated_mlp(x: Tensor, block: Any) -> Tensor:
    """down(silu(gate x) * up x), silu(z) = z / (1 + e^-z), by a module's weights."""
    gate, up, down = (getattr(block, name).weight for name in ("gate", "up", "down"))
    z = x @ gate.T
    made: Tensor = (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T
    return made


def _block(model: Transformer, at: int) -> Block:
    block = model.blocks[at]
    assert isinstance(block, Block)
    return block


def mixer_of(model: Transformer, at: int) -> Mixer:
    """A block's mixer."""
    return _block(model, at).mixer


def stack(model: Transformer, ids: Tensor, mix: Callable[[int, int, Tensor], Tensor], order: list[int] | None = None) -> Tensor:
    """Logits (n, vocabulary) of a pre-norm stack with a sum for its residual stream.

    mix: (layer, block, normed input (n, width)) -> the mixer's output, layers counted as they run. order: the blocks that run,
        each once by default.
    """
    x = model.embedding.weight[ids]
    if model.places is not None:
        x = x + model.places.weight[: len(ids)]
    for layer, at in enumerate(range(len(model.blocks)) if order is None else order):
        block = _block(model, at)
        x = x + mix(layer, at, normed(x, block.norm))
        if block.feed_forward is not None and block.feed_norm is not None:
            x = x + gated_mlp(normed(x, block.feed_norm), block.feed_forward)
    return normed(x, model.norm) @ (model.embedding if model.head is None else model.head).weight.T
