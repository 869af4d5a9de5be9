"""Heads keep the tokens whose keys are short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...caches.rules.key_norm import CARD, KeyNorm
from ...errors import SelectionError
from ...models.subject import Subject, as_subject
from ...types import Heads, HeadTable
from ..plan import Plan
from ._budgets import Amount, about, evicting

__all__ = ["CARD", "example", "key_norm"]


def key_norm(
    model: Any = None,
    heads: Heads | None = None,
    *,
    budget: Amount = 0.5,
    skip_layers: Sequence[int] = (),
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep `budget` tokens of a prompt, or that share of it.

    Of no use for models that normalize their keys (query-key norm): their keys are about equally long.

    Args:
        budget: tokens (an integer), a share (a float up to 1.0), or a HeadTable of one of the two for each head.
        skip_layers: layers that keep everything all the same; the authors' examples skip (0, 1), their code's default none.

    Raises: PlanError for a budget that is none; SelectionError for a layer that there is not.
    """
    subject = as_subject(model)
    layers = subject.main.shape[0]
    wrong = [layer for layer in skip_layers if not 0 <= layer < layers]
    if wrong:
        raise SelectionError(f"there is no layer {wrong[0]} to skip; layers are 0 to {layers - 1}")
    if heads is None:
        heads = budget.heads() if isinstance(budget, HeadTable) else subject.main.exists()
    mask = heads.mask.clone()
    mask[list(skip_layers)] = False
    chosen, each = evicting(subject, Heads(mask, heads.stack), budget)
    return Plan.empty(subject).use(chosen, KeyNorm(each)).noting(recipe="key_norm", budget=about(budget), whole=list(skip_layers))


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return key_norm(subject, budget=64)
