"""Exact for any row-wise stage at O(n x rows) memory, forward and backward, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..read import Operands, Read, apply_outputs, block_of, needed_keys, repeat_heads, row_blocks, scores, take_keys, weigh


def refuses(read: Read, x: Operands) -> str | None:
    """It runs anything: every stage works on whole rows."""
    return None


def run(read: Read, x: Operands, rows: int | None = None) -> Tensor:
    """(b, h, n, dv), a block of rows at a time; the backward pass computes each block again instead of keeping it."""
    assert x.v is not None
    v = x.v

    def rows_of(start: int, stop: int) -> Tensor:
        keys = needed_keys(read, x, start, stop)
        block = block_of(x, start, stop, keys)
        weights, _ = weigh(read, scores(read, block), block)
        values = repeat_heads(take_keys(v, keys), x.groups)
        return torch.matmul(weights, values.to(weights.dtype)).to(v.dtype)

    keep_nothing = torch.is_grad_enabled()
    parts = [
        checkpoint(rows_of, start, stop, use_reentrant=False) if keep_nothing else rows_of(start, stop)
        for start, stop in row_blocks(x, rows)
    ]
    return apply_outputs(read, torch.cat(parts, dim=2) if parts else v.new_zeros(*x.q.shape[:3], v.shape[-1]), x)
