"""Shared differential attention: two readings subtracted, whose queries and keys share one map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues, Seen
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import rms_normed
from .._rotary import Rotary

CARD = Card(
    paper="Shared DIFF Transformer",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2501.17900: a base that both sets share plus an update of low rank for each, of the maps to queries and to keys. "
        "All else is DIFF Transformer, arXiv:2410.05258, and its authors' code: lambda, its start by layer, one RMS norm over the "
        "2 d of a head whose gain all heads share, 1 - lambda_0 after it. That code rotates neighbouring dimensions, here halves "
        "are rotated. `rank=None` is DIFF itself"
    ),
    status=(
        "the paper publishes no code; that updates go across heads, that values and lambda are DIFF's, and that the second factors "
        "start at zero, is a reading of its description"
    ),
)
EPSILON = 1e-5


class Pair(nn.Module):
    """Two linear maps: one base that both share plus x A_t B_t each, or with rank None two maps of their own."""

    def __init__(self, width: int, out: int, rank: int | None) -> None:
        super().__init__()
        if rank is not None and not 1 <= rank <= min(width, out):
            raise ShapeError(f"updates of rank {rank} of a map from {width} to {out}; give 1 to {min(width, out)}, or None")
        self.base = nn.Linear(width, 2 * out if rank is None else out, bias=False)
        self.down = self.up = None
        if rank is not None:
            bound = width**-0.5  # as a linear map starts
            self.down = nn.Parameter(torch.empty(2, width, rank).uniform_(-bound, bound))
            self.up = nn.Parameter(torch.zeros(2, rank, out))  # so that both sets start as the base

    def forward(self, x: Tokens) -> Tensor:
        """(b, n, 2, out)."""
        both: Tensor = self.base(x)
        if self.down is None or self.up is None:
            return both.unflatten(-1, (2, -1))
        low = torch.einsum("bnc,tcr->btnr", x, self.down)
        return both[:, :, None] + (low @ self.up).transpose(1, 2)

    def weights(self) -> Tensor:
        """(2, out, width): both maps whole, as linear maps hold theirs."""
        if self.down is None or self.up is None:
            return self.base.weight.unflatten(0, (2, -1))
        return self.base.weight + (self.down @ self.up).mT

    def fit(self, weights: Tensor) -> None:
        """Comes as near to two given maps (2, out, width) as its rank allows, in the sum of squares.

        The base is free, so only their difference has to be matched, by A_1 B_1 - A_2 B_2 of twice the rank.
        """
        with torch.no_grad():
            if self.down is None or self.up is None:
                self.base.weight.copy_(weights.flatten(0, 1))
                return
            left, size, right = torch.linalg.svd(weights[0] - weights[1], full_matrices=False)
            kept = min(2 * self.down.shape[-1], len(size))
            self.down.zero_()
            self.up.zero_()
            for t, sign in enumerate((1, -1)):  # every other part to one set, so that they share the large ones
                root = size[t:kept:2].sqrt()
                self.down[t, :, : len(root)] = right[t:kept:2].mT * root
                self.up[t, : len(root)] = sign * root[:, None] * left[:, t:kept:2].mT
            self.base.weight.copy_((weights - (self.down @ self.up).mT).mean(0))


class SharedDiff(Mixer):
    """Reads twice and subtracts: (A_1 - lambda A_2) V, the queries and keys of both a shared map plus an update of low rank.

    Args:
        heads: of d = width / (2 heads) for queries and keys and 2 d for values, so half as many as plain attention has.
        rank: of the updates; None for two maps of their own, which is DIFF Transformer. It saves parameters below width / 6.
        layer: counted from 0; lambda starts at 0.8 - 0.6 exp(-0.3 layer).
    """

    rotates = True

    def __init__(self, width: int, heads: int, rank: int | None, *, layer: int = 0) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ShapeError(f"width {width} is no multiple of {2 * heads}, twice the {heads} heads; change one of them")
        self.width, self.heads, self.size = width, heads, width // (2 * heads)
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.q, self.k = Pair(width, width // 2, rank), Pair(width, width // 2, rank)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.vectors = nn.Parameter(torch.randn(4, self.size) * 0.1)  # lambda's: query and key of set 1, then of set 2
        self.gain = nn.Parameter(torch.ones(2 * self.size))

    @staticmethod
    def of(diff: SharedDiff, rank: int | None) -> SharedDiff:
        """Another of another rank and all else the same: exact from rank width / 4 on, else the one with the nearest maps."""
        made = SharedDiff(diff.width, diff.heads, rank).to(diff.gain)
        made.start, made.rotary = diff.start, diff.rotary
        made.v, made.out, made.vectors, made.gain = diff.v, diff.out, diff.vectors, diff.gain
        made.q.fit(diff.q.weights())
        made.k.fit(diff.k.weights())
        return made

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        # the heads of set 1, then those of set 2
        q, k = (f(x).unflatten(-1, (-1, self.size)).permute(0, 2, 3, 1, 4).flatten(1, 2) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, 2 * self.size)).transpose(1, 2)
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        first, second = self.readings(seen, *stages)
        read = first - self.strength() * second
        normed = rms_normed(read, EPSILON) * ((1 - self.start) * self.gain)
        merged: Tensor = self.out(normed.to(x.dtype).transpose(1, 2).flatten(2))
        return merged

    def readings(self, seen: Seen, *stages: Stage) -> tuple[Tensor, Tensor]:
        """(b, h, n, 2 d) each: what the two sets read, in float32 at least, for the difference may be small."""
        # zeros make queries and keys as wide as values, without which fused kernels hold all weights
        q, k = (F.pad(t, (0, self.size)) for t in (seen.q, seen.k))
        wide, scale = torch.promote_types(q.dtype, torch.float32), self.size**-0.5
        sets = slice(self.heads), slice(self.heads, None)
        first, second = (attend(q[:, at], k[:, at], seen.v, *stages, scale=scale, **seen.places).to(wide) for at in sets)
        return first, second

    def strength(self) -> Tensor:
        """lambda: a number, not bounded by 1."""
        vectors = self.vectors.to(torch.promote_types(self.vectors.dtype, torch.float32))
        products = (vectors[0::2] * vectors[1::2]).sum(-1).exp()
        return products[0] - products[1] + self.start

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: the keys of both sets and the values, as much as plain attention of this width keeps."""
        return KeyValues()


