"""Attention sinks: how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention.statistic import PositionMass, Statistic
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted, queries
from ._text import reads_tokens

CARD = Card(
    paper="When Attention Sink Emerges in Language Models: An Empirical View",
    year=2024,
    room="probe",
    source=(
        "arXiv:2410.10781, eq. 7 and the authors' code: alpha_1 is the mean over all rows, the first included, compared with "
        "epsilon for each sequence before averaging. Defaults k = 1, epsilon = 0.3, T = 64 as published; 32 sequences instead of "
        "100"
    ),
)
PLANTED = Planted("sink", at_least=1.0, others_at_most=0.5)


@dataclass(frozen=True)
class SinkRate(CallProbe):
    """Share of sequences of 64 tokens in which the first token receives more than `epsilon` of the weight on average."""

    epsilon: float = 0.3
    rows: int = 32
    length: int = 64
    unit = "share of sequences"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return reads_tokens(subject, stack)

    def request(self) -> Request:
        return Request("text", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"first": PositionMass(0, 1)}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        counted = queries(call).to(found["first"])
        alpha = (found["first"] * counted[:, None]).sum(-1) / counted.sum(-1, keepdim=True)
        return Observation((alpha > self.epsilon).sum(0), len(alpha))
