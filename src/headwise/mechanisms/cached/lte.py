"""Learnable token eviction: a window, and beyond it only tokens that a small network scores as worth keeping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention import attend
from ...attention.mask import FAR
from ...attention.stage import Stage
from ...card import Card
from ...errors import InputError, ShapeError
from ...stages.causal import Causal
from ...stages.sink import Sink
from ...stages.window import Window
from .._caches import Cache
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest
from .._rotary import Rotary
from ._retention import Bank, Retained, Router, Scored, Until, rows, slots

CARD = Card(
    paper="Alleviating Forgetfulness of Linear Attention by Hybrid Sparse Attention and Contextualized Learnable Token Eviction",
    year=2025,
    room="cache",
    source=(
        "arXiv:2510.20787, abstract, and the authors' code (idiap/hybrid-linear-sparse-attention): scores are sigmoid(z) - 1/2 of "
        "a convolution over keys (before rotation) and values, a window of w tokens besides one's own, sinks, a bank of B tokens, "
        "sinks among them; no bank in training, where all tokens of a score above zero are kept. A prompt is read there with the "
        "bank of its end; here each query reads the bank of its own time, so that decoding is as one pass. Their first sinks are "
        "lost where a prompt is shorter than they are; here not. The last tokens, whose neighbours have not come yet, have no "
        "score here; there one with zeros in their place. Their other variants are plain windows and native sparse attention; "
        "the stack of Gated DeltaNet and this is `hybrid` with full='lte', ratio=1"
    ),
    exempt={
        "gradients": "scores only choose tokens, which has no slope; in training they get the paper's gradient (compared in tests)",
        "half_precision": "rounding changes which tokens are kept",
    },
)
CHUNK = 256  # tokens that leave the window are offered to the bank so many at a time


class _Line(NamedTuple):
    """All keys of a call in the order of their places, those of the cache's window first.

    at: (b, slots) places. real: which slots hold a token. score: (b, h, slots), 0 where it is not known yet.
    """

    k: Tensor
    v: Tensor
    at: Int[Tensor, "b slots"]
    real: Bool[Tensor, "b slots"]
    known: Bool[Tensor, "b slots"]
    score: Float[Tensor, "b h slots"]


class Lte(Mixer):
    """Softmax attention on the last `window` tokens, one's own, and of older ones those that each key/value head keeps.

    A token that leaves the window is kept if its score is above zero, and in the place of the one with the least score where
    `budget` are kept; the first `sinks` always. In training nothing is dropped for the budget: see `Sparsity`.

    Args:
        heads, kv_heads, head_dim: as for `Attention`. window: at least the router's margin - 1, so that a token's neighbours are
            there when it leaves. budget: of each key/value head, sinks included. dilations, dropout: of the router.
    """

    rotates = True
    bounded = True
    cannot = {"full": "tokens are kept or not when they leave the window behind, which is for texts that are read in order"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 768,
        budget: int = 512,
        sinks: int = 4,
        dilations: Sequence[int] = (2, 2, 2),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.width = width
        self.projections = p = Projections(width, heads, kv_heads, head_dim)
        self.router = Router(p.kv_heads, 2 * p.head_dim, dilations, dropout)
        if window < self.router.margin - 1:
            raise ShapeError(
                f"a window of {window}: scores depend on {self.router.margin} later tokens, which must be there when a token "
                f"leaves it; give {self.router.margin - 1} at least"
            )
        if not 0 <= sinks <= budget or not budget:
            raise ShapeError(f"a budget of {budget} with {sinks} sinks among them; give 1 at least, and no more sinks")
        self.window, self.budget, self.sinks = window, budget, sinks
        self.watched: list[Watched] | None = None  # where a `Sparsity` listens

    @property
    def last(self) -> int:
        """How many of the last tokens a cache holds: the window, one's own place, and what a score needs."""
        return max(self.window + 1, 2 * self.router.margin)

    def forward(self, x: Tokens, *stages: Stage, cache: Retained | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`.

        Raises: ShapeError for stages other than Causal: which tokens are read, it says itself. InputError for a cache that was
        filled while gradients were recorded in training.
        """
        if [type(stage) for stage in stages] != [Causal]:
            raise ShapeError(f"what is read is the window and what is kept: {list(stages)} can't be obeyed; give Causal()")
        b, n = x.shape[:2]
        if attention_mask is not None and attention_mask.shape != (b, n):
            raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}, the new tokens are (batch, tokens) = {(b, n)}")
        learning = self.training and torch.is_grad_enabled()
        if cache is not None and len(cache) and (learning or cache.k is None):
            raise InputError("in training whole texts are read, and nothing is kept to go on from; decode without gradients")
        q, k, v = self.projections.split(x)
        new, order = torch.full((b,), n, device=x.device), None
        if attention_mask is not None:
            real = attention_mask.bool()
            new, order = real.sum(1), (~real).int().argsort(dim=1, stable=True)  # tokens, then padding
            q, k, v = (rows(t, order) for t in (q, k, v))
        count = cache.counted if cache is not None and cache.counted is not None else torch.zeros_like(new)
        at, end = count[:, None] + torch.arange(n, device=x.device), count + new
        line = self._line(k, v, cache, count, end)
        turned = line.k if self.rotary is None else self.rotary(line.k, line.at.clamp(min=0))
        q = q if self.rotary is None else self.rotary(q, at)
        out = self._learn(q, turned, line) if learning else self._read(q, turned, line, at, end, cache)
        if order is not None:
            out = rows(out, order.argsort(1))
        if cache is not None:
            cache.counted, cache.total = end, cache.total + n
        return self.projections.merge(out)

    def _line(self, k: Tensor, v: Tensor, cache: Retained | None, count: Tensor, end: Tensor) -> _Line:
        """Keys of the window and new ones, scored as far as their neighbours are there."""
        margin, n = self.router.margin, k.shape[2]
        before, score = 0, k.new_zeros(*k.shape[:2], 0)
        if cache is not None and cache.k is not None and cache.v is not None and cache.score is not None:
            before, score = self.last, cache.score[..., : self.last - margin]
            k, v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
        at = (count - before)[:, None] + torch.arange(before + n, device=k.device)
        real = (at >= 0) & (at < end[:, None])
        both = torch.cat([k, v], -1)
        need = n + 2 * margin
        spare = max(0, need - both.shape[2])
        around, there = F.pad(both, (0, 0, spare, 0))[:, :, -need:], F.pad(real, (spare, 0))[:, -need:]
        found = torch.sigmoid(self.router(around, there)) - 0.5  # of the tokens `margin` before each new one
        not_yet = found.new_zeros(*found.shape[:2], margin)
        score = torch.cat([score, found, not_yet], -1) if before else torch.cat([found, not_yet], -1)[..., margin:]
        known = real & (at + margin < end[:, None])
        return _Line(k, v, at, real, known, score.where(known[:, None], 0.0))

    def _kept(self, line: _Line) -> tuple[Tensor, Tensor, Tensor]:
        """(b, h, slots) places, sinks, and what is kept if there is room: sinks and scores above zero."""
        places = line.at[:, None].expand_as(line.score)
        sink = (places < self.sinks) & line.real[:, None]
        return places, sink, sink | ((line.score > 0) & line.known[:, None])

    def _learn(self, q: Tensor, turned: Tensor, line: _Line) -> Tensor:
        """What queries read in training: the window and all that is kept, whose scores get a gradient by their values."""
        places, _, keep = self._kept(line)
        until = torch.where(keep, FAR, places + self.window + 1).where(line.real[:, None], 0)
        if self.watched is not None:
            self.watched.append(Watched(line.score, line.known, keep))
        v: Tensor = Scored.apply(line.v, line.score)  # type: ignore[no-untyped-call]
        return attend(q, turned, v, Until(places, until, q.shape[1] // v.shape[1]), query_positions=line.at)

    def _read(self, q: Tensor, turned: Tensor, line: _Line, at: Tensor, end: Tensor, cache: Retained | None) -> Tensor:
        """What queries at places `at` read of the line, its keys rotated, and of the bank; the cache takes up what is new."""
        places, sink, keep = self._kept(line)
        worth = line.score.masked_fill(sink, torch.inf).masked_fill(~keep, -torch.inf).detach()
        until, k, v, places = self._through_the_bank(worth, turned, line, places, at.shape[1], end, cache)
        out = attend(q, k, v, Until(places, until, q.shape[1] // k.shape[1]), query_positions=at)
        if cache is not None:
            self._take_up(line, end - line.at[:, 0], cache)
        return out

    def _through_the_bank(
        self, worth: Tensor, k: Tensor, line: _Line, places: Tensor, n: int, end: Tensor, cache: Retained | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Until when keys are read, those of the bank first; all keys, values, and their places."""
        size, held, v = self.budget, 0, line.v
        bank = Bank.empty(worth.shape[0], worth.shape[1], size, worth)
        until = places + self.window + 1
        if cache is not None and cache.bank is not None and cache.bank_k is not None and cache.bank_v is not None:
            held, bank = size, cache.bank
            k, v = torch.cat([cache.bank_k, k], 2), torch.cat([cache.bank_v, v], 2)
            bank = bank._replace(slot=torch.arange(size, device=k.device).expand_as(bank.place))
        m = k.shape[2]
        gone = bank.place.new_zeros(*bank.place.shape[:2], held)
        until = torch.cat([gone, until.where(line.real[:, None], 0), until[..., :1]], -1)  # one slot more, for what is nowhere
        leaving = until[..., held:-1]
        worth = worth.masked_fill(leaving >= end[:, None, None], -torch.inf)  # still in the window
        bank = bank._replace(slot=bank.slot.where(bank.score > -torch.inf, m))
        until = until.scatter(-1, bank.slot, FAR)
        stop = worth.shape[-1] - self.window - 1  # slots before it leave by the last of n queries, from stop - n on not before
        for start in range(max(0, stop - n), stop, CHUNK):
            piece = slice(start, min(start + CHUNK, stop))
            slot = torch.arange(m, device=k.device)[held:][piece].expand_as(worth[..., piece])
            where = torch.cat([bank.slot, slot], -1)
            bank, went = bank.admit(worth[..., piece], places[..., piece], slot, leaving[..., piece])
            until = until.scatter(-1, where, went)
            bank = bank._replace(slot=bank.slot.where(bank.score > -torch.inf, m))
        if cache is not None:
            found = bank.slot.clamp(max=m - 1)
            cache.bank, cache.bank_k, cache.bank_v = bank, slots(k, found), slots(v, found)
        first = places if not held else torch.cat([torch.zeros_like(bank.place), places], -1)
        return until[..., :m], k, v, first

    def _take_up(self, line: _Line, stop: Tensor, cache: Retained) -> None:
        """The last tokens before slot `stop` (b,) of the line, into the cache."""
        index = stop[:, None] + torch.arange(self.last, device=stop.device)
        k, v = (F.pad(t, (0, 0, self.last, 0)) for t in (line.k, line.v))
        cache.k, cache.v = rows(k, index), rows(v, index)
        cache.score = rows(F.pad(line.score, (self.last, 0)), index)

    def new_cache(self, owner: Cache | None = None) -> Retained:
        """An empty cache for decoding."""
        return Retained()


class Watched(NamedTuple):
    """What a pass in training says of tokens: scores (b, h, n), of which are known (b, n), which are kept (b, h, n)."""

    score: Tensor
    known: Tensor
    keep: Tensor


class Sparsity:
    """Holds heads of `Lte` layers to their budgets in training: a loss on scores above zero, times a number for each head.

    The loss is the mean over layers, heads and tokens of multiplier * max(score, 0). Every `every` steps a head's multiplier
    grows by half if it keeps as many tokens as its budget, and is halved if it keeps 95 % or less, by a running mean of how
    many it keeps. It begins at 1e-9 once 95 % are kept, ends at 1, and is 0 below 1e-9.

        with Sparsity(model) as sparsity:
            loss = task(model(ids)) + sparsity.loss()
            sparsity.step()

    Raises: InputError if the model has no such layers.
    """

    low, grow, shrink, least, most = 0.95, 1.5, 2.0, 1e-9, 1.0

    def __init__(self, model: nn.Module, every: int = 32) -> None:
        self.layers = [part for part in model.modules() if isinstance(part, Lte)]
        if not self.layers:
            raise InputError(f"{type(model).__name__} has no Lte layers, whose scores there would be a loss on")
        self.every, self.steps = every, 0
        self.multipliers = [torch.zeros_like(layer.router.bias.detach()) for layer in self.layers]
        self.kept: list[Tensor] | None = None  # running means, (heads,) of each layer

    def __enter__(self) -> Sparsity:
        for layer in self.layers:
            layer.watched = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer in self.layers:
            layer.watched = None

    def _passes(self) -> list[Watched]:
        """The last pass of each layer.

        Raises: InputError if there was none in training.
        """
        if any(not layer.watched for layer in self.layers):
            raise InputError("no pass in training was seen; call the model inside `with Sparsity(model)`, in train mode")
        return [layer.watched[-1] for layer in self.layers if layer.watched]

    def loss(self) -> Tensor:
        """Of the last pass."""
        parts = []
        for multiplier, (score, known, _) in zip(self.multipliers, self._passes(), strict=True):
            total = (F.relu(score) * known[:, None]).sum((0, 2)) / known.sum().clamp(min=1)
            parts.append((multiplier.to(score) * total).mean())
        return torch.stack(parts).mean()

    def step(self) -> None:
        """Counts what the last pass kept; changes the multipliers if it is time."""
        counts = [found.keep.sum(-1).to(torch.float32).mean(0) for found in self._passes()]
        part = 2 / (1 + self.every // 2)
        kept = self.kept or counts
        self.kept = [old + part * (new - old) for old, new in zip(kept, counts, strict=True)]
        self.steps += 1
        for layer in self.layers:
            layer.watched = []
        if self.steps % self.every == 0:
            self.multipliers = [
                self._next(old, many / layer.budget)
                for old, many, layer in zip(self.multipliers, self.kept, self.layers, strict=True)
            ]

    def _next(self, old: Tensor, part: Tensor) -> Tensor:
        factor = torch.where(part >= 1, self.grow, torch.where(part <= self.low, 1 / self.shrink, 1.0)).to(old)
        made = (old * factor).clamp(max=self.most)
        made = made.where(made >= self.least, 0.0)
        return torch.where((made == 0) & (part > self.low), self.least, made)


def oracle(mixer: Lte, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time: what has left the window enters a list, whose least goes when it is full."""
    p, router, n = mixer.projections, mixer.router, len(x)
    d, group, margin = p.head_dim, p.heads // p.kv_heads, router.margin
    heads = []
    for kv in range(p.kv_heads):
        at = slice(kv * d, kv * d + d)
        k, v = x @ p.k.weight[at].T, x @ p.v.weight[at].T
        scores = [_score(mixer, kv, torch.cat([k, v], -1), j) if j + margin < n else None for j in range(n)]
        read = v
        if mixer.training:
            read = torch.stack([value if s is None else value * (1 + s - s.detach()) for value, s in zip(v, scores, strict=True)])
        seen, bank = [], {}
        for i in range(n):
            out = i - mixer.window - 1
            if out >= 0:
                s = scores[out]
                assert s is not None
                bank[out] = torch.inf if out < mixer.sinks else float(s.detach())
                if bank[out] <= 0:
                    del bank[out]
                elif len(bank) > mixer.budget and not mixer.training:
                    del bank[min(reversed(bank), key=lambda j: bank[j])]  # of equal ones, the youngest
            seen.append(sorted(bank) + list(range(max(0, out + 1), i + 1)))
        for head in range(kv * group, kv * group + group):
            q = x @ p.q.weight[head * d : head * d + d].T
            found = []
            for i in range(n):
                e = torch.exp(k[seen[i]] @ q[i] / d**0.5)
                found.append((e / e.sum()) @ read[seen[i]])
            heads.append(torch.stack(found))
    return torch.cat(heads, -1) @ p.out.weight.T


def _score(mixer: Lte, head: int, u: Tensor, j: int) -> Tensor:
    """The score of token j, of one head: each layer's output at each place that it needs, worked out anew."""
    router = mixer.router

    def after(layer: int, place: int) -> Tensor | None:
        if not 0 <= place < len(u):
            return None
        if layer < 0:
            return u[place]
        total, step = router.biases[layer][head], router.dilations[layer]
        for tap in range(3):
            x = after(layer - 1, place + (tap - 1) * step)
            total = total if x is None else total + router.weights[layer][head, :, :, tap] @ x
        return total / (1 + torch.exp(-total))

    x = after(len(router.dilations) - 1, j)
    assert x is not None
    return 1 / (1 + torch.exp(-(router.last[head] @ x + router.bias[head]))) - 0.5


def examples(heads: int, size: int) -> list[Lte]:
    """Settings that the conformance checks run: their banks are full soon, and some scores are below zero."""
    width = heads * size
    made = [
        Lte(width, heads, window=5, budget=3, sinks=1, dilations=(1, 1, 1)),
        Lte(width, heads, kv_heads=heads // 2, window=3, budget=4, sinks=2, dilations=(1, 2)),
        Lte(width, heads, window=2, budget=1, sinks=0, dilations=(1,)),
    ]
    for mixer in made:
        nn.init.constant_(mixer.router.bias, 0.1)
    return made


def neutral(heads: int, size: int) -> list[Lte]:
    """Keep all: plain attention."""
    made = [Lte(heads * size, heads, window=5, budget=64), Lte(heads * size, heads, window=100, budget=4)]
    nn.init.constant_(made[0].router.bias, 50.0)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Lte:
    """The paper's for texts of 4096 tokens, a window of 768 and 512 kept; in proportion for shorter ones, 8 at least."""
    part = min(1.0, tokens / 4096)
    small = {"window": max(8, round(768 * part)), "budget": max(8, round(512 * part))}
    return Lte(heads * size, heads, **{**small, "dilations": (2, 2, 2) if size >= 4 else (2,), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    mixer = Lte(32, 4, kv_heads=2, window=5, budget=30, sinks=2).double().eval()
    plain = Attention(32, 4, kv_heads=2).double()
    plain.projections = mixer.projections
    with torch.no_grad():
        mixer.router.last.zero_()
        for rotary in (None, Rotary()):
            mixer.rotary = plain.rotary = rotary
            mixer.router.bias.fill_(1.0)
            yield "all are kept: full attention", largest(mixer(x, Causal()) - plain(x, Causal()))
            mixer.router.bias.zero_()
            only = largest(mixer(x, Causal()) - plain(x, Causal(), Window(6) | Sink(2)))
            yield "none is kept: a window and sinks; a score of zero is none to keep", only
        mixer.router.bias.fill_(1.0)
        mixer.budget = 5
        first = largest(mixer(x, Causal()) - plain(x, Causal(), Window(6) | Sink(5)))
        yield "of equal scores, the oldest stay", first
    with torch.device("meta"):
        yield "32,385 parameters score a head of 64", sum(p.numel() for p in Router(1, 128).parameters()) - 32385
    cache = mixer.new_cache()
    for piece in x.split(7, 1):
        mixer(piece, Causal(), cache=cache)
    d, last = 8, 12  # 2 margins, which is more than the window and one's own place
    numbers = 2 * 2 * (2 * d * (last + 5) + last + 2 * 5)
    yield "its cache: window and budget, with a score for each and a place in the bank", float(abs(cache.nbytes / 8 - numbers))
