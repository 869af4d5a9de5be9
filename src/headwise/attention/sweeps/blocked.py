"""The fast path on CPUs: blocks of the weights that stay in the cache, each row's sums from one matrix product.

A block is `ROWS` queries of as many heads as fit. Of its unnormalised weights P = exp(S - max) one product P [V, 1, place,
...] gives the output, the normaliser and every sum whose factor depends on the key alone; what remains is one pass for the
entropy, one for the maximum, and a narrow strip near the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..read import KeyIndex, Operands, Read, needed_keys, visibility
from ..stage import Block, Pattern
from ..statistic import (
    Distance,
    Entropy,
    KeyMass,
    LocalMass,
    LogSumExp,
    MaxWeight,
    PositionMass,
    RecentMass,
    SpanMass,
    Statistic,
    Sweep,
)

ROWS = 128
ELEMENTS = 1 << 20  # of scores in a block
HIDDEN = -1.0e30  # stands for -inf, where 0 * -inf would be NaN


def refuses(read: Read, x: Operands, statistic: Statistic) -> str | None:
    """Why it cannot run this read; None if it can."""
    if read.scoring or read.weights or read.normalizer is not None:
        return "it knows plain softmax under masks only"
    if read.mask is not None and read.mask.pattern() is None:
        return "the mask has no simple form"
    return None


def run(read: Read, x: Operands, statistics: Sequence[Statistic], output: bool) -> tuple[Tensor | None, list[Tensor]]:
    """The output (b, h, n, dv) before output stages, or None, and every statistic."""
    b, h, n, _ = x.q.shape
    m, groups = x.k.shape[2], x.groups
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    out = x.v.new_empty(b, h, n, x.v.shape[-1]) if output and x.v is not None else None
    pattern = (read.mask.pattern() if read.mask is not None else None) or Pattern()
    triangular = pattern.causal and pattern.window is None and pattern.documents is None and x.aligned and n <= m
    sums = _Sums(x, dtype)
    others: dict[int, Tensor] = {}  # statistics that have no short way, gathered from the weights of each block
    for row in range(b):
        own = x.of_row(row)
        mine = [statistic.of_row(row) for statistic in statistics]
        q, k = own.q[0].to(dtype) * read.scale, own.k[0].to(dtype)
        room = _Room(k, own.v[0].to(dtype) if output and own.v is not None else None)
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            keys = needed_keys(read, own, start, stop)
            frame = _frame(own, start, stop, keys)
            hidden = None if triangular else ~visibility(read, frame)[0, 0].expand(stop - start, len(frame.key_index))
            taken = slice(None) if keys is None else keys
            tables = _tables(mine, frame, pattern.causal, triangular, dtype)
            values = room.factors(torch.stack(list(tables.factors.values()), dim=-1), keys)
            count = max(1, ELEMENTS // (groups * (stop - start) * len(frame.key_index)))
            for first in range(0, len(k), count):
                kv = slice(first, min(first + count, len(k)))
                at = row, slice(first * groups, kv.stop * groups), slice(start, stop)
                part = _part(q[at[1], at[2]], k[kv, taken], values[kv], hidden, frame, room)
                sums.take(at, part, tables, mine)
                if out is not None:
                    out[at] = part.products[..., part.products.shape[-1] - out.shape[-1] :] / part.divisor
                for i, statistic in enumerate(mine):
                    if i in tables.short:
                        continue
                    value = _from_weights(statistic, part)
                    result = others.get(i)
                    if result is None:
                        result = others[i] = value.new_zeros(b, h, m if statistic.columns else n, *value.shape[2:])
                    if not statistic.columns:
                        result[at] = value
                    elif isinstance(keys, Tensor):
                        result[at[:2]] = result[at[:2]].index_add(1, keys, value)
                    else:
                        result[at[:2]][:, taken] += value
    found = [others[i] if i in others else sums.value(i, statistic) for i, statistic in enumerate(statistics)]
    return out, [s.finish(total, x) for s, total in zip(statistics, found, strict=True)]


class _Room:
    """Memory that all blocks of a row of the batch use again: fresh pages for each would cost more than what is done in them."""

    def __init__(self, k: Tensor, v: Tensor | None) -> None:
        self._k, self._v = k, v
        self._wide: Tensor | None = None
        self._blocks: dict[str, Tensor] = {}
        self._later = torch.zeros(0, 0, dtype=torch.bool)

    def factors(self, values: Tensor, keys: KeyIndex) -> Tensor:
        """(kv, m, columns + dv): factors of the keys (m, columns), and beside them the values of each key/value head."""
        columns = values.shape[-1]
        width = self._v.shape[-1] if self._v is not None else 0
        spare = max(-(columns + width) % 8, 16 - columns - width)  # columns of zeros: odd widths are slow in matrix products
        values = F.pad(values, (0, spare))
        columns += spare
        if self._v is None:
            return values.expand(len(self._k), -1, -1)
        if isinstance(keys, Tensor):
            return torch.cat([values.expand(len(self._k), -1, -1), self._v[:, keys]], dim=-1)
        if self._wide is None:
            self._wide = torch.cat([self._k.new_empty(*self._k.shape[:2], columns), self._v], dim=-1)
        wide = self._wide if keys is None else self._wide[:, keys]
        wide[..., :columns] = values
        return wide

    def later(self, count: int) -> Tensor:
        """(count, count): which of the last keys are later than which of the queries."""
        if len(self._later) != count:
            self._later = torch.ones(count, count, dtype=torch.bool).triu_(1)
        return self._later

    def block(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape; what it held before is lost."""
        size = math.prod(shape)
        held = self._blocks.get(name)
        if held is None or held.numel() < size:
            held = self._blocks[name] = self._k.new_empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True)
