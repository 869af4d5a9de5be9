"""Mixers that keep a state: what one call of them knows, what they keep, and the base that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..attention.stage import Stage
from ..errors import ShapeError
from ..recurrence import recur, weights
from ..stages.causal import Causal
from ..stages.documents import Documents
from ._caches import Cache, Recent
from ._mixer import Mixer, Projections, Real, Tokens
from ._rotary import Rotary


class StateCache(Cache):
    """A state, and the last tokens of each convolution: bytes do not grow with the tokens read."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.recent: dict[str, Recent] = {}
        self.counted: Tensor | None = None  # (b,) tokens without padding; None while there was none
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.state, *(recent.rows for recent in self.recent.values()))

    def count(self, like: Tensor) -> Tensor:
        """How many tokens each row has read, padding not counted."""
        return torch.full((len(like),), self.total, device=like.device) if self.counted is None else self.counted


@dataclass
class Pass:
    """One call of a mixer: which tokens are there, where they stand, where documents begin.

    real: (b, n), False at padding; None while there is none. count: (b,) tokens read before, of the document that goes on.
    places: (b, n), counting real tokens only; 0 before the first.
    ids: (b, n), each token's document; None without documents. causal: whether it reads what came before only.
    """

    cache: StateCache
    causal: bool
    real: Bool[Tensor, "b n"] | None
    count: Tensor
    places: Int[Tensor, "b n"]
    ids: Int[Tensor, "b n"] | None = None
    starts: Bool[Tensor, "b n"] | None = None
    _named: set[str] = field(default_factory=set)

    def rotated(self, x: Float[Tensor, "b h n d"], rotary: Rotary | None) -> Float[Tensor, "b h n d"]:
        """x turned by its places."""
        return x if rotary is None else rotary(x, self.places)

    def convolved(
        self, name: str, x: Float[Tensor, "b n c"], weight: Float[Tensor, "c taps"], bias: Tensor | None = None
    ) -> Float[Tensor, "b n c"]:
        """A causal depthwise convolution: out_t = bias + sum_a weight[:, a] x_(t - taps + 1 + a), within a document.

        name: of its rows in the cache, one for each convolution of the mixer.
        """
        taps = weight.shape[-1]

        def run(rows: Tensor) -> Tensor:
            n = rows.shape[1] - taps + 1
            own = rows[:, taps - 1 :, -1:] if self.ids is not None else None
            out: Tensor | None = None
            for a in range(taps):
                near = rows[:, a : a + n]
                part = near[..., : weight.shape[0]] * weight[:, a]
                if own is not None:
                    part = part * (near[..., -1:] == own)
                out = part if out is None else out + part
            assert out is not None
            return out if bias is None else out + bias

        if self.ids is not None:  # documents go along as a channel, so that they are known of past tokens
            x = torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)), self.ids[..., None].to(x.dtype)], -1)
        return self.kept(name, taps - 1, x, run)

    def kept(self, name: str, back: int, x: Float[Tensor, "b n c"], f: Callable[[Tensor], Tensor]) -> Tensor:
        """f of the last `back` tokens and the new ones, (b, back + n, c) -> (b, n, ...), padding left out: see `Recent.along`."""
        if name in self._named:
            raise ShapeError(f"two parts of a mixer keep their last tokens as {name!r}; give each a name of its own")
        self._named.add(name)
        return self.cache.recent.setdefault(name, Recent(back)).along(x, self.real, f)


def begin(cache: StateCache, x: Tokens, stages: tuple[Stage, ...], attention_mask: Real | None) -> Pass:
    """What a call knows; the cache counts its tokens.

    Raises: ShapeError for a mask of another shape, or stages other than Causal and Documents, which a state can't obey.
    """
    b, n = x.shape[:2]
    if attention_mask is not None and attention_mask.shape != (b, n):
        raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}, the new tokens are (batch, tokens) = {(b, n)}")
    real = None if attention_mask is None else attention_mask.bool()
    count = cache.count(x)
    there = torch.ones(b, n, dtype=torch.bool, device=x.device) if real is None else real
    places = (count[:, None] + there.long().cumsum(1) - 1).clamp(min=0)
    cache.total += n
    if real is not None or cache.counted is not None:
        cache.counted = count + there.sum(1)
    now = Pass(cache, False, real, count, places)
    for stage in stages:
        if isinstance(stage, Causal):
            now.causal = True
        elif isinstance(stage, Documents):
            _documents(now, stage, there)
        else:
            raise ShapeError(f"a state holds all that came before: {stage!r} can't be obeyed; Causal and Documents can")
    return now


def _documents(now: Pass, stage: Documents, there: Tensor) -> None:
    ids = torch.atleast_2d(stage.ids).to(there.device)
    if any(len(row.unique()) != len(row.unique_consecutive()) for row in ids):
        raise ShapeError("a state is cleared where a document begins, so documents must stand one after the other; ids interleave")
    ids = ids.expand(len(there), -1)
    begins = F.pad(ids.diff(dim=1) != 0, (1, 0), value=True)
    first = torch.where(begins, torch.arange(begins.shape[1], device=begins.device), 0).cummax(1).values  # of each document
    last = (now.count - 1).clamp(min=0)  # read before
    inside = last - first.gather(1, last[:, None])[:, 0] + 1
    now.count = torch.where(now.count > 0, inside, 0)
    now.ids = ids.gather(1, now.places)
    now.starts = begins.gather(1, now.places) & there


class Reading(NamedTuple):
    """What `headwise.recurrence.recur` is given: see there."""

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b hk n d"]
    v: Float[Tensor, "b hk n dv"]
    decay: Tensor | None = None
    write: Float[Tensor, "b h n"] | None = None
    erase: Float[Tensor, "b h n"] | None = None
    levels: Float[Tensor, "b h n levels"] | None = None


