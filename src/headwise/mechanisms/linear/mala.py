"""MALA: linear attention whose weights know how large a query is, by a factor and an offset for each query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Tokens, largest
from .._states import Pass, Reading, begin, over
from ._grid import Grid, GridMixer, centred, slowly_convolved, slowly_turned, turned
from ._parts import elu_plus_one

CARD = Card(
    paper="Rectifying Magnitude Neglect in Linear Attention",
    year=2025,
    room="linear",
    source=(
        "arXiv:2507.00698, abstract and summaries, and qhfan/MALA, classfication_release/model.py: 1 + ELU, scores times "
        "1 / (n sqrt(d)), which summaries leave out and which matters, since nothing is divided by; 1e-6 is added to the sum in "
        "the factor. Rotations by row and column are of the scores only, not of their sum, so that weights then do not sum to one. "
        "Maps have biases; a depthwise 5 x 5 convolution of values is added, and all is multiplied by a linear map of x. The "
        "causal form is our own (the paper's for language was not found): sums run, with the tokens so far in the place of n"
    ),
)


class Mala(GridMixer):
    """o_i = sum_j (beta_i s_ij - gamma_i) v_j with s = phi(q) . phi(k) / (n sqrt(d)), S_i its sum, beta 1 + 1/S, gamma S/n.

    Args:
        heads: of width / heads. grid: (rows, columns) of the tokens; None for a line of any length. taps: of the convolution of
            values; 0 for none: a line may then be read causally. rope: whether scores see rows and columns. gated: whether
            outputs are multiplied by a linear map of x. eps: added to S where it divides.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: Grid = None,
        taps: int = 5,
        rope: bool = True,
        gated: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width, heads, grid, taps, gated=gated)
        if rope and self.projections.head_dim % 4:
            raise ShapeError(f"rows and columns turn pairs in halves of a head; {self.projections.head_dim} channels are no such")
        self.rope, self.eps = rope, eps

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        q, k = elu_plus_one(q), elu_plus_one(k)
        share = self.share(q, now)
        total = self.mean(q, k, share, now) * self.projections.head_dim**-0.5
        if self.rope:
            q, k = turned(q, now.places, self.grid), turned(k, now.places, self.grid)
        beta = 1 + over(torch.ones_like(total), total + self.eps)
        return centred(q * (beta * share * self.projections.head_dim**-0.5), k, v, -total * share)


def oracle(mixer: Mala, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time."""
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))
    heads = []
    for head in range(mixer.heads):
        own = slice(head * d, (head + 1) * d)
        a, b = (torch.where(t[:, own] > 0, 1 + t[:, own], torch.exp(t[:, own].clamp(max=0))) for t in (q, k))
        turn = [
            (slowly_turned(a[t], t, mixer.grid), slowly_turned(b[t], t, mixer.grid)) if mixer.rope else (a[t], b[t])
            for t in range(n)
        ]
        rows = []
        for i in range(n):
            seen = [j for j in range(n) if visible[i, j]]
            total = sum(a[i] @ b[j] for j in seen) / (len(seen) * d**0.5)
            beta, gamma = 1 + 1 / (total + mixer.eps), total / len(seen)
            rows.append(sum((beta * (turn[i][0] @ turn[j][1]) / (len(seen) * d**0.5) - gamma) * v[j, own] for j in seen))
        heads.append(torch.stack(rows))
    out = torch.cat(heads, 1)
    if mixer.conv is not None:
        out = out + slowly_convolved(v, mixer.conv.conv.weight[:, 0], mixer.conv.conv.bias, mixer.grid)
    if mixer.gate is not None:
        out = out * (x @ mixer.gate.weight.T + mixer.gate.bias)
    return out @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[Mala]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [Mala(width, heads), Mala(width, heads, taps=0, gated=False), Mala(width, heads // 2, taps=0, rope=False, eps=0.0)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mala:
    """The paper's: along a line, with rotations, convolution and gate."""
    return Mala(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    whole = torch.ones(24, 24, dtype=torch.bool)
    grid = Mala(32, 4, grid=(4, 6)).double()
    yield "a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
    plain = Mala(32, 4, taps=0, rope=False, eps=0.0).double()
    for stages in ((), (Causal(),)):
        found = plain.weights(x, *stages)
        yield "without rotations weights sum to one", largest(found.sum(-1) - 1)
    now = begin(plain.new_cache(), x, (), None)
    q, k, v = plain.split(x, now)
    scores = elu_plus_one(q) @ elu_plus_one(k).mT * (8**-0.5 / 24)
    total = scores.sum(-1, keepdim=True)
    usual = scores / total
    yield (
        "usual linear weights, and S times how far these are from even ones",
        largest(plain.weights(x) - usual - total * (usual - 1 / 24)),
    )
    yield (
        "output: (1 + S) times linear attention's, less S times the mean value",
        largest(plain.read(x) - (1 + total) * (usual @ v) + total * v.mean(2, keepdim=True)),
    )
    same = x.clone()
    same[:] = x[:, :1]
    yield "equal tokens: even weights", largest(plain.weights(same) - 1 / 24)
    constant = Mala(32, 4, taps=0, rope=False, eps=0.0, gated=False).double()
    constant.projections.v.weight.zero_()
    wanted = constant.projections.out(constant.projections.v.bias)
    yield "one value for all tokens comes back", largest(constant(x) - wanted)
    turns = Mala(32, 4, grid=(4, 6), taps=0).double()
    a = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 24, 8)
    spun = turned(a, torch.arange(24)[None], turns.grid)
    met = (spun @ spun.mT)[0, 0].unflatten(0, (4, 6)).unflatten(2, (4, 6))
    yield "rotated scores see how many rows and columns two tokens are apart", largest(met[:3, :5, :3, :5] - met[1:, 1:, 1:, 1:])
    yield "tokens one column apart differ in the second half only", largest(spun[0, 0, 0, :4] - spun[0, 0, 1, :4])
    made = sized(4, 16, 1)
    yield (
        "5 width^2 weights in its maps, 5 taps a channel",
        float(sum(p.numel() for p in made.parameters() if p.dim() > 1) - 5 * 64**2 - 5 * 64),
    )
