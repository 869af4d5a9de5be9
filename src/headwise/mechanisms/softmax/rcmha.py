"""Relative convolutional attention: queries, keys and values that blend near tokens, and learned vectors for distances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...attention import attend
from ...attention.stage import Block, RowScore, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Projections, Real, Tokens, largest

CARD = Card(
    paper="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    year=2023,
    room="softmax",
    source=(
        "arXiv:2308.03429 and the attention class of the authors' code: scores ((q + u) . k + q . R[r] + beta[r]) / sqrt(d) with r "
        "the key's place less the query's, free tables in the place of Transformer-XL's projected sines; causal convolutions that "
        "all heads share, after the projections. Their memory of a segment before reaches the convolutions of keys and values "
        "only; here that of queries has its past too, so that segments are one long text. Their training script builds another "
        "library's attention without convolutions"
    ),
)


@dataclass(frozen=True, eq=False)
class RelativeScores(RowScore):
    """Adds (u . k_j + q_i . R[r] + beta[r]) / sqrt(d), r = j - i. embedding: (h, 2 reach, d); bias: (h, 2 reach); shift: (h, d)."""

    embedding: Tensor
    bias: Tensor
    shift: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("embedding", "bias", "shift")

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        wide, reach = scores.dtype, self.bias.shape[1] // 2
        away = block.key_position[:, None, :] - block.query_position[:, :, None]  # (b or 1, c, m)
        low, high = max(-reach, int(away.min())), min(reach - 1, int(away.max()))
        there = slice(reach + low, reach + high + 1)
        of_distance = block.query.to(wide) @ self.embedding[:, there].to(wide).mT + self.bias[:, None, there].to(wide)
        index = (away.clamp(low, high) - low)[:, None].expand(scores.shape)  # what is out of reach is an empty slot
        of_key = torch.einsum("bhmd,hd->bhm", block.key.to(wide), self.shift.to(wide))
        return scores + (of_distance.gather(-1, index) + of_key[:, :, None]) * block.query.shape[-1] ** -0.5


class ConvolvedKeyValues(KeyValues):
    """Keys and values as they are read, and the last tokens' projections (b, h, tokens, 3 d) before the convolutions."""

    tail: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), self.tail)


