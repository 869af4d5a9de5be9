"""Duplicate-token heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention.statistic import Statistic, WeightAt
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted
from ._repeats import second_copy
from ._text import reads_tokens

CARD = Card(
    paper="Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
    year=2022,
    room="probe",
    source=(
        "arXiv:2211.00593, sec. 3; measured on repeated random tokens as TransformerLens' head detector does, with a period for "
        "each row"
    ),
)
PLANTED = Planted("duplicate", at_least=0.95, others_at_most=0.2)


@dataclass(frozen=True)
class DuplicateToken(CallProbe):
    """Mean weight on the earlier copy of the same token, in the second copy of repeated random tokens."""

    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return reads_tokens(subject, stack)

    def request(self) -> Request:
        return Request("repeats", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"copy": WeightAt(second_copy(batch, call)[1])}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["copy"], second_copy(batch, call)[0])
