"""Heads keep keys and values in the host's memory."""

from __future__ import annotations

from typing import Any

from ...caches.rules.offloaded import CARD as RULE
from ...caches.rules.offloaded import Offloaded
from ...caches.rules.quantized import Quantized
from ...card import Card
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

CARD = Card(paper=RULE.paper, year=RULE.year, room=RULE.room, source=RULE.source)


def offloaded(
    model: Any = None, heads: Heads | None = None, *, bits: int | None = None, group: int = 64, show_progress: bool = True
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep everything in the host's memory.

    Args:
        bits: keep codes of so many bits (8, 4 or 2) there, so that less has to be fetched; None keeps what comes. group:
            channels that share a scale; 64 as published.

    Raises: PlanError for other numbers of bits; SelectionError if `heads` is of another model.
    """
    subject = as_subject(model)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    rule = Offloaded(None if bits is None else Quantized(bits, group))
    about = {"recipe": "offloaded", "bits": bits, "offloaded": chosen.names()}
    return Plan.empty(subject).use(chosen, rule).noting(**about)


def example(subject: Subject) -> Plan:
    """As published, with 4 bits."""
    return offloaded(subject, bits=4)
