"""Normalised attention: scores of mean zero and variance one as weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend, attention_weights
from ...attention.stage import Normalizer, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Attention, Keys, Mechanism, Outputs, Positions, Queries, Values, largest, shake

CARD = Card(
    paper="Normalized Attention Without Probability Cage",
    year=2020,
    room="softmax",
    source=(
        "arXiv:2005.09561 (its abstract) and the authors' code: q . k undivided, minus its mean over the row, divided by its "
        "deviation plus 1e-3, gain and bias of each head, no division by the number of keys; layer norm over all heads (epsilon "
        "1e-3, Keras' default), GELU in its tanh form. Queries, keys, values and output have biases there: `Attention(..., "
        "bias=True)`. Their models read both sides; with a mask, mean and deviation are of the keys that it shows. Max pooling, "
        "one of their baselines, is left out; sum pooling is a gain of 0 and a bias of 1"
    ),
)
NORM_EPSILON = 1e-3  # of the layer norm


@dataclass(frozen=True, eq=False)
class Standardised(Normalizer):
    """gain * (score - mean) / (deviation + epsilon) + bias over the visible keys of a row. gain, bias: (heads,)."""

    gain: Tensor
    bias: Tensor
    epsilon: float
    per_head: ClassVar[tuple[str, ...]] = ("gain", "bias")

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        visible = ~scores.isneginf()
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        scores = scores.masked_fill(~visible, 0.0)
        centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~visible, 0.0)
        variance = centred.square().sum(-1, keepdim=True) / count
        varied = variance > 0  # a row of equal scores has no deviation, nor a gradient of it
        deviation = torch.where(varied, torch.where(varied, variance, 1.0).sqrt(), 0.0)
        tiny = torch.finfo(scores.dtype).tiny
        gain, bias = (t.to(scores)[:, None, None] for t in (self.gain, self.bias))
        weights = gain * centred / (deviation + self.epsilon).clamp(min=tiny) + bias
        return weights.masked_fill(~visible, 0.0), torch.zeros_like(scores[..., 0])


class NormalizedAttention(Mechanism):
    """Weighs keys by how many deviations their score is above the row's mean, then norms all heads together.

    Weights may be negative and their sum is the bias times the number of keys, so outputs leave the hull of the values.
    A mechanism, not a mixer: all of it, the norm and the GELU too, is a function of queries, keys and values.

    Args:
        heads, head_dim: of the values. norm: layer norm over all heads; without it outputs grow with the length. gelu: GELU
            after it. epsilon: added to the deviation.
    """

    def __init__(self, heads: int, head_dim: int, *, norm: bool = True, gelu: bool = True, epsilon: float = 1e-3) -> None:
        super().__init__()
        if epsilon < 0:
            raise ShapeError(f"epsilon {epsilon} is added to a deviation; it must be at least 0")
        self.gain, self.bias = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.zeros(heads))
        self.norm_gain = nn.Parameter(torch.ones(heads, head_dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(heads, head_dim)) if norm else None
        self.gelu, self.epsilon = gelu, epsilon

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        out = attend(q, k, v, *stages, Standardised(self.gain, self.bias, self.epsilon), scale=1.0, **places)
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.norm_gain is not None and self.norm_bias is not None:
            centred = wide - wide.mean((1, 3), keepdim=True)
            normed = centred * torch.rsqrt(centred.square().mean((1, 3), keepdim=True) + NORM_EPSILON)
            wide = normed * self.norm_gain[:, None] + self.norm_bias[:, None]
        return (F.gelu(wide, approximate="tanh") if self.gelu else wide).to(out.dtype)


def oracle(mechanism: NormalizedAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a query at a time."""
    h, n, d = q.shape
    group = h // k.shape[0]
    rows = []
    for i in range(n):
        seen = visible[i].nonzero().flatten().tolist()
        read = []
        for head in range(h):
            s = torch.stack([(q[head, i] * k[head // group, j]).sum() for j in seen])
            mean = s.sum() / len(seen)
            square = ((s - mean) ** 2).sum() / len(seen)
            deviation = square**0.5 if square > 0 else torch.zeros_like(square)
            total = torch.zeros_like(v[0, 0])
            for j, x in zip(seen, s, strict=True):
                weight = mechanism.gain[head] * (x - mean) / (deviation + mechanism.epsilon) + mechanism.bias[head]
                total = total + weight * v[head // group, j]
            read.append(total)
        out = torch.cat(read)
        if mechanism.norm_gain is not None and mechanism.norm_bias is not None:
            mean = out.sum() / len(out)
            out = (out - mean) / torch.sqrt(((out - mean) ** 2).sum() / len(out) + NORM_EPSILON)
            out = out * mechanism.norm_gain.flatten() + mechanism.norm_bias.flatten()
        if mechanism.gelu:
            out = out / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (out + 0.044715 * out**3)))
        rows.append(out)
    return torch.stack(rows).view(n, h, d).transpose(0, 1)


def examples(heads: int, size: int) -> list[NormalizedAttention]:
    """Settings that the conformance checks run."""
    made = [
        NormalizedAttention(heads, size),
        NormalizedAttention(heads, size, gelu=False, epsilon=0.1),
        NormalizedAttention(heads, size, norm=False, gelu=False),
    ]
    shake((p for mechanism in made for p in mechanism.parameters()), seed=5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> NormalizedAttention:
    """As in the authors' models, with norm and GELU."""
    return NormalizedAttention(heads, size, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 11, 8, generator=generator, dtype=torch.float64)
    n = 11
    plain = NormalizedAttention(2, 8, norm=False, gelu=False).double()
    gain, bias = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([0.2, -0.1], dtype=torch.float64)
    plain.gain.data, plain.bias.data = gain, bias
    stage = Standardised(gain, bias, plain.epsilon)
    weights = attention_weights(q, k, Causal(), stage, scale=1.0)
    counts = torch.arange(1, n + 1, dtype=torch.float64)
    yield "a row's weights sum to the bias times how many keys it sees", largest(weights.sum(-1) - bias[:, None] * counts)
    shift = torch.randn(8, generator=generator, dtype=torch.float64)
    yield "what all keys have in common changes nothing", largest(plain(q, k + shift, v) - plain(q, k, v))
    exact = NormalizedAttention(2, 8, epsilon=0.0).double()
    yield "with no epsilon the size of the queries does not matter", largest(exact(1e-3 * q, k, v) - exact(7 * q, k, v))
    new = NormalizedAttention(2, 8, norm=False, gelu=False).double()
    yield "at the start of training values that are all the same are taken away", largest(new(q, k, torch.ones_like(v)))
    pool = NormalizedAttention(2, 8, norm=False, gelu=False).double()
    pool.gain.data, pool.bias.data = torch.zeros_like(gain), torch.ones_like(gain)
    yield "a gain of 0 and a bias of 1 are sum pooling", largest(pool(q, k, v, Causal()) - v.cumsum(2))
    pool.bias.data = torch.full_like(gain, 1 / n)
    yield "a gain of 0 and a bias of 1 / n are the mean", largest(pool(q, k, v) - v.mean(2, keepdim=True))
    least, most = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    outside = (new(q, k, v) > most) | (new(q, k, v) < least)
    yield "every output leaves the hull of the values", float((~outside.any(-1)).sum())
    centred = k - k.mean(2, keepdim=True)
    products, spread = centred.mT @ v, centred.mT @ centred / n  # d x d each: all that the keys and values leave behind
    deviation = torch.einsum("bhid,bhde,bhie->bhi", q, spread, q).sqrt()[..., None] + plain.epsilon
    linear = gain[:, None, None] * (q @ products) / deviation + bias[:, None, None] * v.sum(2, keepdim=True)
    yield "it is linear attention divided by the deviation of the scores", largest(plain(q, k, v) - linear)
    more = sum(p.numel() for p in Attention(32, 4, NormalizedAttention(4, 8, norm=False)).parameters())
    yield (
        "a gain and a bias of each head are all that is added",
        float(abs(more - sum(p.numel() for p in Attention(32, 4).parameters()) - 8)),
    )
