"""Tables of page numbers, on the host, and those who hold pages by them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NONE = -1  # no page

Pages = np.ndarray


class Holder(Protocol):
    """Who holds pages of an arena: `table` has a page for each time that it holds it, NONE elsewhere."""

    table: Pages

    def moved(self, where: Pages) -> None:
        """Page p is where[p] from now on."""
        ...


def after_move(table: Pages, where: Pages) -> Pages:
    """A table after page p moved to where[p]."""
    result = table.copy()
    held = table >= 0
    result[held] = where[table[held]]
    return result


def index_of(pages: Pages, pool: Tensor) -> Tensor:
    """Page or token numbers beside a pool, to index it with."""
    return torch.from_numpy(np.ascontiguousarray(pages, dtype=np.int64)).to(pool.device)


def even(table: Pages) -> tuple[int, int, int] | None:
    """(first page, distance of rows, of heads) if all of (b, heads, pages) lie evenly, pages one after another."""
    if not table.size:
        return None
    start = int(table[0, 0, 0])
    row = int(table[1, 0, 0]) - start if len(table) > 1 else table.shape[1] * table.shape[2]
    head = int(table[0, 1, 0]) - start if table.shape[1] > 1 else table.shape[2]
    if min(start, row, head) < 0:
        return None
    places = np.arange(len(table))[:, None, None] * row + np.arange(table.shape[1])[:, None] * head + np.arange(table.shape[2])
    return (start, row, head) if (table == start + places).all() else None
