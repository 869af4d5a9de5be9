"""Heads that need the whole context: DuoAttention's gates, to first order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.subject import Subject
from ..stages.sink import Sink
from ..stages.window import Window
from ..types import HeadTable
from ._material import Batch, Material, Request
from ._probe import Advance, Planted, Probe
from ._text import finds_needles

CARD = Card(
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.10819, sec. 2.2: gates alpha that mix a head's full and streaming outputs, alpha F + (1 - alpha) S. The "
        "paper trains them by distillation on passkeys, which is headwise.plans.gates.train_gates; here is the gradient of the "
        "answer's loss at alpha = 1/2 for all heads, from one backward pass a prompt. Sinks and window follow the paper's training "
        "shares (128 and 256 of long contexts) scaled to short ones"
    ),
    status="first order: the gradient of the gates; gates trained to convergence are in plans/gates.py",
)
PLANTED = Planted("induction", at_least=0.01, others_at_most=1e-6)


@dataclass(frozen=True)
class DuoGate(Probe):
    """How much the loss of a needle's answer falls as the head's view goes from sink + recent tokens to the whole context."""

    prompts: int = 8
    length: int = 768
    sink: int = 24
    recent: int = 96
    unit = "nats"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return finds_needles(subject, stack)

    def _batches(self, material: Material) -> list[Batch]:
        return material.batches(Request("needles", self.prompts, self.length))

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(self._batches(material))

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        total, count, losses = torch.zeros(stack.shape, dtype=torch.float64), 0, 0.0
        view = Window(self.recent) | Sink(self.sink)
        for batch in self._batches(material):
            gates: dict[int, Tensor] = {}

            def tap(call: Call, out: Tensor, gates: dict[int, Tensor] = gates) -> Tensor | None:
                if call.site.stack != stack.name:
                    return None
                (reading,) = call.readings
                streaming = replace(reading, stages=(*reading.stages, view)).run().transpose(1, 2)
                gate = gates[call.site.layer] = torch.full_like(out[:, 0, :, 0], 0.5).requires_grad_()
                return streaming + gate[:, None, :, None] * (out - streaming)

            longest = max(len(prompt.answer) for prompt in batch.prompts)
            with torch.enable_grad(), subject.tap(tap):
                logits = subject.model(input_ids=batch.ids, use_cache=False).logits[:, -longest - 1 : -1].float()
                loss = logits.new_zeros(())
                for row, prompt in enumerate(batch.prompts):
                    answer = torch.tensor(prompt.answer, device=logits.device)
                    loss = loss + F.cross_entropy(logits[row, -len(answer) :], answer)
                grads = torch.autograd.grad(loss, [gates[layer] for layer in sorted(gates)])
            for layer, grad in zip(sorted(gates), grads, strict=True):
                total[layer, : grad.shape[-1]] -= grad.sum(0).double().cpu()
            count, losses = count + len(batch.prompts), losses + float(loss.detach())
            advance(1)
        values = (total / count).masked_fill(~stack.exists().mask, torch.nan)
        return HeadTable(values, self.name, stack.name, self.unit, {"loss_at_half": losses / count, "length": self.length})
