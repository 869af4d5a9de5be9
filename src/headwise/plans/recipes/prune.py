"""The least important heads are closed."""

from __future__ import annotations

from typing import Any

import torch

from ...card import Card
from ...errors import PlanError
from ...models.subject import as_subject
from ...probes import probe
from ...stages.gate import Gate
from ...types import HeadTable
from ..plan import Plan

CARD = Card(
    paper="Are Sixteen Heads Really Better than One?",
    year=2019,
    room="convert",
    source="arXiv:1905.10650, sec. 4: one-shot order by importance. By exact ablation unless a table is given; gates, not yet removed weights",
    status="gates of a greedy order; weights are not removed from the checkpoint yet",
)


def prune(
    model: Any = None,
    importance: HeadTable | None = None,
    *,
    count: int | None = None,
    share: float = 0.1,
    show_progress: bool = True,
) -> Plan:
    """Closes the `count` heads (or that share of them) of least importance.

    Args:
        importance: a table, larger is more important; None measures ablation_importance.

    Raises: PlanError for a count that the model does not have; UnsupportedModelError if importance cannot be measured.
    """
    subject = as_subject(model)
    if importance is None:
        importance = probe("ablation_importance", subject, needed_for="prune", show_progress=show_progress)
    total = importance.heads().count()
    closed = round(share * total) if count is None else count
    if not 0 <= closed <= total:
        raise PlanError(f"cannot close {closed} of {total} heads")
    heads = importance.bottom(closed)
    about = {"recipe": "prune", "by": importance.name, "closed": heads.names()}
    return Plan.empty(subject).use(heads, Gate(torch.zeros(1))).noting(**about)
