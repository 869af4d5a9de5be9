"""Tokens a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..card import Card
from ..models.inputs import text_ids
from ..models.subject import Subject
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="Efficient Memory Management for Large Language Model Serving with PagedAttention",
    year=2023,
    room="bench",
    source="arXiv:2309.06180 measures throughput of serving; here one sequence: reading a prompt, then greedy decoding, wall clock",
)


@dataclass(frozen=True)
class Speed(Task):
    """Tokens a second when reading a prompt of the context, and when generating after it; one warm-up, then one timed run."""

    length: int | None = None
    new_tokens: int = 32

    def steps(self, subject: Subject) -> int:
        return 2

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """prompt_tokens_per_second, tokens_per_second."""
        length = subject.check_length(self.length or min(subject.max_length, 4096)) - self.new_tokens
        ids = text_ids(subject, text)
        ids = (list(subject.begin) + ids * -(-length // len(ids)))[:length]
        rows = torch.tensor([ids], device=subject.device)
        self._generate(subject, rows[:, : min(length, 64)], 2)
        advance(1)
        started = time.perf_counter()
        self._generate(subject, rows, 1)
        read = time.perf_counter() - started
        started = time.perf_counter()
        self._generate(subject, rows, 1 + self.new_tokens)
        wrote = time.perf_counter() - started - read
        advance(1)
        return {"prompt_tokens_per_second": length / read, "tokens_per_second": self.new_tokens / max(wrote, 1e-9)}

    @staticmethod
    def _generate(subject: Subject, rows: torch.Tensor, count: int) -> None:
        with torch.no_grad():
            subject.model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=int(subject.vocabulary[0]),
            )  # fmt: skip
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
