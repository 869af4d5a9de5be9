"""Norms that half precision does not lose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """What the module gives, computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if norm.bias is None else norm.bias.to(wide)
    return F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), bias, norm.eps).to(x.dtype)


def rms_normed(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension, in float32 at least: an RMS norm without weights."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


class Rms(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 at least."""

    def __init__(self, size: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> the same, in float32 at least."""
        normed = rms_normed(x, self.epsilon)
        return normed * self.weight.to(normed.dtype)
