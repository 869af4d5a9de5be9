"""Heads that say something else than most keep everything, chosen anew for each prompt."""

from __future__ import annotations

from typing import Any

from ...caches.rules.task_kv import CARD, TaskKv
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

__all__ = ["CARD", "example", "task_kv"]


def task_kv(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: float = 0.4,
    sinks: int = 16,
    recent: int = 256,
    window: int = 32,
    top: int = 256,
    kernel: int = 7,
    share: float = 0.3,
    fewest: int = 1,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) share `budget` tokens a head, or that share of a prompt.

    Args:
        sinks, recent, window, top, kernel, share, fewest: see `headwise.caches.rules.task_kv.TaskKv`. The paper has a share of
            0.3 and 1 at least for grouped heads, 0.25 and 4 for plain ones.

    Raises: PlanError for a budget or share that is none.
    """
    subject = as_subject(model)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    rule = TaskKv(budget, sinks, recent, window, top, kernel, share, fewest)
    return Plan.empty(subject).use(chosen, rule).noting(recipe="task_kv", budget=budget)


def example(subject: Subject) -> Plan:
    """Few tokens beside those of heads that keep everything."""
    return task_kv(subject, budget=0.4, sinks=4, recent=24)
