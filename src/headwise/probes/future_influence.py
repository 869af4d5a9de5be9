"""How much a head returns to single tokens later on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..attention.statistic import HorizonMass, Statistic
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import Statistics
from ._material import Batch, Request
from ._probe import CallProbe, Observation, Planted

CARD = Card(
    paper="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
    year=2025,
    room="probe",
    source=(
        "arXiv:2510.13554, sec. 3: future attention influence FAI_s, the mean weight that token s receives from queries 10 to "
        "100 tokens later, for each head rather than the mean of global heads. The paper reads it token by token; a head's value "
        "here is its peak over tokens (the row's first excluded, since sinks would be every head's peak)"
    ),
)
PLANTED = Planted("anchor", at_least=0.99, others_at_most=0.5)


@dataclass(frozen=True)
class FutureInfluence(CallProbe):
    """Peak over tokens of the mean weight received from queries `near`..`far` tokens later: 1 if all return to one token."""

    near: int = 10
    far: int = 100
    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        if stack.kind == "cross":
            return "cross-attention reads another sequence"
        return (
            None if subject.main.causal and stack.causal else "the horizon is one of later tokens, which only causal attention has"
        )

    def request(self) -> Request:
        return Request("any", self.rows, self.length)

    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        return {"influence": HorizonMass(self.near, self.far)}

    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        influence = found["influence"]
        m = influence.shape[-1]
        place = torch.arange(m, device=influence.device)
        whole = (place > 0) & (place + self.far < m)  # only tokens whose horizon lies inside the row
        if not bool(whole.any()):
            whole = (place > 0) & (place + self.near < m)
        return Observation(influence.masked_fill(~whole, 0.0).amax(-1).sum(0), len(influence))
