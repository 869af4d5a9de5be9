"""What linear attentions for images share: a grid of tokens, convolutions of values over it, angles of rows and columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention.stage import Stage
from ...errors import ShapeError
from .._caches import Cache
from .._mixer import Projections, Real, Tokens
from .._states import Pass, Reading, StateCache, StateMixer, over
from ._carried import CarryCache, summed

Grid = tuple[int, int] | None
NEAR = "it is added to by a convolution of tokens on both sides"
WHOLE = "a grid is read as a whole"


def laid(x: Float[Tensor, "b n c"], grid: Grid, real: Bool[Tensor, "b n"] | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of the tokens laid out, (b, c, rows, columns) -> the same, and back; padding of a line is left out, zeros follow."""
    order = None if real is None else (~real).int().argsort(dim=1, stable=True)[..., None]
    if real is not None and order is not None:
        x = x.where(real[..., None], 0.0).take_along_dim(order, 1)
    out = f(x.mT.unflatten(-1, (1, x.shape[1]) if grid is None else grid)).flatten(2).mT
    return out if order is None else out.take_along_dim(order.argsort(1), 1)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, taps x taps over a grid or taps along a line, with bias; zeros beyond the ends."""

    def __init__(self, channels: int, taps: int, grid: Grid) -> None:
        super().__init__()
        if taps < 1 or taps % 2 == 0:
            raise ShapeError(f"a convolution of {taps} taps has no middle; the number must be odd")
        high = 1 if grid is None else taps
        self.grid = grid
        self.conv = nn.Conv2d(channels, channels, (high, taps), padding=(high // 2, taps // 2), groups=channels)

    def forward(self, x: Float[Tensor, "b n c"], real: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        """The tokens of a grid, row by row, or of a line, convolved."""
        return laid(x, self.grid, real, self.conv)


def turned(x: Float[Tensor, "b h n d"], places: Int[Tensor, "b n"], grid: Grid, base: float = 10000.0) -> Tensor:
    """Turns pairs of neighbouring channels: those of the first half by the row, those of the second half by the column.

    Angles of d/4 pairs are place * base^(-t), t even from 0 to 1. A line is one row. In float32 at least.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    theta = base ** -torch.linspace(0, 1, x.shape[-1] // 4, dtype=pairs.dtype, device=x.device)
    row, column = (places * 0, places) if grid is None else (places // grid[1], places % grid[1])
    angles = torch.cat([row[:, None, :, None] * theta, column[:, None, :, None] * theta], -1)
    cos, sin, first, second = angles.cos(), angles.sin(), pairs[..., 0], pairs[..., 1]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


class GridMixer(StateMixer):
    """Heads that read all tokens of a grid, or of a line, by a state; a convolution of their values is added.

    Without convolution a line may also be read causally: sums run, and the number of tokens is that of those so far.

    Args:
        grid: (rows, columns) of the tokens, which come row by row; None for a line of any length. taps: of the convolution; 0 for
            none. by_head: whether it is the same for all heads. gated: whether outputs are multiplied by a linear map of x.
    """

    def __init__(self, width: int, heads: int, grid: Grid, taps: int, *, by_head: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.width, self.heads, self.grid = width, heads, grid
        self.projections = Projections(width, heads, bias=True)
        self.conv = Depthwise(width // heads if by_head else width, taps, grid) if taps else None
        self.gate = nn.Linear(width, width) if gated else None
        self.by_head = by_head
        if taps:
            self.limit(NEAR)
        if grid is not None:
            self.limit(WHOLE)
            self.cannot = {**self.cannot, "padding": WHOLE}

    def limit(self, why: str) -> None:
        """Says that it reads both sides only."""
        self.cannot = {**self.cannot, "causal": why, "decode": why}

    def split(self, x: Tokens, now: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys in float32 at least, and values, (b, h, n, d).

        Raises: ShapeError for tokens that are no such grid, and for what can't be obeyed.
        """
        if self.grid is not None and (x.shape[1] != self.grid[0] * self.grid[1] or now.real is not None):
            raise ShapeError(f"{x.shape[1]} tokens{'' if now.real is None else ' with padding'} are no grid {self.grid}")
        if "causal" in self.cannot and (now.causal or now.ids is not None):
            raise ShapeError(f"neither Causal nor Documents can be obeyed: {self.cannot['causal']}")
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.projections.split(x)
        return q.to(wide), k.to(wide), v

    def share(self, like: Tensor, now: Pass) -> Float[Tensor, "b 1 n 1"]:
        """1 / the number of tokens that each token reads, 0 for none."""
        one = torch.ones_like(like[:, :1, :, :1])
        return over(one, summed("tokens", self, one, one, one, now))

    def mean(self, q: Tensor, k: Tensor, share: Tensor, now: Pass) -> Float[Tensor, "b h n 1"]:
        """q . the mean of the keys that each token reads."""
        return summed("keys", self, q, k, torch.ones_like(k[..., :1]), now) * share

    def local(self, v: Float[Tensor, "b h n d"], x: Tokens, real: Real | None) -> Tensor | None:
        """What is added to what the heads read: values, convolved."""
        if self.conv is None:
            return None
        if self.by_head:
            each = None if real is None else real.repeat_interleave(self.heads, 0)
            own: Tensor = self.conv(v.flatten(0, 1), each)
            return own.view_as(v)
        near: Tensor = self.conv(v.transpose(1, 2).flatten(2), real)
        return near.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tokens, *stages: Stage, cache: StateCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        if cache is not None and "decode" in self.cannot:
            raise ShapeError(f"there is nothing to keep in a cache: {self.cannot['decode']}")
        out, given = self._read(x, stages, cache, attention_mask)
        near = self.local(given.v, x, None if attention_mask is None else attention_mask.bool())
        return self.finish(out if near is None else out + near, x)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        rows = out.to(x.dtype).transpose(1, 2).flatten(2)
        mapped: Tensor = self.projections.out(rows if self.gate is None else rows * self.gate(x))
        return mapped

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


def centred(q: Tensor, k: Tensor, v: Tensor, constant: Tensor) -> Reading:
    """Weights q_i . k_j + constant_i: one more channel, of ones in the keys."""
    return Reading(torch.cat([q, constant], -1), torch.cat([k, torch.ones_like(k[..., :1])], -1), v)


def slowly_convolved(v: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """Values (n, c) by kernels (c, high, wide), tap by tap: for oracles."""
    rows, columns = (1, len(v)) if grid is None else grid
    high, wide = weight.shape[1:]
    found = []
    for t in range(len(v)):
        total = v[t] * 0 if bias is None else bias
        for i in range(high):
            for j in range(wide):
                row, column = t // columns + i - high // 2, t % columns + j - wide // 2
                if 0 <= row < rows and 0 <= column < columns:
                    total = total + weight[:, i, j] * v[row * columns + column]
        found.append(total)
    return torch.stack(found)


def slowly_turned(x: Tensor, t: int, grid: Grid) -> Tensor:
    """One head's channels (d,) of token t, turned pair by pair: for oracles."""
    quarter = len(x) // 4
    row, column = (0, t) if grid is None else (t // grid[1], t % grid[1])
    found = []
    for pair in range(2 * quarter):
        place, at = (row, pair) if pair < quarter else (column, pair - quarter)
        angle = torch.tensor(place / 10000.0 ** (at / max(quarter - 1, 1)), dtype=x.dtype)
        a, b = x[2 * pair], x[2 * pair + 1]
        found += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(found)
