"""Learned relative position biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.stage import Bias, Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    year=2019,
    room="softmax",
    source=(
        "arXiv:1910.10683, sec. 2.1: a learned scalar for each head and distance, added to the score, far distances sharing one. "
        "T5 also lets near distances share, in buckets that widen with the logarithm of the distance: `bucketed`, whose bucket "
        "boundaries are those of transformers' T5 code"
    ),
)


class _Diagonals(torch.autograd.Function):
    """table[:, row - column + shift], clamped; its gradient sums diagonals in a fixed order, so that it is bitwise repeatable."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: int, columns: int, shift: int) -> Tensor:  # type: ignore[override]
        ctx.shape = (table.shape[1], shift)
        index = torch.arange(rows)[:, None] - torch.arange(columns) + shift
        return table[:, index.clamp(0, table.shape[1] - 1).to(table.device)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        size, shift = ctx.shape
        h, rows, columns = grad.shape
        # row r moved right by r: a row of (columns + rows) numbers less one, read with one number less, is skewed
        skewed = torch.nn.functional.pad(grad.flip(-1), (0, rows)).reshape(h, -1)[:, : rows * (columns + rows - 1)]
        sums = skewed.view(h, rows, columns + rows - 1).sum(1)  # of row - column = 1 - columns .. rows - 1
        place = torch.arange(1 - columns, rows) + shift
        low, inside, high = place < 0, (place >= 0) & (place < size), place >= size
        out = grad.new_zeros(h, size)
        out[:, place[inside].to(grad.device)] = sums[:, inside.to(grad.device)]
        out[:, 0] += sums[:, low.to(grad.device)].sum(1)
        out[:, -1] += sums[:, high.to(grad.device)].sum(1)
        return out, None, None, None


@dataclass(frozen=True, eq=False)
class RelativeBias(Bias):
    """Adds a learned number for each head and distance: s_ij + table[h, clamp(i - j, -R, R) + R]. table: (heads, 2 R + 1).

    Trains: the table's gradient is the same bits each time, on every backend.
    """

    table: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("table",)

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.shape[1] % 2 == 0:
            raise ShapeError(f"the table is {tuple(self.table.shape)}; it must be (heads, 2 R + 1), distances from -R to R")

    @staticmethod
    def bucketed(buckets: Tensor, reach: int, *, causal: bool) -> RelativeBias:
        """T5's table, spread over distances up to `reach`. buckets: (heads, number), of which half look ahead unless causal."""
        distance = torch.arange(-reach, reach + 1, device=buckets.device)
        which = t5_bucket(distance, buckets.shape[1], reach, causal=causal)
        chosen = torch.nn.functional.one_hot(which, buckets.shape[1]).to(buckets)
        return RelativeBias(buckets @ chosen.T)  # a product, whose gradient is summed in a fixed order

    def bias(self, places: Places) -> Tensor:
        table = self.table.to(device=places.i.device, dtype=places.dtype)
        reach = table.shape[1] // 2
        if self._in_order(places):
            rows, columns = places.i.shape[-2], places.j.shape[-1]
            shift = int(places.i.flatten()[0] - places.j.flatten()[0]) + reach
            spread: Tensor = _Diagonals.apply(table, rows, columns, shift)  # type: ignore[no-untyped-call]
            return spread
        at = places.distance().clamp(-reach, reach) + reach
        if not places.row.dim():
            return table[places.head * int(len(table) > 1), at]
        if table.requires_grad:
            spread = torch.nn.functional.one_hot(at[:, 0], table.shape[1]).to(table) @ table.T
            return spread.permute(0, 3, 1, 2)
        return table[places.head if len(table) > 1 else 0, at]

    def _in_order(self, places: Places) -> bool:
        """Whether both positions count up by one, the same in each row of the batch, so that biases lie on diagonals."""
        if not places.row.dim() or places.i.shape[0] > 1 or places.j.shape[0] > 1:
            return False
        i, j = places.i.flatten(), places.j.flatten()
        return bool((i.diff() == 1).all()) and bool((j.diff() == 1).all())

    def relative_table(self) -> Tensor:
        return self.table


def t5_bucket(distance: Tensor, buckets: int, reach: int, *, causal: bool) -> Tensor:
    """Which of T5's buckets a distance (query position less key position) falls into."""
    away, first = distance, torch.zeros_like(distance)
    if causal:
        away = away.clamp(min=0)
    else:
        buckets //= 2
        first = (distance < 0).long() * buckets
        away = away.abs()
    exact = buckets // 2
    far = torch.log(away.clamp(min=1) / exact) / torch.log(torch.tensor(reach / exact)) * (buckets - exact)
    return first + torch.where(away < exact, away, (exact + far.long()).clamp(max=buckets - 1))


def oracle(stage: RelativeBias, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    reach = (stage.table.shape[1] - 1) // 2
    away = min(max(i - j, -reach), reach)
    return score + float(stage.table[head if len(stage.table) > 1 else 0, reach + away])


def examples(heads: int, size: int) -> list[RelativeBias]:
    """Settings that the conformance checks run."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(heads, 41, generator=generator, dtype=torch.float64)
    return [RelativeBias(table), RelativeBias(table[:1, 18:23]), RelativeBias.bucketed(table[:, :8], 16, causal=True)]


def neutral(heads: int, size: int) -> list[RelativeBias]:
    """Settings that change nothing."""
    return [RelativeBias(torch.zeros(heads, 5)), RelativeBias(torch.full((1, 3), 7.0))]
