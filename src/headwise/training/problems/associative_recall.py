"""Multi-query associative recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, distinct, integers, need, nothing_asked, uniform

CARD = Card(
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    year=2023,
    room="bench",
    source=(
        "arXiv:2312.04927 and the authors' code (multiquery_ar): pairs, then each key once more, at gaps drawn by a power law "
        "without repetition. Here the pairs begin at a random place, and what is left is filled with values only, never with keys, "
        "so that a key stands for one value; theirs draws from all tokens"
    ),
)


@dataclass(frozen=True)
class AssociativeRecall(Problem):
    """Pairs of a key and a value, then keys in another order: what was the value of each?

    Chance, 1 / pairs, is to say any value that stands in the pairs; any value at all gives 1 / values.

    Args:
        pairs: how many. length: of a row. keys, values: how many different ones there are. power: of the gaps' law, whose
            weights are gap^(power - 1); 1 for all gaps alike. offset: the pairs begin at a random place up to here.
    """

    pairs: int = 4
    length: int = 32
    keys: int = 16
    values: int = 16
    power: float = 0.01
    offset: int = 4

    def __post_init__(self) -> None:
        need(
            self.length >= 4 * self.pairs + self.offset,
            f"a row of {self.length} tokens has no room for {self.pairs} pairs, their queries and an offset of {self.offset}; "
            f"length must be {4 * self.pairs + self.offset} at least",
        )
        need(
            1 <= self.pairs <= min(self.keys, self.values),
            f"{self.pairs} pairs need as many keys and values; there are {self.keys} and {self.values}",
        )

    @property
    def vocabulary(self) -> int:
        """Keys, then values."""
        return self.keys + self.values

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 1 / self.pairs

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        keys = distinct(generator, device, rows, self.keys, self.pairs)
        values = self.keys + distinct(generator, device, rows, self.values, self.pairs)
        ids = self.keys + integers(generator, device, 0, self.values - 1, rows, self.length)
        start = integers(generator, device, 0, self.offset, rows, 1)
        at = start + 2 * torch.arange(self.pairs, device=device)
        ids = ids.scatter(1, at, keys).scatter(1, at + 1, values)
        # A place every two tokens; drawn without repetition by adding Gumbel noise to the logarithm of their weights
        gaps = torch.arange((self.length - 2 * self.pairs) // 2, device=device)
        room = (self.length - start - 2 * self.pairs) // 2
        noise = -torch.log(-torch.log(uniform(generator, device, rows, len(gaps)).clamp(1e-20, 1 - 1e-7)))
        drawn = ((self.power - 1) * torch.log(gaps + 1.0) + noise).masked_fill(gaps >= room, -torch.inf)
        asked = start + 2 * self.pairs + 2 * drawn.argsort(1, descending=True)[:, : self.pairs]
        return Batch(ids.scatter(1, asked, keys), nothing_asked(ids).scatter(1, asked, values))


def oracle(problem: AssociativeRecall, row: list[int]) -> list[int]:
    """The answers that a row implies, read from its beginning."""
    known: dict[int, int] = {}
    targets = [IGNORE] * len(row)
    for place, token in enumerate(row):
        if token >= problem.keys:
            continue
        if token in known:
            targets[place] = known[token]
        else:
            known[token] = row[place + 1]
    return targets
