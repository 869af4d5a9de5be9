"""Statistics reduced to a number a head while they are gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .read import Operands, Read
from .statistic import Statistic
from .sweeps import sweep

ELEMENTS = 1 << 24  # of a wide row statistic held at once


def reduced(
    read: Read, x: Operands, statistics: Sequence[Statistic], counted: Tensor | None, backend: str | None = None
) -> list[Tensor]:
    """Row statistics -> (h, ...) means over batch and counted queries, float64; columns -> (h, m) sums over the batch."""
    b, _, n, _ = x.q.shape
    if counted is None:
        counted = torch.ones(1, n, dtype=torch.bool, device=x.q.device)
    counted = counted.to(x.q.device).expand(b, -1)
    wide = {i for i, statistic in enumerate(statistics) if statistic.width > 1}
    narrow = [statistic for i, statistic in enumerate(statistics) if i not in wide]
    found = iter(sweep(read, x, narrow, backend=backend)[1] if narrow else ())
    return [
        _reduced_wide(read, x, statistic, counted, backend) if i in wide
        else next(found).sum(0, dtype=torch.float64) if statistic.columns
        else torch.div(*_sums(next(found), counted))
        for i, statistic in enumerate(statistics)
    ]  # fmt: skip


def _sums(value: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(b, h, n, ...) -> the sums over counted queries (h, ...), and how many were finite (a row may see nothing), at least 1."""
    used = value.isfinite() & counted[:, None].view(*counted[:, None].shape, *[1] * (value.dim() - 3)).bool()
    return torch.where(used, value, 0.0).sum((0, 2), dtype=torch.float64), used.sum((0, 2)).clamp(min=1)


def _reduced_wide(read: Read, x: Operands, statistic: Statistic, counted: Tensor, backend: str | None) -> Tensor:
    """A statistic with many numbers a row: some rows at a time."""
    b, h, n, _ = x.q.shape
    rows = max(128, ELEMENTS // (b * h * statistic.width))
    pattern = read.mask.pattern() if read.mask is not None else None
    aligned = x.aligned and pattern is not None and pattern.causal and n <= x.k.shape[2]
    total = torch.zeros((), dtype=torch.float64, device=x.q.device)
    count = torch.zeros((), dtype=torch.float64, device=x.q.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        part = x.of_queries(start, stop, aligned) if rows < n else x
        mine = statistic.of_queries(start, stop).of_keys(part.k.shape[2])
        sums, used = _sums(sweep(read, part, [mine], backend=backend)[1][0], counted[:, start:stop])
        total, count = total + sums, count + used
    return total / count
