"""Attention sinks: how much weight."""

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

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="probe",
    source="arXiv:2309.17453, fig. 2: weight on the initial tokens, averaged over queries that have others to choose from",
)
PLANTED = Planted("sink", at_least=0.99, others_at_most=0.5)


@dataclass(frozen=True)
class SinkMass(CallProbe):
    """Mean weight on the row's first `tokens`, over the queries after them."""

    tokens: int = 1
    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return "cross-attention reads another sequence" if stack.kind == "cross" else None

    def request(self) -> Request:
        return Request("any", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"sink": PositionMass(0, self.tokens)}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["sink"], queries(call, self.tokens))
