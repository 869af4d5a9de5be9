"""The least important heads are closed."""

from __future__ import annotations

from typing import Any

import torch

from ...card import Card
from ...errors import PlanError
from ...models.subject import Subject, as_subject
from ...probes import probe
from ...probes.gate_importance import GateImportance
from ...stages.gate import Gate
from ...types import Heads, HeadTable
from ..plan import Plan

CARD = Card(
    paper="Are Sixteen Heads Really Better than One?",
    year=2019,
    room="convert",
    source=(
        "arXiv:1905.10650, sec. 4: one-shot order by importance. By exact ablation unless a table is given; gates, not yet "
        "removed weights"
    ),
    status="gates of a greedy order; weights are not removed from the checkpoint yet",
)


def prune(
    model: Any = None,
    heads: HeadTable | Heads | None = None,
    *,
    count: int | None = None,
    share: float = 0.1,
    show_progress: bool = True,
) -> Plan:
    """Closes the `count` heads (or that share of them) of least importance.

    Args:
        heads: a table, larger is more important; or the heads to close themselves; None measures ablation_importance.

    Raises: PlanError for a count that the model does not have; UnsupportedModelError if importance cannot be measured.
    """
    subject = as_subject(model)
    by = "given heads"
    if heads is None:
        heads = probe("ablation_importance", subject, needed_for="prune", show_progress=show_progress)
    if isinstance(heads, HeadTable):
        total = heads.heads().count()
        closed = round(share * total) if count is None else count
        if not 0 <= closed <= total:
            raise PlanError(f"cannot close {closed} of {total} heads")
        by, heads = heads.name, heads.bottom(closed)
    about = {"recipe": "prune", "by": by, "closed": heads.names()}
    return Plan.empty(subject).use(heads, Gate(torch.zeros(1))).noting(**about)


def example(subject: Subject) -> Plan:
    """A cheaper measurement, for the conformance checks."""
    return prune(subject, probe(GateImportance(rows=1, length=128), subject, show_progress=False), count=6)
