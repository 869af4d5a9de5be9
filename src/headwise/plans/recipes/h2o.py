"""Heads keep the last tokens and those that got most weight so far."""

from __future__ import annotations

from typing import Any

from ...caches.rules.h2o import CARD, H2o
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan
from ._budgets import Amount, about, evicting

__all__ = ["CARD", "example", "h2o"]


def h2o(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: Amount = 0.2,
    recent: float = 0.5,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens, or that share of all so far.

    Tokens go after the prompt and after each new token, so that drafts of assisted decoding cannot be taken back.

    Args:
        budget: tokens (an integer), a share (a float up to 1.0), or a HeadTable of one of the two for each head.
        recent: how many of them are the last tokens, as a share of the budget (a float) or in tokens (an integer).

    Raises: PlanError for a budget or recent that is none.
    """
    subject = as_subject(model)
    chosen, each = evicting(subject, heads, budget)
    return Plan.empty(subject).use(chosen, H2o(each, recent)).noting(recipe="h2o", budget=about(budget), recent=recent)


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return h2o(subject, budget=64)
