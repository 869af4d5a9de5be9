"""Paths of a text that run beside one another, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mask import Mask
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation",
    year=2025,
    room="cache",
    source=(
        "arXiv:2506.09991, sec. 4, and the authors' code: of each parallel block, every two paths are hidden from each other, "
        "their tags included; all else is causal. Tokens between two paths belong to none, so that they see the path before and "
        "the one after sees them: `models.branching` refuses such texts"
    ),
)


@dataclass(frozen=True, eq=False)
class Branches(Mask):
    """Hides the paths of a block from one another, level by level of nesting.

    path: (levels, positions) integers: the number of the path that a position is in at that level, all paths of a text numbered
    through; -1 for none. block: likewise, the block that the path is one of. Positions behind the last are in none.
    """

    path: Tensor
    block: Tensor

    def __post_init__(self) -> None:
        if self.path.dim() != 2 or self.path.shape != self.block.shape:
            raise ShapeError(
                f"paths are {tuple(self.path.shape)}, blocks {tuple(self.block.shape)}; both must be (levels, positions)"
            )

    def visible(self, places: Places) -> Tensor:
        shown = torch.ones_like(places.i + places.j, dtype=torch.bool)
        for path, block in zip(self.path, self.block, strict=True):
            own, theirs = self._at(block, places.i), self._at(block, places.j)
            apart = self._at(path, places.i) != self._at(path, places.j)
            shown = shown & ~((own == theirs) & (own >= 0) & apart)
        return shown

    @staticmethod
    def _at(table: Tensor, position: Tensor) -> Tensor:
        if not table.numel():
            return torch.full_like(position, -1)
        found = table.to(position.device)[position.clamp(0, len(table) - 1)]
        return torch.where((position >= 0) & (position < len(table)), found, -1)


def oracle(stage: Branches, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    for path, block in zip(stage.path.tolist(), stage.block.tolist(), strict=True):
        if max(i, j) < len(path) and block[i] >= 0 and block[i] == block[j] and path[i] != path[j]:
            return False
    return True


def examples(heads: int, size: int) -> list[Branches]:
    """Three paths; and two of which the second has two of its own."""
    flat = torch.full((1, 40), -1)
    flat[0, 1:2], flat[0, 2:4], flat[0, 4:9] = 0, 1, 2
    nested = torch.full((2, 40), -1)
    nested[0, 1:3], nested[0, 3:20] = 0, 1
    nested[1, 3:4], nested[1, 4:17] = 2, 3
    blocks = torch.where(nested >= 0, torch.tensor([[0], [1]]), -1)
    return [Branches(flat, torch.where(flat >= 0, 0, -1)), Branches(nested, blocks)]


def neutral(heads: int, size: int) -> list[Branches]:
    """One path alone, and none."""
    one = torch.full((1, 64), -1)
    one[0, 1:30] = 0
    return [Branches(one, torch.where(one >= 0, 0, -1)), Branches(torch.full((0, 64), -1), torch.full((0, 64), -1))]
