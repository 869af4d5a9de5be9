"""Finding one among ever more that are like it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, distinct, integers, need, nothing_asked, uniform

CARD = Card(
    paper="Selective Attention: Enhancing Transformer through Principled Context Control",
    year=2024,
    room="bench",
    source=(
        "arXiv:2411.12892 speaks of attention that is diluted as contexts grow; this task for it is ours: pairs of a key and a "
        "value, some of which are asked, with more of the others than training had"
    ),
    status="the idea of a dilution test; the paper measures language models",
)


@dataclass(frozen=True)
class Distractors(Problem):
    """Some pairs of a key and a value among many others, and at the end their keys: what was the value of each?

    Keys of distractors may come again, those that are asked stand once. Judge with more distractors than training had:
    the vocabulary stays the same. Chance is to say the value of any pair of the row.

    Args:
        distractors, fewest: how many there are in a row, at most and at least; fewest 0 for half of distractors. asked: pairs
            that are asked. keys, values: how many different ones there are.
    """

    distractors: int = 12
    fewest: int = 0
    asked: int = 4
    keys: int = 16
    values: int = 16

    def __post_init__(self) -> None:
        need(1 <= self.least <= self.distractors, f"{self.least} to {self.distractors} distractors; give 1 at least, in order")
        need(
            1 <= self.asked < self.keys and self.values >= 2,
            f"{self.asked} of {self.keys} keys are asked, {self.values} values; give 1 at least, more keys, and 2 values at least",
        )

    @property
    def least(self) -> int:
        """Distractors of the shortest row."""
        return self.fewest or max(1, self.distractors // 2)

    @property
    def vocabulary(self) -> int:
        """Keys, values, the token that asks, and a blank."""
        return self.keys + self.values + 2

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return 2 * self.distractors + 4 * self.asked

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        counts = range(self.least, self.distractors + 1)
        # it is the right pair, or another one with the same value
        others = [count + self.asked - 1 for count in counts]
        return sum((1 + other / self.values) / (other + 1) for other in others) / len(counts)

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        most = self.distractors + self.asked
        count = integers(generator, device, self.least, self.distractors, rows, 1) + self.asked
        shuffled = distinct(generator, device, rows, self.keys, self.keys)  # the first are asked, the others distract
        keys = shuffled.gather(1, integers(generator, device, self.asked, self.keys - 1, rows, most))
        values = self.keys + integers(generator, device, 0, self.values - 1, rows, most)
        free = uniform(generator, device, rows, most).masked_fill(torch.arange(most, device=device) >= count, 2.0)
        where, asked = free.argsort(1)[:, : self.asked], shuffled[:, : self.asked]
        pairs = torch.stack([keys.scatter(1, where, asked), values], 2).flatten(1)
        ask, blank = self.vocabulary - 2, self.vocabulary - 1
        ids = torch.nn.functional.pad(pairs, (0, 2 * self.asked))
        ids = torch.where(torch.arange(self.context, device=device) < 2 * count, ids, blank)
        at = 2 * count + 2 * torch.arange(self.asked, device=device)
        ids = ids.scatter(1, at, ask).scatter(1, at + 1, asked)
        return Batch(ids, nothing_asked(ids).scatter(1, at + 1, values.gather(1, where)))


def oracle(problem: Distractors, row: list[int]) -> list[int]:
    """The answers that a row implies."""
    first, targets = row.index(problem.vocabulary - 2), [IGNORE] * len(row)
    for place in range(first, len(row) - 1, 2):
        if row[place] == problem.vocabulary - 2:
            (pair,) = [at for at in range(0, first, 2) if row[at] == row[place + 1]]
            targets[place + 1] = row[pair + 1]
    return targets
