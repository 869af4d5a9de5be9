"""What the host sides of the kernels share: what all of them refuse, and tensors as they take and make them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ...attention.backends._launch import power, readable
from ..inputs import Inputs

__all__ = ["Cut", "Segments", "alike", "like", "nothing_to_do", "power", "readable", "unfit"]
TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut: channels of keys that it takes at once, columns of values of a program (0: all, or no matter), warps,
    loads in flight, and registers at most."""

    block: int
    tile: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


@dataclass(frozen=True)
class Segments:
    """How rows are cut: where there are not `enough` programs, into segments of so many tokens at least, for `programs`."""

    enough: int
    programs: int
    shortest: int

    def of(self, programs: int, tokens: int) -> int:
        """Segments of each row of so many tokens, if it has to be cut; programs: how many there are without."""
        return max(min(-(-self.programs // programs), tokens // self.shortest), 1)


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
