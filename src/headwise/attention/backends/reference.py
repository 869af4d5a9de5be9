"""The specification: every score at once, in float64 if the tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..read import Operands, Read, apply_outputs, repeat_heads, rows_of


def refuses(read: Read, x: Operands) -> str | None:
    """It runs anything."""
    return None


def shuns(read: Read, x: Operands) -> str | None:
    """Nothing: it stands last."""
    return None


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv), holding all n x m weights."""
    assert x.v is not None
    weights = rows_of(read, x, 0, x.q.shape[2], whole=True).weights
    out = torch.matmul(weights, repeat_heads(x.v, x.groups).to(weights.dtype)).to(x.v.dtype)
    return apply_outputs(read, out, x)
