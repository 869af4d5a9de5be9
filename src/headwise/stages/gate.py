"""Head gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.stage import Output
from ..card import Card

CARD = Card(
    paper="Are Sixteen Heads Really Better than One?",
    year=2019,
    room="convert",
    source="arXiv:1905.10650, sec. 2.2: the mask variable xi_h on a head's output, before the output projection",
)


@dataclass(frozen=True, eq=False)
class Gate(Output):
    """Multiplies a head's output: 0 closes it, 1 leaves it alone, anything else scales it. value: (heads,)."""

    value: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("value",)

    def output(self, out: Tensor, own_value: Tensor | None) -> Tensor:
        return out * self.value.to(out).view(1, -1, 1, 1)


def oracle(stage: Gate, out: list[float], head: int) -> list[float]:
    """One query's output of one head, after the stage."""
    factor = float(stage.value[head if len(stage.value) > 1 else 0])
    return [factor * x for x in out]


def examples(heads: int, size: int) -> list[Gate]:
    """Settings that the conformance checks run."""
    return [Gate(torch.linspace(0.0, 2.0, heads)), Gate(torch.zeros(1))]


def neutral(heads: int, size: int) -> list[Gate]:
    """Settings that change nothing."""
    return [Gate(torch.ones(heads))]
