"""Packed documents: several texts in one row, none of which sees another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.stage import Block, Mask, Pattern, documents_at
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

    def visible(self, block: Block) -> Tensor:
        own, theirs = (documents_at(self.ids, place) for place in (block.query_position, block.key_position))
        return (own[:, :, None] == theirs[:, None, :])[:, None]

    def pattern(self) -> Pattern:
        return Pattern(documents=self.ids)


def oracle(stage: Documents, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j."""
    return int(stage.ids[i]) == int(stage.ids[j])


def examples(heads: int, size: int) -> list[Documents]:
    """Settings that the conformance checks run."""
    return [Documents(torch.arange(64) // 4), Documents(torch.arange(64) % 3)]


def neutral(heads: int, size: int) -> list[Documents]:
    """Settings that change nothing."""
    return [Documents(torch.zeros(64, dtype=torch.long))]
