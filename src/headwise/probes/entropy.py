"""Entropy of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention.statistic import Entropy as RowEntropy
from ..attention.statistic import Statistic
from ..card import Card
from ..models.call import Call
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted, queries

CARD = Card(
    paper="What Does BERT Look At? An Analysis of BERT's Attention",
    year=2019,
    room="probe",
    source="arXiv:1906.04341, sec. 3.3; without the paper's smoothing of 1e-4, which only guards its logarithm",
)
PLANTED = Planted("uniform", at_least=3.0)


@dataclass(frozen=True)
class Entropy(CallProbe):
    """Mean entropy of a query's weights, in nats: 0 looks at one key, log(n) at all of n alike."""

    rows: int = 4
    length: int = 512
    unit = "nats"

    def request(self) -> Request:
        return Request("any", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"entropy": RowEntropy()}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["entropy"], queries(call))
