"""Attention with one of its principles taken away: mixing, the form of the weights, or their dependence on the text."""

from __future__ import annotations

import cmath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Normalizer, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Positions, Projections, Real, Tokens, largest
from .._rotary import Rotary

CARD = Card(
    paper="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2510.11602, sec. 3. MLP stands for A V, so that all variants keep the output map and have 4 width^2 parameters. "
        "Approximate is eq. 6 with one normaliser for the three orders; the recurrent form of app. I divides each order by itself, "
        "whose first can be negative, and by its cache size squares elementwise. Non-approximate: eq. 7 as a sum over a head "
        "divided by sqrt(d). Not said: where rotary positions enter, here where queries meet keys; the deviation of the random "
        "stream. Their models have biases in the maps of queries, keys and values"
    ),
    status=(
        "RndEmbQK and FixedSeqQK are one variant, `fixed`, with the stream of the first layer unless a stack hands over its own; "
        "StaticEmbQK needs the token embeddings, which a layer does not see, and is left out"
    ),
)
VARIANTS = ("mlp", "approximate", "non_approximate", "fixed")
PIECE = 128  # tokens that are read at once where the past is carried along


@dataclass(frozen=True)
class Taylor(Normalizer):
    """Weighs keys by 1 + s + s^2 / 2, the start of exp(s), which is never below 1/2, divided by its sum."""

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        seen = scores != -torch.inf
        s = scores.masked_fill(~seen, 0.0)
        weights = (1 + s + s.square() / 2) * seen
        total = weights.sum(-1)
        return weights / total.clamp(min=0.5)[..., None], total.log()


class Running(Cache):
    """The past as one key and value: the logarithm of what its weights sum to (b, h), and the values' mean by them (b, h, d)."""

    def __init__(self) -> None:
        self.total = 0
        self.log_sum: Tensor | None = None
        self.mean: Tensor | None = None
        self.begun: Tensor | None = None  # (b,) rows that have seen a token; None while all have

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.log_sum, self.mean, self.begun)

    def read(self, t: Tensor, v: Tensor, stages: tuple[Stage, ...], there: Tensor | None) -> Tensor:
        """Softmax over time of t (b, h, n), the same for all queries, on the past and v (b, h, n, d). there: (b, n) no padding."""
        n, places = t.shape[2], Positions()
        carried = self.log_sum is not None and self.mean is not None
        if carried:
            t = torch.cat([self.log_sum[..., None], t], 2)  # type: ignore[index]
            v = torch.cat([self.mean[:, :, None], v], 2)  # type: ignore[index]
        if there is not None or self.begun is not None:
            new = torch.ones(len(t), n, dtype=torch.bool, device=t.device) if there is None else there.bool()
            old = torch.ones_like(new[:, :1]) if self.begun is None else self.begun[:, None]
            real = torch.cat([old, new], 1) if carried else new
            at = torch.where(real, real.cumsum(1) - 1, -1)
            places = {"query_positions": at[:, -n:], "key_positions": at}
            self.begun = real.any(1)
            # a row of nothing but padding gets numbers that nobody reads
            t = t.masked_fill(~real[:, None], -torch.inf).masked_fill(~self.begun[:, None, None], 0.0)
        weights = t.softmax(-1)
        self.log_sum, self.mean, self.total = t.logsumexp(-1), (weights[:, :, None] @ v).squeeze(2), self.total + n
        # scores of one column, as wide as values with zeros: without these fused kernels hold all weights
        k = F.pad(t[..., None], (0, v.shape[-1] - 1))
        q = torch.zeros_like(k[:, :, -n:])
        q[..., 0] = 1.0
        return attend(q, k, v, *stages, scale=1.0, **places)


class FixedKeys(KeyValues):
    """Values of each text, and the keys of the fixed stream (1, h, tokens, d), which all texts share."""

    keys: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.v, self.keys)


class Nothing(Cache):
    """Counts tokens and keeps none."""

    total = 0

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return ()


