"""Heads keep what the last queries of a prompt look at, more of it in the first layers."""

from __future__ import annotations

from typing import Any

from ...caches.rules.pyramid_kv import CARD, PyramidKv
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan
from ._budgets import Amount, about, evicting

__all__ = ["CARD", "example", "pyramid_kv"]


def pyramid_kv(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: Amount = 0.25,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    beta: int = 20,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens of a prompt in the mean over layers.

    Layers are counted through the whole model, so the mean is met only where `heads` takes layers evenly.

    Args:
        budget: tokens (an integer), a share (a float up to 1.0), or a HeadTable of one of the two for each head.
        window, kernel, pooling, beta: see `headwise.caches.rules.pyramid_kv.PyramidKv`.

    Raises: PlanError for a budget, window, kernel, pooling or beta that is none.
    """
    subject = as_subject(model)
    chosen, each = evicting(subject, heads, budget)
    rule = PyramidKv(each, window, kernel, pooling, beta)
    return Plan.empty(subject).use(chosen, rule).noting(recipe="pyramid_kv", budget=about(budget))


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return pyramid_kv(subject, budget=64, window=16)
