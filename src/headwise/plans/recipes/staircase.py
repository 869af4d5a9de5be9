"""Heads keep older tokens in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...caches.rules.quantized import Quantized
from ...caches.rules.staircase import CARD, Staircase
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

__all__ = ["CARD", "example", "staircase"]


def staircase(
    model: Any = None,
    heads: Heads | None = None,
    *,
    ages: Sequence[int] = (128, 1024),
    bits: Sequence[int] = (8, 4),
    group: int = 32,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep the last ages[0] tokens plain, older ones in codes.

    Args:
        ages: from how many tokens back on there are bits[0], bits[1], ... for a channel. group: channels that share a scale.

    Raises: PlanError unless ages rise and there are bits for each; SelectionError if `heads` is of another model.
    """
    subject = as_subject(model)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    rule = Staircase(tuple(ages), tuple(Quantized(each, group) for each in bits))
    about = {"recipe": "staircase", "ages": list(ages), "bits": list(bits), "group": group}
    return Plan.empty(subject).use(chosen, rule).noting(**about)


def example(subject: Subject) -> Plan:
    """Three kinds of tokens in the checks' prompts."""
    return staircase(subject, ages=(40, 200))
