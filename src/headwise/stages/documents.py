"""Packed documents: several texts in one row, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mask import Mask, Pattern, Ranges
from ..attention.stage import Places
from ..card import Card

CARD = Card(
    paper=(
        "Efficient Sequence Packing without Cross-contamination: Accelerating Large Language Models without Impacting Performance"
    ),
    year=2021,
    room="softmax",
    source=(
        "arXiv:2107.02027, sec. 3.2: block-diagonal masks for packed sequences; here by document ids, so that documents may "
        "interleave"
    ),
)


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Shows keys of the query's own document. ids: (positions,) or (b, positions) integers: the document at each position."""

    ids: Tensor

    def visible(self, places: Places) -> Tensor:
        return self._at(places, places.i) == self._at(places, places.j)

    def _at(self, places: Places, position: Tensor) -> Tensor:
        """The documents at some positions; those of empty slots mean nothing."""
        ids, position = self.ids.to(position.device), position.clamp(min=0)
        return ids[position] if ids.dim() == 1 else ids[0][position] if len(ids) == 1 else ids[places.batch, position]

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        own, theirs = (self._range(low.flatten(), high.flatten()) for low, high in _ends(ranges))
        (i_least, i_most), (j_least, j_most) = (part[..., :, None] for part in own), (part[..., None, :] for part in theirs)
        some = (i_least <= j_most) & (j_least <= i_most)
        return some, (i_least == i_most) & (j_least == j_most) & (i_least == j_least)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(b or 1, 1, ranges): the least and the greatest id among the positions of each range."""
        ids = torch.atleast_2d(self.ids).to(low.device)
        inside = low[:, None] + torch.arange(int((high - low).max()) + 1, device=low.device)
        found = ids[:, None, torch.minimum(inside, high[:, None]).clamp(min=0)]
        return found.amin(-1), found.amax(-1)

    def pattern(self) -> Pattern:
        return Pattern(documents=self.ids)


def _ends(ranges: Ranges) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (ranges.i_low, ranges.i_high), (ranges.j_low, ranges.j_high)


def oracle(stage: Documents, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return int(stage.ids[i]) == int(stage.ids[j])


def examples(heads: int, size: int) -> list[Documents]:
    """Settings that the conformance checks run."""
    return [Documents(torch.arange(64) // 4), Documents(torch.arange(64) % 3)]


def neutral(heads: int, size: int) -> list[Documents]:
    """Settings that change nothing."""
    return [Documents(torch.zeros(64, dtype=torch.long))]
