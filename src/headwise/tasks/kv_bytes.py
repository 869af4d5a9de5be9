"""What the cache costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..card import Card
from ..models.cache import cache_bytes, cache_of
from ..models.inputs import text_ids
from ..models.subject import Subject
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    room="bench",
    source=(
        "arXiv:2410.10819, sec. 4: memory of keys and values; here the bytes that the cache's tensors really occupy after a prompt"
    ),
)


@dataclass(frozen=True)
class KvBytes(Task):
    """Bytes that keys and values occupy after reading a prompt of the full context."""

    length: int | None = None

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """kv_bytes, kv_bytes_per_token, kv_tokens."""
        length = subject.check_length(self.length or min(subject.max_length, 4096))
        ids = text_ids(subject, text)
        ids = (list(subject.begin) + ids * -(-length // len(ids)))[:length]
        with torch.no_grad():
            out = subject.model(input_ids=torch.tensor([ids], device=subject.device), use_cache=True)
        advance(1)
        size = cache_bytes(cache_of(out))
        return {"kv_bytes": size, "kv_bytes_per_token": size / length, "kv_tokens": length}
