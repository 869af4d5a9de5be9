"""Different masks for different heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.mask import Interval, Mask, Pattern, Ranges, merge
from ..attention.stage import Places
from ..card import Card
from ..errors import ShapeError
from .causal import Causal
from .sink import Sink
from .window import Window

CARD = Card(
    paper="Longformer: The Long-Document Transformer",
    year=2020,
    room="sparse",
    source="arXiv:2004.05150, sec. 3.1: windows of another dilation for each head; here any masks",
)


@dataclass(frozen=True, eq=False)
class PerHead(Mask):
    """Gives each head one of several masks. which: (heads,) the number of each head's mask, or (1,) for all."""

    masks: tuple[Mask, ...]
    which: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("which",)

    def __post_init__(self) -> None:
        if not self.masks or self.which.dim() != 1 or not bool(((self.which >= 0) & (self.which < len(self.masks))).all()):
            raise ShapeError(f"which is {self.which.tolist()}; it must give each head a number below {len(self.masks)}, a mask's")

    def visible(self, places: Places) -> Tensor:
        own = places.of_head(self.which)
        return reduce(torch.logical_or, ((own == number) & mask.visible(places) for number, mask in enumerate(self.masks)))

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        own = self.which.to(ranges.i_low.device).expand(ranges.heads if len(self.which) == 1 else -1)[:, None, None]
        found = list(self._bounds(own, ranges))
        return reduce(torch.logical_or, (some for some, _ in found)), reduce(torch.logical_or, (every for _, every in found))

    def _bounds(self, own: Tensor, ranges: Ranges) -> Iterator[tuple[Tensor, Tensor]]:
        for number, mask in enumerate(self.masks):
            some, every = mask.bounds(ranges)
            yield (own == number) & some, (own == number) & every

    def _used(self) -> list[Mask]:
        return [self.masks[number] for number in sorted(set(self.which.tolist()))]

    def reach(self, low: int, high: int) -> list[Interval]:
        return merge([interval for mask in self._used() for interval in mask.reach(low, high)])

    def pattern(self) -> Pattern | None:
        used = self._used()
        return used[0].pattern() if len(used) == 1 else None

    def select(self, heads: Sequence[int]) -> PerHead:
        """The same for a choice of heads, of masks that differ by head themselves too."""
        which = self.which if len(self.which) == 1 else self.which[list(heads)]
        return PerHead(tuple(mask.select(heads) for mask in self.masks), which)

    def check_heads(self, heads: int) -> None:
        """Raises: ShapeError if `which`, or one of the masks, has another number of heads."""
        super().check_heads(heads)
        for mask in self.masks:
            mask.check_heads(heads)


def oracle(stage: PerHead, i: int, j: int) -> bool:
    """Whether a query at position i may read a key at position j; of examples whose heads all have the same mask."""
    numbers = {0: i >= j, 1: abs(i - j) < 2, 2: j < 1}
    return numbers[int(stage.which[0])]


def examples(heads: int, size: int) -> list[PerHead]:
    """Settings that the conformance checks run."""
    return [PerHead((Causal(), Window(2), Sink(1)), torch.tensor([number])) for number in (1, 2)]


def neutral(heads: int, size: int) -> list[PerHead]:
    """Settings that change nothing."""
    return [PerHead((Causal(), Window(100)), torch.arange(heads) % 2)]
