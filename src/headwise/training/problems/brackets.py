"""Nested brackets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, integers, need

CARD = Card(
    paper="Self-Attention Networks Can Process Bounded Hierarchical Languages",
    year=2021,
    room="bench",
    source=(
        "arXiv:2105.11115, Dyck languages of k kinds and bounded depth: which bracket may close? Here opening and closing are "
        "equally likely where both are allowed, rows may end with brackets still open, and it is asked after closing brackets only"
    ),
)


@dataclass(frozen=True)
class Brackets(Problem):
    """Brackets of several kinds, nested up to a depth: after one was closed, which closes the one around it?

    It is not asked after an opening bracket, whose own kind would be the answer. Chance is 1 / kinds.

    Args:
        length: of a row. kinds: of brackets. depth: how many may be open at once.
    """

    length: int = 64
    kinds: int = 8
    depth: int = 6

    def __post_init__(self) -> None:
        need(self.depth >= 2 and self.kinds >= 2, f"depth {self.depth} and {self.kinds} kinds; both must be 2 at least")
        need(self.length >= 3, f"rows of {self.length} tokens; 3 are needed to ask once")

    @property
    def vocabulary(self) -> int:
        """Opening brackets, then closing ones."""
        return 2 * self.kinds

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        return 1 / self.kinds

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        # A free walk, folded at 0 and at the depth, is the walk that turns back there
        steps = 2 * integers(generator, device, 0, 1, rows, self.length) - 1
        walk = steps.cumsum(1).remainder(2 * self.depth)
        after = torch.minimum(walk, 2 * self.depth - walk)
        before = torch.nn.functional.pad(after, (1, 0))[:, :-1]
        opens, place = after > before, torch.arange(self.length, device=device)
        # For each level, the place of the last bracket that opened it
        levels = torch.arange(1, self.depth + 1, device=device)
        opened = torch.where(opens[..., None] & (after[..., None] == levels), place[:, None], 0).cummax(1).values
        kinds = integers(generator, device, 0, self.kinds - 1, rows, self.length)
        closing = kinds.gather(1, opened.gather(2, (before - 1).clamp(min=0)[..., None])[..., 0])
        around = kinds.gather(1, opened.gather(2, (after - 1).clamp(min=0)[..., None])[..., 0])
        ids = torch.where(opens, kinds, self.kinds + closing)
        return Batch(ids, torch.where(~opens & (after > 0), self.kinds + around, IGNORE))


def oracle(problem: Brackets, row: list[int]) -> list[int]:
    """The answers that a row implies, with a stack."""
    stack: list[int] = []
    targets = [IGNORE] * len(row)
    for place, token in enumerate(row):
        if token < problem.kinds:
            stack.append(token)
        else:
            assert stack.pop() == token - problem.kinds, "a bracket is closed by another kind"
            if stack:
                targets[place] = problem.kinds + stack[-1]
        assert len(stack) <= problem.depth, "too deep"
    return targets
