"""Retrieval heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import HeadTable
from ._material import Batch, Material, Request
from ._probe import Advance, Planted, Probe
from ._text import finds_needles

CARD = Card(
    paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
    year=2024,
    room="probe",
    source=(
        "arXiv:2404.15574, sec. 2: |g & k| / |k|, tokens copied from the needle while it is the head's most attended place, over "
        "the distinct tokens of the needle (the authors' code counts repeats, so its scores can exceed 1), averaged over samples "
        "that the model answers right. Read in one pass over prompt and true answer: for a right answer the same as greedy "
        "decoding. Ten depths at one length instead of 600 runs at 20 lengths, needles among like sentences"
    ),
)
PLANTED = Planted("induction", at_least=0.9, others_at_most=0.2)


@dataclass(frozen=True)
class Retrieval(Probe):
    """Share of a needle's tokens that the head points at, in the haystack, at the moment the model copies them."""

    prompts: int = 10
    length: int = 768
    only_successful: bool = True
    unit = "share of needle tokens"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return finds_needles(subject, stack)

    def _batches(self, material: Material) -> list[Batch]:
        return material.batches(Request("needles", self.prompts, self.length))

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(self._batches(material))

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        total, answered, asked = torch.zeros(stack.shape, dtype=torch.float64), 0, 0
        for batch in self._batches(material):
            n, longest = batch.ids.shape[1], max(len(prompt.answer) for prompt in batch.prompts)
            rows = slice(n - 1 - longest, n - 1)  # the queries from which the answers are predicted
            tops: dict[int, Tensor] = {}

            def tap(call: Call, out: Tensor, rows: slice = rows, tops: dict[int, Tensor] = tops) -> None:
                if call.site.stack == stack.name:
                    tops[call.site.layer] = call.weights(rows).argmax(-1)

            with torch.no_grad(), subject.tap(tap):
                logits = subject.model(input_ids=batch.ids, use_cache=False).logits[:, rows]
            for row, prompt in enumerate(batch.prompts):
                size = len(prompt.answer)
                right = logits[row, longest - size :].argmax(-1).tolist() == list(prompt.answer)
                asked, answered = asked + 1, answered + right
                if right or not self.only_successful:
                    for layer, top in tops.items():
                        total[layer, : top.shape[1]] += _recall(
                            top[row, :, longest - size :].cpu(), batch.ids[row].cpu(), prompt.answer, prompt.needle
                        )
            advance(1)
        counted = answered if self.only_successful else asked
        values = (total / max(counted, 1)).masked_fill(~stack.exists().mask, torch.nan)
        return HeadTable(values, self.name, stack.name, self.unit, {"prompts": asked, "answered": answered, "length": self.length})


def _recall(top: Tensor, ids: Tensor, answer: tuple[int, ...], needle: tuple[int, int]) -> Tensor:
    """(h, steps) most attended places -> (h,) share of the answer's distinct tokens that a head pointed at when they came."""
    next_token = torch.tensor(answer)
    hit = (top >= needle[0]) & (top < needle[1]) & (ids[top] == next_token)
    distinct = next_token.unique()
    found = torch.stack([hit[:, next_token == token].any(-1) for token in distinct], dim=-1)
    return found.double().mean(-1)
