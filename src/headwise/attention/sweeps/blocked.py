"""The fast path on CPUs: blocks of the weights that stay in the cache, each row's sums from one matrix product.

A block is `ROWS` queries of as many heads as fit. Of its unnormalised weights P = exp(S - max) one product P [V, 1, place,
...] gives the output, the normaliser and every sum whose factor depends on the key alone; what remains is one pass for the
entropy, one for the maximum, and a narrow strip near the diagonal.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
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
    results: list[Tensor | None] = [None] * len(statistics)
    pattern = (read.mask.pattern() if read.mask is not None else None) or Pattern()
    triangular = pattern.causal and pattern.window is None and pattern.documents is None and x.aligned and n <= m
    for row in range(b):
        own = x.of_row(row)
        mine = [statistic.of_row(row) for statistic in statistics]
        q, k = own.q[0].to(dtype) * read.scale, own.k[0].to(dtype)
        v = own.v[0].to(dtype) if output and own.v is not None else None
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            keys = needed_keys(read, own, start, stop)
            frame = _frame(own, start, stop, keys)
            hidden = None if triangular else ~visibility(read, frame)[0, 0].expand(stop - start, len(frame.key_index))
            taken = slice(None) if keys is None else keys
            tables = _tables(mine, frame, pattern.causal, triangular, dtype)
            values = torch.stack(list(tables.factors.values()), dim=-1)
            count = max(1, ELEMENTS // (groups * (stop - start) * len(frame.key_index)))
            for first in range(0, len(k), count):
                kv = slice(first, min(first + count, len(k)))
                heads = slice(first * groups, kv.stop * groups)
                factors = values.expand(kv.stop - first, -1, -1)
                if v is not None:
                    factors = torch.cat([factors, v[kv, taken]], dim=-1)
                part = _part(q[heads, start:stop], k[kv, taken], factors, hidden, tables, frame)
                if out is not None:
                    out[row, heads, start:stop] = part.mean(part.products[..., values.shape[-1] :])
                for i, statistic in enumerate(mine):
                    value = _value(statistic, part)
                    result = results[i]
                    if result is None:
                        result = results[i] = value.new_zeros(b, h, m if statistic.columns else n, *value.shape[2:])
                    if not statistic.columns:
                        result[row, heads, start:stop] = value
                    elif isinstance(keys, Tensor):
                        result[row, heads] = result[row, heads].index_add(1, keys, value)
                    else:
                        result[row, heads][:, taken] += value
    return out, [s.finish(total, x) for s, total in zip(statistics, results, strict=True) if total is not None]


@dataclass(frozen=True)
class _Tables:
    """What a block's rows are summed with, made once for all heads.

    factors: (m,) each, of the key alone. strips: (c, s) each, of query and key, for the last s keys.
    """

    factors: dict[Hashable, Tensor]
    strips: dict[Hashable, Tensor]


@dataclass(frozen=True)
class _Part:
    """Some heads' block: S - max and exp of it (h, c, m), max and sum of each row (h, c), and P's products with the factors."""

    shifted: Tensor
    raised: Tensor
    top: Tensor
    total: Tensor
    products: Tensor
    tables: _Tables
    frame: Block

    def mean(self, sums: Tensor) -> Tensor:
        """Sums (h, c, ...) of unnormalised weights over their total; 0 for a row that sees nothing."""
        total = self.total.view(*self.total.shape, *[1] * (sums.dim() - 2))
        return torch.where(total > 0, sums / total, 0.0)

    @cached_property
    def weights(self) -> Tensor:
        """(1, h, c, m): the weights themselves, for statistics that have no shorter way."""
        return self.mean(self.raised)[None]

    def factor(self, key: Hashable) -> Tensor:
        """(h, c): the mean of one factor."""
        return self.mean(self.products[..., list(self.tables.factors).index(key)])

    def strip(self, key: Hashable) -> Tensor:
        """(h, c): the mean of one strip."""
        table = self.tables.strips[key]
        return self.mean((self.raised[..., self.raised.shape[-1] - table.shape[-1] :] * table).sum(-1))


def _frame(x: Operands, start: int, stop: int, keys: KeyIndex) -> Block:
    """Places of rows start..stop-1 and of their keys. Its tensors are not for use: grouped heads are not repeated."""
    index, place = torch.arange(x.k.shape[2]), x.key_position
    if keys is not None:
        index, place = index[keys], place[:, keys]
    return Block(x.q[:, :, start:stop], x.k, torch.arange(start, stop), index, x.query_position[:, start:stop], place)


def _tables(statistics: Sequence[Statistic], frame: Block, causal: bool, triangular: bool, dtype: torch.dtype) -> _Tables:
    """Strips only where the last keys are the nearest ones; a statistic without a table is computed by its own formula."""
    place, own = frame.key_position[0], frame.query_position[0]
    factors: dict[Hashable, Tensor] = {"one": torch.ones_like(place, dtype=dtype)}
    strips: dict[Hashable, Tensor] = {}
    for statistic in statistics:
        if isinstance(statistic, Distance) and statistic.window is None and causal:
            factors["place"] = (place - own[0]).to(dtype)  # relative, so that near places stay exact
        elif isinstance(statistic, PositionMass | LocalMass):
            start, stop = (0, statistic.sink) if isinstance(statistic, LocalMass) else (statistic.start, statistic.stop)
            factors["inside", start, stop] = ((place >= start) & (place < stop)).to(dtype)
        elif isinstance(statistic, SpanMass):
            spans = statistic.spans.reshape(-1, statistic.spans.shape[-1]).to(dtype)[:, frame.key_index]
            factors |= {(id(statistic), i): span for i, span in enumerate(spans)}
        if triangular and isinstance(statistic, RecentMass | LocalMass | Distance) and statistic.window is not None:
            near = place[max(0, len(place) - len(own) - statistic.window + 1) :]
            left = (statistic.window - (own[:, None] - near[None]).abs()).clamp(min=0)
            if isinstance(statistic, Distance):
                strips[statistic] = left.to(dtype)
            else:
                strips[statistic] = ((left > 0) & (near >= (statistic.sink if isinstance(statistic, LocalMass) else 0))).to(dtype)
    return _Tables(factors, strips)


def _part(q: Tensor, k: Tensor, factors: Tensor, hidden: Tensor | None, tables: _Tables, frame: Block) -> _Part:
    """q (h, c, d), k (kv, m, d), factors (kv, m, columns); hidden (c, m), or None where the last c keys are the queries'."""
    h, c, d = q.shape
    kv, m, _ = k.shape
    s = torch.bmm(q.reshape(kv, -1, d), k.transpose(1, 2)).view(h, c, m)
    if hidden is None:
        s[:, :, m - c :].masked_fill_(torch.ones(c, c, dtype=torch.bool).triu_(1), HIDDEN)
    else:
        s.masked_fill_(hidden, HIDDEN)
    top = s.amax(-1)
    s -= top[..., None]
    raised = s.exp()
    if hidden is not None:
        raised.masked_fill_((top <= HIDDEN)[..., None], 0.0)  # rows that see nothing
    products = torch.bmm(raised.view(kv, -1, m), factors).view(h, c, -1)
    return _Part(s, raised, top, products[..., 0], products, tables, frame)


