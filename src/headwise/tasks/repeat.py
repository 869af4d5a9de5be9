"""Continuing what was seen before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..models.subject import Subject
from ..prompts import repeated_rows
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="In-context Learning and Induction Heads",
    year=2022,
    room="bench",
    source="arXiv:2209.11895: random tokens repeated, here at a random distance in each row",
)


@dataclass(frozen=True)
class Repeat(Task):
    """Next-token accuracy in the second copy of random tokens."""

    rows: int = 4
    length: int = 512
    seed: int = 1

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """repeat_accuracy."""
        length = min(self.length, subject.max_length)
        ids, periods = repeated_rows(subject.vocabulary, self.rows, length, begin=subject.begin, seed=self.seed)
        rows = torch.from_numpy(ids).to(subject.device)
        with torch.no_grad():
            guess = subject.model(input_ids=rows, use_cache=False).logits.argmax(-1)
        right, asked = 0, 0
        for row, period in enumerate(periods.tolist()):
            hits = guess[row, length - period : length - 1] == rows[row, length - period + 1 :]
            right, asked = right + int(hits.sum()), asked + len(hits)
        advance(1)
        return {"repeat_accuracy": right / asked}
