"""NaLaFormer: linear attention whose weights are the sharper the larger a query is, by powers of its direction."""

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
from .._states import Pass, Reading, begin, over
from ._grid import Grid, GridMixer, slowly_convolved, slowly_turned, turned

CARD = Card(
    paper="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    year=2025,
    room="linear",
    source=(
        "arXiv:2506.21137, abstract, and ZacharyMeng/NaLaFormer, NALA.py, which disagree. kernel='cosine': the paper's map, which "
        "we know second-hand; there angles are the direction's own numbers, two of which may be 2 apart, so that weights could be "
        "negative, which the paper rules out: here times `angle`, by default pi / 4; 1 for the formula as told. kernel='polarity': "
        "the code's, positive and negative parts beside. Both: queries' power 3 (0.5 + tanh |q|), keys' power 3; in the code "
        "rotations by row and column are of the numerator only, 1e-6 is added to the mean that divides, a depthwise 5 x 5 "
        "convolution of values is added, then layer norm (1e-5), times SiLU(x W_g). Here lengths are sqrt(sum of squares + 1e-12), "
        "so that a query of zero is no 0 / 0. Lines, and the causal form without convolution, are our own"
    ),
)
KERNELS = ("cosine", "polarity")
TINY = 1e-12


class NaLaFormer(GridMixer):
    """o_i = phi_q(q_i) . sum_j phi_k(k_j) v_j / phi_q(q_i) . sum_j phi_k(k_j), phi_q of the power 3 (0.5 + tanh |q|) of q / |q|.

    Cosine: phi_q(q) . phi_k(k) = sum_e |q_e / |q||^p |k_e|^3 cos(angle (q_e / |q| - k_e / |k|)); polarity: the sum over those e
    where q and k have the same sign, without cos.

    Args:
        heads: of width / heads. kernel: "cosine" or "polarity". power, tau: p = power (tau + tanh |q|); keys' is power. angle: of
            the cosine kernel, of a direction along one channel. grid: (rows, columns) of the tokens; None for a line of any length.
            taps: of the convolution of values; 0 for none: a line may then be read causally. rope: whether the numerator sees
            rows and columns.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kernel: str = "cosine",
        power: float = 3.0,
        tau: float = 0.5,
        angle: float = math.pi / 4,
        grid: Grid = None,
        taps: int = 5,
        rope: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width, heads, grid, taps, gated=True)
        if kernel not in KERNELS:
            raise ShapeError(f"kernel {kernel!r} must be one of {', '.join(KERNELS)}")
        if rope and self.projections.head_dim % 4:
            raise ShapeError(f"rows and columns turn pairs in halves of a head; {self.projections.head_dim} channels are no such")
        self.kernel, self.power, self.tau, self.angle, self.rope, self.eps = kernel, power, tau, angle, rope, eps
        self.norm = nn.LayerNorm(width)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of the features of queries and of keys, (b, h, n, 2d)."""
        long, length = ((t.square().sum(-1, keepdim=True) + TINY).sqrt() for t in (q, k))
        power = self.power * (self.tau + torch.tanh(long))
        at, to = q / long, k / length
        if self.kernel == "polarity":
            return (
                torch.cat([torch.relu(at) ** power, torch.relu(-at) ** power], -1),
                torch.cat([torch.relu(k) ** self.power, torch.relu(-k) ** self.power], -1),
            )
        sizes = at.abs() ** power, k.abs() ** self.power
        return tuple(  # type: ignore[return-value]
            torch.cat([size * torch.cos(self.angle * way), size * torch.sin(self.angle * way)], -1)
            for size, way in zip(sizes, (at, to), strict=True)
        )

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.split(x, now)
        q, k = self.features(q, k)
        share = self.share(q, now)
        scale = over(share, self.mean(q, k, share, now) + self.eps)
        if self.rope:
            q, k = (torch.cat([turned(half, now.places, self.grid) for half in t.chunk(2, -1)], -1) for t in (q, k))
        return Reading(q * scale, k, v)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        assert self.gate is not None
        rows = layer_norm(self.norm, out.transpose(1, 2).flatten(2)).to(x.dtype)
        mapped: Tensor = self.projections.out(rows * F.silu(self.gate(x)))
        return mapped


