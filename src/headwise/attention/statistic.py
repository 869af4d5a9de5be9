"""Statistics of a read: what each is, by a formula on a block of the weights, which is also the specification.

A statistic sees a block's scores, weights and log-normalizer in at least float32. Row statistics give (b, h, n, ...),
column statistics (b, h, m). Every statistic is per query head unless it says otherwise: grouped heads share keys, not what
they make of them. What runs them, a block of rows at a time or in a fused kernel, is in `sweep`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..errors import ShapeError
from .read import Operands
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

    @property
    def width(self) -> int:
        """Numbers a row: 1 for (b, h, n), more for (b, h, n, width)."""
        return 1

    @abstractmethod
    def of(self, sweep: Sweep) -> Tensor:
        """This block's part."""

    def finish(self, total: Tensor, x: Operands) -> Tensor:
        """What is made of all parts together."""
        return total

    def of_row(self, row: int) -> Self:
        """The same statistic for one row of the batch."""
        return self

    def of_queries(self, start: int, stop: int) -> Self:
        """The same statistic for some of the queries."""
        return self

    def of_keys(self, count: int) -> Self:
        """The same statistic for the first `count` keys."""
        return self

    def check(self, x: Operands) -> None:
        """Raises: ShapeError if the statistic's own tensors do not fit the read."""
        return


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
        smallest = torch.finfo(sweep.weights.dtype).tiny  # instead of 0, whose logarithm has no gradient
        return -(sweep.weights * sweep.weights.clamp(min=smallest).log()).sum(-1)


class WeightSquare(Statistic):
    """(b, h, n): sum p^2, the second moment of the weights; its inverse is how many keys a row looks at."""

    def of(self, sweep: Sweep) -> Tensor:
        return sweep.weights.square().sum(-1)


@dataclass(frozen=True)
class DistanceSquare(Statistic):
    """(b, h, n): sum p (query position - key position)^2, in square tokens."""

    def of(self, sweep: Sweep) -> Tensor:
        return (sweep.weights * sweep.block.distance().to(sweep.weights.dtype).square()).sum(-1)


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

    @property
    def width(self) -> int:
        return self.spans.shape[-2]

    def of_row(self, row: int) -> SpanMass:
        return self if self.spans.dim() == 2 else SpanMass(self.spans[row : row + 1])

    def of_keys(self, count: int) -> SpanMass:
        return SpanMass(self.spans[..., :count])

    def check(self, x: Operands) -> None:
        if self.spans.shape[-1] != x.k.shape[2] or (self.spans.dim() == 3 and len(self.spans) != len(x.q)):
            raise ShapeError(f"spans are {tuple(self.spans.shape)}, the read has {len(x.q)} rows of {x.k.shape[2]} keys")

    def of(self, sweep: Sweep) -> Tensor:
        spans = self.spans.to(sweep.weights.dtype)[..., sweep.block.key_index.to(self.spans.device)]
        return torch.matmul(sweep.weights, spans.transpose(-1, -2)[:, None] if spans.dim() == 3 else spans.T)


@dataclass(frozen=True, eq=False)
class SegmentMass(Statistic):
    """(b, h, n, count): weight on each segment. segments: integers (m,) or (b, m), the segment of each key; -1 for none."""

    segments: Tensor
    count: int

    @property
    def width(self) -> int:
        return self.count

    def of(self, sweep: Sweep) -> Tensor:
        own = torch.atleast_2d(self.segments).to(sweep.weights.device)[:, sweep.block.key_index]
        table = (own[..., None] == torch.arange(self.count, device=own.device)).to(sweep.weights.dtype)
        return torch.matmul(sweep.weights, table[:, None])

    def of_row(self, row: int) -> SegmentMass:
        return (
            self if self.segments.dim() == 1 or len(self.segments) == 1 else SegmentMass(self.segments[row : row + 1], self.count)
        )

    def of_keys(self, count: int) -> SegmentMass:
        return SegmentMass(self.segments[..., :count], self.count)

    def check(self, x: Operands) -> None:
        rows = torch.atleast_2d(self.segments).shape
        if rows[1] != x.k.shape[2] or rows[0] not in (1, len(x.q)):
            raise ShapeError(f"segments are {tuple(self.segments.shape)}, the read has {len(x.q)} rows of {x.k.shape[2]} keys")


@dataclass(frozen=True)
class RecentMass(Statistic):
    """(b, h, n): weight on keys less than `window` places away, the query's own place included."""

    window: int

    def of(self, sweep: Sweep) -> Tensor:
        near = (sweep.block.distance().abs() < self.window).to(sweep.weights.dtype)
        if near.shape[0] == 1:
            return torch.einsum("bhcm,cm->bhc", sweep.weights, near[0, 0])
        return (sweep.weights * near).sum(-1)


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

    def of_row(self, row: int) -> WeightAt:
        return self if len(self.keys) == 1 else WeightAt(self.keys[row : row + 1])

    def of_queries(self, start: int, stop: int) -> WeightAt:
        return WeightAt(self.keys[:, start:stop])

    def check(self, x: Operands) -> None:
        if self.keys.dim() != 2 or self.keys.shape[1] != x.q.shape[2] or len(self.keys) not in (1, len(x.q)):
            raise ShapeError(f"keys to look at are {tuple(self.keys.shape)} for {len(x.q)} rows of {x.q.shape[2]} queries")

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
    """(b, h, m): the weight that each key receives, summed over queries.

    rows: (b or 1, n), how much each query counts (booleans, or factors); None counts all alike. per: "head", or
    "key_value_head" for (b, hk, m), the sum over the query heads that share the key.
    """

    rows: Tensor | None = None
    per: str = "head"
    columns = True

    def of(self, sweep: Sweep) -> Tensor:
        if self.rows is None:
            return sweep.weights.sum(2)
        counted = self.rows[:, sweep.block.query_index].to(sweep.weights)
        return torch.einsum("bhcm,bc->bhm", sweep.weights, counted.expand(sweep.weights.shape[0], -1))

    def finish(self, total: Tensor, x: Operands) -> Tensor:
        if self.per == "head" or total.shape[1] == x.k.shape[1]:
            return total
        return total.unflatten(1, (x.k.shape[1], x.groups)).sum(2)

    def of_row(self, row: int) -> KeyMass:
        return self if self.rows is None or len(self.rows) == 1 else replace(self, rows=self.rows[row : row + 1])

    def of_queries(self, start: int, stop: int) -> KeyMass:
        return self if self.rows is None else replace(self, rows=self.rows[:, start:stop])

    def check(self, x: Operands) -> None:
        if self.per not in ("head", "key_value_head"):
            raise ShapeError(f"key mass is per 'head' or per 'key_value_head', not {self.per!r}")
        if self.rows is None:
            return
        if self.rows.dim() != 2 or self.rows.shape[1] != x.q.shape[2] or len(self.rows) not in (1, len(x.q)):
            raise ShapeError(f"counted rows are {tuple(self.rows.shape)}, the read has {len(x.q)} rows of {x.q.shape[2]} queries")


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


NAMED: dict[str, Statistic] = {
    "log_sum_exp": LogSumExp(),
    "max_weight": MaxWeight(),
    "entropy": Entropy(),
    "distance": Distance(),
    "distance_square": DistanceSquare(),
    "weight_square": WeightSquare(),
    "key_mass": KeyMass(),
}  # the statistics that have no arguments
