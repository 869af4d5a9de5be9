"""Compressed convolutional attention: all of it happens in a narrow space, where convolutions mix near tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues, Recent
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest

CARD = Card(
    paper="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
    year=2025,
    room="heads",
    source=(
        "arXiv:2510.04476 and the authors' models of transformers (zaya), whose order is kept: queries and keys are padded once, "
        "before both convolutions, so that the second sees the first one's bias there. The temperature is exp(t), as in the paper; "
        "public code multiplies by t itself. With an even number of key/value heads the shift delays whole heads, as in that code. "
        "What the convolutions start as is not told: here as PyTorch's do. Without Causal(), keys of both sides are read, while "
        "convolutions and shift still look back only"
    ),
)
EPSILON = 1e-7  # the least length that queries and keys are divided by


class ConvolvedKeyValues(KeyValues):
    """Keys and values, what convolutions need of the tokens before, and the part of the last token's values that comes later."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.narrow, self.values = Recent(back), Recent(1)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), self.narrow.rows, self.values.rows)


class CompressedConvolutional(Mixer):
    """Attention of fewer heads than the width has room for, whose queries and keys are convolved over near tokens and normed.

    Scores are sqrt(d) exp(t) cos(query, key). Half of the values are those of the token before.

    Args:
        heads, kv_heads, head_dim: of the narrow space; width / (heads * head_dim) is how much queries are compressed, and
            width / (kv_heads * head_dim) keys and values. kernels: tokens of the two convolutions: of each channel for itself,
            and of all channels of a head. mean: whether the mean of queries and keys, before the convolutions, is added to
            both. shift: whether half of the values are of the token before. norm: whether queries and keys are normed.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        kernels: tuple[int, int] = (2, 2),
        mean: bool = True,
        shift: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if min(kernels) < 1:
            raise ShapeError(f"convolutions over {kernels} tokens read nothing; each must be over 1 at least")
        if kv_heads * head_dim % 2:
            raise ShapeError(f"{kv_heads} key/value heads of {head_dim} can't be halved for the shift; make head_dim even")
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim)
        self.mean, self.shift = mean, shift
        channels = (heads + kv_heads) * head_dim
        self.each_channel = nn.Conv1d(channels, channels, kernels[0], groups=channels)
        self.each_head = nn.Conv1d(channels, channels, kernels[1], groups=heads + kv_heads)
        self.temperature = nn.Parameter(torch.zeros(kv_heads)) if norm else None
        self.back = kernels[0] + kernels[1] - 2

    def forward(
        self, x: Tokens, *stages: Stage, cache: ConvolvedKeyValues | None = None, attention_mask: Real | None = None
    ) -> Tokens:
        """See `Mixer.forward`."""
        p = self.projections
        cache = self.new_cache() if cache is None else cache
        narrow = torch.cat([p.q(x), p.k(x)], -1)
        q, k = self._heads(cache.narrow.along(narrow, attention_mask, lambda rows: self.each_head(self.each_channel(rows.mT)).mT))
        if self.mean:
            from_q, from_k = self._heads(narrow)
            both = (from_q + from_k.repeat_interleave(p.heads // p.kv_heads, 1)) / 2
            q, k = q + both, k + both.unflatten(1, (p.kv_heads, -1)).mean(2)
        if self.temperature is not None:
            q, k = _normed(q), _normed(k) * self.temperature.exp()[:, None, None]
        v = p.v(x)
        if self.shift:
            now, late = v.chunk(2, -1)
            v = torch.cat([now, cache.values.along(late, attention_mask, lambda rows: rows[:, :-1])], -1)
        v = v.unflatten(-1, (-1, p.head_dim)).transpose(1, 2)
        seen = cache.extend(q, k, v, attention_mask, self.rotary)
        return p.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))

    def _heads(self, narrow: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, channels) -> queries (b, h, n, d) and keys (b, hk, n, d)."""
        q, k = (
            narrow.unflatten(-1, (-1, self.projections.head_dim))
            .transpose(1, 2)
            .split([self.projections.heads, self.projections.kv_heads], 1)
        )
        return q, k

    def new_cache(self, owner: Cache | None = None) -> ConvolvedKeyValues:
        """An empty cache for decoding: keys and values, and of the last tokens what is convolved and shifted."""
        return ConvolvedKeyValues(self.back)


