"""Rectified linear attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...stages.relu import Relu
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Sparse Attention with Linear Units",
    year=2021,
    room="softmax",
    source=(
        "arXiv:2104.07012, sec. 3, and the authors' code (its gated form): ReLU of scaled scores, then one RMS norm over the "
        "heads together, with a gate sigma(w * O) of the unnormalised output. Without the gate the paper draws the gain from "
        "U(-sqrt(3 / d), sqrt(3 / d)) instead of ones, which its code does not show"
    ),
)
EPSILON = 1e-8


class Rela(Mechanism):
    """Weighs keys by max(score, 0), undivided, then normalises all heads' outputs together by their root mean square.

    Args:
        heads, head_dim: of the values. gated: multiply by sigmoid(w * output), w learned.
    """

    def __init__(self, heads: int, head_dim: int, *, gated: bool = True) -> None:
        super().__init__()
        bound = (3 / (heads * head_dim)) ** 0.5
        self.gain = nn.Parameter(torch.ones(heads, head_dim))
        self.gate = nn.Parameter(torch.empty(heads, head_dim).uniform_(-bound, bound)) if gated else None
        if not gated:
            bound = (3 / head_dim) ** 0.5
            nn.init.uniform_(self.gain, -bound, bound)

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        out = attend(q, k, v, *stages, Relu(), **places)
        wide = out.to(torch.promote_types(out.dtype, torch.float32))  # sums of squares of undivided sums are large
        normed = wide * torch.rsqrt(wide.square().mean((1, 3), keepdim=True) + EPSILON)
        normed = normed * self.gain[:, None]
        if self.gate is not None:
            normed = normed * torch.sigmoid(self.gate[:, None] * wide)
        return normed.to(out.dtype)


def oracle(mechanism: Rela, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a query at a time."""
    h, n, d = q.shape
    group = h // k.shape[0]
    rows = []
    for i in range(n):
        read = []
        for head in range(h):
            total = torch.zeros_like(v[0, 0])
            for j in range(k.shape[1]):
                s = (q[head, i] * k[head // group, j]).sum() / d**0.5
                if visible[i, j] and s > 0:
                    total = total + s * v[head // group, j]
            read.append(total)
        together = torch.cat(read)
        normed = together / torch.sqrt((together**2).mean() + EPSILON) * mechanism.gain.flatten()
        if mechanism.gate is not None:
            normed = normed / (1 + torch.exp(-mechanism.gate.flatten() * together))
        rows.append(normed.view(h, -1))
    return torch.stack(rows, 1)


def examples(heads: int, size: int) -> list[Rela]:
    """Settings that the conformance checks run."""
    return [Rela(heads, size), Rela(heads, size, gated=False)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Rela:
    """The gated form of the authors' code."""
    return Rela(heads, size, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 7, 8, generator=generator, dtype=torch.float64)
    rela, plain = Rela(2, 8).double(), Rela(2, 8, gated=False).double()
    yield "with no positive score the output is zero", largest(rela(q.abs(), -k.abs(), v))
    yield (
        "a key that nobody scores above zero changes nothing",
        largest(rela(q.abs(), torch.cat([k, -k[:, :, :1].abs()], 2), torch.cat([v, v[:, :, :1]], 2)) - rela(q.abs(), k, v)),
    )
    shuffled = torch.randperm(7, generator=generator)
    yield "the order of keys does not matter", largest(rela(q, k[:, :, shuffled], v[:, :, shuffled]) - rela(q, k, v))
    alike = plain(1e3 * q, k, v) - plain(1e6 * q, k, v)
    yield "without a gate the size of the queries does not matter", largest(alike)
