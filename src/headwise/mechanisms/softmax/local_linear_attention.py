"""Local linear attention: each query fits a line to the values near it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from ...attention import attend
from ...attention.backends.chunked import saved
from ...attention.stage import Block, Stage, Weights
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.sink_logit import SinkLogit
from .._mixer import Attention, Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2510.01450 and the authors' code: the intercept at the query of a ridge fit v = b + W (k - q), weighted by "
        "exp(q . k / sqrt(d)), W penalised by ridge times the sum of the weights as in the code (the paper writes a penalty that "
        "the weights do not scale). Solved directly and around the weighted mean of the keys, which takes no difference of large "
        "numbers, so the code's epsilon in a denominator is not needed; the code solves by conjugate gradients. Its default "
        "ridge is 0.01 in one version and 10 in another; its tests in bfloat16 use 10"
    ),
)
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LocalLinear(Weights):
    """w_j -> w_j (1 + u . (k_j - mean)), u = (C + ridge I)^-1 (q - mean), mean and covariance C of the keys under the weights.

    chunk: bytes of second moments to hold at once; no less than those of 16 queries and 16 keys.
    """

    ridge: float
    chunk: int = CHUNK_BYTES

    def edit(self, weights: Tensor, block: Block) -> Tensor:
        query, key = block.query.to(weights.dtype), block.key.to(weights.dtype)
        b, h, _, d = query.shape
        rows = max(16, self.chunk // (b * h * d * d * weights.element_size()))
        pieces = zip(weights.split(rows, 2), query.split(rows, 2), strict=True)
        return torch.cat([w * saved(_factors, w, q, key, self.ridge, rows) for w, q in pieces], 2)


def _factors(weights: Tensor, query: Tensor, key: Tensor, ridge: float, piece: int) -> Tensor:
    """(b, h, c, m): 1 + u . (k - mean) for each query and key; `piece` keys are squared at a time."""
    total = weights.sum(-1, keepdim=True)  # zero for a query that sees nothing, less than one where a sink takes some
    share = weights / torch.where(total == 0, 1.0, total)
    # All is measured from the first query's mean: from zero, covariances would be small differences of large sums
    origin = (share[:, :, :1] @ key).detach()
    key, query = key - origin, query - origin
    mean = share @ key
    squared = mean[..., None] * mean[..., None, :]
    second = torch.zeros_like(squared)
    for start in range(0, key.shape[2], piece):
        stop = start + piece
        second = second + saved(_squares, share[..., start:stop], key[:, :, start:stop])
    rounding = 0.25 * torch.finfo(second.dtype).eps * second.diagonal(dim1=-2, dim2=-1).sum(-1)
    eye = torch.eye(query.shape[-1], device=query.device, dtype=query.dtype)
    slope = torch.linalg.solve(second - squared + (ridge + rounding)[..., None, None] * eye, query - mean)
    return 1 + slope @ key.mT - (slope * mean).sum(-1, keepdim=True)


def _squares(share: Tensor, key: Tensor) -> Tensor:
    """(b, h, c, d, d): sum_j share_j k_j k_j^T."""
    squares = (key[..., None] * key[..., None, :]).flatten(-2)
    return (share @ squares).unflatten(-1, (key.shape[-1], -1))


class LocalLinearAttention(Mechanism):
    """Reads the value, at the query, of a line fitted to the values of near keys, where softmax reads their mean.

    Weights still sum to one but may be negative: a query outside the keys' hull is extrapolated to.

    Args:
        ridge: how much slopes are held down, above 0; endless is softmax attention. scale: on q . k; default d ** -0.5,
            0 fits one line to all keys.
    """

    def __init__(self, *, ridge: float = 0.01, scale: float | None = None) -> None:
        super().__init__()
        if not ridge > 0:
            raise ShapeError(
                f"a ridge of {ridge} leaves the first queries, which see few keys, without a slope; it must be above 0"
            )
        self.ridge, self.scale = ridge, scale

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        return attend(q, k, v, *stages, LocalLinear(self.ridge), scale=self.scale, **places)


def oracle(mechanism: LocalLinearAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a weighted least-squares fit for each query."""
    h, n, d = q.shape
    group = h // k.shape[0]
    scale = d**-0.5 if mechanism.scale is None else mechanism.scale
    out = []
    for head in range(h):
        for i in range(n):
            seen = visible[i].nonzero().flatten()
            keys, values = k[head // group, seen], v[head // group, seen]
            s = keys @ q[head, i] * scale
            w = torch.exp(s - s.max().detach())
            design = torch.cat([torch.ones_like(w)[:, None], keys - q[head, i]], 1)
            penalty = torch.diag(torch.tensor([0.0] + [mechanism.ridge] * d, dtype=q.dtype)) * w.sum()
            out.append(torch.linalg.solve(design.T @ (w[:, None] * design) + penalty, design.T @ (w[:, None] * values))[0])
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[LocalLinearAttention]:
    """Settings that the conformance checks run."""
    return [LocalLinearAttention(), LocalLinearAttention(ridge=10.0, scale=0.5)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> LocalLinearAttention:
    """The default ridge."""
    return LocalLinearAttention(**options)


def neutral(heads: int, size: int) -> list[LocalLinearAttention]:
    """Settings that are plain attention: a ridge that lets no slope be."""
    return [LocalLinearAttention(ridge=1e15)]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 24, 4, generator=generator, dtype=torch.float64)
    local = LocalLinearAttention()
    yield "weights sum to one", largest(local(q, k, torch.ones_like(v), Causal()) - 1)
    sink = SinkLogit(torch.tensor([0.5, -1.0]))
    missing = local(q, k, torch.ones_like(v), Causal(), sink) - attend(q, k, torch.ones_like(v), Causal(), sink)
    yield "what a sink takes is not spread over the others", largest(missing)
    sunk = local(q, k, k @ k[0, 0, :4] + 2, Causal(), sink) / attend(q, k, torch.ones_like(v), Causal(), sink)
    yield "nor does it change what is fitted", largest(sunk - local(q, k, k @ k[0, 0, :4] + 2, Causal()))
    pieces = attend(q, k, v, Causal(), LocalLinear(0.01, chunk=1))
    yield "pieces of queries and keys change nothing", largest(pieces - local(q, k, v, Causal()))
    yield "the first token reads its own value", largest((local(q, k, v, Causal()) - v)[:, :, 0])
    stiff = LocalLinearAttention(ridge=1e13)
    yield "an endless ridge is softmax attention", largest(stiff(q, k, v, Causal()) - attend(q, k, v, Causal()))
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    exact = LocalLinearAttention(ridge=1e-13)(q, k, k @ matrix + 3, Causal())
    yield "values that are affine in the keys are met at the query", largest((exact - q @ matrix - 3)[:, :, 8:])
    w = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / 2).tril()
    z = k[:, :, None] - q[:, :, :, None]
    omega, mu = w.sum(-1), torch.einsum("bhij,bhijd->bhid", w, z)
    sigma = torch.einsum("bhij,bhijd,bhije->bhide", w, z, z) + 0.01 * omega[..., None, None] * torch.eye(4).double()
    rho = torch.linalg.solve(sigma, mu)
    by_code = w * (1 - torch.einsum("bhid,bhijd->bhij", rho, z)) / (omega - (mu * rho).sum(-1))[..., None]
    yield "it is the weights of the paper, around the query", largest(by_code @ v - local(q, k, v, Causal()))
    everywhere = LocalLinearAttention(ridge=0.3, scale=0.0)(q, k, v)
    keys, values = k - k.mean(2, keepdim=True), v - v.mean(2, keepdim=True)
    ridge = torch.linalg.solve(keys.mT @ keys / 24 + 0.3 * torch.eye(4).double(), keys.mT @ values / 24)
    fitted = v.mean(2, keepdim=True) + (q - k.mean(2, keepdim=True)) @ ridge
    yield "with a scale of zero it is one ridge regression for all queries", largest(everywhere - fitted)
    doubled = local(q, torch.cat([k, k], 2), torch.cat([v, v], 2)) - local(q, k, v)
    yield "every key twice changes nothing", largest(doubled)
    mixer, plain = Attention(8, 2, local).double(), Attention(8, 2).double()
    caches = mixer.new_cache(), plain.new_cache()
    x = torch.randn(1, 7, 8, generator=generator, dtype=torch.float64)
    for one, cache in zip((mixer, plain), caches, strict=True):
        one(x, Causal(), cache=cache)
    yield "it keeps what softmax attention keeps", float(abs(caches[0].nbytes - caches[1].nbytes))
    yield "it adds no parameters", float(sum(p.numel() for p in local.parameters()))
