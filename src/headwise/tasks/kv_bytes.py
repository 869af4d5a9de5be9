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
        """kv_bytes, kv_bytes_per_token, kv_tokens; on a GPU also kv_peak_bytes, all that reading the prompt allocated at most."""
        length = subject.check_length(self.length or min(subject.max_length, 4096))
        ids = text_ids(subject, text)
        ids = (list(subject.begin) + ids * -(-length // len(ids)))[:length]
        keep = {"logits_to_keep": 1} if "logits_to_keep" in subject.forward_names else {}
        gpu, before = subject.device.type == "cuda", 0
        if gpu:
            torch.cuda.synchronize(subject.device)
            torch.cuda.reset_peak_memory_stats(subject.device)
            before = torch.cuda.memory_allocated(subject.device)
        with torch.no_grad():
            out = subject.model(input_ids=torch.tensor([ids], device=subject.device), use_cache=True, **keep)
        advance(1)
        size = cache_bytes(cache_of(out))
        peak = {"kv_peak_bytes": torch.cuda.max_memory_allocated(subject.device) - before} if gpu else {}
        return {"kv_bytes": size, "kv_bytes_per_token": size / length, "kv_tokens": length, **peak}