def oracle(mixer: NaLaFormer, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens and a channel at a time."""
    maps, n, d = mixer.projections, len(x), mixer.projections.head_dim
    q, k, v = (x @ part.weight.T + part.bias for part in (maps.q, maps.k, maps.v))

    def score(a: Tensor, b: Tensor) -> Tensor:
        """Of two tokens' channels, without rotations."""
        long, length = torch.sqrt((a * a).sum() + 1e-12), torch.sqrt((b * b).sum() + 1e-12)
        power, total = mixer.power * (mixer.tau + torch.tanh(long)), a[0] * 0
        for e in range(d):
            size = (a[e].abs() / long) ** power * b[e].abs() ** mixer.power
            if mixer.kernel == "cosine":
                total = total + size * torch.cos(mixer.angle * (a[e] / long - b[e] / length))
            elif a[e] * b[e] > 0:
                total = total + size
        return total

    def halves(t: Tensor, raised: Tensor) -> list[Tensor]:
        if mixer.kernel == "polarity":
            return [raised * (t > 0), raised * (t < 0)]
        way = mixer.angle * t / torch.sqrt((t * t).sum() + 1e-12)
        return [raised * torch.cos(way), raised * torch.sin(way)]

    def rotated(i: int, j: int, own: slice) -> Tensor:
        a, b = q[i, own], k[j, own]
        long = torch.sqrt((a * a).sum() + 1e-12)
        first = halves(a, (a.abs() / long) ** (mixer.power * (mixer.tau + torch.tanh(long))))
        second = halves(b, b.abs() ** mixer.power)
        met = [slowly_turned(f, i, mixer.grid) @ slowly_turned(s, j, mixer.grid) for f, s in zip(first, second, strict=True)]
        return met[0] + met[1]

    heads = []
    for head in range(mixer.heads):
        own, rows = slice(head * d, (head + 1) * d), []
        for i in range(n):
            seen = [j for j in range(n) if visible[i, j]]
            scores = [score(q[i, own], k[j, own]) for j in seen]
            met = [rotated(i, j, own) for j in seen] if mixer.rope else scores
            total = sum(scores) / len(seen) + mixer.eps
            rows.append(sum(s / len(seen) * v[j, own] for s, j in zip(met, seen, strict=True)) / total)
        heads.append(torch.stack(rows))  # type: ignore[arg-type]
    out = torch.cat(heads, 1)
    if mixer.conv is not None:
        out = out + slowly_convolved(v, mixer.conv.conv.weight[:, 0], mixer.conv.conv.bias, mixer.grid)
    far = out - out.mean(1, keepdim=True)
    out = far / torch.sqrt((far * far).mean(1, keepdim=True) + 1e-5) * mixer.norm.weight + mixer.norm.bias
    assert mixer.gate is not None
    gate = x @ mixer.gate.weight.T + mixer.gate.bias
    return (out * gate / (1 + torch.exp(-gate))) @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[NaLaFormer]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        NaLaFormer(width, heads),
        NaLaFormer(width, heads // 2, kernel="polarity", taps=0),
        NaLaFormer(width, heads, taps=0, rope=False, power=2.0, tau=0.75, angle=0.5, eps=1e-5),
    ]
    for mixer in made:
        shake(mixer.norm.parameters(), seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> NaLaFormer:
    """The paper's: its cosines, along a line, with rotations and convolution."""
    return NaLaFormer(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    whole = torch.ones(24, 24, dtype=torch.bool)
    for kernel in KERNELS:
        grid = NaLaFormer(32, 4, kernel=kernel, grid=(4, 6)).double()
        yield f"{kernel}: a grid is read as by loops", largest(grid(x)[0] - oracle(grid, x[0], whole))
        plain = NaLaFormer(32, 4, kernel=kernel, taps=0, rope=False, eps=0.0).double()
        before = plain.weights(x)
        yield f"{kernel}: no weight is negative", float(before.clamp(max=0).abs().max())
        yield f"{kernel}: weights sum to one", largest(before.sum(-1) - 1)
        plain.projections.k.weight.mul_(2.0)
        plain.projections.k.bias.mul_(2.0)
        yield f"{kernel}: keys twice as large change nothing", largest(plain.weights(x) - before)
        q, k, _ = plain.split(x, begin(plain.new_cache(), x, (), None))
        a, b = plain.features(q, k)
        norms = torch.stack([t.unflatten(-1, (2, -1)).square().sum(-2).sqrt() for t in (a, b)])
        direct = q.abs() / q.norm(dim=-1, keepdim=True)
        wanted = torch.stack([direct ** (3 * (0.5 + q.norm(dim=-1, keepdim=True).tanh())), k.abs() ** 3])
        yield f"{kernel}: both halves of a channel together are as long as its power", largest(norms - wanted)
    close, far = torch.tensor([[[[1.0, 0.0]]]]).double(), torch.tensor([[[[-1.0, 0.0]]]]).double()
    for angle, gap in ((math.pi / 4, 0.0), (1.0, math.cos(2.0))):
        signed = NaLaFormer(2, 1, taps=0, rope=False, angle=angle).double()
        a, b = signed.features(close, far)
        yield f"angle {angle:.3g}: opposite directions meet with the cosine of twice as much", largest(a @ b.mT - gap)
    plain = NaLaFormer(32, 4, taps=0, rope=False, eps=0.0).double()
    yield "equal tokens: even weights", largest(plain.weights(x[:, :1].expand(-1, 24, -1)) - 1 / 24)