def _normed(x: Tensor) -> Tensor:
    """(..., d) of length sqrt(d)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = wide.square().sum(-1, keepdim=True).clamp(min=EPSILON**2).sqrt()
    return (wide * (x.shape[-1] ** 0.5 / length)).to(x.dtype)


def oracle(mixer: CompressedConvolutional, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time, by sums over taps, channels and heads."""
    p = mixer.projections
    n, d, h, hk = len(x), p.head_dim, p.heads, p.kv_heads
    first, second = mixer.each_channel, mixer.each_head
    zero = torch.zeros((h + hk) * d, dtype=x.dtype)
    narrow = [torch.cat([p.q.weight @ token, p.k.weight @ token]) for token in x]
    padded = [zero] * mixer.back + narrow  # once, before both
    bias_1, bias_2 = dict(first.named_parameters())["bias"], dict(second.named_parameters())["bias"]
    taps = first.weight.shape[-1]
    once = [bias_1 + sum(first.weight[:, 0, a] * padded[at + a] for a in range(taps)) for at in range(len(padded) - taps + 1)]
    twice = []
    for t in range(n):
        heads = []
        for head in range(h + hk):
            own = slice(head * d, head * d + d)
            taken = sum(second.weight[own, :, a] @ once[t + a][own] for a in range(second.weight.shape[-1]))
            heads.append(bias_2[own] + taken)  # type: ignore[arg-type]
        twice.append(heads)

    def part(t: int, head: int) -> Tensor:
        return narrow[t][head * d : head * d + d]

    def finished(t: int, head: int) -> Tensor:
        out, group = twice[t][head], h // hk
        mean = [(part(t, of) + part(t, h + of // group)) / 2 for of in range(h)]
        if mixer.mean:
            out = out + (mean[head] if head < h else sum(mean[(head - h) * group : (head - h + 1) * group]) / group)
        if mixer.temperature is not None:
            out = d**0.5 * out / torch.sqrt((out * out).sum())
            out = out if head < h else out * torch.exp(mixer.temperature[head - h])
        return out

    half = hk * d // 2
    values = []
    for t in range(n):
        late = x[t - 1] if mixer.shift and t else torch.zeros_like(x[t]) if mixer.shift else x[t]
        values.append(torch.cat([p.v.weight[:half] @ x[t], p.v.weight[half:] @ late]))
    rows = []
    for i in range(n):
        seen, joined = visible[i].nonzero().flatten().tolist(), []
        for head in range(h):
            kv = head // (h // hk)
            e = torch.exp(torch.stack([finished(i, head) @ finished(j, h + kv) / d**0.5 for j in seen]))
            joined.append(sum(e[at] / e.sum() * values[j][kv * d : kv * d + d] for at, j in enumerate(seen)))
        rows.append(p.out.weight @ torch.cat(joined))  # type: ignore[arg-type]
    return torch.stack(rows)


def _random(mixer: CompressedConvolutional) -> CompressedConvolutional:
    if mixer.temperature is not None:
        with torch.no_grad():
            mixer.temperature.copy_(torch.linspace(-0.5, 0.7, len(mixer.temperature)))
    return mixer


def _still(mixer: CompressedConvolutional) -> CompressedConvolutional:
    """The same with convolutions that do nothing."""
    with torch.no_grad():
        for conv in (mixer.each_channel, mixer.each_head):
            conv.weight.zero_()
            assert conv.bias is not None
            conv.bias.zero_()
        mixer.each_channel.weight[:, 0, -1] = 1.0
        size = mixer.projections.head_dim
        mixer.each_head.weight[:, :, -1] = torch.eye(size).repeat(len(mixer.each_head.weight) // size, 1)
    return mixer


def examples(heads: int, size: int) -> list[CompressedConvolutional]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        _random(CompressedConvolutional(width, heads // 2, heads // 4, size)),
        _random(CompressedConvolutional(width, heads, heads // 2, size // 2, kernels=(3, 2))),
        CompressedConvolutional(width, heads, heads, size, kernels=(1, 4), norm=False),
        _random(CompressedConvolutional(width, heads // 2, heads // 2, size, mean=False, shift=False)),
    ]


def neutral(heads: int, size: int) -> list[CompressedConvolutional]:
    """Settings that are plain attention: nothing compressed or changed."""
    made = [
        CompressedConvolutional(heads * size, heads, kv, size, mean=False, shift=False, norm=False) for kv in (heads, heads // 2)
    ]
    return [_still(mixer) for mixer in made]


def sized(heads: int, size: int, tokens: int, **options: Any) -> CompressedConvolutional:
    """Queries compressed by 2 and keys and values by 8, as in the paper's larger models, where there are as many heads."""
    queries = options.pop("query_heads", max(1, heads // 2))
    kv_heads = options.pop("kv_heads", math.gcd(queries, max(1, heads // 8)))
    return CompressedConvolutional(heads * size, queries, kv_heads, size, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    bare: dict[str, Any] = {"mean": False, "shift": False}
    plain = Attention(32, 4, kv_heads=2).double()
    still = _still(CompressedConvolutional(32, 4, 2, 8, norm=False, **bare)).double()
    still.projections = plain.projections
    yield "convolutions that do nothing, and no more, are grouped attention", largest(still(x, Causal()) - plain(x, Causal()))

    normed = _still(CompressedConvolutional(32, 4, 2, 8, **bare)).double()
    q, k, v = normed.projections.split(x)
    q, k = (8**0.5 * t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    yield (
        "with the norm, attention of normed queries and keys",
        largest(normed(x, Causal()) - normed.projections.merge(attend(q, k, v, Causal()))),
    )

    mixer = CompressedConvolutional(32, 4, 2, 4, **bare).double()
    with torch.no_grad():
        for conv in (mixer.each_channel, mixer.each_head):
            conv.bias.zero_()  # type: ignore[union-attr]
    before = mixer(x, Causal())
    with torch.no_grad():
        mixer.projections.q.weight.mul_(3.0)
    yield "without bias and mean, the size of queries does nothing", largest(mixer(x, Causal()) - before)

    mixer = _random(CompressedConvolutional(32, 4, 2, 4)).double()
    moved = x.clone()
    moved[:, 5] += 1.0
    caches = [mixer.new_cache(), mixer.new_cache()]
    with torch.no_grad():
        for text, cache in zip((x, moved), caches, strict=True):
            mixer(text, Causal(), cache=cache)
    held = [[t for t in cache.tensors() if t is not None and t.dim() == 4] for cache in caches]
    keys, values = (other - one for one, other in zip(*held, strict=True))
    yield "a token moves keys up to two places on", float(_changed(keys) != [5, 6, 7])
    yield "and values up to one", float(_changed(values) != [5, 6])
    yield "the second of two key/value heads does not see the present", float(_changed(values[:, 1:]) != [6])

    c, d, h, hk, (t0, t1) = 32, 4, 4, 2, (2, 2)
    counted = sum(w.numel() for name, w in mixer.named_parameters() if not name.endswith("bias")) - hk  # without temperatures
    formula = 2 * c * h * d + 2 * c * hk * d + (h + hk) * d * t0 + (h + hk) * d**2 * t1
    yield "2 c^2 / C1 + 2 c^2 / C2 + (h + h_k) (d t0 + d^2 t1) weights", float(abs(counted - formula))
    state = (t0 + t1 - 2) * (h + hk) * d + hk * d // 2
    numbers = caches[0].nbytes / 8 / 2
    yield (
        "the cache holds 2 h_k d numbers a token, and what is convolved and shifted",
        float(abs(numbers - 12 * 2 * hk * d - state)),
    )
    full = Attention(64, 16).new_cache()
    narrow = sized(16, 4, 100)
    less = narrow.new_cache()
    Attention(64, 16)(torch.randn(1, 100, 64), Causal(), cache=full)
    narrow(torch.randn(1, 100, 64), Causal(), cache=less)
    kept = less.nbytes - 4 * (2 * 10 * 4 + 4)  # 8 query and 2 key/value heads of 4
    yield "keys and values are an eighth of those of attention of 16 heads", float(abs(kept / full.nbytes - 1 / 8))


def _changed(difference: Tensor) -> list[int]:
    """The tokens of (b, h, n, d) that are not zero."""
    return [int(at) for at in difference.abs().amax((0, 1, 3)).nonzero().flatten()]
