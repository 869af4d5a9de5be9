"""Saying again what was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, below, integers, need

CARD = Card(
    paper="Repeat After Me: Transformers are Better than State Space Models at Copying",
    year=2024,
    room="bench",
    source="arXiv:2402.01032, copying of uniform random tokens; here after noise of random length that is not copied",
)


@dataclass(frozen=True)
class Copy(Problem):
    """Random tokens between two marks, to be said again after the second.

    Chance is 1 / symbols. Each answer is judged after the right ones before it; rows_right is the share of rows copied whole.

    Args:
        longest, shortest: how many tokens are to be copied. noise: up to so many random tokens come before. symbols: how many
            different ones there are.
    """

    longest: int = 24
    shortest: int = 8
    noise: int = 16
    symbols: int = 32

    def __post_init__(self) -> None:
        need(1 <= self.shortest <= self.longest, f"copies of {self.shortest} to {self.longest} tokens; give 1 at least, in order")
        need(self.symbols >= 2 and self.noise >= 0, f"{self.symbols} symbols, noise {self.noise}; give 2 and 0 at least")

    @property
    def vocabulary(self) -> int:
        """Symbols, the mark of the beginning and that of the end."""
        return self.symbols + 2

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.noise + 2 * self.longest + 2

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 1 / self.symbols

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        start = below(torch.full((rows, 1), self.noise, device=device), generator)
        size = integers(generator, device, self.shortest, self.longest, rows, 1)
        noise = integers(generator, device, 0, self.symbols - 1, rows, self.context)
        place = torch.arange(self.context, device=device)
        end = start + size + 1  # the second mark
        ids = torch.where(place > end, noise.gather(1, (place - size - 1).clamp(min=0)), noise)
        ids = torch.where(place == start, self.symbols, ids)
        ids = torch.where((place == end) | (place > end + size), self.symbols + 1, ids)
        copied = (place >= end) & (place < end + size)
        return Batch(ids, torch.where(copied, ids.roll(-1, 1), IGNORE))


def oracle(problem: Copy, row: list[int]) -> list[int]:
    """The answers that a row implies."""
    first, second = row.index(problem.symbols), row.index(problem.symbols + 1)
    targets = [IGNORE] * len(row)
    for step, token in enumerate(row[first + 1 : second]):
        targets[second + step] = token
    return targets
