"""Statistics of a read without its n x m weights: a sweep over blocks of rows, each reduced before the next.

A statistic sees a block's scores, weights and log-normalizer in at least float32. Row statistics give (b, h, n, ...),
column statistics (b, h, m). Every statistic is per query head: grouped heads share keys, not what they make of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .read import Operands, Read, block_of, needed_keys, row_blocks, scores, weigh
from .stage import Block


@dataclass(frozen=True)
class Sweep:
    """What a statistic may use of one block of rows."""

    scores: Tensor  # (b, h, c, m), -inf where masked
    weights: Tensor  # (b, h, c, m)
    log_normalizer: Tensor  # (b, h, c)
    block: Block


class Statistic(ABC):
    """Something measured on the weights of a read."""

    columns = False  # True: rows give (b, h, m) parts that are added; False: (b, h, c, ...) parts that are joined

    @abstractmethod
    def of(self, sweep: Sweep) -> Tensor:
        """This block's part."""

    def finish(self, total: Tensor, x: Operands) -> Tensor:
        """What is made of all parts together."""
        return total


class LogSumExp(Statistic):
    """(b, h, n): the logarithm of each row's normalizer; -inf where every key is masked."""

    def of(self, sweep: Sweep) -> Tensor:
        return sweep.log_normalizer


class MaxWeight(Statistic):
    """(b, h, n): the largest weight of each row."""

    def of(self, sweep: Sweep) -> Tensor:
        return sweep.weights.amax(-1)


class Entropy(Statistic):
    """(b, h, n): -sum p log p in nats, 0 for a row that sees one key or none."""

    def of(self, sweep: Sweep) -> Tensor:
        return -torch.xlogy(sweep.weights, sweep.weights).sum(-1)


@dataclass(frozen=True)
class Distance(Statistic):
    """(b, h, n): sum p |query position - key position|, in tokens; with `window`, distances above it count as `window`."""

    window: int | None = None

    def of(self, sweep: Sweep) -> Tensor:
        distance = sweep.block.distance().abs()
        if self.window is not None:
            distance = distance.clamp(max=self.window)
        if distance.shape[0] == 1:  # one table for the whole batch: a matrix product with no copy of the weights
            return torch.einsum("bhcm,cm->bhc", sweep.weights, distance[0, 0].to(sweep.weights.dtype))
        return (sweep.weights * distance).sum(-1)


@dataclass(frozen=True, eq=False)
class SpanMass(Statistic):
    """(b, h, n, spans): weight on each span. spans: booleans (spans, m) or (b, spans, m) over key indices."""

    spans: Tensor

    def of(self, sweep: Sweep) -> Tensor:
        spans = self.spans.to(sweep.weights.dtype)[..., sweep.block.key_index.to(self.spans.device)]
        return torch.matmul(sweep.weights, spans.transpose(-1, -2)[:, None] if spans.dim() == 3 else spans.T)


@dataclass(frozen=True)
class PositionMass(Statistic):
    """(b, h, n): weight on keys at positions start..stop-1 (empty slots have no position)."""

    start: int
    stop: int

    def of(self, sweep: Sweep) -> Tensor:
        position = sweep.block.key_position
        inside = (position >= self.start) & (position < self.stop)
        return torch.einsum("bhcm,bm->bhc", sweep.weights, inside.to(sweep.weights.dtype).expand(sweep.weights.shape[0], -1))


@dataclass(frozen=True)
class LocalMass(Statistic):
    """(b, h, n): weight on the first `sink` positions and on keys closer than `window` (the query's own place counts)."""

    sink: int
    window: int

    def of(self, sweep: Sweep) -> Tensor:
        position = sweep.block.key_position[:, None, None, :]
        local = (sweep.block.distance().abs() < self.window) | ((position >= 0) & (position < self.sink))
        if local.shape[0] == 1:
            return torch.einsum("bhcm,cm->bhc", sweep.weights, local[0, 0].to(sweep.weights.dtype))
        return (sweep.weights * local).sum(-1)


@dataclass(frozen=True, eq=False)
class WeightAt(Statistic):
    """(b, h, n): the weight on one chosen key of each row. keys: (b or 1, n) key indices, negative for none (gives 0)."""

    keys: Tensor

    def of(self, sweep: Sweep) -> Tensor:
        keys = self.keys[:, sweep.block.query_index].to(sweep.weights.device)
        columns = sweep.block.key_index
        place = torch.searchsorted(columns, keys.contiguous()).clamp(max=len(columns) - 1)
        there = (columns[place] == keys)[:, None, :, None]
        place = place[:, None, :, None].expand(*sweep.weights.shape[:3], 1)
        return (sweep.weights.gather(-1, place) * there).squeeze(-1)


class TopKey(Statistic):
    """(b, h, n): the key index of the largest score, the lowest of equals; -1 where every key is masked."""

    def of(self, sweep: Sweep) -> Tensor:
        top = sweep.block.key_index[sweep.scores.argmax(-1)]
        return top.masked_fill(sweep.log_normalizer.isinf(), -1)


@dataclass(frozen=True, eq=False)
class KeyMass(Statistic):
    """(b, h, m): the weight that each key receives, summed over queries; rows: (b or 1, n) which queries count."""

    rows: Tensor | None = None
    columns = True

    def of(self, sweep: Sweep) -> Tensor:
        if self.rows is None:
            return sweep.weights.sum(2)
        counted = self.rows[:, sweep.block.query_index].to(sweep.weights)
        return torch.einsum("bhcm,bc->bhm", sweep.weights, counted.expand(sweep.weights.shape[0], -1))


@dataclass(frozen=True)
class HorizonMass(Statistic):
    """(b, h, m): mean weight that each key receives from the queries `near`..`far` tokens after it.

    Keys whose horizon reaches past the last query are averaged over the queries there are; those with none give 0.
    """

    near: int
    far: int
    columns = True

    def of(self, sweep: Sweep) -> Tensor:
        distance = sweep.block.distance()
        return (sweep.weights * ((distance >= self.near) & (distance <= self.far))).sum(2)

    def finish(self, total: Tensor, x: Operands) -> Tensor:
        last = x.query_position.amax(-1, keepdim=True)
        count = (last - x.key_position).clamp(max=self.far) - self.near + 1
        return torch.where(count > 0, total.transpose(0, 1) / count.clamp(min=1), 0.0).transpose(0, 1)


def gather(read: Read, x: Operands, statistics: Sequence[Statistic], rows: int | None = None) -> list[Tensor]:
    """Every statistic in one sweep; memory O(n x rows)."""
    parts: list[list[Tensor]] = [[] for _ in statistics]
    columns: list[Tensor | None] = [None] * len(statistics)
    b, h, _, _ = x.q.shape
    for start, stop in row_blocks(x, rows):
        keys = needed_keys(read, x, start, stop)
        block = block_of(x, start, stop, keys)
        s = scores(read, block)
        weights, log_normalizer = weigh(read, s, block)
        sweep = Sweep(s, weights, log_normalizer, block)
        for i, statistic in enumerate(statistics):
            part = statistic.of(sweep)
            if not statistic.columns:
                parts[i].append(part)
                continue
            total = columns[i]
            if total is None:
                total = columns[i] = part.new_zeros(b, h, x.k.shape[2])
            total[:, :, slice(None) if keys is None else keys] += part
    totals = [torch.cat(part, dim=2) if part else column for part, column in zip(parts, columns, strict=True)]
    return [s.finish(total, x) for s, total in zip(statistics, totals, strict=True)]  # type: ignore[arg-type]
