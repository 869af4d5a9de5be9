"""Token-aware phase attention: places enter by the phase of a cosine that queries and keys choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import pi
from typing import Any, Unpack

import torch
from torch import Tensor

from ...attention import attend
from ...attention.read import repeat_heads
from ...attention.stage import Block, RowScore, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Positional Encoding via Token-Aware Phase Attention",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2509.12635, eq. 12: amplitudes from the first theta d dimensions, phases from the rest; alpha = 0.1 and "
        "theta = 0.5 (sec. 4.1); the linear phase of eq. 16. No code was published. At distance zero the cosine is one. They train "
        "with a maximum learning rate of 2e-5, a fifth of that for rotary embedding"
    ),
)


@dataclass(frozen=True, eq=False)
class Phase(RowScore):
    """Multiplies scores by cos(2 pi |i - j|^alpha phase_ij).

    query: (b, h, n, r). key: (b, hk, m, r). phase_ij = query_i . key_j / sqrt(r), or of their sums if linear.
    """

    query: Tensor
    key: Tensor
    alpha: float
    linear: bool = False

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        query = self.query[:, :, block.query_index].to(scores.dtype)
        key = repeat_heads(self.key[:, :, block.key_index], query.shape[1] // self.key.shape[1]).to(scores.dtype)
        phase = query.sum(-1)[..., None] + key.sum(-1)[..., None, :] if self.linear else query @ key.mT
        far = block.distance().abs().to(scores.dtype) ** self.alpha
        return scores * torch.cos(2 * pi * query.shape[-1] ** -0.5 * far * phase)


class Tapa(Mechanism):
    """Lets one part of q and k say how much (a scaled product), and the rest how that changes with distance (a cosine's phase).

    Args:
        theta: the part of each head, from its start, that says how much. alpha: power of the distance in the phase.
        phase: "quadratic", a product of queries and keys, or "linear", the sum of their entries. No parameters.
    """

    positional = True

    def __init__(self, *, theta: float = 0.5, alpha: float = 0.1, phase: str = "quadratic") -> None:
        super().__init__()
        if not 0 < theta < 1 or alpha <= 0:
            raise ShapeError(f"theta must be between 0 and 1 and alpha above 0; they are {theta} and {alpha}")
        if phase not in ("quadratic", "linear"):
            raise ShapeError(f"the phase must be 'quadratic' or 'linear', not {phase!r}")
        self.theta, self.alpha, self.phase = theta, alpha, phase

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        d, first = q.shape[-1], round(self.theta * q.shape[-1])
        if not 0 < first < d:
            raise ShapeError(f"theta {self.theta} of {d} dimensions leaves amplitude or phase with none; give larger heads")
        theirs = places.get("key_positions")
        if theirs is not None:  # what empty slots hold must not reach the phases
            k = torch.where((torch.atleast_2d(theirs) >= 0)[:, None, :, None], k, 0)
        phase = Phase(q[..., first:], k[..., first:], self.alpha, self.phase == "linear")
        return attend(q[..., :first], k[..., :first], v, phase, *stages, **places)


def oracle(mechanism: Tapa, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a pair at a time."""
    h, n, d = q.shape
    m, group = k.shape[1], h // k.shape[0]
    amplitude = round(mechanism.theta * d)
    out = []
    for head in range(h):
        for i in range(n):
            scores, seen = [], visible[i].nonzero().flatten().tolist()
            for j in seen:
                one, other = q[head, i], k[head // group, j]
                much = sum(one[e] * other[e] for e in range(amplitude)) / amplitude**0.5
                rest = range(amplitude, d)
                phase = sum(one[e] + other[e] if mechanism.phase == "linear" else one[e] * other[e] for e in rest)
                turns = abs(m - n + i - j) ** mechanism.alpha * phase / (d - amplitude) ** 0.5
                scores.append(much * torch.cos(2 * pi * turns))
            out.append(torch.softmax(torch.stack(scores), 0) @ v[head // group, seen])
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[Tapa]:
    """Settings that the conformance checks run."""
    return [Tapa(), Tapa(theta=0.75, alpha=0.4), Tapa(phase="linear")]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Tapa:
    """The paper's theta and alpha."""
    return Tapa(**options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    tapa, at = Tapa(), torch.arange(9)
    still = torch.cat([q[..., :4], torch.zeros_like(q[..., 4:])], -1)
    nope = attend(q[..., :4], k[..., :4], v, Causal())
    yield (
        "without phase in the queries it is attention of width theta d, blind to places",
        largest(tapa(still, k, v, Causal()) - nope),
    )
    still = torch.cat([k[..., :4], torch.zeros_like(k[..., 4:])], -1)
    yield "nor in the keys", largest(tapa(q, still, v, Causal()) - nope)
    moved = tapa(q, k, v, Causal(), query_positions=at + 1000, key_positions=at + 1000)
    yield "only distances matter", largest(moved - tapa(q, k, v, Causal()))
    mirrored = tapa(q, k, v, query_positions=-at + 8, key_positions=-at + 8)
    yield "and not their signs", largest(mirrored - tapa(q, k, v))
    alone = tapa(q[:, :, :1], k, v, query_positions=at[:1], key_positions=at[:1].expand(9))
    yield "at distance zero the cosine is one", largest(alone - attend(q[:, :, :1, :4], k[..., :4], v))
    yield "what empty slots hold does not reach a gradient", _slope_of_empty_slots(q, k, v)
    q, k, v = torch.randn(3, 1, 1, 1800, 4, generator=generator, dtype=torch.float64)  # more than are read at once
    with_all = tapa(q, k, v, Causal())
    yield "the last queries of a long text read as they do alone", largest(tapa(q[:, :, -3:], k, v, Causal()) - with_all[:, :, -3:])
    for r in (1, 30, 1000):
        mean, variance = _of_normal_tokens(r)
        yield (
            f"at distance {r} the mean of cosines of normal q and k falls as r^(-alpha width)",
            abs(mean - (1 + _turn(r) ** 2) ** -0.5),
        )
        yield "while their variance stays near 1/2", abs(variance - (1 + (1 + 4 * _turn(r) ** 2) ** -0.5) / 2 + mean**2)


def _slope_of_empty_slots(q: Tensor, k: Tensor, v: Tensor) -> float:
    tapa, at, asked = Tapa(), torch.arange(9), q.clone().requires_grad_()
    (alone,) = torch.autograd.grad(tapa(asked[:, :, 2:], k[:, :, 2:], v[:, :, 2:], Causal()).square().sum(), asked)
    places = torch.where(at < 2, -1, at - 2)
    k = torch.where((at < 2)[:, None], torch.nan, k)
    out = tapa(asked, k, v, Causal(), query_positions=places, key_positions=places)[:, :, 2:]
    return largest(torch.autograd.grad(out.square().sum(), asked)[0] - alone)


def _turn(r: int) -> float:
    return 2 * pi * r**0.1


def _of_normal_tokens(r: int) -> tuple[float, float]:
    """Mean and variance of the cosine at a distance, with phases of width one from standard normal queries and keys."""
    x = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    chance = torch.exp(-x.square() / 2) / (2 * pi) ** 0.5 * (x[1] - x[0])
    index, here = torch.arange(len(x)), torch.zeros(1, len(x), dtype=torch.long)
    block = Block.of_places(index, index, here + r, here)
    token = x[None, None, :, None]
    cosine = Phase(token, token, 0.1).score_rows(torch.ones(1, 1, len(x), len(x), dtype=torch.float64), block)[0, 0]
    mean = float(chance @ cosine @ chance)
    return mean, float(chance @ cosine.square() @ chance) - mean**2
