"""What a mixer carries along beside its state: running largest values and log-sums, and the block of tokens that has begun."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import ShapeError
from ...recurrence import recur
from .._states import Pass, Reading, StateCache, StateMixer, both_sides

LEAST = -1e30  # of nothing: finite, so that differences of it are numbers


class CarryCache(StateCache):
    """A state, and named tensors whose sizes do not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.carried: dict[str, Tensor] = {}

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), *self.carried.values())


def carried_of(now: Pass) -> CarryCache:
    """The cache of a call.

    Raises: ShapeError if it is of another mixer.
    """
    if not isinstance(now.cache, CarryCache):
        raise ShapeError(f"this mixer's cache is a CarryCache, from its new_cache(); it was given a {type(now.cache).__name__}")
    return now.cache


def running(name: str, x: Float[Tensor, "b h n c"], now: Pass, largest: bool = False) -> Float[Tensor, "b h n1 c"]:
    """Log of the sum of exp(x), or the largest x, of each channel over its document up to each token, padding left out.

    Read causally, (b, h, 1 + n, c): before the first token, then at each. Else (b, h, n, c): over all of each token's document.
    """
    if now.real is not None:
        x = x.where(now.real[:, None, :, None], LEAST)
    before = torch.full_like(x[:, :, :1], LEAST)
    if now.causal:
        cache = carried_of(now)
        out = scan(torch.cat([cache.carried.get(name, before), x], 2), now.starts, largest)
        cache.carried[name] = out[:, :, -1:].clone()
        return out
    if now.starts is None:
        return (x.amax(2, keepdim=True) if largest else x.logsumexp(2, keepdim=True)).expand_as(x)
    n = x.shape[2]
    ends = torch.where(F.pad(now.starts[:, 1:], (0, 1), value=True), torch.arange(n, device=x.device), n)
    last = ends.flip(1).cummin(1).values.flip(1)  # of each token's document
    out = scan(torch.cat([before, x], 2), now.starts, largest)[:, :, 1:]
    return out.gather(2, last[:, None, :, None].expand_as(x))


def scan(x: Tensor, starts: Tensor | None, largest: bool) -> Tensor:
    """Running values of (b, h, 1 + n, c); begun anew at starts (b, n), by doubling how far each looks back."""
    if starts is None:
        return x.cummax(2).values if largest else x.logcumsumexp(2)
    join = torch.maximum if largest else torch.logaddexp
    document = torch.cat([torch.zeros_like(starts[:, :1], dtype=torch.long), starts.long().cumsum(1)], 1)
    step = 1
    while step < x.shape[2]:
        same = (document[:, step:] == document[:, :-step])[:, None, :, None]
        x = torch.cat([x[:, :, :step], join(x[:, :, step:], x[:, :, :-step].where(same, LEAST))], 2)
        step *= 2
    return x


def summed(name: str, mixer: StateMixer, q: Tensor, k: Tensor, v: Tensor, now: Pass) -> Float[Tensor, "b h n dv"]:
    """q_i . sum_j k_j v_j over the tokens j that i reads; sums of the past go on in the cache under a name."""
    if not now.causal:
        return both_sides(Reading(q, k, v), now)
    cache = carried_of(now)
    out, cache.carried[name] = recur(
        q, k, v, starts=now.starts, state=cache.carried.get(name), real=now.real,
        form=mixer.form, chunk=mixer.chunk, backend=mixer.backend,
    )  # fmt: skip
    return out


class NearReading(Reading):
    """What a state is given, and what tokens have read beside it, (b, h, n, d): for `StateMixer.beside`."""

    near: Tensor | None = None

    @staticmethod
    def of(given: Reading, near: Tensor | None) -> NearReading:
        """A reading with what goes beside it."""
        made = NearReading(*given)
        made.near = near
        return made


@dataclass
class Pieces:
    """The blocks of `size` tokens that a call's tokens fall into, each document's own, padding left out.

    filled: (b, slots), whether a slot holds a token. old: whether an earlier call's. source: (b, slots), which new token.
    slots: (b, n), of each token. kept: (b, size), the slots of the block that goes on. inside: (b,), its tokens so far.
    """

    size: int
    filled: Bool[Tensor, "b slots"]
    old: Bool[Tensor, "b slots"]
    source: Tensor
    slots: Tensor
    kept: Tensor
    cache: CarryCache

    @staticmethod
    def of(now: Pass, size: int) -> Pieces:
        """The blocks of a call; the cache is told where the next one's go on."""
        (b, n), cache, device = now.places.shape, carried_of(now), now.places.device
        there = torch.ones(b, n, dtype=torch.bool, device=device) if now.real is None else now.real
        inside = cache.carried.get("inside", torch.zeros(b, dtype=torch.long, device=device))[:, None]
        at = there.long().cumsum(1) - 1
        place, blocks = inside + at, -(-(n + size - 1) // size)
        if now.starts is not None:
            begin = at.where(now.starts, -1).cummax(1).values
            place = place.where(begin < 0, at - begin)
        offset = place % size
        block = (there & (offset == 0)).long().cumsum(1) - 1 + (inside > 0).long()
        if now.starts is not None:
            blocks = max(blocks, int(block.max()) + 1)
        slots = (block * size + offset).clamp(0, blocks * size - 1)
        target = slots.where(there, blocks * size)
        source = slots.new_zeros(b, blocks * size + 1).scatter(1, target, torch.arange(n, device=device).expand(b, -1))[:, :-1]
        new = torch.zeros_like(source, dtype=torch.bool)
        new = torch.cat([new, new[:, :1]], 1).scatter(1, target, there)[:, :-1]
        old = torch.arange(blocks * size, device=device) < inside
        after = torch.maximum(slots.where(there, -1).amax(1, keepdim=True), inside - 1) + 1
        cache.carried["inside"] = (after % size)[:, 0]
        kept = after // size * size + torch.arange(size, device=device)
        return Pieces(size, new | old, old, source, slots, kept, cache)

    def cut(self, new: Float[Tensor, "b h n d"], name: str | None = None) -> Float[Tensor, "b h blocks size d"]:
        """Tokens by blocks, zeros where nothing is filled. name: of what the cache has of the first block, and then of the last."""
        rows = new.gather(2, _across(self.source, new))
        earlier = None if name is None else self.cache.carried.get(name)
        if earlier is not None:
            first = earlier.to(rows.dtype).where(self.old[:, None, : self.size, None], rows[:, :, : self.size])
            rows = torch.cat([first, rows[:, :, self.size :]], 2)
        rows = rows.where(self.filled[:, None, :, None], 0.0)
        if name is not None:
            longer = torch.cat([rows, torch.zeros_like(rows[:, :, : self.size])], 2)
            self.cache.carried[name] = longer.gather(2, _across(self.kept, rows))
        return rows.unflatten(2, (-1, self.size))

    def joined(self, cut: Float[Tensor, "b h blocks size d"]) -> Float[Tensor, "b h n d"]:
        """What each new token has."""
        flat = cut.flatten(2, 3)
        return flat.gather(2, _across(self.slots, flat))

    @property
    def seen(self) -> Bool[Tensor, "b 1 blocks 1 size"]:
        """Which slots of each block hold a token."""
        return self.filled.unflatten(1, (-1, self.size))[:, None, :, None]


def _across(rows: Tensor, like: Tensor) -> Tensor:
    """Row numbers (b, m), for a gather from (b, h, n, d)."""
    return rows[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[-1])
