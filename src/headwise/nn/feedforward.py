"""Feed-forward layers: what a block does to each token alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ..mechanisms._mixer import Tokens


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x), as in Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tokens) -> Tokens:
        """(b, n, width) -> (b, n, width)."""
        made: Tokens = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


def default_hidden(width: int) -> int:
    """About 8/3 of the width, which gives three maps the parameters of two of four times the width; a multiple of 8."""
    return max(8, round(width * 8 / 3 / 8) * 8)
