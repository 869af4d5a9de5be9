"""Finding a fact in a long text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..card import Card
from ..models.cache import cache_argument, cache_of
from ..models.inputs import text_ids
from ..models.subject import Subject
from ..prompts import NeedlePrompt, needle_prompts
from ._task import Advance, Metrics, Task

CARD = Card(
    paper="RULER: What's the Real Context Size of Your Long-Context Language Models?",
    year=2024,
    room="bench",
    source=(
        "arXiv:2404.06654, multi-key needles: one fact asked among like facts, in running text. A password of five common words; "
        "exact recall is every token of it right, which under teacher forcing is the same as greedy decoding of the whole"
    ),
)
MINIMUM = 256  # tokens that a needle with its distractors needs


@dataclass(frozen=True)
class Needle(Task):
    """Exact recall of a password hidden in text, by depth: 0 at its start, 1 at its end."""

    depths: Sequence[float] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9)
    count: int = 1
    length: int | None = None
    seed: int = 1

    def why_not(self, subject: Subject) -> str | None:
        if subject.max_length < MINIMUM:
            return f"a context of {subject.max_length} tokens has no room for needles"
        return super().why_not(subject)

    def steps(self, subject: Subject) -> int:
        return len(self.depths) * self.count

    def prompts(self, subject: Subject, text: str | None) -> list[NeedlePrompt]:
        """The prompts: at the full context (at most 4096 tokens) unless `length` says otherwise."""
        length = subject.check_length(self.length or min(subject.max_length, 4096))
        haystack = text_ids(subject, text)
        haystack = haystack * -(-length // len(haystack))
        return needle_prompts(
            haystack, length, self.depths, encode=subject.encode_raw if subject.tokenizer is not None else None,
            vocabulary=subject.vocabulary, begin=subject.begin, count=self.count, seed=self.seed,
        )  # fmt: skip

    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """needle (mean exact recall), needle_by_depth."""
        found: dict[float, list[bool]] = {}
        for prompt in self.prompts(subject, text):
            found.setdefault(prompt.depth, []).append(answered(subject, prompt))
            advance(1)
        by_depth = {f"{depth:g}": sum(hits) / len(hits) for depth, hits in found.items()}
        return {"needle": sum(by_depth.values()) / len(by_depth), "needle_by_depth": by_depth}


def answered(subject: Subject, prompt: NeedlePrompt) -> bool:
    """Whether greedy decoding gives the whole answer.

    Read in one forward pass; under a plan that says how heads are cached, the prompt is read first, and then the answer token by
    token from what the cache holds.
    """
    if subject.session.caches_otherwise:
        return _answered_from_cache(subject, prompt)
    size = len(prompt.answer)
    ids = torch.tensor([[*prompt.input_ids, *prompt.answer]], device=subject.device)
    keep = {"logits_to_keep": size + 1} if "logits_to_keep" in subject.forward_names else {}
    with torch.no_grad():
        logits = subject.model(input_ids=ids, use_cache=False, **keep).logits
    return bool(logits[0, -size - 1 : -1].argmax(-1).tolist() == list(prompt.answer))


def _answered_from_cache(subject: Subject, prompt: NeedlePrompt) -> bool:
    keep = {"logits_to_keep": 1} if "logits_to_keep" in subject.forward_names else {}
    ids = torch.tensor([list(prompt.input_ids)], device=subject.device)
    cache: dict[str, Any] = {}
    with torch.no_grad():
        for token in prompt.answer:
            out = subject.model(input_ids=ids, use_cache=True, **keep, **cache)
            if int(out.logits[0, -1].argmax()) != token:
                return False
            ids, cache = ids.new_tensor([[token]]), {str(cache_argument(subject.model)): cache_of(out)}
    return True
