"""Massive activations."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.statistic import SpanMass
from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import HeadTable
from ._material import Material, Request
from ._probe import Advance, Observation, Planted, Probe, queries

CARD = Card(
    paper="Massive Activations in Large Language Models",
    year=2024,
    room="probe",
    source=(
        "arXiv:2402.17762, sec. 2: after a block, values above `ratio` times the median magnitude of that layer's hidden state. "
        "The paper also asks for magnitudes above 100, a number that means nothing for small models: `floor` here, 0 by default. "
        "The table is ours: how much each head attends to the tokens that carry them (the paper's sec. 4), found in `about`"
    ),
    status="detection and attention to the tokens; the paper's interventions and explicit key-value biases are not here",
)
PLANTED = Planted("sink", at_least=0.99, others_at_most=0.1, massive=1e5)


@dataclass(frozen=True)
class MassiveActivations(Probe):
    """Mean weight on tokens whose residual stream carries a massive activation when the head reads it."""

    ratio: float = 1000.0
    floor: float = 0.0
    rows: int = 4
    length: int = 512
    unit = "probability"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return "cross-attention reads another sequence" if stack.kind == "cross" else None

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(material.batches(Request("any", self.rows, self.length)))

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        total = torch.zeros(stack.shape, dtype=torch.float64)
        count = torch.zeros(len(stack.sites), 1, dtype=torch.float64)
        found: dict[tuple[int, int, int], dict[str, Any]] = {}
        peak = [0.0] * len(stack.sites)
        for batch in material.batches(Request("any", self.rows, self.length)):
            carriers: dict[int, Tensor] = {}  # layer -> (b, n), tokens that carry one in what the layer reads

            def note(_: nn.Module, args: Any, output: Any, layer: int, carriers: dict[int, Tensor] = carriers) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                hidden = hidden if hidden.dim() == 3 else hidden[None]
                size = hidden.detach().float().abs()
                ratios = size / size.median().clamp(min=1e-12)
                peak[layer] = max(peak[layer], float(ratios.amax()))
                massive = (ratios >= self.ratio) & (size > self.floor)
                carriers[layer + 1] = massive.any(-1)
                for row, token, channel in massive.nonzero()[:64].tolist():
                    entry = {"layer": layer, "token": token, "channel": channel, "value": float(hidden[row, token, channel])}
                    found.setdefault((layer, token, channel), {**entry, "ratio": float(ratios[row, token, channel])})

            def tap(call: Call, out: Tensor, carriers: dict[int, Tensor] = carriers) -> None:
                if call.site.stack != stack.name:
                    return
                layer, m = call.site.layer, call.k.shape[2]
                mine = carriers.get(layer)
                if mine is None or mine.shape[1] != m:
                    mine = torch.zeros(len(call.q), m, dtype=torch.bool, device=call.q.device)
                mass = call.statistics({"mass": SpanMass(mine[:, None, :])})["mass"][..., 0]
                seen = Observation.mean_of(mass, queries(call, 1))
                total[layer, : call.site.heads] += seen.total.cpu()
                count[layer] += seen.count

            with torch.no_grad(), subject.tap(tap), ExitStack() as undo:
                for site in stack.sites:
                    block = subject.model.get_submodule(site.block)
                    hook = block.register_forward_hook(lambda m, a, o, layer=site.layer: note(m, a, o, layer))
                    undo.callback(hook.remove)
                subject.run(batch.inputs)
            advance(1)
        values = (total / count.clamp(min=1)).masked_fill(~stack.exists().mask, torch.nan)
        rows = sorted(found.values(), key=lambda entry: -entry["ratio"])[:32]
        about = {"massive": rows, "largest_ratio_by_layer": [round(p, 1) for p in peak], "ratio": self.ratio}
        return HeadTable(values, self.name, stack.name, self.unit, about)
