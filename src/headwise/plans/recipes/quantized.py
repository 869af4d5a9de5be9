"""Heads keep keys and values in a few bits."""

from __future__ import annotations

from typing import Any

from ...caches.rules.quantized import CARD, Quantized
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

__all__ = ["CARD", "example", "quantized"]


def quantized(
    model: Any = None,
    heads: Heads | None = None,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    half: bool = True,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep codes of 8, 4 or 2 bits.

    Args:
        group, symmetric, half: see `headwise.caches.rules.quantized.Quantized`.

    Raises: PlanError for other numbers of bits; SelectionError if `heads` is of another model.
    """
    subject = as_subject(model)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    about = {"recipe": "quantized", "bits": bits, "group": group, "quantized": chosen.count()}
    return Plan.empty(subject).use(chosen, Quantized(bits, group, symmetric, half)).noting(**about)


def example(subject: Subject) -> Plan:
    """Its own options."""
    return quantized(subject)
