"""Induction heads."""

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
from ._repeats import second_copy
from ._text import reads_tokens

CARD = Card(
    paper="In-context Learning and Induction Heads",
    year=2022,
    room="probe",
    source=(
        "arXiv:2209.11895, prefix matching (with the erratum of 2022-09-20: the token after the earlier copy). One earlier copy "
        "and a period drawn for each row, so that a head at a fixed distance is not taken for one that matches content"
    ),
)
PLANTED = Planted("induction", at_least=0.95, others_at_most=0.2)


@dataclass(frozen=True)
class Induction(CallProbe):
    """Mean weight on the token after the earlier copy of the present one, on random tokens repeated at random distances."""

    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return reads_tokens(subject, stack)

    def request(self) -> Request:
        return Request("repeats", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        inside, copy = second_copy(batch, call)
        return {"after": WeightAt(torch.where(inside, copy + 1, -1))}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["after"], second_copy(batch, call)[0])