def oracle(mixer: SharedDiff, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""
    n, d = len(x), mixer.size

    def project(pair: Pair, t: int) -> Tensor:
        if pair.down is None or pair.up is None:
            half = pair.base.out_features // 2
            return x @ pair.base.weight[t * half : t * half + half].T
        return x @ (pair.base.weight.T + pair.down[t] @ pair.up[t])

    def turned(row: Tensor, place: int) -> Tensor:
        if mixer.rotary is None:
            return row
        out = list(row)
        for pair in range(d // 2):
            angle = place * mixer.rotary.base ** (-2 * pair / d)
            a, b = row[pair], row[pair + d // 2]
            out[pair], out[pair + d // 2] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        return torch.stack(out)

    q1, k1, q2, k2 = mixer.vectors
    strength = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + mixer.start
    rows = []
    for i in range(n):
        seen, heads = visible[i].nonzero().flatten().tolist(), []
        for head in range(mixer.heads):
            own, weights = slice(head * d, head * d + d), []
            for t in (0, 1):
                q, k = project(mixer.q, t)[:, own], project(mixer.k, t)[:, own]
                s = torch.stack([(turned(q[i], i) * turned(k[j], j)).sum() / d**0.5 for j in seen])
                weights.append(torch.softmax(s, 0))
            values = (x @ mixer.v.weight.T)[seen, 2 * head * d : 2 * head * d + 2 * d]
            read = (weights[0] - strength * weights[1]) @ values
            heads.append((1 - mixer.start) * read / torch.sqrt((read**2).mean() + EPSILON) * mixer.gain)
        rows.append(torch.cat(heads) @ mixer.out.weight.T)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[SharedDiff]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [SharedDiff(width, heads // 2, 3), SharedDiff(width, heads, 2, layer=5), SharedDiff(width, heads // 2, None, layer=1)]
    made[0].rotary = Rotary(base=50.0)
    return [_random(one) for one in made]


def _random(made: SharedDiff) -> SharedDiff:
    shake((p for p in (made.q.up, made.k.up, made.vectors, made.gain) if p is not None), seed=3)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> SharedDiff:
    """Half as many heads, as in DIFF Transformer, so that keys are of the same size. The rank, which is ours: width / 16."""
    width = heads * size
    return SharedDiff(width, **{"heads": max(1, heads // 2), "rank": max(1, width // 16), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    shared = SharedDiff(24, 2, 2).double()
    q, k = (f.base(x).unflatten(-1, (2, 6)).transpose(1, 2) for f in (shared.q, shared.k))
    v = shared.v(x).unflatten(-1, (2, 12)).transpose(1, 2)
    twice = Seen(torch.cat([q, q], 1), torch.cat([k, k], 1), v, None, None)
    first, second = shared.readings(twice, Causal())
    strength = shared.strength()
    plain = attend(q, k, v, Causal())
    yield "updates of zero read (1 - lambda) of plain attention", largest(first - strength * second - (1 - strength) * plain)
    half = Pair(24, 12, 2).double()
    yield "and both sets are the base", largest(half(x) - half.base(x)[:, :, None])
    with torch.no_grad():
        shared.q.down[1] = shared.q.down[0]  # type: ignore[index]
    (grad,) = torch.autograd.grad(shared(x, Causal()).square().sum(), shared.q.up)  # type: ignore[arg-type]
    yield "there the second update's gradient is -lambda times the first's", largest(grad[1] + strength * grad[0])
    diff = _random(SharedDiff(24, 2, None, layer=3)).double()
    for rank in (6, 12):
        same = SharedDiff.of(diff, rank)
        yield f"updates of rank {rank} are any DIFF of width 24", largest(same(x, Causal()) - diff(x, Causal()))
    yield "and back", largest(SharedDiff.of(same, None)(x, Causal()) - diff(x, Causal()))
    lost = (diff.q.weights() - SharedDiff.of(diff, 2).q.weights()).square().sum()
    rest = torch.linalg.svdvals(diff.q.weights()[0] - diff.q.weights()[1])[4:].square().sum() / 2
    yield "of less rank, what is lost is half of the least singular values' squares", largest(lost - rest)
    ones = Seen(torch.randn(1, 4, 9, 6).double(), torch.randn(1, 4, 9, 6).double(), torch.ones(1, 2, 9, 12).double(), None, None)
    first, second = diff.readings(ones, Causal())
    yield "weights sum to 1 - lambda", largest(first - diff.strength() * second - (1 - diff.strength()))
    counts = [sum(p.numel() for p in SharedDiff(96, 4, rank).parameters()) for rank in (None, 5)]
    yield "6 c r parameters in the place of c^2", float(abs(counts[0] - counts[1] - (96**2 - 6 * 96 * 5)))
    with FlopCounterMode(display=False) as counter:
        Pair(96, 48, 5)(torch.randn(1, 7, 96))
    wanted = 7 * (96 * 48 + 2 * 5 * (96 + 48))
    yield "c^2 / 2 + 3 c r multiplications for both queries of a token", float(abs(counter.get_total_flops() / 2 - wanted))
    cache = shared.new_cache()
    shared(x, Causal(), cache=cache)
    yield "the cache holds 2 c numbers a token, as plain attention's", float(abs(cache.nbytes - 2 * 24 * 2 * 9 * 8))
    layers = [SharedDiff(8, 1, 1, layer=layer).start for layer in (0, 10**6)]
    yield "lambda starts between 0.2 and 0.8", abs(layers[0] - 0.2) + abs(layers[1] - 0.8)
