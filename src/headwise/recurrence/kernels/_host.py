"""What the host sides of the kernels share: what all of them refuse, and tensors as they take and make them."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ...attention.backends._launch import power, readable
from ..inputs import Inputs

__all__ = ["alike", "like", "nothing_to_do", "power", "readable", "unfit"]
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def unfit(given: Inputs, widest: int) -> str | None:
    """Why sizes or types of tensors don't fit kernels for heads up to `widest`; None if they do."""
    tensors = (given.q, given.k, given.v)
    largest = max(given.q.shape[-1], given.v.shape[-1])
    if largest > widest:
        return f"heads of size {largest} are larger than {widest}"
    return "the kernels know bfloat16, float16 and float32" if any(t.dtype not in TYPES for t in tensors) else None


def nothing_to_do(q: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Outputs and last state where there are no tokens, or nothing in them; None where there are."""
    b, h, _, d = q.shape
    if 0 not in (*q.shape, v.shape[-1]):
        return None
    return torch.zeros_like(v), q.new_zeros(b, h, d, v.shape[-1], dtype=torch.float32) if state is None else state.float()


def alike(*tensors: Tensor) -> list[Tensor]:
    """All in the type that holds each."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def like(tensor: Tensor) -> Tensor:
    """Empty, as (b, h, n, d) seen of (b, n, h, d), as heads usually come."""
    b, h, n, d = tensor.shape
    return tensor.new_empty(b, n, h, d).transpose(1, 2)
