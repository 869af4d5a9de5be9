"""Local against long-range heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention.statistic import LocalMass as LocalWeight
from ..attention.statistic import Statistic
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted, queries

CARD = Card(
    paper="Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification",
    year=2025,
    room="probe",
    source=(
        "arXiv:2502.09647: A_loc / (A_loc + A_bulk), the quantity that its oracle compares with a threshold, averaged over "
        "queries that have a bulk; sinks 16 as published, a window of 64 for short contexts (the paper's is about 1024)"
    ),
)
PLANTED = Planted("local", at_least=0.99, lowest="anchor")


@dataclass(frozen=True)
class LocalMass(CallProbe):
    """Mean weight on the first `sink` and the last `window` tokens: what is left of 1 is long-range."""

    sink: int = 16
    window: int = 64
    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        if stack.kind == "cross":
            return "cross-attention reads another sequence"
        if getattr(subject.model, "main_input_name", "") == "pixel_values" or stack.name in ("vision", "audio"):
            return "patches of an image have no one-dimensional neighbourhood"
        return (
            None
            if subject.max_length > self.sink + self.window
            else f"its context is no longer than {self.sink + self.window} tokens"
        )

    def request(self) -> Request:
        return Request("any", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"local": LocalWeight(self.sink, self.window)}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        return Observation.mean_of(found["local"], queries(call, self.sink + self.window))
