"""State tracking: products of permutations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ...card import Card
from ._problem import IGNORE, Batch, Problem, integers, need, uniform

CARD = Card(
    paper="The Illusion of State in State-Space Models",
    year=2024,
    room="bench",
    source=(
        "arXiv:2404.08819, sec. 5: the word problem of a group, at every token the product of all elements so far; there of S5, A5 "
        "and the cyclic group of 60. Here of all permutations of a few items, or of the cyclic group of as many elements, and rows "
        "of different lengths, which begin anywhere"
    ),
)


@dataclass(frozen=True)
class StateTracking(Problem):
    """Each token is an element of a group; after each, what is the product of all of them so far?

    Chance is 1 / elements. Products of permutations of 5 items can't be followed by a fixed number of layers whose states only
    decay (or by attention) at any length; the delta rule with strengths up to two follows exchanges of two items.

    Args:
        items: that are permuted: 2 to 5, so 2 to 120 elements. length: of the longest row. shortest: of the shortest one; 0 for
            half of length. commutes: the cyclic group of as many elements instead, whose products do not depend on the order.
        swaps: only exchanges of two items are given, as the S5 task of later work has it.
    """

    items: int = 3
    length: int = 32
    shortest: int = 0
    commutes: bool = False
    swaps: bool = False

    def __post_init__(self) -> None:
        need(2 <= self.items <= 5, f"permutations of {self.items} items; give 2 to 5")
        need(2 <= self.least <= self.length, f"rows of {self.least} to {self.length} tokens; give 2 at least, in order")
        need(not (self.commutes and self.swaps), "a cyclic group has no exchanges of two items; give commutes or swaps")

    @property
    def least(self) -> int:
        """Tokens of the shortest row."""
        return self.shortest or max(2, self.length // 2)

    @property
    def elements(self) -> list[tuple[int, ...]]:
        """The permutations, in alphabetical order: where each item goes. The first changes nothing."""
        return list(permutations(range(self.items)))

    @property
    def vocabulary(self) -> int:
        """The group's elements, and a blank before and after a row."""
        return len(self.elements) + 1

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 1 / len(self.elements)

    def products(self) -> Tensor:
        """(elements, elements): which one the first, and then the second, make together."""
        known = {element: number for number, element in enumerate(self.elements)}
        size = len(known)
        if self.commutes:
            return (torch.arange(size)[:, None] + torch.arange(size)) % size
        rows = [[known[tuple(then[first[i]] for i in range(self.items))] for then in known] for first in known]
        return torch.tensor(rows)

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        table = self.products().to(device)
        size = len(table)
        if self.swaps:
            moved = [sum(i != to for i, to in enumerate(element)) for element in self.elements]
            given = torch.tensor([n for n, count in enumerate(moved) if count == 2], device=device)
            ids = given[integers(generator, device, 0, len(given) - 1, rows, self.length)]
        else:
            ids = integers(generator, device, 0, size - 1, rows, self.length)
        count = integers(generator, device, self.least, self.length, rows, 1)
        start = (uniform(generator, device, rows, 1) * (self.length - count + 1)).long()
        place = torch.arange(self.length, device=device)
        there = (place >= start) & (place < start + count)
        known = torch.where(there, ids, 0)  # products of 1, 2, 4, ... elements, until each place has all of its past
        step = 1
        while step < self.length:
            known = torch.cat([known[:, :step], table[known[:, :-step], known[:, step:]]], 1)
            step *= 2
        return Batch(torch.where(there, ids, size), torch.where(there, known, IGNORE))


def oracle(problem: StateTracking, row: list[int]) -> list[int]:
    """The answers that a row implies, read from its beginning."""
    elements = list(permutations(range(problem.items)))
    state, count, targets = tuple(range(problem.items)), 0, []
    for token in row:
        if token == len(elements):
            targets.append(IGNORE)
            continue
        count = (count + token) % len(elements)
        state = tuple(elements[token][state[i]] for i in range(problem.items))
        targets.append(count if problem.commutes else elements.index(state))
    return targets
