"""All heads of a layer keep the tokens that the newest query looks at."""

from __future__ import annotations

from typing import Any

from ...caches.rules.tova import CARD, Tova
from ...errors import SelectionError
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

__all__ = ["CARD", "example", "tova"]


def tova(
    model: Any = None, heads: Heads | None = None, *, budget: float = 0.25, newest: bool = False, show_progress: bool = True
) -> Plan:
    """Lets layers (by default all) keep `budget` tokens, or that share of all so far: the same ones in all heads of a layer.

    Tokens go after the prompt and after each new token, so that drafts of assisted decoding cannot be taken back.

    Args:
        heads: of whole layers. budget: tokens (an integer) or a share (a float up to 1.0).
        newest: keep the newest token in any case.

    Raises: SelectionError if only some heads of a layer are given; PlanError for a budget that is none.
    """
    subject = as_subject(model)
    chosen = subject.main.exists() if heads is None else heads
    for site in subject.main.sites:
        given = len(chosen.layer(site.layer))
        if given not in (0, site.heads):
            raise SelectionError(
                f"tova keeps the same tokens in all heads of a layer, and was given {given} of the {site.heads} heads of layer "
                f"{site.layer}; give whole layers, or use h2o, which goes by head"
            )
    return Plan.empty(subject).use(chosen, Tova(budget, newest)).noting(recipe="tova", budget=budget)


def example(subject: Subject) -> Plan:
    """Much fewer tokens than the checks' prompts have."""
    return tova(subject, budget=64)