def _value(statistic: Statistic, part: _Part) -> Tensor:
    """(h, c, ...) or, for columns, (h, m)."""
    total, some = part.total, part.total > 0
    log_normalizer = torch.where(some, part.top + total.log(), -torch.inf)
    match statistic:
        case LogSumExp():
            return log_normalizer
        case MaxWeight():
            return torch.where(some, 1 / total, 0.0)
        case Entropy():
            spread = part.mean(torch.linalg.vecdot(part.raised, part.shifted))
            return torch.where(some, (total.log() - spread).clamp(min=0.0), 0.0)
        case Distance(window=None) if "place" in part.tables.factors:
            own = part.frame.query_position[0]
            return torch.where(some, (own - own[0]) - part.factor("place"), 0.0)
        case Distance() if statistic in part.tables.strips:
            return torch.where(some, float(statistic.window or 0) - part.strip(statistic), 0.0)
        case PositionMass():
            return part.factor(("inside", statistic.start, statistic.stop))
        case RecentMass() if statistic in part.tables.strips:
            return part.strip(statistic)
        case LocalMass() if statistic in part.tables.strips:
            return part.factor(("inside", 0, statistic.sink)) + part.strip(statistic)
        case SpanMass():
            return torch.stack([part.factor((id(statistic), i)) for i in range(statistic.spans.shape[-2])], dim=-1)
        case KeyMass(rows=None):
            return torch.bmm(part.mean(torch.ones_like(total))[:, None], part.raised)[:, 0]
    return statistic.of(Sweep(part.shifted[None], part.weights, log_normalizer[None], part.frame))[0]
