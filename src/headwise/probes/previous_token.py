"""Previous-token heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..attention.statistic import Statistic, WeightAt
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted
from ._text import reads_tokens

CARD = Card(
    paper="In-context Learning and Induction Heads",
    year=2022,
    room="probe",
    source=(
        "arXiv:2209.11895, appendix; measured on repeated random tokens as TransformerLens' head detector does. The query whose "
        "previous token is the row's first is left out, since attention sinks look there for other reasons"
    ),
)
PLANTED = Planted("previous", at_least=0.99, others_at_most=0.2)


@dataclass(frozen=True)
class PreviousToken(CallProbe):
    """Mean weight on the token just before, on random tokens: 1 for a head that always looks one back."""

    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return reads_tokens(subject, stack)

    def request(self) -> Request:
        return Request("repeats", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        n = call.q.shape[2]
        return {"previous": WeightAt(torch.arange(-1, n - 1, device=call.q.device)[None])}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        place = torch.arange(call.q.shape[2], device=call.q.device)[None]
        return Observation.mean_of(found["previous"], place >= 2)
