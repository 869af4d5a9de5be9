"""Heads keep the tokens that queries to come are expected to look at."""

from __future__ import annotations

from typing import Any

from ...caches.rules.expected_attention import CARD, ExpectedAttention
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

__all__ = ["CARD", "example", "expected_attention"]


def expected_attention(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: float = 0.5,
    sinks: int = 4,
    future: int = 512,
    covariance: bool = True,
    values: bool = True,
    epsilon: float = 0.0,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens of a prompt, or that share of it.

    Args:
        sinks, future, covariance, values, epsilon: see `headwise.caches.rules.expected_attention.ExpectedAttention`.

    Raises: UnsupportedModelError if the model's rotary positions cannot be told; PlanError for a budget that is none.
    """
    subject = as_subject(model)
    for site in subject.main.sites:
        subject.session.rotary(site)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    rule = ExpectedAttention(budget, sinks, future, covariance, values, epsilon)
    return Plan.empty(subject).use(chosen, rule).noting(recipe="expected_attention", budget=budget)


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return expected_attention(subject, budget=64, future=40)
