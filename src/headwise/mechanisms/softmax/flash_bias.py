"""Biases as products of features, added at the price of a few columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.alibi import Alibi
from ...stages.causal import Causal
from ...stages.low_rank_bias import LowRankBias
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="FlashBias: Fast Computation of Attention with Bias",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2505.12044 and the authors' code. Their ALiBi example has the other sign (it favours far keys); here -m (i - j). "
        "Distances have rank 5 in space and 4 in the plane, as in the code; the paper's equation uses 9. Energy of the truncated "
        "SVD is the sum of squared singular values, which the sources leave open; factors share their root"
    ),
)


class FlashBias(Mechanism):
    """Adds phi_q phi_k^T to the scores, features of rank r at each position, as r columns of queries and keys.

    Args:
        query: (heads or 1, positions, r). key: (heads or 1, positions, r). Both train. From `of_table`, `alibi` or
            `squared_distance`, or your own.
    """

    def __init__(self, query: Float[Tensor, "h n r"], key: Float[Tensor, "h m r"]) -> None:
        super().__init__()
        if query.dim() != 3 or key.dim() != 3 or query.shape[2] != key.shape[2]:
            raise ShapeError(
                f"features are {tuple(query.shape)} and {tuple(key.shape)}; they must be (heads or 1, positions, rank)"
            )
        self.query, self.key = nn.Parameter(query.clone()), nn.Parameter(key.clone())

    @staticmethod
    def of_table(bias: Float[Tensor, "h n m"], *, rank: int | None = None, energy: float = 0.995) -> FlashBias:
        """A table's best approximation: of a given rank, or of the least that keeps a share of the table's energy in each head."""
        u, s, vt = torch.linalg.svd(bias.double(), full_matrices=False)
        if rank is None:
            kept = s.square().cumsum(-1) / s.square().sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
            rank = int((kept < energy).sum(-1).max()) + 1
        root = s[:, :rank].sqrt()
        return FlashBias((u[:, :, :rank] * root[:, None]).to(bias), (vt[:, :rank].mT * root[:, None]).to(bias))

    @staticmethod
    def alibi(heads: int, length: int) -> FlashBias:
        """-m_h (i - j), of rank 2; to be read under a causal mask."""
        slopes, places = Alibi.geometric(heads).slopes[:, None], torch.arange(length, dtype=torch.float32)
        one = torch.ones(heads, length)
        return FlashBias(torch.stack([slopes * one, -slopes * places], -1), torch.stack([places * one, one], -1))

    @staticmethod
    def squared_distance(points: Float[Tensor, "n space"], weight: Float[Tensor, "h n"]) -> FlashBias:
        """-w_i |x_i - x_j|^2 of points in the plane or in space, weighed by each query; rank 4 or 5."""
        square = points.square().sum(-1, keepdim=True)
        one = torch.ones_like(square)
        query = weight[..., None] * torch.cat([2 * points, -square, -one], -1)
        return FlashBias(query, torch.cat([points, one, square], -1)[None])

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        if places.get("key_positions") is None and k.shape[2] > self.key.shape[1]:
            raise ShapeError(f"there are features of {self.key.shape[1]} positions, the keys have {k.shape[2]}")
        bias = LowRankBias(self.query[None], self.key[None])
        return attend(q, k, v, *stages, bias, **places)


def oracle(mechanism: FlashBias, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), with the whole table."""
    h, n, d = q.shape
    m, group = k.shape[1], h // k.shape[0]
    out = []
    for head in range(h):
        own = mechanism.query[head if len(mechanism.query) > 1 else 0, m - n : m]
        theirs = mechanism.key[head if len(mechanism.key) > 1 else 0, :m]
        scores = q[head] @ k[head // group].T / d**0.5 + own @ theirs.T
        out.append(torch.softmax(torch.where(visible, scores, -torch.inf), -1) @ v[head // group])
    return torch.stack(out)


def examples(heads: int, size: int) -> list[FlashBias]:
    """Settings that the conformance checks run."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(heads, 128, 128, generator=generator)
    places = torch.arange(128)
    points = torch.stack([places.cos(), places.sin(), places / 128], -1)
    return [FlashBias.of_table(table, rank=3), FlashBias.squared_distance(points, torch.rand(heads, 128, generator=generator))]


def sized(heads: int, size: int, tokens: int, rank: int = 8) -> FlashBias:
    """One for a text of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    return FlashBias(*torch.randn(2, heads, tokens, rank, generator=generator))


def neutral(heads: int, size: int) -> list[FlashBias]:
    """Settings that are plain attention."""
    return [FlashBias(torch.zeros(heads, 128, 2), torch.ones(1, 128, 2))]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 24, 8, generator=generator, dtype=torch.float64)
    alibi = FlashBias.alibi(4, 24).double()(q, k, v, Causal()) - attend(q, k, v, Causal(), Alibi.geometric(4))
    yield "ALiBi has rank 2", largest(alibi)
    points, weight = torch.randn(24, 3, generator=generator, dtype=torch.float64), torch.rand(4, 24, generator=generator).double()
    dense = -weight[..., None] * torch.cdist(points, points).square()
    made = FlashBias.squared_distance(points, weight)
    yield "squared distances in space have rank 5", largest(made.query @ made.key.mT - dense)
    table = torch.randn(2, 24, 24, generator=generator, dtype=torch.float64)
    cut = [FlashBias.of_table(table, rank=rank) for rank in (1, 4, 16, 24)]
    errors = [float((part.query @ part.key.mT - table).detach().norm()) for part in cut]
    yield "the error of a cut table falls with its rank", float(errors != sorted(errors, reverse=True))
    yield "and is none at full rank", errors[-1]
    turn = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    turned = FlashBias(made.query @ turn, made.key @ torch.linalg.inv(turn).T)
    yield "features may be turned against each other", largest(turned(q, k, v) - made(q, k, v))
