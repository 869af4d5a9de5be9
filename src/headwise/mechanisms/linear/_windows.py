"""Softmax attention within windows of a grid, as the local layers of vision models have it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import attend
from ...attention.stage import Stage
from ...errors import ShapeError
from ...stages.blocks import Blocks
from .._caches import Cache
from .._mixer import Mixer, Projections, Real, Tokens
from ._grid import WHOLE, Grid, laid


class WindowLayer(Mixer):
    """Softmax attention within windows that do not overlap, window x window of a grid or `window` tokens of a line.

    The last windows are filled up with tokens of zero, whose keys and values are the maps' biases.
    """

    def __init__(self, width: int, heads: int, *, grid: Grid = None, window: int = 7) -> None:
        super().__init__()
        self.width, self.grid, self.high, self.window = width, grid, 1 if grid is None else window, window
        self.projections = Projections(width, heads, bias=True)
        why = "its windows are read both ways"
        self.cannot = {"causal": why, "decode": why, **({} if grid is None else {"padding": WHOLE})}

    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        if stages or cache is not None or (attention_mask is not None and self.grid is not None):
            raise ShapeError(f"windows obey no stage, no cache and, of a grid, no mask; got {stages}, {cache}, {attention_mask}")
        if self.grid is not None and x.shape[1] != self.grid[0] * self.grid[1]:
            raise ShapeError(f"{x.shape[1]} tokens are no grid {self.grid}")
        return laid(x, self.grid, None if attention_mask is None else attention_mask.bool(), self._windows)

    def _windows(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        x = F.pad(x, (0, -columns % self.window, 0, -rows % self.high))
        parts = x.unflatten(3, (-1, self.window)).unflatten(2, (-1, self.high)).transpose(3, 4)  # (b, c, down, along, high, wide)
        q, k, v = self.projections.split(parts.flatten(2).mT)
        out = self.projections.merge(attend(q, k, v, Blocks(self.high * self.window)))
        back = out.mT.unflatten(2, parts.shape[2:]).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return back[:, :, :rows, :columns]

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """It has none."""
        raise NotImplementedError(self.cannot["decode"])


def slowly_windowed(mixer: WindowLayer, x: Tensor) -> Tensor:
    """One sequence (n, width): each token reads those of its window, and zeros where that is cut off."""
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    rows, columns = (1, n) if mixer.grid is None else mixer.grid
    found = []
    for t in range(n):
        top, left = t // columns // mixer.high * mixer.high, t % columns // mixer.window * mixer.window
        at = [(r, c) for r in range(top, top + mixer.high) for c in range(left, left + mixer.window)]
        seen = torch.stack([x[r * columns + c] if r < rows and c < columns else x[0] * 0 for r, c in at])
        q = x[t] @ maps.q.weight.T + maps.q.bias
        k, v = (seen @ part.weight.T + part.bias for part in (maps.k, maps.v))
        heads = []
        for head in range(maps.heads):
            own = slice(head * d, (head + 1) * d)
            force = torch.exp(k[:, own] @ q[own] / d**0.5)
            heads.append(force @ v[:, own] / force.sum())
        found.append(torch.cat(heads))
    return torch.stack(found) @ maps.out.weight.T + maps.out.bias
