"""Head offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Output
from ..card import Card

CARD = Card(
    paper="LoFiT: Localized Fine-tuning on LLM Representations",
    year=2024,
    room="steer",
    source="arXiv:2406.01563, sec. 3: z + v on the outputs of chosen heads; ITI's shift is the same edit",
)


@dataclass(frozen=True, eq=False)
class Offset(Output):
    """Adds a vector to a head's output at every token. vector: (heads, head size)."""

    vector: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("vector",)

    def output(self, out: Tensor, own_value: Tensor | None) -> Tensor:
        return out + self.vector.to(out)[:, None, :]


def oracle(stage: Offset, out: list[float], head: int) -> list[float]:
    """One query's output of one head, after the stage."""
    row = stage.vector[head if len(stage.vector) > 1 else 0].tolist()
    return [x + y for x, y in zip(out, row, strict=True)]


def examples(heads: int, size: int) -> list[Offset]:
    """Settings that the conformance checks run."""
    return [Offset(torch.linspace(-1.0, 1.0, heads * size).view(heads, size))]


def neutral(heads: int, size: int) -> list[Offset]:
    """Settings that change nothing."""
    return [Offset(torch.zeros(heads, size))]
