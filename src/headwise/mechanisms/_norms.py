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
