"""Heads keep the tokens that the last queries of a prompt look at."""

from __future__ import annotations

from typing import Any

from ...caches.rules.snap_kv import CARD, SnapKv
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan
from ._budgets import Amount, about, evicting

__all__ = ["CARD", "example", "snap_kv"]


def snap_kv(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: Amount = 0.25,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens of a prompt, or that share of it.

    Other heads keep everything: to compress all but retrieval heads, give `subject.main.exists() - retrieval`.

    Args:
        budget: tokens (an integer), a share (a float up to 1.0), or a HeadTable of one of the two for each head.
        window, kernel, pooling: see `headwise.caches.rules.snap_kv.SnapKv`.

    Raises: PlanError for a budget, window, kernel or pooling that is none.
    """
    subject = as_subject(model)
    chosen, each = evicting(subject, heads, budget)
    return Plan.empty(subject).use(chosen, SnapKv(each, window, kernel, pooling)).noting(recipe="snap_kv", budget=about(budget))


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return snap_kv(subject, budget=64, window=16)