class DeconstructingAttention(Mixer):
    """Attention that lacks one thing, the rest being equal.

    variant: "mlp" mixes no tokens; "approximate" weighs by 1 + s + s^2 / 2 in the place of exp(s); "non_approximate" gives each
        key the weight exp(sum SiLU(q_j) k_j / sqrt(d)) whoever asks; "fixed" takes queries and keys from a stream that is the
        same for all texts, so that weights depend on places alone.
    stream: for "fixed", (tokens, width): a fixed text's states, or random normal numbers if `tokens` is given instead. A stack
        that runs its stream through its layers, as the paper does, sets each layer's `stream` to the state before it.
    """

    stream: Tensor | None

    def __init__(self, width: int, heads: int, variant: str, *, stream: Tensor | None = None, tokens: int | None = None) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ShapeError(f"there is no variant {variant!r}; there are: {', '.join(VARIANTS)}")
        if (variant == "fixed") != ((stream is None) != (tokens is None)):
            raise ShapeError(f"variant {variant!r}: give stream or tokens, one of them, for 'fixed', and neither for the others")
        if stream is not None and (stream.dim() != 2 or stream.shape[1] != width):
            raise ShapeError(f"the stream is {tuple(stream.shape)}; it must be (tokens, {width})")
        self.width, self.variant = width, variant
        self.rotates = variant in ("approximate", "fixed")
        self.projections = Projections(width, heads)  # of the same shapes in all variants
        self.register_buffer("stream", stream if tokens is None else torch.randn(tokens, width))

    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`. "mlp" reads no other token whatever a mask shows."""
        cache = self.new_cache() if cache is None else cache
        p = self.projections
        if self.variant == "mlp":
            cache.total += x.shape[1]
            alone: Tensor = p.out(p.v(F.silu(p.q(x)) * p.k(x)))
            return alone
        if self.variant == "approximate":
            seen = cache.extend(*p.split(x), attention_mask, self.rotary)
            return p.merge(attend(seen.q, seen.k, seen.v, *stages, Taylor(), **seen.places))
        if self.variant == "fixed":
            return p.merge(self._read_fixed(x, stages, cache, attention_mask))
        return p.merge(self._read_running(x, stages, cache, attention_mask))

    def _read_running(self, x: Tensor, stages: tuple[Stage, ...], cache: Running, attention_mask: Tensor | None) -> Tensor:
        """(b, h, n, d). Under a causal mask in pieces, so that time grows with the length and not with its square."""
        q, k, v = self.projections.split(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # numbers that grow into the thousands, and sums
        t = (F.silu(q.to(wide)) * k.to(wide)).sum(-1) * q.shape[-1] ** -0.5
        simple = all(isinstance(stage, Causal) for stage in stages)
        if len(cache) and not simple:
            raise ShapeError("a cache that keeps the past as one sum can be read causally only; run the whole text at once")
        step = PIECE if stages and simple else x.shape[1]
        parts = []
        for start in range(0, x.shape[1], step):
            at = slice(start, start + step)
            there = None if attention_mask is None else attention_mask[:, at]
            parts.append(cache.read(t[:, :, at], v[:, :, at].to(wide), stages, there))
        return torch.cat(parts, 2).to(x.dtype)

    def _read_fixed(self, x: Tensor, stages: tuple[Stage, ...], cache: FixedKeys, attention_mask: Tensor | None) -> Tensor:
        """(b, h, n, d)."""
        p, before, total = self.projections, len(cache), len(cache) + x.shape[1]
        assert self.stream is not None
        if total > len(self.stream):
            raise ShapeError(f"{total} tokens, padding included, and a stream of {len(self.stream)}; give a longer one")

        def heads(states: Tensor, of: nn.Linear, places: Tensor) -> Tensor:
            y: Tensor = of(states).unflatten(-1, (-1, p.head_dim)).transpose(1, 2)
            return y if self.rotary is None else self.rotary(y, places)

        v = p.v(x).unflatten(-1, (-1, p.head_dim)).transpose(1, 2)
        seen = cache.extend(v[..., :0], v[..., :0], v, attention_mask)  # keys of no size: they are kept once, below
        new = torch.arange(before, total, device=x.device)[None]
        keys = heads(self.stream[None, before:total], p.k, new)
        cache.keys = keys = keys if cache.keys is None else torch.cat([cache.keys, keys], 2)
        at = new if seen.query_positions is None else seen.query_positions.clamp(min=0)
        q = heads(self.stream[at], p.q, at)
        if seen.key_positions is not None:  # each row's tokens have places of their own
            keys = keys[0][:, seen.key_positions.clamp(min=0)].transpose(0, 1)
        b = len(x)
        return attend(q.expand(b, -1, -1, -1), keys.expand(b, -1, -1, -1), seen.v, *stages, **seen.places)

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """An empty cache for decoding."""
        kinds = {"mlp": Nothing, "approximate": KeyValues, "non_approximate": Running, "fixed": FixedKeys}
        made: Cache = kinds[self.variant]()
        return made


def oracle(mixer: DeconstructingAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""
    p, d = mixer.projections, mixer.projections.head_dim
    wq, wk, wv, wo = (f.weight for f in (p.q, p.k, p.v, p.out))

    def silu(row: Tensor) -> Tensor:
        return row / (1 + torch.exp(-row))

    def turned(row: Tensor, place: int) -> Tensor:
        if mixer.rotary is None:
            return row
        rates = [cmath.exp(1j * place * mixer.rotary.base ** (-2 * i / d)) for i in range(d // 2)]
        moved = torch.complex(row[: d // 2], row[d // 2 :]) * torch.tensor(rates, dtype=torch.complex128)
        return torch.cat([moved.real, moved.imag])

    rows = []
    for i in range(len(x)):
        if mixer.variant == "mlp":
            rows.append(wo @ (wv @ (silu(wq @ x[i]) * (wk @ x[i]))))
            continue
        read = []
        for head in range(p.heads):
            at, total, out = slice(head * d, head * d + d), torch.zeros((), dtype=x.dtype), torch.zeros(d, dtype=x.dtype)
            for j in visible[i].nonzero().flatten().tolist():
                if mixer.variant == "non_approximate":
                    weight = torch.exp((silu(wq[at] @ x[j]) * (wk[at] @ x[j])).sum() / d**0.5)
                else:
                    states = x if mixer.variant == "approximate" else mixer.stream
                    assert states is not None
                    s = (turned(wq[at] @ states[i], i) * turned(wk[at] @ states[j], j)).sum() / d**0.5
                    weight = 1 + s + s * s / 2 if mixer.variant == "approximate" else torch.exp(s)
                total, out = total + weight, out + weight * (wv[at] @ x[j])
            read.append(out / total)
        rows.append(wo @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[DeconstructingAttention]:
    """Settings that the conformance checks run."""
    width, generator = heads * size, torch.Generator().manual_seed(4)
    text = torch.randn(64, width, generator=generator) * 2
    made = [DeconstructingAttention(width, heads, variant) for variant in VARIANTS[:3]]
    made += [DeconstructingAttention(width, heads, "fixed", stream=text), DeconstructingAttention(width, heads, "fixed", tokens=48)]
    made[1].rotary = made[3].rotary = Rotary(base=50.0)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> DeconstructingAttention:
    """The approximation, unless another variant is named; a random stream, if it is to be fixed."""
    options = {"variant": "approximate", **options}
    if options["variant"] == "fixed" and "stream" not in options:
        options = {"tokens": tokens, **options}
    return DeconstructingAttention(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formulas promise, and how far off it is."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 11, 16, dtype=torch.float64)
    alone, taylor, silent = (DeconstructingAttention(16, 2, variant).double() for variant in VARIANTS[:3])
    fixed = DeconstructingAttention(16, 2, "fixed", tokens=20).double()
    counts = [sum(p.numel() for p in mixer.parameters()) for mixer in (alone, taylor, silent, fixed)]
    yield "all have the 4 c^2 parameters of attention", float(sum(abs(count - 4 * 16**2) for count in counts))
    yield "mlp: no other token matters", largest(alone(x)[:, 5] - alone(torch.cat([y[:, :5], x[:, 5:6], y[:, 6:]], 1))[:, 5])

    q, k, v = taylor.projections.split(x)
    near = attend(1e-4 * q, k, v, Causal(), Taylor()) - attend(1e-4 * q, k, v, Causal())
    yield "approximate: small scores are softmax", largest(near)
    keys, queries = _features(k), _features(q)
    sums = (keys[..., None] * torch.cat([v, torch.ones_like(v[..., :1])], -1)[..., None, :]).cumsum(2)
    linear = (queries[..., None, :] @ sums).squeeze(-2)
    yield (
        "approximate: sums over 1 + d + d^2 features of keys hold all of the past",
        largest(linear[..., :-1] / linear[..., -1:] - attend(q, k, v, Causal(), Taylor())),
    )

    t, eye = torch.randn(1, 2, 11, dtype=torch.float64), torch.eye(11, dtype=torch.float64).expand(1, 2, 11, 11)
    weights = Running().read(t, eye, (Causal(),), None)
    ratio, wanted = weights / weights[..., :1], (t - t[..., :1]).exp()[..., None, :].expand(-1, -1, 11, -1).tril()
    yield "non-approximate: A_ij / A_i0 is the same for all queries", largest(ratio - wanted)
    long = torch.randn(1, 2 * PIECE + 9, 16, dtype=torch.float64)
    whole = silent(long, Causal())
    yield "non-approximate: later queries read in pieces the same", largest(whole - _sums(silent, long))
    yield "non-approximate: reading both sides, all read what the last one does", largest(silent(long) - whole[:, -1:])
    cache, pad = silent.new_cache(), torch.zeros(3, 2, dtype=torch.bool)
    parts = [silent(x[:, :4], Causal(), cache=cache)]
    silent(y[:, :2], Causal(), cache=cache, attention_mask=pad)
    parts.append(silent(x[:, 4:], Causal(), cache=cache))
    yield "non-approximate: a piece of padding is not there", largest(torch.cat(parts, 1) - silent(x, Causal()))
    for mixer, numbers, words in (
        (alone, 0, "mlp: nothing"),
        (taylor, 2 * 3 * 11 * 16, "approximate: keys and values, 2 L c numbers a row"),
        (silent, 3 * (16 + 2), "non-approximate: c + heads numbers a row, however long the past"),
        (fixed, (3 + 1) * 11 * 16, "fixed: L c numbers a row, and as many for all rows together"),
    ):
        cache = mixer.new_cache()
        for start in (0, 4, 10):
            mixer(x[:, start : {0: 4, 4: 10, 10: 11}[start]], Causal(), cache=cache)
        yield f"kept, {words}", float(abs(cache.nbytes - 8 * numbers))

    apart = fixed(x + 3 * y, Causal()) - fixed(x, Causal()) - 3 * fixed(y, Causal())
    yield "fixed: weights do not depend on the text, so that all is linear", largest(apart)
    plain, own = Attention(16, 2).double(), DeconstructingAttention(16, 2, "fixed", stream=x[0]).double()
    own.projections = plain.projections
    yield "fixed: on its own text it is attention", largest(own(x[:1], Causal()) - plain(x[:1], Causal()))


def _features(x: Tensor) -> Tensor:
    """(..., 1 + d + d^2), whose products are 1 + s + s^2 / 2."""
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, (x[..., None] * x[..., None, :]).flatten(-2) / 2**0.5], -1)


def _sums(mixer: DeconstructingAttention, x: Tensor) -> Tensor:
    """The non-approximate variant by two running sums, as the paper's recurrent form."""
    q, k, v = mixer.projections.split(x)
    e = ((q * q.sigmoid() * k).sum(-1, keepdim=True) / q.shape[-1] ** 0.5).exp()
    return mixer.projections.merge((e * v).cumsum(2) / e.cumsum(2))
