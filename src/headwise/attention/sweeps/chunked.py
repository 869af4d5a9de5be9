"""Any statistic of any read, a block of rows of all heads at a time; with gradients. The specification when blocks are whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..read import Operands, Read, repeat_heads, row_blocks, rows_of, take_keys
from ..statistic import Statistic, Sweep


def refuses(read: Read, x: Operands, statistic: Statistic) -> str | None:
    """It runs anything."""
    return None


def run(
    read: Read, x: Operands, statistics: Sequence[Statistic], output: bool, rows: int | None = None
) -> tuple[Tensor | None, list[Tensor]]:
    """The output (b, h, n, dv) before output stages, or None, and every statistic. Memory O(n x rows), backward too."""

    def block(start: int, stop: int) -> list[Tensor]:
        part = rows_of(read, x, start, stop)
        sweep = Sweep(part.scores, part.weights, part.log_normalizer, part.block)
        parts = [statistic.of(sweep) for statistic in statistics]
        parts = [_whole(p, x.k.shape[2], part.keys) if s.columns else p for p, s in zip(parts, statistics, strict=True)]
        if output:
            assert x.v is not None
            values = repeat_heads(take_keys(x.v, part.keys), x.groups)
            parts.append(torch.matmul(part.weights, values.to(part.weights.dtype)).to(x.v.dtype))
        return parts

    joined: list[list[Tensor]] = [[] for _ in range(len(statistics) + output)]
    for start, stop in row_blocks(x, rows):
        keep_nothing = torch.is_grad_enabled()
        parts = checkpoint(block, start, stop, use_reentrant=False) if keep_nothing else block(start, stop)
        for i, part in enumerate(parts):
            if i < len(statistics) and statistics[i].columns and joined[i]:
                joined[i] = [joined[i][0] + part]
            else:
                joined[i].append(part)
    totals = [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in joined]
    out = totals.pop() if output else None
    return out, [s.finish(total, x) for s, total in zip(statistics, totals, strict=True)]


def _whole(part: Tensor, m: int, keys: slice | Tensor | None) -> Tensor:
    """(b, h, needed keys) -> (b, h, m), zero elsewhere."""
    if keys is None:
        return part
    index = torch.arange(m, device=part.device)[keys]
    return part.new_zeros(*part.shape[:2], m).index_add(2, index, part)
