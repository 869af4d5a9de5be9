"""Counting how often a variable went up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, integers, need, nothing_asked, uniform

CARD = Card(
    paper="Contextual Position Encoding: Learning to Count What's Important",
    year=2024,
    room="bench",
    source=(
        "arXiv:2405.18719, the counting task, and the authors' generator (projects/cope): `a = 0 ;`, `a ++;` and `pass;` in the "
        "proportions 1 : 7 : 50, values up to 10, then `print a`. Theirs draws a statement again that is not allowed (a variable "
        "that is not there yet, a value above 10); here it becomes a `pass;`, and the first statement sets a variable"
    ),
)
TOP = 10  # the largest value
SET, UP, PASS, ZERO, END, PRINT, BLANK = range(
    7
)  # tokens after the values 0 ... 10: `=`, `++;`, `pass;`, `0`, `;`, `print`, nothing


@dataclass(frozen=True)
class Counting(Problem):
    """Variables are set to zero, raised by one, or left alone, in a little program; at its end, what is the value of one?

    Chance is the share of the commonest value, counted over a fixed sample.

    Args:
        length: tokens of the longest program, its question included. shortest: of the shortest one; 0 for a quarter of that.
        variables: how many there may be. sets, raises, passes: how often each kind of statement is drawn, in proportion.
    """

    length: int = 96
    shortest: int = 0
    variables: int = 3
    sets: float = 1.0
    raises: float = 7.0
    passes: float = 50.0

    def __post_init__(self) -> None:
        need(self.variables >= 1, f"{self.variables} variables; one at least is needed")
        need(6 <= self.least <= self.length, f"programs of {self.least} to {self.length} tokens; the shortest possible has 6")
        shares = (self.sets, self.raises, self.passes)
        need(min(shares) >= 0 and sum(shares) > 0, f"statements in proportions {shares}; give none below 0 and one above")

    @property
    def least(self) -> int:
        """Tokens of the shortest program."""
        return self.shortest or max(6, self.length // 4)

    @property
    def vocabulary(self) -> int:
        """Values, words of statements, variables."""
        return TOP + 1 + BLANK + 1 + self.variables

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return _commonest(self)

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        words, names = TOP + 1, TOP + 1 + BLANK + 1
        shares = torch.tensor([self.sets, self.raises, self.passes], device=device).cumsum(0)
        drawn = (uniform(generator, device, rows, self.length)[..., None] * shares[-1] >= shares[:2]).sum(-1)
        drawn[:, 0] = 0
        of = integers(generator, device, 0, self.variables - 1, rows, self.length)
        # For each variable: was it set, and how often has it been raised since then?
        mine = of[..., None] == torch.arange(self.variables, device=device)
        sets, raises = (drawn == 0)[..., None] & mine, (drawn == 1)[..., None] & mine
        counted = raises.cumsum(1)
        there = sets.cumsum(1) > 0
        since = counted - torch.where(sets, counted, 0).cummax(1).values
        allowed = ((since <= TOP) & there).gather(2, of[..., None])[..., 0]
        drawn = torch.where((drawn == 1) & ~allowed, 2, drawn)
        # Statements of 4, 2 and 1 tokens, as many as there is room for before the question
        size = torch.tensor([4, 2, 1], device=device)[drawn]
        end = size.cumsum(1)
        room = integers(generator, device, self.least, self.length, rows, 1) - 2
        kept = end <= room
        ids = torch.full((rows, self.length + 4), words + BLANK, device=device)
        name = names + of
        spelled = [
            torch.where(drawn == 2, words + PASS, name), torch.where(drawn == 0, words + SET, words + UP),
            torch.full_like(name, words + ZERO), torch.full_like(name, words + END),
        ]  # fmt: skip
        for place, token in enumerate(spelled):
            at = torch.where(kept & (place < size), end - size + place, self.length + place)  # what is not there goes past the end
            ids = ids.scatter(1, at, token)
        ids = ids[:, : self.length]
        last = kept.sum(1, keepdim=True) - 1
        values = since.clamp(max=TOP).gather(1, last[..., None].expand(-1, -1, self.variables))[:, 0]
        known = there.gather(1, last[..., None].expand(-1, -1, self.variables))[:, 0]
        which = torch.where(known, uniform(generator, device, rows, self.variables), -1.0).argmax(1, keepdim=True)
        begin = end.gather(1, last)
        ids = ids.scatter(1, begin, words + PRINT).scatter(1, begin + 1, names + which)
        return Batch(ids, nothing_asked(ids).scatter(1, begin + 1, values.gather(1, which)))


@cache
def _commonest(problem: Counting) -> float:
    device = torch.device("cpu")
    answers = problem.batch(8192, torch.Generator().manual_seed(0), device).targets
    return float(answers[answers != IGNORE].bincount().max()) / 8192


def oracle(problem: Counting, row: list[int]) -> list[int]:
    """The answer that a program implies, run statement by statement."""
    words, names = TOP + 1, TOP + 1 + BLANK + 1
    values: dict[int, int] = {}
    targets = [IGNORE] * len(row)
    place = 0
    while row[place] != words + PRINT:
        if row[place] == words + PASS:
            place += 1
        elif row[place + 1] == words + UP:
            values[row[place]] += 1
            assert values[row[place]] <= TOP, "a value above 10"
            place += 2
        else:
            assert row[place] >= names, "no variable"
            assert row[place + 1 : place + 4] == [words + SET, words + ZERO, words + END], "no statement"
            values[row[place]] = 0
            place += 4
    targets[place + 1] = values[row[place + 1]]
    return targets
