"""Positions of tokens on grids of any number of axes: MD-LRPE, which turns keys and queries, and MD-TPE, which is added once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import ShapeError
from ...recurrence import recur
from .._norms import rms_normed


def on_axes(places: Int[Tensor, "b n"], grid: Sequence[int]) -> Int[Tensor, "b n axes"]:
    """Places counted along the last axis first -> places on each axis; the first axis has no end."""
    found = []
    for size in reversed(grid[1:]):
        found.append(places % size)
        places = places // size
    return torch.stack([places, *reversed(found)], -1)


class MdLrpe(nn.Module):
    """x -> [x cos, x sin] of twice the size, angles place * theta: products of two tokens see the offsets of their places only.

    Each axis has its part of the channels and the same theta, of which each head has its own; all start as powers of base.
    """

    def __init__(self, heads: int, size: int, axes: int = 1, base: float = 10000.0) -> None:
        super().__init__()
        each = -(-size // axes)
        self.size = size
        self.theta = nn.Parameter(base ** (-2 / (heads * each) * torch.arange(heads * each).view(heads, each)))

    def forward(self, x: Float[Tensor, "b h n d"], places: Int[Tensor, "b n axes"]) -> Float[Tensor, "b h n 2d"]:
        """x at its places, in float32 at least."""
        theta = self.theta.to(torch.promote_types(x.dtype, torch.float32))
        angles = (places[:, None, :, :, None] * theta[:, None, None]).flatten(3)[..., : self.size]
        return torch.cat([x * angles.cos(), x * angles.sin()], -1)


class MdTpe(nn.Module):
    """The sum over axes of sums of the tokens before on that axis, that decay: normed by heads, then mapped.

    Along one axis, o_t = (q . k) sum_(s <= t) lambda^(t - s) x_s for each head, with learned q, k and lambda.

    Args:
        axes: how many the grid has.
    """

    def __init__(self, width: int, heads: int, axes: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.epsilon = heads, epsilon
        self.q, self.k = (nn.Parameter(torch.randn(axes, width)) for _ in range(2))
        self.decay = nn.Parameter(torch.randn(axes, heads))
        self.norm = nn.Parameter(torch.ones(axes, width))
        self.out = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(axes)])

    def forward(self, x: Float[Tensor, "b n width"], grid: Sequence[int]) -> Float[Tensor, "b n width"]:
        """Tokens of a grid, the last axis first -> what is added to them."""
        if len(grid) != len(self.out) or prod(grid) != x.shape[1]:
            raise ShapeError(f"{x.shape[1]} tokens are no grid {tuple(grid)} of {len(self.out)} axes")
        total = torch.zeros_like(x)
        for axis, out in enumerate(self.out):
            rows = x.unflatten(1, tuple(grid)).movedim(axis + 1, -2)
            read = self._along(axis, rows.flatten(0, -3)).view_as(rows)
            total = total + out(read.movedim(-2, axis + 1).flatten(1, -2).to(x.dtype))
        return total

    def _along(self, axis: int, x: Float[Tensor, "b n width"]) -> Tensor:
        v = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        decay = F.logsigmoid(self.decay[axis].to(v.dtype))[None, :, None].expand(v.shape[:3])
        q, k = (t[axis].to(v.dtype).view(1, self.heads, 1, -1) for t in (self.q, self.k))
        ones = torch.ones_like(v[..., :1])
        out = recur((q * k).sum(-1, keepdim=True) * ones, ones, v, decay=decay, last=False).out
        return rms_normed(out, self.epsilon).transpose(1, 2).flatten(2) * self.norm[axis].to(v.dtype)
