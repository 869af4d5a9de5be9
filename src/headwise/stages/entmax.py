"""Entmax: weights that are exactly zero for keys whose scores lie too far below the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.stage import Normalizer
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Sparse Sequence-to-Sequence Models",
    year=2019,
    room="softmax",
    source="arXiv:1905.05702, sec. 3 (1.5: sorted); other alpha by Newton's steps in place of bisection; in attention: 1909.00015",
)

FIRST_SORTED = 64  # of a row's scores, how many are sorted first; four times as many, until they hold its support
STEPS = 100  # at most, to the threshold; Newton's steps from below need about ten


@dataclass(frozen=True)
class Entmax(Normalizer):
    """Weights p_j = [(alpha - 1) s_j - tau]_+ ^ (1 / (alpha - 1)), with the threshold tau that makes them sum to 1.

    alpha: above 1, where it tends to softmax, up to 2, where it is sparsemax; the higher, the more weights are zero.
    In place of the log-normalizer stands tau (b, h, c): weights are positive where (alpha - 1) s > tau; -inf for a row that
    sees no key.
    """

    alpha: float = 1.5

    def __post_init__(self) -> None:
        if not 1.0 < self.alpha <= 2.0:
            raise ShapeError(f"alpha is {self.alpha:g}; it must be above 1 (use no stage for 1: that is softmax) and at most 2")

    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return entmax(scores, self.alpha)

    def entmax_alpha(self) -> float:
        return self.alpha


def entmax(scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Weights (..., m) and thresholds (...) of scores (..., m), -inf where masked; differentiable once, in both."""
    weights, tau = _Entmax.apply(scores, alpha)  # type: ignore[no-untyped-call]
    return weights, tau