class StateMixer(Mixer):
    """A mixer whose heads read a state: a subclass says what is read and written (`reading`) and what is made of it (`finish`).

    form: "chunk", "parallel" or "recurrent", which give the same up to rounding; chunk: its tokens; backend: as in `recur`.
    epsilon: outputs are divided by the sum of their weights plus this; None for no normaliser.
    """

    heads: int
    form: str = "chunk"
    chunk: int = 64
    backend: str = "auto"
    epsilon: float | None = None
    bounded = True

    @abstractmethod
    def reading(self, x: Tokens, now: Pass) -> Reading:
        """Queries, keys, values and what governs the state. Padding need not be cared for."""

    def beside(self, out: Float[Tensor, "b h n dv"], given: Reading) -> Float[Tensor, "b h n dv"]:
        """What the heads have read, with what does not come from the state, such as a token's own value; nothing by default."""
        return out

    @abstractmethod
    def finish(self, out: Float[Tensor, "b h n dv"], x: Tokens) -> Tokens:
        """What the heads give, normed, gated and mapped back."""

    def forward(self, x: Tokens, *stages: Stage, cache: StateCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        return self.finish(self.beside(*self._read(x, stages, cache, attention_mask)), x)

    def read(
        self, x: Tokens, *stages: Stage, cache: StateCache | None = None, attention_mask: Real | None = None
    ) -> Float[Tensor, "b h n dv"]:
        """What each head reads of the state, before norms, gates and the map back."""
        return self._read(x, stages, cache, attention_mask)[0]

    def _read(
        self, x: Tokens, stages: tuple[Stage, ...], cache: StateCache | None, attention_mask: Real | None
    ) -> tuple[Tensor, Reading]:
        keep = cache is not None
        cache = self.new_cache() if cache is None else cache
        now = begin(cache, x, stages, attention_mask)
        asked = given = self.reading(x, now)
        size = given.v.shape[-1]
        if self.epsilon is not None:  # the sum of weights is read as one more value, of ones
            given = given._replace(v=torch.cat([given.v, torch.ones_like(given.v[..., :1])], -1))
        if now.causal:
            out, cache.state = recur(
                **given._asdict(), starts=now.starts, state=cache.state, count=now.count, real=now.real,
                form=self.form, chunk=self.chunk, backend=self.backend, last=keep,
            )  # fmt: skip
        else:
            out = both_sides(given, now)
        out = out if self.epsilon is None else over(out[..., :size], out[..., size:] + self.epsilon)
        return out, asked

    def weights(self, x: Tokens, *stages: Stage, attention_mask: Real | None = None) -> Float[Tensor, "b h n n"]:
        """The weights by which outputs are mixtures of values: `read(x)` is these times `reading(x).v`. Quadratic, for looking."""
        now = begin(self.new_cache(), x, stages, attention_mask)
        given = self.reading(x, now)
        if now.causal:
            q, k, _, *rest = given
            found = weights(q, k, **dict(zip(Reading._fields[3:], rest, strict=True)), starts=now.starts, real=now.real)
        else:
            found = _product(given, now)
        return found if self.epsilon is None else over(found, found.sum(-1, keepdim=True) + self.epsilon)

    def new_cache(self, owner: Cache | None = None) -> StateCache:
        """An empty cache for decoding."""
        return StateCache()


class KernelAttention(StateMixer):
    """Attention whose weights are products of features: phi(q_i) . phi(k_j), divided by their sum.

    Args:
        heads: query heads. kv_heads: key/value heads, shared by groups. head_dim: default width / heads.
    """

    rotates = True
    epsilon = 1e-6

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.projections = Projections(width, heads, kv_heads, head_dim, bias)

    @abstractmethod
    def features(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b hk n d"]) -> tuple[Tensor, Tensor]:
        """Features of queries (b, h, n, f) and of keys (b, hk, n, f)."""

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`. Queries and keys are rotated before features are made of them, if at all."""
        q, k, v = self.projections.split(x)
        return Reading(*self.features(now.rotated(q, self.rotary), now.rotated(k, self.rotary)), v)

    def finish(self, out: Float[Tensor, "b h n dv"], x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        return self.projections.merge(out)


def over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is: a row that sees nothing."""
    nothing = denominator == 0
    return (numerator / denominator.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def both_sides(given: Reading, now: Pass) -> Tensor:
    """Every token reads all of them: one state, of the whole text."""
    _require_timeless(given)
    if now.ids is not None:
        return _product(given, now) @ _of_group(given, given.v)
    wide = torch.promote_types(given.q.dtype, torch.float32)
    k, v = given.k, given.v
    if now.real is not None:
        k, v = (t.where(now.real[:, None, :, None], 0.0) for t in (k, v))
    state = _of_group(given, k.mT.to(wide) @ v.to(wide))
    return (given.q.to(wide) @ state).to(v.dtype)


def _product(given: Reading, now: Pass) -> Tensor:
    _require_timeless(given)
    found = given.q @ _of_group(given, given.k).mT
    if now.real is not None:
        found = found.where(now.real[:, None, None, :], 0.0)
    if now.ids is not None:
        found = found.masked_fill((now.ids[:, :, None] != now.ids[:, None, :])[:, None], 0.0)
    return found


def _of_group(given: Reading, t: Tensor) -> Tensor:
    """For every query head, that of its key/value head."""
    group = given.q.shape[1] // given.k.shape[1]
    return t if group == 1 else t.repeat_interleave(group, 1)


def _require_timeless(given: Reading) -> None:
    if any(t is not None for t in given[3:]):
        raise ShapeError("a state that decays, erases or has levels reads what came before: give Causal()")
