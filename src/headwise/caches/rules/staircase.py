"""Keeps new tokens as they are, and older ones in fewer and fewer bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from ...card import Card
from ...errors import PlanError
from ..rule import PLAIN, Codec, Rule
from .quantized import Quantized

CARD = Card(
    paper="SKVQ: Sliding-window Key and Value Cache Quantization for Large Language Models",
    year=2024,
    room="cache",
    source=(
        "arXiv:2405.06219: the last tokens keep their precision, older ones are quantized in groups of channels of each token. "
        "Its order of channels, clipped ranges and filters of tokens that stay precise are left out; a second step down and "
        "moves of whole pages are our own. A token that goes down a second step is encoded from what the first left of it"
    ),
)


@dataclass(frozen=True, eq=False)
class Staircase(Rule):
    """The last ages[0] tokens (and those that fill their page) plain, older ones by codecs[0], from ages[1] on by codecs[1], ...

    Moves happen after a read, also after that of a prompt, which sees all of its tokens plain.

    Raises: PlanError unless ages rise and there is a codec for each.
    """

    alone: ClassVar[bool] = True
    masked: ClassVar[bool] = False
    ages: tuple[int, ...] = (128, 1024)
    codecs: tuple[Codec, ...] = (Quantized(8), Quantized(4))

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((-1, *self.ages), self.ages, strict=False))
        if not self.ages or len(self.ages) != len(self.codecs) or not rising:
            raise PlanError(f"ages {self.ages} for {len(self.codecs)} codecs; give ages in tokens that rise, and a codec for each")

    @property
    def segments(self) -> tuple[Codec, ...]:
        return (PLAIN, *self.codecs)

    def select(self, heads: Sequence[int]) -> Self:
        return dataclasses.replace(self, codecs=tuple(codec.select(heads) for codec in self.codecs))

    def check_heads(self, heads: int) -> None:
        for codec in self.codecs:
            codec.check_heads(heads)


def example(heads: int) -> Staircase:
    """Three kinds of tokens in the checks' prompts."""
    return Staircase(ages=(20, 100))
