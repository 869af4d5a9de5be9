"""Associative recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..models.subject import Subject
from ..prompts import recall_prompts
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    year=2023,
    room="bench",
    source="arXiv:2312.04927, multi-query associative recall, with keys and values from the model's whole vocabulary",
)


@dataclass(frozen=True)
class Recall(Task):
    """Accuracy of values asked by their keys, after a list of random key-value pairs."""

    rows: int = 4
    pairs: int = 48
    queries: int = 24
    seed: int = 1

    def why_not(self, subject: Subject) -> str | None:
        if len(subject.vocabulary) < 2 * self.pairs or subject.max_length < 2 * (self.pairs + self.queries) + 2:
            return f"{self.pairs} pairs need {2 * self.pairs} ordinary tokens and {2 * (self.pairs + self.queries) + 2} of context"
        return super().why_not(subject)

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """recall_accuracy."""
        prompts = recall_prompts(subject.vocabulary, self.rows, self.pairs, self.queries, begin=subject.begin, seed=self.seed)
        rows = torch.tensor([prompt.input_ids for prompt in prompts], device=subject.device)
        with torch.no_grad():
            guess = subject.model(input_ids=rows, use_cache=False).logits.argmax(-1)
        hits = [guess[i, list(p.queries)].tolist() for i, p in enumerate(prompts)]
        right = sum(a == b for got, p in zip(hits, prompts, strict=True) for a, b in zip(got, p.answers, strict=True))
        advance(1)
        return {"recall_accuracy": right / (self.rows * self.queries)}
