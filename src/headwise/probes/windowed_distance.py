"""How far a head looks within a short window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention.statistic import Distance, Statistic
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted, queries

CARD = Card(
    paper="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
    year=2025,
    room="probe",
    source=(
        "arXiv:2510.13554, sec. 3: windowed average attention distance (WAAD), W = 10, for each head rather than the mean of "
        "local heads"
    ),
)
PLANTED = Planted("sink", at_least=9.0)


@dataclass(frozen=True)
class WindowedDistance(CallProbe):
    """Mean of min(distance, W) between a query and where it looks: 1 for a previous-token head, W for one far away."""

    window: int = 10
    rows: int = 4
    length: int = 512
    unit = "tokens"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return "cross-attention reads another sequence" if stack.kind == "cross" else None

    def request(self) -> Request:
        return Request("any", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"distance": Distance(self.window)}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["distance"], queries(call))
