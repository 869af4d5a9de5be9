"""What the host side of our Triton kernels shares: how they are cut, and tensors as they take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: queries and keys of a tile, warps, loads in flight, and registers at most."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


def fitting(launches: Mapping[tuple[int, bool], Launch], d: int, exact: bool) -> Launch:
    """The first of {(largest head size, float32): launch} that heads of size d fit; exact: for float32."""
    return next(found for (size, of_exact), found in launches.items() if of_exact == exact and d <= size)


def readable(tensor: Tensor) -> Tensor:
    """With heads' numbers next to each other; Triton's interpreter, which has no bfloat16 products, gets the same in float32."""
    tensor = tensor.detach()
    if not tensor.is_cuda and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def sixteens(tensor: Tensor) -> Tensor:
    """With heads made wider by zeros to a multiple of 16 numbers, which tensor cores take whole."""
    return F.pad(tensor, (0, -tensor.shape[-1] % 16)) if tensor.shape[-1] % 16 else tensor


def power(size: int) -> int:
    """The power of two that holds a head of this size, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
