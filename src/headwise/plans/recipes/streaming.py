"""Every head streams: sinks and a window."""

from __future__ import annotations

from typing import Any

from ...caches.rules.renumbered import Renumbered
from ...card import Card
from ...errors import PlanError, UnsupportedModelError
from ...models.subject import Subject, as_subject
from ...stages.sink import Sink
from ...stages.window import Window
from ...types import Heads
from ..plan import Plan

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="cache",
    source=(
        "arXiv:2309.17453; 4 sinks as published. Keys keep their true positions unless positions='cache', where they count inside "
        "the cache as in the paper; its variant for ALiBi is left out"
    ),
)


def streaming(
    model: Any = None,
    heads: Heads | None = None,
    *,
    sink: int = 4,
    recent: int = 256,
    positions: str = "text",
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all) read only the first `sink` and the last `recent` tokens, and keep only those.

    Args:
        positions: "text", where tokens are; or "cache", as if the tokens that are held followed each other: no distance is
            ever longer than what is held. Heads that share keys with one of `heads` then stream too.

    Raises: SelectionError if `heads` is of another model; UnsupportedModelError if positions in the cache are asked of a model
        whose positions are not rotary, or not known; PlanError for other positions.
    """
    subject = as_subject(model)
    chosen = subject.main.exists() if heads is None else heads
    if positions not in ("text", "cache"):
        raise PlanError(f"positions={positions!r}; give 'text' or 'cache'")
    moved = positions == "cache"
    rotary = [subject.session.rotary(site) for site in subject.main.sites] if moved else []
    if moved and not any(rotary):
        raise UnsupportedModelError(
            f"{type(subject.model).__name__} has no rotary positions, and others do not change in the cache; use positions='text'"
        )
    if moved:
        chosen = subject.main.key_value_groups(chosen)
    about = {"recipe": "streaming", "sink": sink, "recent": recent, "positions": positions, "streaming": chosen.count()}
    stages = (Window(recent) | Sink(sink), *((Renumbered(),) if moved else ()))
    return Plan.empty(subject).use(chosen, *stages).noting(**about)


def example(subject: Subject) -> Plan:
    """A window that is shorter than the checks' prompts."""
    return streaming(subject, sink=4, recent=48)
