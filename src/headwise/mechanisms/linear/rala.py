"""RALA: linear attention, keys weighted by how the mean query reads them, outputs multiplied by a map of x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from .._mixer import Tokens, largest
from .._states import Pass, Reading, begin, over
from ._grid import Grid, GridMixer, slowly_convolved, slowly_turned, turned
from ._parts import elu_plus_one

CARD = Card(
    paper="Breaking the Low-Rank Dilemma of Linear Attention",
    year=2024,
    room="linear",
    source=(
        "arXiv:2411.07635, abstract and summaries, and qhfan/RALA, classfication/RALA.py: 1 + ELU; n softmax(mean query . key / "
        "sqrt(d)) multiplies each key, before the sum that divides, to which 1e-6 is added; rotations by row and column are of the "
        "numerator only, so that weights then do not sum to one; maps have biases. The map of x that outputs are multiplied by has "
        "no activation, and multiplies the depthwise 5 x 5 convolution of values, too, as in the code. Positive coefficients can't "
        "raise the rank of keys times values beyond that of either; the map of x does raise that of outputs. A line, and "
        "weighted=False, which may be read causally without convolution, are our own"
    ),
)


class Rala(GridMixer):
    """o_i = (phi(q_i) . sum_j a_j phi(k_j) v_j / phi(q_i) . sum_j a_j phi(k_j) + convolution) * g(x_i), a_j of mean 1.

    Args:
        heads: of width / heads. weighted: whether keys have coefficients a, by the mean query; else they are 1. grid: (rows,
            columns) of the tokens; None for a line of any length. taps: of the convolution of values; 0 for none. rope: whether
            the numerator sees rows and columns. gated: whether outputs are multiplied by a linear map of x.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        weighted: bool = True,
        grid: Grid = None,
        taps: int = 5,
        rope: bool = True,
        gated: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width, heads, grid, taps, gated=gated)
        if rope and self.projections.head_dim % 4:
            raise ShapeError(f"rows and columns turn pairs in halves of a head; {self.projections.head_dim} channels are no such")
        self.weighted, self.rope, self.eps = weighted, rope, eps
        if weighted:
            self.limit("keys are weighted by the mean of all queries")

    def coefficients(self, q: Tensor, k: Tensor, now: Pass) -> Float[Tensor, "b h n 1"]:
        """n softmax(mean query . key / sqrt(d)) of features of queries and keys, over the tokens that are no padding."""
        there = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if now.real is None else now.real
        here = there[:, None, :, None]
        count = here.sum(2, keepdim=True)
        mean = q.where(here, 0.0).sum(2, keepdim=True) / count.clamp(min=1)
        scores = k @ mean.mT * self.projections.head_dim**-0.5
        scores = scores.where(here, torch.finfo(scores.dtype).min)  # of the product's type, which autocast may choose
        return count * scores.softmax(2).where(here, 0.0)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        q, k = elu_plus_one(q), elu_plus_one(k)
        if self.weighted:
            k = k * self.coefficients(q, k, now)
        share = self.share(q, now)
        scale = over(share, self.mean(q, k, share, now) + self.eps)
        if self.rope:
            q, k = turned(q, now.places, self.grid), turned(k, now.places, self.grid)
        return Reading(q * scale, k, v)


def oracle(mixer: Rala, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time."""
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))
    heads = []
    for head in range(mixer.heads):
        own = slice(head * d, (head + 1) * d)
        a, b = (torch.where(t[:, own] > 0, 1 + t[:, own], torch.exp(t[:, own].clamp(max=0))) for t in (q, k))
        if mixer.weighted:
            force = torch.exp(torch.stack([(a.sum(0) / n) @ key / d**0.5 for key in b]))
            b = torch.stack([n * force[j] / force.sum() * b[j] for j in range(n)])
        rows = []
        for i in range(n):
            seen = [j for j in range(n) if visible[i, j]]
            total = sum(a[i] @ b[j] for j in seen) / len(seen) + mixer.eps
            met = [
                slowly_turned(a[i], i, mixer.grid) @ slowly_turned(b[j], j, mixer.grid) if mixer.rope else a[i] @ b[j] for j in seen
            ]
            rows.append(sum(s * v[j, own] for s, j in zip(met, seen, strict=True)) / (len(seen) * total))
        heads.append(torch.stack(rows))  # type: ignore[arg-type]
    out = torch.cat(heads, 1)
    if mixer.conv is not None:
        out = out + slowly_convolved(v, mixer.conv.conv.weight[:, 0], mixer.conv.conv.bias, mixer.grid)
    if mixer.gate is not None:
        out = out * (x @ mixer.gate.weight.T + mixer.gate.bias)
    return out @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[Rala]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [Rala(width, heads), Rala(width, heads // 2, taps=0, rope=False, gated=False)]
    return [*made, Rala(width, heads, weighted=False, taps=0, eps=1e-3)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Rala:
    """The paper's: along a line, with coefficients, rotations, convolution and the map of x."""
    return Rala(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    whole = torch.ones(24, 24, dtype=torch.bool)
    grid = Rala(32, 4, grid=(4, 6)).double()
    yield "a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
    plain = Rala(32, 4, weighted=False, taps=0, rope=False, eps=0.0).double()
    assert plain.gate is not None
    plain.gate.weight.zero_()
    plain.gate.bias.fill_(1.0)
    now = begin(plain.new_cache(), x, (), None)
    q, k, v = plain.split(x, now)
    q, k = elu_plus_one(q), elu_plus_one(k)
    usual = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)
    yield "no coefficients, a map of x to one: linear attention", largest(plain(x) - plain.projections.merge(usual @ v))
    found = plain.coefficients(q, k, now)
    yield "coefficients sum to the number of tokens", largest(found.sum(2) - 24)
    plain.weighted = True
    yield "with them, too, weights sum to one without rotations", largest(plain.weights(x).sum(-1) - 1)
    again = usual * found.mT
    yield (
        "they multiply weights, which are then divided by their new sum",
        largest(plain.weights(x) - again / again.sum(-1, keepdim=True)),
    )
    plain.projections.k.weight.zero_()
    yield "equal keys: coefficients of one, even weights", largest(plain.weights(x) - 1 / 24)
    made = sized(4, 16, 1)
    yield (
        "5 width^2 weights in its maps, 5 taps a channel",
        float(sum(p.numel() for p in made.parameters() if p.dim() > 1) - 5 * 64**2 - 5 * 64),
    )
