"""A fact in a long text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, below, distinct, integers, need, nothing_asked, uniform

CARD = Card(
    paper="RULER: What's the Real Context Size of Your Long-Context Language Models?",
    year=2024,
    room="bench",
    source="arXiv:2404.06654, multi-key needles: facts among like facts, hidden in filler; here single tokens, several asked",
)


@dataclass(frozen=True)
class Needle(Problem):
    """Facts, each a key and its value, far apart in filler, and at the end of the row some keys: what was the value of each?

    Chance, 1 / needles, is to say a value that stands in the row; of a single needle it is 1 / values.

    Args:
        length: the longest row. shortest: rows are as long as this at least, 0 for half of length. needles: facts in a row.
            questions: how many of them are asked, in another order; 0 for all, from which models learn fastest. keys, values,
            words: how many different ones there are; words are the filler.
    """

    length: int = 64
    shortest: int = 0
    needles: int = 4
    questions: int = 0
    keys: int = 16
    values: int = 16
    words: int = 16

    def __post_init__(self) -> None:
        least = 2 * self.needles + 2 * self.asked + 1
        need(
            least <= self.least <= self.length,
            f"rows of {self.least} to {self.length} tokens; {self.needles} needles, {self.asked} of them asked, need {least}",
        )
        need(
            1 <= self.needles <= min(self.keys, self.values),
            f"{self.needles} needles need as many keys and values; there are {self.keys} and {self.values}",
        )
        need(0 <= self.questions <= self.needles, f"{self.questions} questions about {self.needles} needles; give no more")

    @property
    def asked(self) -> int:
        """Questions of a row."""
        return self.questions or self.needles

    @property
    def least(self) -> int:
        """Tokens of the shortest row."""
        return self.shortest or self.length // 2

    @property
    def vocabulary(self) -> int:
        """Keys, values, words, and the token that asks."""
        return self.keys + self.values + self.words + 1

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 1 / self.needles if self.needles > 1 else 1 / self.values

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        first_word = self.keys + self.values
        ids = first_word + integers(generator, device, 0, self.words - 1, rows, self.length)
        size = integers(generator, device, self.least, self.length, rows, 1)
        keys = distinct(generator, device, rows, self.keys, self.needles)
        values = self.keys + distinct(generator, device, rows, self.values, self.needles)
        tail = 2 * self.asked  # each question is a mark and a key
        slots = torch.arange((self.length - tail) // 2, device=device)  # pairs stand in places of two tokens, before the questions
        odd = (size % 2) * below(torch.ones_like(size), generator)  # where one token is left over, they may begin one later
        free = uniform(generator, device, rows, len(slots)).masked_fill(slots >= (size - tail) // 2, 2.0)
        at = 2 * free.argsort(1)[:, : self.needles] + odd
        ids = ids.scatter(1, at, keys).scatter(1, at + 1, values)
        asked = size - tail + 1 + 2 * torch.arange(self.asked, device=device)  # keys are in random order already, so take the first
        ids = ids.scatter(1, asked - 1, self.vocabulary - 1).scatter(1, asked, keys[:, : self.asked])
        ids = torch.where(torch.arange(self.length, device=device) >= size, first_word, ids)
        return Batch(ids, nothing_asked(ids).scatter(1, asked, values[:, : self.asked]))


def oracle(problem: Needle, row: list[int]) -> list[int]:
    """The answers that a row implies."""
    targets = [IGNORE] * len(row)
    for place, token in enumerate(row):
        if token == problem.vocabulary - 1:
            targets[place + 1] = row[row.index(row[place + 1]) + 1]
    return targets
