"""Importance of heads by taking each away."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..card import Card
from ..models.call import Call
from ..models.layout import Stack
from ..models.resume import Replay, copies_of
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
        "arXiv:1905.10650, sec. 3.2 (leave one out), with the language-model loss for the task's metric. Each layer's heads are "
        "closed in one batch of copies, and the layers below are not computed again"
    ),
)
PLANTED = Planted("induction", at_least=1e-6, others_at_most=0.0, by_size=True)


@dataclass(frozen=True)
class AblationImportance(Probe):
    """Exact rise of the loss when the head's output is set to zero at every token; below 0 where the head does harm."""

    rows: int = 16
    length: int = 256
    copies: int = 8
    unit = "nats per token"

    def why_not(self, subject: Subject, stack: Stack) -> str | None:
        return predicts_tokens(subject, stack)

    def steps(self, subject: Subject, stack: Stack, material: Material) -> int:
        return len(material.batches(Request("text", self.rows, self.length))) * len(stack.sites)

    def measure(self, subject: Subject, stack: Stack, material: Material, advance: Advance) -> HeadTable:
        total, count, base_total = torch.zeros(stack.shape, dtype=torch.float64), 0, 0.0
        for batch in material.batches(Request("text", self.rows, self.length)):
            replay = Replay(subject.model, stack)
            with torch.no_grad(), replay.recording(len(batch.ids)):
                base = subject.token_losses(batch.ids)
            trusted = self._replays_exactly(subject, replay, batch.ids, base)
            copies = max(1, min(self.copies, subject.rows_at_once(batch.ids.shape[1]) // len(batch.ids)))
            for site in stack.sites:
                for start in range(0, site.heads, copies):
                    closed = list(range(start, min(start + copies, site.heads)))
                    gate = 1 - torch.eye(site.heads, device=subject.device)[closed].repeat_interleave(len(batch.ids), dim=0)

                    def tap(call: Call, out: Tensor, layer: int = site.layer, gate: Tensor = gate) -> Tensor | None:
                        mine = call.site.stack == stack.name and call.site.layer == layer
                        return out * gate[:, None, :, None].to(out) if mine else None

                    below = site.layer if trusted else 0
                    with torch.no_grad(), subject.tap(tap), replay.skipping(below, len(closed)):
                        losses = subject.token_losses(copies_of(batch.ids, len(closed)))
                    change = losses.double().view(len(closed), *base.shape) - base.double()
                    total[site.layer, closed] += change.mean(-1).sum(-1).cpu()
                advance(1)
            count += len(batch.ids)
            base_total += float(base.double().mean(-1).sum())
        values = (total / count).masked_fill(~stack.exists().mask, torch.nan)
        return HeadTable(values, self.name, stack.name, self.unit, {"loss": base_total / count})

    @staticmethod
    def _replays_exactly(subject: Subject, replay: Replay, ids: Tensor, base: Tensor) -> bool:
        """Whether starting from the last layer gives the same losses; not so where layers pass on more than their output."""
        try:
            with torch.no_grad(), replay.skipping(len(replay.blocks) - 1, 1):
                again = subject.token_losses(ids)
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError):
            return False
        return bool(torch.allclose(again, base, rtol=1e-4, atol=1e-4))