class _Tables:
    """What a block's rows are summed with, made once for all heads.

    factors: (m,) each, of the key alone. strips, by number of the statistic: (c, s) of query and key, for the last s + rest
    keys, of which the `rest` are all counted in full. short: the statistics that need no more than these.
    """

    factors: dict[Hashable, Tensor]
    strips: dict[int, tuple[Tensor, int]]
    short: set[int]


@dataclass(frozen=True)
class _Part:
    """Some heads' block: S - max and exp of it (h, c, m), each row's largest score (h, c), and P's products with the factors."""

    shifted: Tensor
    raised: Tensor
    top: Tensor
    products: Tensor
    frame: Block
    room: _Room

    @cached_property
    def divisor(self) -> Tensor:
        """(h, c, 1): the sum of each row; the least number there is for a row that sees nothing, whose sums are all zero."""
        return self.products[..., :1].clamp(min=torch.finfo(self.products.dtype).tiny)

    @cached_property
    def weights(self) -> Tensor:
        """(1, h, c, m): the weights themselves, for statistics that have no shorter way."""
        return (self.raised / self.divisor)[None]


class _Sums:
    """The sums of all rows of the read, (b, h, n) each, and what is made of them in the end."""

    def __init__(self, x: Operands, dtype: torch.dtype) -> None:
        self._x, self._dtype = x, dtype
        self._held: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, int] = {}

    def _put(self, key: Hashable, at: tuple[int, slice, slice], value: Tensor) -> None:
        if key not in self._held:
            self._held[key] = self._x.q.new_empty(*self._x.q.shape[:3], *value.shape[2:], dtype=self._dtype)
        self._held[key][at] = value

    def take(self, at: tuple[int, slice, slice], part: _Part, tables: _Tables, statistics: Sequence[Statistic]) -> None:
        """Keeps one block's sums."""
        self._places = {key: i for i, key in enumerate(tables.factors)}
        self._put("top", at, part.top)
        self._put("products", at, part.products[..., : len(tables.factors)])
        if any(isinstance(statistic, Entropy) for statistic in statistics):
            weighted = torch.mul(part.raised, part.shifted, out=part.room.block("weighted", *part.raised.shape))
            self._put("spread", at, weighted.sum(-1))
        for i, (table, rest) in tables.strips.items():
            stop = part.raised.shape[-1] - rest
            counted = (part.raised[..., stop - table.shape[-1] : stop] * table).sum(-1)
            self._put(i, at, counted + part.raised[..., stop:].sum(-1) if rest else counted)

    def value(self, number: int, statistic: Statistic) -> Tensor:
        """(b, h, n, ...): a statistic from the sums; a row that sees nothing has zeros, and -inf for its log-sum-exp."""
        products = self._held["products"]
        total = products[..., 0]
        some = total > 0
        divisor = torch.where(some, total, 1.0)

        def factor(key: Hashable) -> Tensor:
            return products[..., self._places[key]] / divisor

        match statistic:
            case LogSumExp():
                return torch.where(some, self._held["top"] + divisor.log(), -torch.inf)
            case MaxWeight():
                return torch.where(some, 1 / divisor, 0.0)
            case Entropy():
                return torch.where(some, (divisor.log() - self._held["spread"] / divisor).clamp(min=0.0), 0.0)
            case Distance(window=None):
                own = self._x.query_position
                first = own[:, torch.arange(own.shape[1]) // ROWS * ROWS]
                return torch.where(some, (own - first)[:, None] - factor("place"), 0.0)
            case Distance():
                return torch.where(some, float(statistic.window or 0) - self._held[number] / divisor, 0.0)
            case PositionMass():
                return factor(("inside", statistic.start, statistic.stop))
            case RecentMass():
                return self._held[number] / divisor
            case LocalMass():
                return factor(("inside", 0, statistic.sink)) + self._held[number] / divisor
            case SpanMass():
                return torch.stack([factor((number, i)) for i in range(statistic.spans.shape[-2])], dim=-1)
        raise TypeError(f"{type(statistic).__name__} is not made of sums")


def _frame(x: Operands, start: int, stop: int, keys: KeyIndex) -> Block:
    """Places of rows start..stop-1 and of their keys. Its tensors are not for use: grouped heads are not repeated."""
    index, place = torch.arange(x.k.shape[2]), x.key_position
    if keys is not None:
        index, place = index[keys], place[:, keys]
    return Block(x.q[:, :, start:stop], x.k, torch.arange(start, stop), index, x.query_position[:, start:stop], place)


def _tables(statistics: Sequence[Statistic], frame: Block, causal: bool, triangular: bool, dtype: torch.dtype) -> _Tables:
    """Strips only where the last keys are the nearest ones; statistics that are not `short` are computed by their own formula."""
    place, own = frame.key_position[0], frame.query_position[0]
    factors: dict[Hashable, Tensor] = {"one": torch.ones_like(place, dtype=dtype)}
    strips: dict[int, tuple[Tensor, int]] = {}
    short = {
        i
        for i, statistic in enumerate(statistics)
        if isinstance(statistic, LogSumExp | MaxWeight | Entropy | PositionMass | SpanMass)
    }
    for i, statistic in enumerate(statistics):
        if isinstance(statistic, Distance) and statistic.window is None and causal:
            factors["place"] = (place - own[0]).to(dtype)  # relative, so that near places stay exact
            short.add(i)
        elif isinstance(statistic, PositionMass | LocalMass):
            start, stop = (0, statistic.sink) if isinstance(statistic, LocalMass) else (statistic.start, statistic.stop)
            factors["inside", start, stop] = ((place >= start) & (place < stop)).to(dtype)
        elif isinstance(statistic, SpanMass):
            spans = statistic.spans.reshape(-1, statistic.spans.shape[-1]).to(dtype)[:, frame.key_index]
            factors |= {(i, j): span for j, span in enumerate(spans)}
        if triangular and isinstance(statistic, RecentMass | LocalMass | Distance) and statistic.window is not None:
            short.add(i)
            near = place[max(0, len(place) - len(own) - statistic.window + 1) :]
            left = (statistic.window - (own[:, None] - near[None]).abs()).clamp(min=0)
            if isinstance(statistic, Distance):
                strips[i] = left.to(dtype), 0
                continue
            counted = (left > 0) & (near >= (statistic.sink if isinstance(statistic, LocalMass) else 0))
            full = counted | (near[None] > own[:, None])  # later keys weigh nothing, however they are counted
            rest = int(full.all(0).flip(0).long().cumprod(0).sum())
            strips[i] = counted[:, : len(near) - rest].to(dtype), rest
    return _Tables(factors, strips, short)


def _part(q: Tensor, k: Tensor, factors: Tensor, hidden: Tensor | None, frame: Block, room: _Room) -> _Part:
    """q (h, c, d), k (kv, m, d), factors (kv, m, columns); hidden (c, m), or None where the last c keys are the queries'."""
    h, c, d = q.shape
    kv, m, _ = k.shape
    s = torch.bmm(q.reshape(kv, -1, d), k.transpose(1, 2), out=room.block("scores", kv, h // kv * c, m)).view(h, c, m)
    if hidden is None:
        s[:, :, m - c :].masked_fill_(room.later(c), HIDDEN)
    else:
        s.masked_fill_(hidden, HIDDEN)
    top = s.amax(-1)
    s -= top[..., None]
    raised = torch.exp(s, out=room.block("raised", h, c, m))
    if hidden is not None:
        raised.masked_fill_((top <= HIDDEN)[..., None], 0.0)  # rows that see nothing
    return _Part(s, raised, top, torch.bmm(raised.view(kv, -1, m), factors).view(h, c, -1), frame, room)


def _from_weights(statistic: Statistic, part: _Part) -> Tensor:
    """(h, c, ...) or, for columns, (h, m)."""
    total = part.products[..., 0]
    if isinstance(statistic, KeyMass) and statistic.rows is None:
        return torch.bmm((total > 0).to(total.dtype)[:, None] / part.divisor.transpose(1, 2), part.raised)[:, 0]
    log_normalizer = torch.where(total > 0, part.top + total.log(), -torch.inf)
    return statistic.of(Sweep(part.shifted[None], part.weights, log_normalizer[None], part.frame))[0]