class _Entmax(torch.autograd.Function):
    """Gradients from the weights alone: with u = p^(2 - alpha) on the support, dp/ds = diag(u) - u u^T / sum(u)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        weights, tau = _forward(scores, alpha)
        ctx.alpha = alpha
        ctx.save_for_backward(weights)
        return weights, tau

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weights: Tensor, of_tau: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        u = torch.where(weights > 0, weights.pow(2.0 - ctx.alpha), 0.0)
        total = u.sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
        mean = (u * of_weights).sum(-1, keepdim=True) / total
        return u * (of_weights - mean + (ctx.alpha - 1.0) * of_tau[..., None] / total), None


def _forward(scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    if scores.shape[-1] == 0:
        return torch.zeros_like(scores), scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    empty = top == -torch.inf
    z = ((scores - top.masked_fill(empty, 0.0)) * (alpha - 1.0)).clamp_(min=-1.0)  # what lies lower weighs nothing anyway
    t = _sorted(z, alpha) if alpha in (1.5, 2.0) else _stepped(z, alpha)
    weights, _ = _powers(z, t, alpha)
    weights = (weights / weights.sum(-1, keepdim=True)).masked_fill_(empty, 0.0)
    tau = (alpha - 1.0) * top + torch.where(empty, 0.0, t + _origin(alpha))
    return weights, tau.squeeze(-1)


def _origin(alpha: float) -> float:
    """From where t = tau - (alpha - 1) max s is counted: its lower end for low alpha, its upper end for high, which it nears."""
    return -1.0 if alpha < 1.5 else 0.0


def _bounds(count: int, alpha: float) -> tuple[float, float]:
    """Of t: one key has all the weight; `count` keys share it alike."""
    low = -1.0 - _origin(alpha)
    return low, -math.expm1((1.0 - alpha) * math.log(count)) if low == 0.0 else -(count ** (1.0 - alpha))


def _powers(z: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """x^q and x^(q - 1), with x = [z - tau]_+ and q = 1 / (alpha - 1)."""
    if alpha == 2.0:
        x = (z - t).clamp_(min=0.0)
        return x, (x > 0).to(x.dtype)
    if alpha == 1.5:
        x = (z - t).clamp_(min=0.0)
        return x.square(), x
    log = torch.log1p((z - t).clamp_(min=-1.0)) if alpha < 1.5 else torch.log((z - t).clamp_(min=0.0))
    q = 1.0 / (alpha - 1.0)
    return torch.exp(q * log), torch.exp((q - 1.0) * log)


def _step(z: Tensor, t: Tensor, alpha: float) -> Tensor:
    """Newton's step for |x|_q = 1, the norm with q = 1 / (alpha - 1).

    It is convex and falls, so that steps from below never pass the root; and nearly linear, so that they are few.
    """
    whole, slope = (part.sum(-1, keepdim=True) for part in _powers(z, t, alpha))
    log = torch.log(whole)
    return torch.expm1((alpha - 1.0) * log) * torch.exp((2.0 - alpha) * log) / slope


def _stepped(z: Tensor, alpha: float) -> Tensor:
    """(..., 1): t in closing steps from its lower end, where the sum is at least 1, to machine precision."""
    low, high = _bounds(z.shape[-1], alpha)
    t = torch.full_like(z[..., :1], low)
    precision = 4.0 * torch.finfo(z.dtype).eps
    for _ in range(STEPS):
        moved = (t + _step(z, t, alpha)).clamp_(low, high)
        still = (moved - t).abs() <= precision * (moved.abs() + alpha - 1.0)
        t = moved
        if bool(still.all()):
            break
    return t


def _sorted(z: Tensor, alpha: float) -> Tensor:
    """(..., 1): t from the largest scores, in closed form; alpha is 1.5 or 2. Rows with long supports sort more."""
    rows = z.reshape(-1, z.shape[-1])
    found = torch.empty_like(rows[:, 0])
    left = torch.arange(len(rows), device=z.device)
    size, m = FIRST_SORTED, z.shape[-1]
    while len(left):
        size = min(size, m)
        part = rows if len(left) == len(rows) else rows[left]
        part = part.sort(-1, descending=True).values if size == m else part.topk(size).values
        found[left], support = _closed(part, alpha)
        left = left[support == size] if size < m else left[:0]
        size *= 4
    t = found.view(*z.shape[:-1], 1)
    return (t + _step(z, t, alpha)).clamp_(*_bounds(m, alpha))  # mends the rounding of long sums


def _closed(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(rows,) t and sizes of support, of rows (rows, k) in falling order: the longest start that its own t keeps whole."""
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = z.cumsum(-1) / count
    if alpha == 2.0:
        t = mean - 1.0 / count
    else:
        spread = z.square().cumsum(-1) / count - mean.square()
        t = mean - (1.0 / count - spread).clamp_(min=0.0).sqrt()
    support = ((z > t) | (count == 1)).sum(-1)  # the first always is in it
    return t.gather(-1, support[:, None] - 1).squeeze(-1), support


def oracle(stage: Normalizer, scores: list[float], head: int) -> list[float]:
    """The weights of one row of scores, -inf where masked: tau by halving the interval that holds it."""
    alpha = stage.entmax_alpha() or 1.0
    z = [(alpha - 1.0) * s for s in scores]
    if max(z, default=-math.inf) == -math.inf:
        return [0.0] * len(z)

    def weights(tau: float) -> list[float]:
        return [max(x - tau, 0.0) ** (1.0 / (alpha - 1.0)) for x in z]

    low, high = max(z) - 1.0, max(z)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) >= 1.0 else (low, middle)
    return [p / sum(weights(low)) for p in weights(low)]


def examples(heads: int, size: int) -> list[Entmax]:
    """Settings that the conformance checks run."""
    return [Entmax(), Entmax(1.25), Entmax(1.8), Entmax(2.0)]


def neutral(heads: int, size: int) -> list[Entmax]:
    """Settings that change nothing: next to 1, entmax is softmax."""
    return [Entmax(1.0 + 1e-13)]
