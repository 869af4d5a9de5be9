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

from ..mask import Pattern
from ..read import KeyIndex, Operands, Read, needed_keys, visibility
from ..stage import Block
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
RUN = 8  # blocks of rows that go through the heads together
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
        for begin in range(0, n, ROWS * RUN):
            blocks = [
                _block_of(read, own, mine, start, min(start + ROWS, n), pattern.causal, triangular, dtype)
                for start in range(begin, min(begin + ROWS * RUN, n), ROWS)
            ]
            rows, longest = blocks[0].stop - blocks[0].start, max(len(block.frame.key_index) for block in blocks)
            count = max(1, ELEMENTS // (groups * rows * longest))
            # heads one after another, so that their keys stay in the cache for a run of blocks
            for first in range(0, len(k), count):
                kv = slice(first, min(first + count, len(k)))
                heads = slice(first * groups, kv.stop * groups)
                for block in blocks:
                    at = row, heads, slice(block.start, block.stop)
                    part = _part(q[at[1], at[2]], k[kv, block.taken], room.factors(block, kv), block, room)
                    sums.take(at, part, block, mine)
                    if out is not None:
                        out[at] = part.products[..., part.products.shape[-1] - out.shape[-1] :] / part.divisor
                    for i, statistic in enumerate(mine):
                        if i in block.short:
                            continue
                        value = _from_weights(statistic, part)
                        result = others.get(i)
                        if result is None:
                            result = others[i] = value.new_zeros(b, h, m if statistic.columns else n, *value.shape[2:])
                        if not statistic.columns:
                            result[at] = value
                        elif isinstance(block.taken, Tensor):
                            result[at[:2]] = result[at[:2]].index_add(1, block.taken, value)
                        else:
                            result[at[:2]][:, block.taken] += value
    found = [others[i] if i in others else sums.value(i, statistic) for i, statistic in enumerate(statistics)]
    return out, [s.finish(total, x) for s, total in zip(statistics, found, strict=True)]


class _Room:
    """Memory that all blocks of a row of the batch use again: fresh pages for each would cost more than what is done in them."""

    def __init__(self, k: Tensor, v: Tensor | None) -> None:
        self._k, self._v = k, v
        self._wide: Tensor | None = None
        self._blocks: dict[str, Tensor] = {}
        self._later = torch.zeros(0, 0, dtype=torch.bool)

    def factors(self, block: _Block, kv: slice) -> Tensor:
        """(kv, m, columns + dv): factors of the block's keys, and beside them the values of some key/value heads."""
        values, count = block.values, kv.stop - kv.start
        width = self._v.shape[-1] if self._v is not None else 0
        spare = max(-(values.shape[-1] + width) % 8, 16 - values.shape[-1] - width)  # odd widths are slow in matrix products
        values = F.pad(values, (0, spare))
        if self._v is None:
            return values.expand(count, -1, -1)
        if isinstance(block.taken, Tensor):
            return torch.cat([values.expand(count, -1, -1), self._v[kv, block.taken]], dim=-1)
        if self._wide is None:
            self._wide = torch.cat([self._k.new_empty(*self._k.shape[:2], values.shape[-1]), self._v], dim=-1)
        wide = self._wide[kv, block.taken]
        wide[..., : values.shape[-1]] = values
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
class _Block:
    """Rows start..stop-1 against the keys `taken`, and what they are summed with, made once for all heads.

    hidden: (c, m) pairs that the mask hides; None where only keys later than their query are, of the last c. values: (m,
    factors), what depends on the key alone; places: which factor is which. strips, by number of the statistic: (c, s) of
    query and key, for the last s + rest keys, of which the `rest` are all counted in full. short: the statistics that need
    no more than these.
    """

    start: int
    stop: int
    taken: slice | Tensor
    frame: Block
    hidden: Tensor | None
    values: Tensor
    places: dict[Hashable, int]
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

    def take(self, at: tuple[int, slice, slice], part: _Part, block: _Block, statistics: Sequence[Statistic]) -> None:
        """Keeps one block's sums."""
        self._places = block.places
        self._put("top", at, part.top)
        self._put("products", at, part.products[..., : len(block.places)])
        if any(isinstance(statistic, Entropy) for statistic in statistics):
            weighted = torch.mul(part.raised, part.shifted, out=part.room.block("weighted", *part.raised.shape))
            self._put("spread", at, weighted.sum(-1))
        for i, (table, rest) in block.strips.items():
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


def _block_of(
    read: Read,
    x: Operands,
    statistics: Sequence[Statistic],
    start: int,
    stop: int,
    causal: bool,
    triangular: bool,
    dtype: torch.dtype,
) -> _Block:
    """Strips only where the last keys are the nearest ones; statistics that are not `short` are computed by their own formula."""
    keys: KeyIndex = needed_keys(read, x, start, stop)
    index, key_position = torch.arange(x.k.shape[2]), x.key_position
    if keys is not None:
        index, key_position = index[keys], key_position[:, keys]
    frame = Block.of_places(torch.arange(start, stop), index, x.query_position[:, start:stop], key_position)
    hidden = None if triangular else ~visibility(read, frame)[0, 0].expand(stop - start, len(index))
    place, own = key_position[0], frame.query_position[0]
    factors: dict[Hashable, Tensor] = {"one": torch.ones_like(place, dtype=dtype)}
    strips: dict[int, tuple[Tensor, int]] = {}
    short = set()
    for i, statistic in enumerate(statistics):
        match statistic:
            case LogSumExp() | MaxWeight() | Entropy():
                short.add(i)
            case Distance(window=None) if causal:
                factors["place"] = (place - own[0]).to(dtype)  # relative, so that near places stay exact
                short.add(i)
            case PositionMass():
                factors["inside", statistic.start, statistic.stop] = _inside(place, statistic.start, statistic.stop, dtype)
                short.add(i)
            case SpanMass():
                spans = statistic.spans.reshape(-1, statistic.spans.shape[-1]).to(dtype)[:, index]
                factors |= {(i, j): span for j, span in enumerate(spans)}
                short.add(i)
            case RecentMass() | LocalMass() | Distance() if triangular and statistic.window is not None:
                strips[i] = _strip(statistic, place, own, dtype)
                short.add(i)
                if isinstance(statistic, LocalMass):
                    factors["inside", 0, statistic.sink] = _inside(place, 0, statistic.sink, dtype)
    places = {key: i for i, key in enumerate(factors)}
    taken = slice(None) if keys is None else keys
    return _Block(start, stop, taken, frame, hidden, torch.stack(list(factors.values()), dim=-1), places, strips, short)


def _inside(place: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return ((place >= start) & (place < stop)).to(dtype)


def _strip(statistic: RecentMass | LocalMass | Distance, place: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """How much each near key counts for each query; and how many of the last keys count in full for all."""
    window = statistic.window or 0
    near = place[max(0, len(place) - len(own) - window + 1) :]
    left = (window - (own[:, None] - near[None]).abs()).clamp(min=0)
    if isinstance(statistic, Distance):
        return left.to(dtype), 0
    counted = (left > 0) & (near >= (statistic.sink if isinstance(statistic, LocalMass) else 0))
    full = counted | (near[None] > own[:, None])  # later keys weigh nothing, however they are counted
    rest = int(full.all(0).flip(0).long().cumprod(0).sum())
    return counted[:, : len(near) - rest].to(dtype), rest


def _part(q: Tensor, k: Tensor, factors: Tensor, block: _Block, room: _Room) -> _Part:
    """q (h, c, d), k (kv, m, d), factors (kv, m, columns)."""
    h, c, d = q.shape
    kv, m, _ = k.shape
    s = torch.bmm(q.reshape(kv, -1, d), k.transpose(1, 2), out=room.block("scores", kv, h // kv * c, m)).view(h, c, m)
    hidden = block.hidden
    if hidden is None:
        s[:, :, m - c :].masked_fill_(room.later(c), HIDDEN)
    else:
        s.masked_fill_(hidden, HIDDEN)
    top = s.amax(-1)
    s -= top[..., None]
    raised = torch.exp(s, out=room.block("raised", h, c, m))
    if hidden is not None:
        raised.masked_fill_((top <= HIDDEN)[..., None], 0.0)  # rows that see nothing
    return _Part(s, raised, top, torch.bmm(raised.view(kv, -1, m), factors).view(h, c, -1), block.frame, room)


def _from_weights(statistic: Statistic, part: _Part) -> Tensor:
    """(h, c, ...) or, for columns, (h, m)."""
    total = part.products[..., 0]
    if isinstance(statistic, KeyMass) and statistic.rows is None:
        return torch.bmm((total > 0).to(total.dtype)[:, None] / part.divisor.transpose(1, 2), part.raised)[:, 0]
    log_normalizer = torch.where(total > 0, part.top + total.log(), -torch.inf)
    return statistic.of(Sweep(part.shifted[None], part.weights, log_normalizer[None], part.frame))[0]
