"""Masks and biases that a model brings as tables, and the simple form of those that have one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from ..attention.mask import Mask
from ..attention.stage import Bias, Block, Places, Stage
from ..stages.causal import Causal
from ..stages.window import Window

ROWS = 1024  # of a table compared at once


@dataclass(frozen=True, eq=False)
class _Table(Stage):
    """Something that the model brings for every pair: (b or 1, h or 1, n, m)."""

    table: Tensor

    def given(self) -> torch.dtype:
        """Of the table."""
        return self.table.dtype

    def select(self, heads: Sequence[int]) -> Self:
        return self if self.table.shape[1] == 1 else replace(self, table=self.table[:, list(heads)])


class DenseMask(_Table, Mask):
    """A mask that the model brings: booleans."""

    def visible(self, places: Places) -> Tensor:
        return places.of_table(self.table)


class DenseBias(_Table, Bias):
    """A bias that the model brings."""

    def bias(self, places: Places) -> Tensor:
        return places.of_table(self.table)


@dataclass(frozen=True, eq=False)
class Known:
    """A table's simple form: the masks that show the same, and which keys are there at all, (b or 1, m)."""

    stages: tuple[Mask, ...]
    there: Tensor


Found = dict[Hashable, tuple[Tensor, Known | None]]  # holds the tables too, so that their addresses stay theirs


def recognise(table: Tensor, queries: Tensor, keys: Tensor, in_order: bool, known: Found) -> Known | None:
    """The simple form of a table (b or 1, n, m): causal, windowed, both or neither, with some keys left out; None if it has none.

    Args:
        queries, keys: positions (b or 1, n) and (b or 1, m); in_order: whether they are those of rows and columns.
        known: what was found about the tables of this forward pass; layers share theirs.
    """
    name = (table.data_ptr(), tuple(table.shape), table.stride(), in_order)
    if name not in known:
        known[name] = table, _search(table, queries, keys)
    return known[name][1]


def _search(table: Tensor, queries: Tensor, keys: Tensor) -> Known | None:
    there = table.any(1) & (keys >= 0)
    own, seen = queries[:, -1:], table[:, -1] & there
    reach = max(1, int((own - keys).where(seen, 0).amax()) + 1)  # how far back the last query looks
    candidates: tuple[tuple[Mask, ...], ...] = ((Causal(),), (Causal(), Window(reach)), (), (Window(reach),))
    return next((Known(stages, there) for stages in candidates if _shows(stages, table, queries, keys, there)), None)


def _shows(stages: tuple[Mask, ...], table: Tensor, queries: Tensor, keys: Tensor, there: Tensor) -> bool:
    """Whether the stages show just what the table shows."""
    index = torch.arange(table.shape[2], device=table.device)
    for start in range(0, table.shape[1], ROWS):
        rows = table[:, start : start + ROWS]
        block = Block.of_places(index[: rows.shape[1]] + start, index, queries[:, start : start + ROWS], keys)
        shown = reduce(torch.logical_and, (stage.visible(block.places)[:, 0] for stage in stages), there[:, None])
        if not bool((shown == rows).all()):
            return False
    return True
