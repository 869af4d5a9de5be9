"""The block that holds two letters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...card import Card
from ._problem import IGNORE, Batch, Problem, Tally, distinct, integers, need, nothing_asked, uniform

CARD = Card(
    paper="Multi-Token Attention",
    year=2025,
    room="bench",
    source=(
        "arXiv:2504.00927, the motivating toy task, and the authors' generator (projects/mta/toy_task): 5 letters of 26 in a "
        "block, a query of 2 of them; theirs has 52 blocks in 319 tokens. Theirs draws again what holds both letters by accident; "
        "here one of the two becomes a letter that it does not hold. Theirs cuts its last block off, here blocks are whole"
    ),
)
ANSWERS = ("all", "first", "last")


@dataclass(frozen=True)
class TwoLetters(Problem):
    """Blocks of letters, then two letters: say the block that holds both.

    What counts is the share of rows answered without a mistake. Chance is to say one of the blocks, the mean of 1 / blocks, or
    one of the two letters, 1 / block, where one letter is asked. One of the blocks that hold one of the two letters is a
    better guess, which needs no more than single-token attention.

    Args:
        blocks, fewest: how many there are, at most and at least; fewest 0 for half of blocks. block: letters in one. letters:
            how many different ones there are. answer: "all" letters of the block, its "first", or its "last".
    """

    blocks: int = 16
    fewest: int = 0
    block: int = 5
    letters: int = 26
    answer: str = "all"
    metric = "rows_right"

    def __post_init__(self) -> None:
        need(2 <= self.block < self.letters, f"blocks of {self.block} of {self.letters} letters; give 2 at least, and more letters")
        need(1 <= self.least <= self.blocks, f"{self.least} to {self.blocks} blocks; give 1 at least, in order")
        need(self.answer in ANSWERS, f"answer {self.answer!r} must be one of {', '.join(ANSWERS)}")

    @property
    def least(self) -> int:
        """Blocks of the shortest row."""
        return self.fewest or max(1, self.blocks // 2)

    @property
    def vocabulary(self) -> int:
        """Letters, the full stop between blocks, the mark of the query, and a blank."""
        return self.letters + 3

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.blocks * (self.block + 1) + 2 + (self.block if self.answer == "all" else 1)

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        blocks = range(self.least, self.blocks + 1)
        one = sum(1 / count for count in blocks) / len(blocks)
        return one if self.answer == "all" else max(one, 1 / self.block)

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        size, stop, mark, blank = self.block, self.letters, self.letters + 1, self.letters + 2
        count = integers(generator, device, self.least, self.blocks, rows, 1)
        target = distinct(generator, device, rows, self.letters, size)
        pair = target.gather(1, distinct(generator, device, rows, size, 2))
        drawn = uniform(generator, device, rows, self.blocks, self.letters).argsort(2)
        blocks, spare = drawn[..., :size], drawn[..., size]
        holds = (blocks[..., None] == pair[:, None, None]).any(2).all(2)  # (rows, blocks)
        gone = pair.gather(1, integers(generator, device, 0, 1, rows, self.blocks))
        blocks = torch.where(holds[..., None] & (blocks == gone[..., None]), spare[..., None], blocks)
        where = (uniform(generator, device, rows, 1) * count).long().clamp(max=self.blocks - 1)
        here = torch.arange(self.blocks, device=device) == where
        blocks = torch.where(here[..., None], target[:, None], blocks)
        text = torch.nn.functional.pad(blocks, (0, 1), value=stop).flatten(1)  # every block with its stop
        end = count * (size + 1) - 1  # the last stop gives way to the mark
        wanted = {"all": target, "first": target[:, :1], "last": target[:, -1:]}[self.answer]
        tail = torch.cat([torch.full_like(pair[:, :1], mark), pair, wanted], 1)
        ids = torch.nn.functional.pad(text, (0, self.context - text.shape[1]))
        place = torch.arange(self.context, device=device)
        after = torch.nn.functional.pad(tail, (0, self.context), value=blank).gather(1, (place - end).clamp(min=0))
        ids = torch.where(place < end, ids, after)
        return Batch(ids, nothing_asked(ids).scatter(1, end + 2 + torch.arange(wanted.shape[1], device=device), wanted))

    def metrics(self, tally: Tally) -> dict[str, float]:
        """See `Problem.metrics`; the share of rows without a mistake comes first."""
        found = super().metrics(tally)
        return {"rows_right": found.pop("rows_right"), **found}


def oracle(problem: TwoLetters, row: list[int]) -> list[int]:
    """The answer that a row implies, by looking at every block."""
    mark = row.index(problem.letters + 1)
    blocks = [row[place : place + problem.block] for place in range(0, mark, problem.block + 1)]
    (found,) = [block for block in blocks if set(row[mark + 1 : mark + 3]) <= set(block)]
    said = {"all": found, "first": found[:1], "last": found[-1:]}[problem.answer]
    targets = [IGNORE] * len(row)
    targets[mark + 2 : mark + 2 + len(said)] = said
    return targets
