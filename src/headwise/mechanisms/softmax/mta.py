"""Multi-token attention: scores that look at their neighbours, and heads that share what they find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend
from ...attention.mask import Mask
from ...attention.stage import Block, Places, RowScore, Stage, Weights
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest, shake
from .._norms import rms_normed

CARD = Card(
    paper="Multi-Token Attention",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2504.00927 and the authors' code, whose order is kept: hidden scores count as zero, correlation over queries and "
        "keys, linear mix of heads, softmax, correlation and mix again with hidden weights zeroed before and after; then an RMS "
        "norm of each head and a gate on the normed output. The gate's bias starts at zero, which the code leaves undefined. "
        "Their models have the correlations in every fourth layer only"
    ),
)
EPSILON = 1e-5


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """(b, h, c, m) with a kernel (h, queries back, keys): its last row and middle column stand on the place itself."""
    back, width = kernel.shape[1:]
    padded = F.pad(x, ((width - 1) // 2, (width - 1) // 2, back - 1, 0))
    return F.conv2d(padded, kernel[:, None].to(x), groups=x.shape[1])


def _rows_back(kernel: Tensor | None) -> int:
    return 0 if kernel is None else kernel.shape[1] - 1


@dataclass(frozen=True)
class _Present(Mask):
    """Hides everything from padding: what it would read is not to reach the rows near it."""

    def visible(self, places: Places) -> Tensor:
        return places.i >= 0


@dataclass(frozen=True, eq=False)
class NearScores(RowScore):
    """Correlates scores over near queries and keys, then mixes heads. kernel: (h, queries, keys); mix: (h to, h from)."""

    kernel: Tensor | None
    mix: Tensor | None
    adjacent: ClassVar[bool] = True

    @property
    def past_rows(self) -> int:
        return _rows_back(self.kernel)

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        assert block.visible is not None
        scores = scores.masked_fill(~block.visible, 0.0)
        if self.kernel is not None:
            scores = _correlate(scores, self.kernel)
        return scores if self.mix is None else torch.einsum("gh,bhcm->bgcm", self.mix.to(scores), scores)


@dataclass(frozen=True, eq=False)
class NearWeights(Weights):
    """Correlates weights over near queries and keys, then mixes heads; what the mask hides stays zero. mix: (h from, h to)."""

    kernel: Tensor | None
    mix: Tensor | None
    adjacent: ClassVar[bool] = True

    @property
    def past_rows(self) -> int:
        return _rows_back(self.kernel)

    def edit(self, weights: Tensor, block: Block) -> Tensor:
        assert block.visible is not None
        if self.kernel is not None:
            weights = _correlate(weights, self.kernel).masked_fill(~block.visible, 0.0)
        return weights if self.mix is None else torch.einsum("bhcm,hg->bgcm", weights, self.mix.to(weights))


class Mta(Mechanism):
    """Lets a weight depend on several queries and keys, and on other heads: correlations of scores and of weights.

    Args:
        heads, head_dim: of queries and values. queries, keys: size of the correlations over queries (own and before) and
            keys (odd, own in the middle). before, after: whether scores and weights are correlated.
        mix_before, mix_after: whether heads are mixed before and after the softmax. norm: whether heads are normed and gated.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        queries: int = 6,
        keys: int = 11,
        before: bool = True,
        after: bool = True,
        mix_before: bool = True,
        mix_after: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if keys % 2 == 0:
            raise ShapeError(f"a correlation over {keys} keys has no middle; the number must be odd")
        kernel = torch.zeros(heads, queries, keys)
        kernel[:, -1, keys // 2] = 1.0  # what starts as plain attention
        self.kernel_before = nn.Parameter(kernel.clone()) if before else None
        self.kernel_after = nn.Parameter(kernel.clone()) if after else None
        self.mix_before = nn.Parameter(torch.eye(heads)) if mix_before else None
        self.mix_after = nn.Parameter(torch.eye(heads)) if mix_after else None
        self.norm = nn.Parameter(torch.ones(head_dim)) if norm else None
        self.gate = nn.Linear(head_dim, 1) if norm else None
        if self.gate is not None:
            width = heads * head_dim
            nn.init.trunc_normal_(self.gate.weight, std=width**-0.5, a=-3 * width**-0.5, b=3 * width**-0.5)
            nn.init.zeros_(self.gate.bias)
        self.past_queries = (queries - 1) * (before + after)

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        near: list[Stage] = [NearScores(self.kernel_before, self.mix_before), NearWeights(self.kernel_after, self.mix_after)]
        if places.get("query_positions") is not None:
            near.append(_Present())
        out = attend(q, k, v, *stages, *near, **places)
        if self.norm is None or self.gate is None:
            return out
        normed = rms_normed(out, EPSILON).to(out.dtype) * self.norm
        gated: Tensor = normed * torch.sigmoid(self.gate(normed))
        return gated


def oracle(mechanism: Mta, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), by the double sum of the paper."""
    h, n, d = q.shape
    group = h // k.shape[0]
    raw = torch.stack([q[head] @ k[head // group].T / d**0.5 for head in range(h)])
    scores = _sums(torch.where(visible, raw, 0.0), mechanism.kernel_before)
    if mechanism.mix_before is not None:
        scores = torch.stack([sum(mechanism.mix_before[g, f] * scores[f] for f in range(h)) for g in range(h)])  # type: ignore[misc]
    weights = []
    for head in range(h):
        rows = []
        for i in range(n):
            e = torch.where(visible[i], torch.exp(scores[head, i] - scores[head, i][visible[i]].max().detach()), 0.0)
            rows.append(e / e.sum())
        weights.append(torch.stack(rows))
    mixed = torch.where(visible, _sums(torch.stack(weights), mechanism.kernel_after), 0.0)
    if mechanism.mix_after is not None:
        mixed = torch.stack([sum(mechanism.mix_after[f, g] * mixed[f] for f in range(h)) for g in range(h)])  # type: ignore[misc]
    out = torch.stack([mixed[head] @ v[head // group] for head in range(h)])
    if mechanism.norm is None or mechanism.gate is None:
        return out
    normed = out / torch.sqrt((out**2).mean(-1, keepdim=True) + EPSILON) * mechanism.norm
    return normed / (1 + torch.exp(-(normed @ mechanism.gate.weight[0] + mechanism.gate.bias)))[..., None]


def _sums(x: Tensor, kernel: Tensor | None) -> Tensor:
    """sum over a, b of kernel[a, b] x[i - (back - 1) + a, j - width // 2 + b], with x zero outside."""
    if kernel is None:
        return x
    n, m = x.shape[1:]
    back, width = kernel.shape[1:]
    out = torch.zeros_like(x)
    for a in range(back):
        for b in range(width):
            down, right = back - 1 - a, width // 2 - b
            moved = torch.zeros_like(x)
            i, j = slice(down, n), slice(max(0, right), min(m, m + right))
            if j.start < j.stop and down < n:
                moved[:, i, j] = x[:, : n - down, j.start - right : j.stop - right]
            out = out + kernel[:, a, b, None, None] * moved
    return out


def examples(heads: int, size: int) -> list[Mta]:
    """Settings that the conformance checks run."""
    return [
        _random(Mta(heads, size, queries=3, keys=5)),
        _random(Mta(heads, size, queries=4, keys=3, after=False, mix_after=False, norm=False)),
    ]


def _random(made: Mta) -> Mta:
    shake(made.parameters(), seed=7)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mta:
    """The paper's sizes."""
    return Mta(heads, size, **options)


def neutral(heads: int, size: int) -> list[Mta]:
    """Settings that are plain attention: at the start of training, without the norm."""
    return [Mta(heads, size, norm=False)]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 20, 8, generator=generator, dtype=torch.float64)
    mta = _random(Mta(4, 8, queries=3, keys=5)).double()
    moved = k.clone()
    moved[:, :, 12:] += 1.0
    yield "no key is read before its time", largest((mta(q, k, v, Causal()) - mta(q, moved, v, Causal()))[:, :, :12])
    earlier = q.clone()
    earlier[:, :, : 15 - mta.past_queries] += 1.0
    yield (
        "it reaches back past_queries queries and no more",
        largest((mta(q, k, v, Causal()) - mta(earlier, k, v, Causal()))[:, :, 15:]),
    )
    counted = sum(p.numel() for p in Mta(16, 96).parameters())
    yield "2817 parameters in a layer of 16 heads of 96", float(abs(counted - 2817))
