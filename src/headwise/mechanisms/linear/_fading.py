"""Maps to decays and gates: those whose speed each token says, as in Mamba-2 and the delta rules, and those of low rank."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fading(nn.Module):
    """Steps softplus(x + bias) and log decays -exp(rate) * step, both in float32 at least.

    It starts as the papers do: exp(rate) even between `slowest` and 16, steps of 0.001 to 0.1, even in their logarithm.

    Args:
        heads: each with a rate. channels: of a head, each with a step of its own; None for one step a head.
    """

    def __init__(self, heads: int, channels: int | None = None, *, slowest: float = 1.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.empty(heads).uniform_(slowest, 16.0).clamp(min=1e-4).log())
        step = torch.empty((heads,) if channels is None else (heads, channels)).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(step.expm1().log())  # whose softplus is the step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, n, heads * channels) -> log decays and steps, (b, heads, n) or (b, heads, n, channels)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide).unflatten(-1, self.bias.shape)
        step = F.softplus(x + self.bias.to(wide))
        rate = self.rate.to(wide).exp().view(-1, *(1,) * (self.bias.dim() - 1))
        return (-rate * step).transpose(1, 2), step.transpose(1, 2)


class LowRank(nn.Module):
    """x W_down W_up + bias: a map by way of few channels."""

    def __init__(self, width: int, rank: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., size)."""
        mapped: Tensor = self.up(self.down(x))
        return mapped
