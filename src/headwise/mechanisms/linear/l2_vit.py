"""L2ViT: linear attention with ReLU whose sums are cut from below, a module that concentrates it near by, and windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from .._mixer import Tokens, largest, shake
from .._norms import layer_norm
from .._states import Pass, Reading, begin
from ._carried import summed
from ._grid import Depthwise, Grid, GridMixer, slowly_convolved
from ._windows import WindowLayer, slowly_windowed

CARD = Card(
    paper="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    room="linear",
    source=(
        "arXiv:2501.16182, abstract, and ChuanyangZheng/L2ViT, l2vit.py, the form that runs (one that is commented out cuts at 1): "
        "ReLU, sums of scores cut from below at 100, so that few or small tokens are not normalised, a learned factor for each "
        "head from 1 / sqrt(d); maps have biases. The local concentration module (layer norm, depthwise 7 x 7, GELU, batch norm, "
        "depthwise 7 x 7) is of the residual stream after attention; a mixer does not see the stream, so here it takes x + "
        "attention. `WindowLayer` is the attention of every other layer; as in its code the last windows are filled up with tokens "
        "of zero, which are read. Lines, and the causal form without the module, are our own; convolutions of positions and MLPs "
        "are of the stack"
    ),
)


class LocalConcentration(nn.Module):
    """Depthwise convolution, GELU, batch norm, depthwise convolution of layer-normed tokens; for a residual stream to add.

    Args:
        taps: along each axis of the grid (rows, columns), or along a line.
    """

    def __init__(self, width: int, grid: Grid = None, taps: int = 7) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = Depthwise(width, taps, grid), Depthwise(width, taps, grid)
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tokens) -> Tokens:
        """(b, n, width) -> the same."""
        near = F.gelu(self.first(layer_norm(self.norm, x)))
        found: Tensor = self.second(self.batch_norm(near.mT).mT)
        return found


class L2Vit(GridMixer):
    """a_i = tau relu(q_i) . sum_j relu(k_j) v_j / max(relu(q_i) . sum_j relu(k_j), floor), and a + LCM(x + a).

    Args:
        heads: of width / heads. grid: (rows, columns) of the tokens; None for a line of any length. concentration: whether the
            local concentration module (LCM) is there; without it a line may be read causally. taps: its taps. floor: from below
            which sums are cut.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: Grid = None,
        concentration: bool = True,
        taps: int = 7,
        floor: float = 100.0,
    ) -> None:
        super().__init__(width, heads, grid, 0)
        if floor <= 0:
            raise ShapeError(f"floor {floor} must be above 0, which a sum may be")
        self.floor = floor
        self.tau = nn.Parameter(torch.full((heads,), (width // heads) ** -0.5))
        self.concentration = LocalConcentration(width, grid, taps) if concentration else None
        if concentration:
            self.limit("its concentration module reads both sides")
            self.cannot = {**self.cannot, "padding": "batch norm takes its measures over all tokens"}

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        if "padding" in self.cannot and now.real is not None:
            raise ShapeError(f"an attention_mask can't be obeyed: {self.cannot['padding']}")
        q, k = torch.relu(q), torch.relu(k)
        total = summed("keys", self, q, k, torch.ones_like(k[..., :1]), now).clamp(min=self.floor)
        return Reading(q * (self.tau.to(q.dtype)[:, None, None] / total), k, v)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        found = super().finish(out, x)
        return found if self.concentration is None else found + self.concentration(x + found)


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    far = x - x.mean(1, keepdim=True)
    return far / torch.sqrt((far * far).mean(1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def oracle(mixer: L2Vit | WindowLayer, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time."""
    if isinstance(mixer, WindowLayer):
        return slowly_windowed(mixer, x)
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))
    heads = []
    for head in range(mixer.heads):
        own, rows = slice(head * d, (head + 1) * d), []
        a, b = (torch.where(t[:, own] > 0, t[:, own], 0.0) for t in (q, k))
        for i in range(n):
            scores = torch.stack([a[i] @ b[j] for j in range(n) if visible[i, j]])
            low = scores.sum() if scores.sum() > mixer.floor else torch.tensor(mixer.floor, dtype=x.dtype)
            rows.append(mixer.tau[head] * (scores / low) @ v[visible[i], own])
        heads.append(torch.stack(rows))
    out = torch.cat(heads, 1) @ maps.out.weight.T + maps.out.bias
    if mixer.concentration is None:
        return out
    module = mixer.concentration
    near = slowly_convolved(_normed(x + out, module.norm), module.first.conv.weight[:, 0], module.first.conv.bias, mixer.grid)
    near = near * (1 + torch.erf(near / math.sqrt(2))) / 2
    by = module.batch_norm
    assert by.running_mean is not None
    assert by.running_var is not None
    near = (near - by.running_mean) / torch.sqrt(by.running_var + 1e-5) * by.weight + by.bias
    return out + slowly_convolved(near, module.second.conv.weight[:, 0], module.second.conv.bias, mixer.grid)


def examples(heads: int, size: int) -> list[L2Vit | WindowLayer]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [L2Vit(width, heads), L2Vit(width, heads // 2, concentration=False, floor=8.0), L2Vit(width, heads, taps=3, floor=1.0)]
    for mixer in made:
        shake([mixer.tau], seed=2, by=0.1)
        if mixer.concentration is not None:
            by = mixer.concentration.batch_norm
            shake([by.weight, by.bias, *mixer.concentration.norm.parameters(), by.running_mean], seed=3)  # type: ignore[list-item]
            assert by.running_var is not None
            by.running_var.mul_(2.0)
    return [*made, WindowLayer(width, heads), WindowLayer(width, heads // 2, window=4)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> L2Vit:
    """The paper's linear layer: with its concentration module, along a line."""
    return L2Vit(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    whole = torch.ones(40, 40, dtype=torch.bool)
    grid = L2Vit(32, 4, grid=(5, 8), floor=2.0).double().eval()
    yield "a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
    for size in (4, 7):
        windows = WindowLayer(32, 4, grid=(5, 8), window=size).double()
        yield f"windows of {size} x {size} are read as by loops", largest(windows(x)[0] - oracle(windows, x[0], whole))
    one = WindowLayer(32, 4, window=40).double()
    q, k, v = one.projections.split(x)
    plain = one.projections.merge(F.scaled_dot_product_attention(q, k, v))
    yield "one window of all tokens: softmax attention", largest(one(x) - plain)
    assert grid.concentration is not None
    grid.concentration.second.conv.weight.zero_()
    assert grid.concentration.second.conv.bias is not None
    grid.concentration.second.conv.bias.zero_()
    yield "a concentration module of zero: linear attention", largest(grid(x) - grid.projections.merge(grid.read(x)))
    for floor in (1e-9, 20.0):
        mixer = L2Vit(32, 4, concentration=False, floor=floor).double()
        q, k, v = mixer.split(x, begin(mixer.new_cache(), x, (), None))
        total = torch.relu(q) @ torch.relu(k).sum(2)[..., None]
        wanted = mixer.tau[:, None, None] * (total / floor).clamp(max=1)
        yield (
            f"weights sum to tau, or less where the sum of scores is below {floor:g}",
            largest(mixer.weights(x).sum(-1, keepdim=True) - wanted),
        )
    usual = L2Vit(32, 4)
    yield "sums are cut at 100, the factor starts at 1 / sqrt(d)", abs(usual.floor - 100) + largest(usual.tau - 8**-0.5)
    assert usual.concentration is not None
    numbers = sum(p.numel() for p in LocalConcentration(32, (5, 8)).parameters())
    yield "the module has 2 (49 + 1) + 4 numbers for each channel", float(numbers - 104 * 32)
