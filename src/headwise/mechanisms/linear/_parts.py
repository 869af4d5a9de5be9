"""Parts that mixers of this folder share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._states import Pass


class ShortConvolutions(nn.Module):
    """Causal depthwise convolutions over near tokens, one for each name; the last tap is the token itself.

    Args:
        channels: of each. taps: their tokens; 0 for no convolution. bias: whether they have one.
    """

    def __init__(self, channels: Mapping[str, int], taps: int, bias: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: torch.empty(size, max(taps, 1)) for name, size in channels.items() if taps})
        self.biases = nn.ParameterDict({name: torch.zeros(size) for name, size in channels.items() if taps and bias})
        for weight in self.weights.values():
            nn.init.uniform_(weight, -(taps**-0.5), taps**-0.5)  # as nn.Conv1d starts

    def forward(self, name: str, x: Tensor, now: Pass) -> Tensor:
        """x (b, n, channels), convolved within documents; x itself if there is no convolution."""
        if name not in self.weights:
            return x
        return now.convolved(name, x, self.weights[name], self.biases.get(name, None))


def l2_normed(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x / sqrt(sum of squares + epsilon) over the last dimension, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + epsilon)


def elu_plus_one(x: Tensor) -> Tensor:
    """1 + elu(x), which is positive."""
    return 1 + F.elu(x)
