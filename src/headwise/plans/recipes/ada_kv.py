"""Heads keep what the last queries of a prompt look at, and share their layer's budget by how much that is."""

from __future__ import annotations

from typing import Any

from ...caches.rules.ada_kv import CARD, AdaKv
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan
from ._budgets import Amount, about, evicting

__all__ = ["CARD", "ada_kv", "example"]


def ada_kv(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: Amount = 0.25,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    alpha: float = 0.2,
    floor: bool = False,
    normalize: bool = False,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens of a prompt in the mean over a layer.

    Other heads keep everything and take no part in the sharing: to compress all but retrieval heads, give
    `subject.main.exists() - retrieval`.

    Args:
        budget: tokens (an integer), a share (a float up to 1.0), or a HeadTable of one of the two for each head.
        window, kernel, pooling, alpha, floor, normalize: see `headwise.caches.rules.ada_kv.AdaKv`.

    Raises: PlanError for a budget, window, kernel, pooling or alpha that is none.
    """
    subject = as_subject(model)
    chosen, each = evicting(subject, heads, budget)
    rule = AdaKv(each, window, kernel, pooling, alpha, floor, normalize)
    return Plan.empty(subject).use(chosen, rule).noting(recipe="ada_kv", budget=about(budget))


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return ada_kv(subject, budget=64, window=16)
