"""Exact for any row-wise stage at O(n x rows) memory, forward and backward, on any device.

A softmax read is cut along the keys too where whole rows would not fit: chunks are merged by their maxima and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..read import (
    KeyIndex,
    Operands,
    Read,
    apply_outputs,
    block_of,
    needed_keys,
    repeat_heads,
    row_blocks,
    rows_of,
    scores,
    sweep_bytes,
    take_keys,
)
from ..stage import RowScore
from . import edits_weights, not_softmax

LEAST_ROWS = 16  # rows of a block, below which keys are cut instead


def refuses(read: Read, x: Operands) -> str | None:
    """It runs anything: every stage works on whole rows."""
    return None


def shuns(read: Read, x: Operands) -> str | None:
    """Nothing."""
    return None


def run(read: Read, x: Operands, rows: int | None = None, keys: int | None = None) -> Tensor:
    """(b, h, n, dv), a block of rows at a time; the backward pass computes each block again instead of keeping it.

    rows: how many in a block; keys: how many keys at a time (softmax only). Both chosen by memory if not given.
    """
    assert x.v is not None
    v, m = x.v, x.k.shape[2]
    cuttable = splits(read)
    column = x.q.shape[0] * x.q.shape[1] * LEAST_ROWS * max(4, x.q.dtype.itemsize)  # bytes of a key's scores, at the least
    if keys is None and cuttable and column * m > sweep_bytes(x):
        keys = max(256, sweep_bytes(x) // column)
    if not cuttable or (keys is not None and keys >= m):
        keys = None

    def whole(start: int, stop: int) -> Tensor:
        part = rows_of(read, x, start, stop)
        values = repeat_heads(take_keys(v, part.keys), x.groups)
        return torch.matmul(part.weights, values.to(part.weights.dtype)).to(v.dtype)

    parts = []
    for start, stop in row_blocks(x, rows):
        if keys is not None:
            chunks = [saved(_chunk, read, x, start, stop, part) for part in _chunks(read, x, start, stop, keys)]
            parts.append(_merge(read, chunks).to(v.dtype))
        else:
            parts.append(saved(whole, start, stop))
    return apply_outputs(read, torch.cat(parts, dim=2) if parts else v.new_zeros(*x.q.shape[:3], v.shape[-1]), x)


def saved(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, computed again in the backward pass instead of keeping what it is made from."""
    return checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)


def splits(read: Read) -> bool:
    """Whether a row can be read in pieces: a softmax whose scores know nothing of the rest of their row."""
    apart = not any(isinstance(stage, RowScore) for stage in read.scoring)
    return apart and not_softmax(read) is None and edits_weights(read) is None


def _chunks(read: Read, x: Operands, start: int, stop: int, keys: int) -> list[KeyIndex]:
    """The keys that some rows need, a few at a time; the last piece may be shorter."""
    needed = needed_keys(read, x, start, stop)
    index = torch.arange(x.k.shape[2], device=x.k.device)
    return list((index if needed is None else index[needed]).split(keys))


def _chunk(read: Read, x: Operands, start: int, stop: int, keys: KeyIndex) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised output (b, h, c, dv), sum and maximum (b, h, c, 1) of some rows over some keys."""
    assert x.v is not None
    block = block_of(x, start, stop, keys)
    s = scores(read, block)
    top = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(top.isinf(), 0.0, top))  # a chunk that is all masked adds nothing, and no NaN
    values = repeat_heads(take_keys(x.v, keys), x.groups)
    return torch.matmul(e, values.to(e.dtype)), e.sum(-1, keepdim=True), top


def _merge(read: Read, chunks: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The output of rows from that of their chunks."""
    top = torch.stack([part[2] for part in chunks]).amax(0)
    logit = None if read.normalizer is None else read.normalizer.extra_logit()
    if logit is not None:
        logit = logit.to(top).view(1, -1, 1, 1)
        top = torch.maximum(top, logit.detach())
    top = torch.where(top.isinf(), 0.0, top)
    factors = [torch.exp(part[2] - top) for part in chunks]
    out = sum(part[0] * factor for part, factor in zip(chunks, factors, strict=True))
    total = sum(part[1] * factor for part, factor in zip(chunks, factors, strict=True))
    if logit is not None:
        total = total + torch.exp(logit - top)
    return out / torch.where(total == 0, 1.0, total)  # type: ignore[arg-type, operator, no-any-return, return-value]
