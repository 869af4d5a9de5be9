"""What a probe is. Most watch attention calls and reduce each at once (`CallProbe`); some measure in their own way (`Probe`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.statistic import Statistic
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import HeadTable, Statistics
from ._material import Batch, Material, Request

Advance = Callable[[int], None]  # told how many steps of work are done


@dataclass(frozen=True)
class Planted:
    """Which head of the planted model a probe must find, and how far it must stand out.

    at_least: its value, larger than every other head's. others_at_most: theirs, or None. lowest: where several roles reach
    the top, the role that must be at the bottom instead. by_size: magnitudes are compared. massive: a massive activation
    that the model is to have.
    """

    role: str
    at_least: float
    others_at_most: float | None = None
    lowest: str | None = None
    by_size: bool = False
    massive: float = 0.0


class Probe(ABC):
    """Measures every head of a stack and returns a HeadTable. Subclasses are frozen dataclasses: their fields are options."""

    unit: ClassVar[str]

    @property
    def name(self) -> str:
        """The registered name: its file's stem."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        """Why this probe makes no sense here, in a few words; None if it does."""
        return None

    @abstractmethod
    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        """How many steps of work `measure` will report."""

    @abstractmethod
    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        """The table of one stack."""


@dataclass(frozen=True)
class Observation:
    """What one attention call adds: the sum (h,) over rows, queries or sequences, and how many there were."""

    total: Tensor
    count: float

    @staticmethod
    def mean_of(values: Tensor, counted: Tensor) -> Observation:
        """Of values (b, h, n), those where counted (b or 1, n) is true."""
        counted = counted.expand(values.shape[0], -1)
        total = torch.einsum("bhn,bn->h", values.double(), counted.double())
        return Observation(total, float(counted.sum()))


class CallProbe(Probe):
    """A probe that looks at attention calls one by one; its value is the sum of what it observes over their count."""

    @abstractmethod
    def request(self) -> Request:
        """The rows it needs."""

    @abstractmethod
    def wants(self, batch: Batch, call: Call) -> Mapping[str, Statistic]:
        """The statistics it needs of a call."""

    @abstractmethod
    def observe(self, found: Statistics, batch: Batch, call: Call) -> Observation:
        """Reduces them to one number a head."""

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(material.batches(self.request()))

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        return observe_calls([self], subject, [stack], material, advance)[self, stack.name]


def observe_calls(
    probes: list[CallProbe], subject: Subject, stacks: list[Stack], material: Material, advance: Advance
) -> dict[tuple[CallProbe, str], HeadTable]:
    """The tables of all probes and stacks; probes that request the same rows share their forward passes."""
    totals = {(p, s.name): torch.zeros(s.shape, dtype=torch.float64) for p in probes for s in stacks}
    counts = {(p, s.name): torch.zeros(s.shape[0], dtype=torch.float64) for p in probes for s in stacks}
    wanted = {stack.name for stack in stacks}
    for request in dict.fromkeys(probe.request() for probe in probes):
        own = [probe for probe in probes if probe.request() == request]
        for batch in material.batches(request):

            def tap(call: Call, out: Tensor, own: list[CallProbe] = own, batch: Batch = batch) -> None:
                if call.site.stack not in wanted:
                    return
                asked = {(i, name): s for i, probe in enumerate(own) for name, s in probe.wants(batch, call).items()}
                found = call.statistics(asked)  # type: ignore[arg-type]
                for i, probe in enumerate(own):
                    mine = Statistics({name: found[i, name] for j, name in asked if j == i})  # type: ignore[index]
                    seen = probe.observe(mine, batch, call)
                    key = probe, call.site.stack
                    totals[key][call.site.layer, : call.site.heads] += seen.total.double().cpu()
                    counts[key][call.site.layer] += seen.count

            with torch.no_grad(), subject.tap(tap):
                subject.run(batch.inputs)
            advance(len(own) * len(stacks))
    tables = {}
    for (probe, name), total in totals.items():
        exists = subject.layout.stacks[name].exists().mask
        values = (total / counts[probe, name][:, None]).masked_fill(~exists, torch.nan)
        tables[probe, name] = HeadTable(values, probe.name, name, probe.unit)
    return tables


def queries(call: Call, first: int = 0) -> Tensor:
    """(b or 1, n): real queries, from the `first`-th of the row on."""
    n = call.q.shape[2]
    counted = torch.arange(n, device=call.q.device)[None] >= first
    if call.valid is None:
        return counted
    place = call.valid.long().cumsum(1) - 1
    return call.valid & (place >= first)