class Rcmha(Mixer):
    """Attention on projections that are blended with those of the tokens just before, scored by content and by distance.

    Args:
        reach: the longest text; distances up to it have vectors of their own. kernel: tokens that a convolution blends, one's
            own included.
    """

    def __init__(self, width: int, heads: int, *, reach: int = 4096, kernel: int = 3) -> None:
        super().__init__()
        if reach < 1 or kernel < 1:
            raise ShapeError(f"a reach of {reach} and a kernel of {kernel} tokens; both must be at least 1")
        self.width = width
        self.projections = Projections(width, heads)
        self.projections.v = nn.Linear(width, width)  # these two have biases, as the authors' have
        self.projections.out = nn.Linear(width, width)
        size, bound = self.projections.head_dim, kernel**-0.5
        self.kernels = nn.Parameter(torch.empty(3, size, kernel).uniform_(-bound, bound))  # of queries, keys, values; latest last
        self.offsets = nn.Parameter(torch.empty(3, size).uniform_(-bound, bound))
        self.embedding = nn.Parameter(torch.zeros(heads, 2 * reach, size))
        self.bias = nn.Parameter(torch.zeros(heads, 2 * reach))
        self.shift = nn.Parameter(torch.zeros(heads, size))

    def forward(
        self, x: Tokens, *stages: Stage, cache: ConvolvedKeyValues | None = None, attention_mask: Real | None = None
    ) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        total, reach = len(cache) + x.shape[1], self.bias.shape[1] // 2
        if total > reach:
            raise ShapeError(f"{total} tokens, padding included, and vectors for distances below {reach}; give a larger reach")
        blended = self._convolve(torch.cat(self.projections.split(x), -1), cache, attention_mask)
        q, k, v = (part.clone() for part in blended.chunk(3, -1))  # so that a cache does not keep all three alive
        seen = cache.extend(q, k, v, attention_mask)
        relative = RelativeScores(self.embedding, self.bias, self.shift)
        return self.projections.merge(attend(seen.q, seen.k, seen.v, *stages, relative, **seen.places))

    def _convolve(self, x: Tensor, cache: ConvolvedKeyValues, attention_mask: Tensor | None) -> Tensor:
        """Blends each token of (b, h, n, 3 d) with those before it, over tokens only: padding is stepped over."""
        n, back = x.shape[2], self.kernels.shape[-1] - 1
        if attention_mask is not None:
            real = attention_mask.bool()
            x = _take(x, (~real).int().argsort(dim=1, stable=True))  # tokens first, then padding
        tail = torch.zeros_like(x[:, :, :1]).expand(-1, -1, back, -1) if cache.tail is None else cache.tail
        longer = torch.cat([tail, x], 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = self.kernels.flatten(0, 1).to(wide)
        blended = self.offsets.flatten().to(wide)
        for tap in range(back + 1):
            blended = blended + longer[:, :, tap : tap + n] * weights[:, tap]
        out = blended.to(x.dtype)
        if attention_mask is None:
            cache.tail = longer[:, :, n:].clone()
            return out
        cache.tail = _take(longer, real.sum(1, keepdim=True) + torch.arange(back, device=x.device))
        return _take(out, (real.cumsum(1) - 1).clamp(min=0))

    def new_cache(self, owner: Cache | None = None) -> ConvolvedKeyValues:
        """An empty cache for decoding."""
        return ConvolvedKeyValues()


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(b, h, n, d) at the tokens (b, m) of each row."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def oracle(mixer: Rcmha, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""
    p, n, d = mixer.projections, len(x), mixer.projections.head_dim
    reach, taps = mixer.bias.shape[1] // 2, mixer.kernels.shape[-1]

    def blended(projected: Tensor, which: int, i: int, head: int) -> Tensor:
        total = mixer.offsets[which]
        for ago in range(min(taps, i + 1)):
            total = total + mixer.kernels[which, :, taps - 1 - ago] * projected[i - ago, head * d : head * d + d]
        return total

    wq, wk, wv = x @ p.q.weight.T, x @ p.k.weight.T, x @ p.v.weight.T + p.v.bias
    rows = []
    for i in range(n):
        read = []
        for head in range(p.heads):
            q, seen, scores = blended(wq, 0, i, head), visible[i].nonzero().flatten().tolist(), []
            for j in seen:
                content = ((q + mixer.shift[head]) * blended(wk, 1, j, head)).sum()
                distance = (q * mixer.embedding[head, reach + j - i]).sum() + mixer.bias[head, reach + j - i]
                scores.append((content + distance) / d**0.5)
            weights = torch.softmax(torch.stack(scores), 0)
            read.append(sum(w * blended(wv, 2, j, head) for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(read) @ p.out.weight.T + p.out.bias)  # type: ignore[arg-type]
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Rcmha]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [_random(Rcmha(width, heads, reach=64)), _random(Rcmha(width, heads // 2, reach=40, kernel=4))]


def _random(made: Rcmha) -> Rcmha:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for table in (made.embedding, made.bias, made.shift):
            table.copy_(torch.randn(table.shape, generator=generator))
    return made


def _delta(made: Rcmha) -> Rcmha:
    """The same with convolutions that do nothing."""
    with torch.no_grad():
        made.kernels.zero_()[..., -1] = 1.0
        made.offsets.zero_()
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Rcmha:
    """The paper's kernels of three tokens; a reach of the texts' length, for tables of 4096 would outweigh all else."""
    return Rcmha(heads * size, heads, **{"reach": tokens, **options})


def neutral(heads: int, size: int) -> list[Rcmha]:
    """Settings that are plain attention: tables of zero, as they start, and convolutions that do nothing."""
    return [_delta(Rcmha(heads * size, heads, reach=64))]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    relative = _delta(_random(Rcmha(16, 2, reach=12))).double()
    q, k, v = relative.projections.split(x)
    r = torch.arange(9) - torch.arange(9)[:, None] + 12
    scores = (
        (q + relative.shift[:, None]) @ k.mT + torch.einsum("bhid,hijd->bhij", q, relative.embedding[:, r]) + relative.bias[:, r]
    )
    weights = (scores / 8**0.5).masked_fill(r > 12, -torch.inf).softmax(-1)
    wanted = relative.projections.merge(weights @ v)
    yield "kernels that do nothing leave relative attention", largest(relative(x, Causal()) - wanted)

    stage = RelativeScores(relative.embedding, relative.bias, relative.shift)
    places = torch.arange(9)
    shifted = attend(q, k, v, Causal(), stage, query_positions=places + 70, key_positions=places + 70)
    yield "only distances matter", largest(shifted - attend(q, k, v, Causal(), stage))
    mixer = _random(Rcmha(16, 2, reach=64, kernel=3)).double()
    moved = x.clone()
    moved[:, 4] += 1.0
    q0, q1 = (mixer._convolve(torch.cat(mixer.projections.split(t), -1), mixer.new_cache(), None) for t in (x, moved))
    reached = (q0 - q1).abs().amax((0, 1, 3)) > 0
    yield "a token is blended into itself and the next two", float((reached != torch.tensor([4 <= i < 7 for i in range(9)])).sum())
    holes = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1]]).expand(2, -1).bool()
    cache = mixer.new_cache()
    parts = [mixer(x[:, at], Causal(), cache=cache, attention_mask=holes[:, at]) for at in (slice(0, 5), slice(5, 9))]
    alone = mixer(x[:, holes[0]], Causal())
    yield "padding between tokens, and a text in pieces, change nothing", largest(torch.cat(parts, 1)[:, holes[0]] - alone)

    wide, c, h, d, reach = Rcmha(128, 8, reach=4096), 128, 8, 16, 4096
    counted = sum(p.numel() for p in wide.parameters())
    parts_of = 4 * c**2 + 2 * c, 3 * (3 * d + d), 2 * reach * h * (d + 1) + h * d
    yield "maps, 3 (3 d + d) of convolutions, 2 P h (d + 1) of tables", float(abs(counted - sum(parts_of)))
    cache = mixer.new_cache()
    mixer(x, Causal(), cache=cache)
    yield "beside keys and values, two tokens' projections are kept", float(abs(cache.nbytes - 8 * 2 * 16 * (2 * 9 + 3 * 2)))
    long, sizes = Rcmha(8, 1, reach=256), [0]
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        long(torch.randn(1, 256, 8), Causal())
    yield "nothing of n x n is kept for the backward pass", float(max(sizes) >= 256**2)
