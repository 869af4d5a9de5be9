"""How well a model predicts text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import zoo
from ..card import Card
from ..errors import InputError
from ..models.inputs import text_ids
from ..models.subject import Subject
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="The Pile: An 800GB Dataset of Diverse Text for Language Modeling",
    year=2020,
    room="bench",
    source="arXiv:2101.00027, sec. 3.1, for bits per byte, which compares models of different tokenizers",
)


@dataclass(frozen=True)
class Perplexity(Task):
    """Loss on text, cut into windows of the model's context: nats a token, perplexity, and bits per byte."""

    rows: int = 6
    length: int = 2048

    def _windows(self, subject: Subject, text: str | None) -> list[tuple[int, int]]:
        ids = text_ids(subject, text)
        size = min(self.length, subject.max_length) - len(subject.begin)
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} tokens; at least 2 are needed")
        starts = range(0, max(1, len(ids) - size + 1), size)
        return [(start, min(start + size, len(ids))) for start in starts][: self.rows]

    def steps(self, subject: Subject) -> int:
        return self.rows

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """loss (nats a token), perplexity, bits_per_byte (with a tokenizer), tokens."""
        ids, begin = text_ids(subject, text), list(subject.begin)
        windows = self._windows(subject, text)
        nats, tokens, size = 0.0, 0, 0
        offsets, source = None, zoo.heldout_text() if text is None else text
        if subject.tokenizer is not None and subject.tokenizer.is_fast:
            offsets = subject.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        for start, stop in windows:
            row = torch.tensor([begin + ids[start:stop]], device=subject.device)
            with torch.no_grad():
                nats += float(subject.token_losses(row)[:, max(len(begin) - 1, 0) :].double().sum())
            first = start if begin else start + 1  # without a begin token nothing predicts the window's first token
            tokens += stop - first
            if offsets is not None:
                size += len(source[offsets[first][0] : offsets[stop - 1][1]].encode("utf-8"))
            advance(1)
        advance(self.rows - len(windows))
        metrics: Metrics = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0)), "text_tokens": tokens}
        if size:
            metrics["bits_per_byte"] = nats / math.log(2) / size
        return metrics
