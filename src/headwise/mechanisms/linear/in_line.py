"""InLine attention: scores less their mean, so that no two queries read alike, and values convolved by a kernel made of x."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Real, Tokens, largest
from .._states import Pass, Reading, begin
from ._grid import Grid, GridMixer, centred, laid, slowly_convolved

CARD = Card(
    paper="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    year=2024,
    room="linear",
    source=(
        "arXiv:2412.06590, abstract, and LeapLabTHU/InLine, inline_swin.py: scores times 1 / (n sqrt(d)), which the paper takes to "
        "be a part of phi and which matters, since nothing is divided by; phi one of four, by default the identity; maps have "
        "biases. The local part: a 3 x 3 kernel for each channel and each sequence, by two maps by heads with GELU of the mean of "
        "the layer's input, over values. Our own are lines (3 taps), the causal form (sums run, the tokens so far in the place of "
        "n; no local part), and that exponents end at 40, so that float32 holds. The class token, smaller keys of PVT and the "
        "convolution of CSwin are left out"
    ),
)
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leakyrelu": F.leaky_relu,
    "exp": lambda x: torch.exp((0.2 * x).clamp(max=40.0)),
}


class Kernels(nn.Module):
    """The mean token (b, width) -> a kernel for each channel, (b, width, taps), by two maps by heads with GELU between."""

    def __init__(self, width: int, heads: int, taps: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, width, 1, groups=heads)
        self.second = nn.Conv1d(width, width * taps, 1, groups=heads)

    def forward(self, mean: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.second(F.gelu(self.first(mean[..., None])))
        return found.view(*mean.shape, -1)


class InLine(GridMixer):
    """o_i = sum_j (s_ij - mean_m s_im + 1/n) v_j + r_i, with s = phi(q) . phi(k) / (n sqrt(d)) and r values convolved.

    Args:
        heads: of width / heads. kernel: phi, "identity", "relu", "leakyrelu" or "exp" (of x / 5). residual: whether there is a
            local part; without it a line may be read causally. grid: (rows, columns) of the tokens; None for a line.
    """

    def __init__(self, width: int, heads: int, *, kernel: str = "identity", residual: bool = True, grid: Grid = None) -> None:
        super().__init__(width, heads, grid, 0)
        if kernel not in KERNELS:
            raise ShapeError(f"kernel {kernel!r} must be one of {', '.join(KERNELS)}")
        self.kernel = kernel
        self.high = 1 if grid is None else 3
        self.kernels = Kernels(width, heads, 3 * self.high) if residual else None
        if residual:
            self.limit("its local kernel is made of all tokens")

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        q, k = KERNELS[self.kernel](q), KERNELS[self.kernel](k)
        share, scale = self.share(q, now), self.projections.head_dim**-0.5
        return centred(q * (share * scale), k, v, share - self.mean(q, k, share, now) * share * scale)

    def local(self, v: Tensor, x: Tokens, real: Real | None) -> Tensor | None:
        """See `GridMixer.local`."""
        if self.kernels is None:
            return None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        there = torch.ones_like(wide[..., 0], dtype=torch.bool) if real is None else real
        mean = wide.where(there[..., None], 0.0).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        kernels = self.kernels(mean.to(x.dtype)).view(-1, 1, self.high, 3)

        def run(near: Tensor) -> Tensor:
            one = F.conv2d(near.flatten(0, 1)[None], kernels, padding=(self.high // 2, 1), groups=len(kernels))
            return one.view_as(near)

        return laid(v.transpose(1, 2).flatten(2), self.grid, real, run).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def oracle(mixer: InLine, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time."""
    maps, n, d, width = mixer.projections, len(x), mixer.projections.head_dim, mixer.width
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))

    def phi(t: Tensor) -> Tensor:
        if mixer.kernel == "identity":
            return t
        if mixer.kernel == "exp":
            return torch.exp(t / 5)
        return torch.where(t > 0, t, t * (0.0 if mixer.kernel == "relu" else 0.01))

    heads = []
    for head in range(mixer.heads):
        own = slice(head * d, (head + 1) * d)
        a, b, rows = phi(q[:, own]), phi(k[:, own]), []
        for i in range(n):
            seen = [j for j in range(n) if visible[i, j]]
            scores = torch.stack([a[i] @ b[j] / (d**0.5 * len(seen)) for j in seen])
            weights = scores - scores.sum() / len(seen) + 1 / len(seen)
            rows.append(sum(weights[at] * v[j, own] for at, j in enumerate(seen)))
        heads.append(torch.stack(rows))  # type: ignore[arg-type]
    out = torch.cat(heads, 1)
    if mixer.kernels is not None:
        mean, taps = x.sum(0) / n, 3 * mixer.high
        first, second = ((part.weight[..., 0], part.bias) for part in (mixer.kernels.first, mixer.kernels.second))
        assert first[1] is not None
        assert second[1] is not None
        inner, outer = [], []
        for c in range(width):
            group = slice(c // d * d, (c // d + 1) * d)
            inner.append(first[0][c] @ mean[group] + first[1][c])
        h = torch.stack([t * (1 + torch.erf(t / math.sqrt(2))) / 2 for t in inner])
        for c in range(width * taps):
            at = c // (d * taps) * d
            outer.append(second[0][c] @ h[at : at + d] + second[1][c])
        out = out + slowly_convolved(v, torch.stack(outer).view(width, mixer.high, 3), None, mixer.grid)
    return out @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[InLine]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [InLine(width, heads), InLine(width, heads // 2, kernel="leakyrelu", residual=False)]
    return [*made, InLine(width, heads, kernel="exp", residual=False), InLine(width, heads, kernel="relu")]


def sized(heads: int, size: int, tokens: int, **options: Any) -> InLine:
    """The paper's: the identity, and a local part, along a line."""
    return InLine(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    whole = torch.ones(24, 24, dtype=torch.bool)
    grid = InLine(32, 4, grid=(4, 6)).double()
    yield "a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
    plain = InLine(32, 4, residual=False).double()
    for stages in ((), (Causal(),)):
        yield "weights sum to one", largest(plain.weights(x, *stages).sum(-1) - 1)
    before, read = plain.weights(x), plain.read(x)
    q, k, v = plain.split(x, begin(plain.new_cache(), x, (), None))
    far = k - k.mean(2, keepdim=True)
    yield "as centred keys, and the mean value", largest(read - v.mean(2, keepdim=True) - q @ (far.mT @ v) / (24 * 8**0.5))
    plain.projections.k.bias.add_(torch.randn(32, dtype=torch.float64))
    yield "a constant added to all keys changes nothing", largest(plain.weights(x) - before)
    plain.projections.q.weight.mul_(3.0)
    plain.projections.q.bias.mul_(3.0)
    yield (
        "queries three times as large: three times as far from even weights",
        largest(plain.weights(x) - 1 / 24 - 3 * (before - 1 / 24)),
    )
    local = InLine(32, 4).double()
    assert local.kernels is not None
    assert local.kernels.second.bias is not None
    local.kernels.second.weight.zero_()
    local.kernels.second.bias.zero_()
    yield "a local kernel of zero: nothing local", largest(local(x) - local.projections.merge(local.read(x)))
    local.kernels.second.bias.view(32, 3)[:, 0] = 1.0
    _, _, v = local.split(x, begin(local.new_cache(), x, (), None))
    near = local.local(v, x, None)
    assert near is not None
    yield "a kernel of its first tap: the value before", largest(near[:, :, 1:] - v[:, :, :-1]) + largest(near[:, :, 0])
