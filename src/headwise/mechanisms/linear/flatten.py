"""FLatten: linear attention with a map that pulls features towards their nearest axis, and a convolution of values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from .._mixer import Tokens, largest, shake
from .._states import Pass, Reading, begin, over
from ._grid import Grid, GridMixer, slowly_convolved

CARD = Card(
    paper="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    year=2023,
    room="linear",
    source=(
        "arXiv:2308.00442, abstract, and LeapLabTHU/FLatten-Transformer, flatten_swin.py: norms over all channels, before heads "
        "are split, as in the code (the paper speaks of one vector); keys have learned positions; ReLU + 1e-6 by softplus of a "
        "scale for each channel; powers of features divided by their largest, as in an earlier version, which changes range only; "
        "sums are divided by n, 1e-6 added. One 5 x 5 kernel for each channel of a head, the same for all heads. A line (5 taps) "
        "and the causal form without convolution are our own; smaller keys, as in PVT, are left out"
    ),
)
FLOOR = 1e-6


def focused(u: Tensor, power: float) -> Tensor:
    """u^power, as long as u: u positive, over the last dimension. In float32 at least."""
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    raised = (wide / wide.detach().amax(-1, keepdim=True)) ** power
    return raised * (wide.norm(dim=-1, keepdim=True) / raised.norm(dim=-1, keepdim=True))


class Flatten(GridMixer):
    """o_i = f(q_i) . sum_j f(k_j) v_j / f(q_i) . sum_j f(k_j) + a depthwise convolution, f(u) = u^p |u| / |u^p| of ReLU(u).

    Args:
        heads: of width / heads. power: p. taps: of the convolution of values; 0 for none: a line may then be read causally.
        grid: (rows, columns) of the tokens; None for a line. tokens: how many learned positions keys have, all of a grid's; 0
            for none.
    """

    def __init__(self, width: int, heads: int, *, power: float = 3.0, taps: int = 5, grid: Grid = None, tokens: int = 0) -> None:
        super().__init__(width, heads, grid, taps, by_head=True)
        if power < 1:
            raise ShapeError(f"power {power} must be 1 or more; less would blur")
        self.power = power
        self.scale = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(tokens, width)) if tokens else None

    def features(self, x: Tensor) -> Tensor:
        """f of queries or keys of all heads together, (b, n, width)."""
        scale = F.softplus(self.scale.to(x.dtype))
        return focused((torch.relu(x) + FLOOR) / scale, self.power)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        share = self.share(q, now)
        q, k = (t.transpose(1, 2).flatten(2) for t in (q, k))
        if self.positions is not None:
            places = self._places(now, share)
            if int(places.max()) >= len(self.positions):
                raise ShapeError(f"token {int(places.max())} has no position: there are {len(self.positions)}")
            k = k + self.positions[places]
        q, k = (self.features(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k))
        total = self.mean(q, k, share, now)
        return Reading(q * over(share, total + FLOOR), k, v)

    def _places(self, now: Pass, share: Tensor) -> Int[Tensor, "b n"]:
        """Where tokens stand in their document."""
        if now.causal:
            return (over(torch.ones_like(share), share)[:, 0, :, 0].round().long() - 1).clamp(min=0)
        if now.ids is None:
            return now.places
        there = torch.ones_like(now.ids, dtype=torch.bool) if now.real is None else now.real
        before = (now.ids[:, :, None] == now.ids[:, None, :]).tril(-1) & there[:, None]
        return before.sum(-1)


def oracle(mixer: Flatten, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time."""
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))
    k = k if mixer.positions is None else k + mixer.positions[:n]

    def f(token: Tensor) -> Tensor:
        u = (torch.where(token > 0, token, 0.0) + 1e-6) / torch.log(1 + torch.exp(mixer.scale))
        raised = u**mixer.power
        return raised * torch.sqrt((u * u).sum()) / torch.sqrt((raised * raised).sum())

    a, b = torch.stack([f(t) for t in q]), torch.stack([f(t) for t in k])
    heads = []
    for head in range(mixer.heads):
        own, rows = slice(head * d, (head + 1) * d), []
        for i in range(n):
            seen = [j for j in range(n) if visible[i, j]]
            scores = [a[i, own] @ b[j, own] / len(seen) for j in seen]
            rows.append(sum(s * v[j, own] for s, j in zip(scores, seen, strict=True)) / (sum(scores) + 1e-6))
        out = torch.stack(rows)  # type: ignore[arg-type]
        if mixer.conv is not None:
            out = out + slowly_convolved(v[:, own], mixer.conv.conv.weight[:, 0], mixer.conv.conv.bias, mixer.grid)
        heads.append(out)
    return torch.cat(heads, 1) @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[Flatten]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Flatten(width, heads, tokens=48),
        Flatten(width, heads // 2, power=2.0, taps=0),
        Flatten(width, heads, taps=0, tokens=48),
    ]
    for mixer in made:
        shake([p for p in (mixer.scale, mixer.positions) if p is not None], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Flatten:
    """The paper's: the third power, 5 taps, a position for each token, along a line."""
    return Flatten(heads * size, heads, **{"tokens": tokens, **options})


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    whole = torch.ones(24, 24, dtype=torch.bool)
    grid = Flatten(32, 4, grid=(4, 6), tokens=24).double()
    shake([grid.scale, grid.positions], seed=1)  # type: ignore[list-item]
    yield "a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
    u = torch.rand(50, 32, dtype=torch.float64) + 1e-3
    for power in (2.0, 3.0, 8.0):
        yield f"power {power:g} keeps the norm", largest(focused(u, power).norm(dim=-1) - u.norm(dim=-1))
    yield "power one changes nothing", largest(focused(u, 1.0) - u)
    yield "three times as long, three times as long after it", largest(focused(3 * u, 3.0) - 3 * focused(u, 3.0))
    top = F.one_hot(u.argmax(-1), 32) * u.norm(dim=-1, keepdim=True)
    yield "a high power: only the largest channel is left", largest(focused(u, 1e6) - top)
    plain = Flatten(32, 4, power=1.0, taps=0).double()
    plain.scale.fill_(torch.tensor(1.0, dtype=torch.float64).expm1().log())
    q, k, v = plain.split(x, begin(plain.new_cache(), x, (), None))
    scores = (torch.relu(q) + FLOOR) @ (torch.relu(k) + FLOOR).mT / 24
    wanted = scores / (scores.sum(-1, keepdim=True) + FLOOR)
    yield "power one, a scale of one, no convolution: linear attention with ReLU", largest(plain.read(x) - wanted @ v)
    conv = Flatten(32, 4).double()
    assert conv.conv is not None
    assert conv.conv.conv.bias is not None
    conv.conv.conv.weight.zero_()
    conv.conv.conv.weight[:, :, :, 2] = 1.0
    conv.conv.conv.bias.zero_()
    _, _, v = conv.split(x, begin(conv.new_cache(), x, (), None))
    yield "a convolution of its middle tap adds the value", largest(conv(x) - conv.projections.merge(conv.read(x) + v))
    made = sized(4, 16, 40)
    assert made.conv is not None
    yield (
        "one kernel of 5 taps and a bias for each channel of a head",
        float(sum(p.numel() for p in made.conv.parameters()) - 6 * 16),
    )
