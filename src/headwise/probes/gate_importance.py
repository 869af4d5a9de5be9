"""Importance of heads by gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..types import HeadTable
from ._material import Material, Request
from ._probe import Advance, Planted, Probe
from ._text import predicts_tokens

CARD = Card(
    paper="Are Sixteen Heads Really Better than One?",
    year=2019,
    room="convert",
    source=(
        "arXiv:1905.10650, eq. 5: I_h = E_x |dL/d xi_h| with one gate for each head and example. The authors' code takes the "
        "absolute value at each token instead (per='token', never smaller), and both divide each layer by its l2 norm "
        "(normalize=True)"
    ),
)
PLANTED = Planted("induction", at_least=1e-6, others_at_most=0.0)


@dataclass(frozen=True)
class GateImportance(Probe):
    """Mean absolute gradient of the loss with respect to a gate on the head's output: the cost of closing it, to first order."""

    rows: int = 16
    length: int = 256
    per: str = "example"
    normalize: bool = False
    unit = "nats per token"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return predicts_tokens(subject, stack)

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(material.batches(Request("text", self.rows, self.length)))

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        total, count = torch.zeros(stack.shape, dtype=torch.float64), 0
        for batch in material.batches(Request("text", self.rows, self.length)):
            gates: dict[int, Tensor] = {}

            def tap(call: Call, out: Tensor, gates: dict[int, Tensor] = gates) -> Tensor | None:
                if call.site.stack != stack.name:
                    return None
                places = out.shape[1] if self.per == "token" else 1
                gate = gates[call.site.layer] = out.new_ones(len(out), places, call.site.heads).requires_grad_()
                return out * gate[..., None]

            with torch.enable_grad(), subject.tap(tap):
                loss = subject.token_losses(batch.ids).mean(-1).sum()  # of each row its mean, so that rows do not meet
                grads = torch.autograd.grad(loss, [gates[layer] for layer in sorted(gates)])
            for layer, grad in zip(sorted(gates), grads, strict=True):
                total[layer, : grad.shape[-1]] += grad.abs().sum((0, 1)).double().cpu()
            count += len(batch.ids)
            advance(1)
        values = total / count
        if self.normalize:
            values = values / values.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return HeadTable(values.masked_fill(~stack.exists().mask, torch.nan), self.name, stack.name, self.unit, {"per": self.per})
