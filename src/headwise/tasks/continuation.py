"""How well a model predicts the tokens after a long prompt, from what its cache still holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..card import Card
from ..models.cache import cache_argument, cache_of
from ..models.inputs import text_ids
from ..models.subject import Subject
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="bench",
    source="arXiv:2309.17453 reads text token by token through the cache; here so after a prompt that is read at once",
)


@dataclass(frozen=True)
class Continuation(Task):
    """Loss of the tokens that follow a prompt, read one by one with the cache: what a plan that frees keys changes.

    rows: pieces of the text, evenly spread. length: tokens of prompt and continuation together; None: the context, at most
    2048. tokens: of the continuation.
    """

    rows: int = 4
    length: int | None = None
    tokens: int = 32

    def why_not(self, subject: Subject) -> str | None:
        if cache_argument(subject.model) is None:
            return "the model takes no cache"
        return super().why_not(subject)

    def steps(self, subject: Subject) -> int:
        return self.tokens

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """continuation_loss, in nats a token."""
        length = subject.check_length(self.length or min(subject.max_length, 2048))
        ids, begin = text_ids(subject, text), list(subject.begin)
        size = length - len(begin)
        ids = ids * -(-size // len(ids))
        starts = np.linspace(0, len(ids) - size, self.rows).astype(int)
        rows = torch.tensor([begin + ids[start : start + size] for start in starts], device=subject.device)
        prompt, rest = rows[:, : -self.tokens], rows[:, -self.tokens :]
        keep = {"logits_to_keep": 1} if "logits_to_keep" in subject.forward_names else {}
        name, nats = str(cache_argument(subject.model)), 0.0
        with torch.no_grad():
            out = subject.model(input_ids=prompt, use_cache=True, **keep)
            for i in range(self.tokens):
                losses = -out.logits[:, -1].double().log_softmax(-1).gather(-1, rest[:, i : i + 1])
                nats += float(losses.sum())
                advance(1)
                if i + 1 < self.tokens:
                    out = subject.model(input_ids=rest[:, i : i + 1], **{name: cache_of(out)})
        return {"continuation_loss": nats / (self.rows * self.tokens)}
