"""The specification: every score at once, in float64 if the tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..read import Operands, Read, apply_outputs, block_of, repeat_heads, scores, weigh


def refuses(read: Read, x: Operands) -> str | None:
    """It runs anything."""
    return None


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv), holding all n x m weights."""
    assert x.v is not None
    block = block_of(x, 0, x.q.shape[2], None)
    weights, _ = weigh(read, scores(read, block), block)
    out = torch.matmul(weights, repeat_heads(x.v, x.groups).to(weights.dtype)).to(x.v.dtype)
    return apply_outputs(read, out, x)
