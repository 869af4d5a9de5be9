"""Rotary position embedding: queries and keys turned by their places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class Rotary:
    """Turns the pairs (x_i, x_{i + d/2}) by place * base^(-2i/d), as in Llama; RoFormer, arXiv:2104.09864.

    Args:
        base: of the wave lengths. share: the part of each head, from its start, that is turned, as in GPT-NeoX.
    """

    base: float = 10000.0
    share: float = 1.0

    def __call__(self, x: Float[Tensor, "b h n d"], places: Int[Tensor, "... n"]) -> Float[Tensor, "b h n d"]:
        """x at its places, (n,) or (b, n); angles are computed in float32 at least."""
        turned = int(x.shape[-1] * self.share)
        if turned % 2:
            raise ShapeError(f"rotary embedding turns pairs, and {turned} of {x.shape[-1]} dimensions of a head are no pairs")
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = torch.arange(0, turned, 2, device=x.device, dtype=wide)
        angles = places.to(wide)[..., None] * self.base ** (-steps / turned)
        if angles.dim() == 3:
            angles = angles[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., : turned // 2], x[..., turned // 2 : turned]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., turned:]], -1)
