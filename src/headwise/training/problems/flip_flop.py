"""One bit of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, integers, need, uniform

CARD = Card(
    paper="Exposing Attention Glitches with Flip-Flop Language Modeling",
    year=2023,
    room="bench",
    source=(
        "arXiv:2306.00946, the language FFL(p) with p = 0.8 of ignoring and equal shares of writing and reading; the first "
        "instruction writes, the last reads. Theirs are 512 tokens long; the loss is taken at what is read only"
    ),
)
WRITE, READ, PASS = 2, 3, 4  # the bits are 0 and 1


@dataclass(frozen=True)
class FlipFlop(Problem):
    """Instructions to write, read or ignore, each with a bit: what is read is what was written last.

    Chance is 1/2. Errors are what the paper calls glitches; it judges at `ignore` 0.98 and 0.1, which training rarely shows.

    Args:
        length: of the longest row, even. shortest: of the shortest one; 0 for half of length. ignore: the share of instructions
            whose bit does not count.
    """

    length: int = 128
    shortest: int = 0
    ignore: float = 0.8

    def __post_init__(self) -> None:
        need(0 <= self.ignore < 1, f"a share of {self.ignore:g} to ignore; it must be 0 or more, and below 1")
        need(
            4 <= self.least <= self.length and self.length % 2 == 0,
            f"rows of {self.least} to {self.length} tokens; give 4 at least, in order, and an even length",
        )

    @property
    def least(self) -> int:
        """Tokens of the shortest row."""
        return self.shortest or max(4, self.length // 2)

    @property
    def vocabulary(self) -> int:
        """Bits, the three instructions, and a blank after a row's end."""
        return 6

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 0.5

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        steps = self.length // 2
        place = torch.arange(steps, device=device)
        share, written = uniform(generator, device, rows, steps), (1 - self.ignore) / 2
        kind = torch.where(share < written, WRITE, torch.where(share < 2 * written, READ, PASS))
        last = integers(generator, device, (self.least + 1) // 2, steps, rows, 1) - 1
        kind = torch.where(place == 0, WRITE, torch.where(place == last, READ, kind))
        bits = integers(generator, device, 0, 1, rows, steps)
        wrote = torch.where(kind == WRITE, place, 0).cummax(1).values
        bits = torch.where(kind == READ, bits.gather(1, wrote), bits)
        there = place <= last
        ids = torch.stack([torch.where(there, kind, 5), torch.where(there, bits, 5)], 2).flatten(1)
        asked = torch.where(there & (kind == READ), bits, IGNORE)
        return Batch(ids, torch.stack([asked, torch.full_like(asked, IGNORE)], 2).flatten(1))


def oracle(problem: FlipFlop, row: list[int]) -> list[int]:
    """The answers that a row implies, read from its beginning."""
    bit, targets = -1, [IGNORE] * len(row)
    for place in range(0, len(row), 2):
        if row[place] == WRITE:
            bit = row[place + 1]
        elif row[place] == READ:
            targets[place] = bit
    return targets
