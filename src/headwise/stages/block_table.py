"""Block-sparse attention from a table of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.mask import Mask, Ranges
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Big Bird: Transformers for Longer Sequences",
    year=2020,
    room="sparse",
    source="arXiv:2007.14062, appendix D: queries and keys in blocks, a table says which pairs of blocks are read",
)


@dataclass(frozen=True, eq=False)
class BlockTable(Mask):
    """Shows the blocks that a table marks. table: (heads or 1, query blocks, key blocks) booleans; size: positions in a block."""

    table: Tensor
    size: int
    per_head: ClassVar[tuple[str, ...]] = ("table",)

    def __post_init__(self) -> None:
        if self.table.dim() != 3 or self.table.dtype != torch.bool:
            given = f"{tuple(self.table.shape)} {self.table.dtype}"
            raise ShapeError(f"the table is {given}; it must be (heads or 1, query blocks, key blocks) booleans")

    def visible(self, places: Places) -> Tensor:
        table = self.table.to(places.j.device)
        head = places.head if len(table) > 1 else places.head * 0
        return table[head, self._block(places.i, 1), self._block(places.j, 2)]

    def _block(self, position: Tensor, axis: int) -> Tensor:
        """Which block; positions past the table count to its last block."""
        return position.div(self.size, rounding_mode="floor").clamp(0, self.table.shape[axis] - 1)

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        sums = F.pad(self.table.to(ranges.i_low.device).long().cumsum(1).cumsum(2), (1, 0, 1, 0))  # of all blocks before
        top, bottom = self._block(ranges.i_low, 1), self._block(ranges.i_high, 1) + 1
        left, right = self._block(ranges.j_low, 2), self._block(ranges.j_high, 2) + 1
        shown = sums[:, bottom, right] - sums[:, top, right] - sums[:, bottom, left] + sums[:, top, left]
        return (shown > 0)[None], (shown == (bottom - top) * (right - left))[None]


def oracle(stage: BlockTable, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j; for tables of one head."""
    rows = stage.table[0].tolist()
    return bool(rows[min(i // stage.size, len(rows) - 1)][min(j // stage.size, len(rows[0]) - 1)])


def examples(heads: int, size: int) -> list[BlockTable]:
    """Settings that the conformance checks run."""
    table = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]]).bool()
    return [BlockTable(table, 3), BlockTable(table, 2)]


def neutral(heads: int, size: int) -> list[BlockTable]:
    """Settings that change nothing."""
    return [BlockTable(torch.ones(heads, 2, 2, dtype=torch.bool), 3)]
