"""Every head streams: sinks and a window."""

from __future__ import annotations

from typing import Any

from ...card import Card
from ...models.subject import Subject, as_subject
from ...stages.sink import Sink
from ...stages.window import Window
from ...types import Heads
from ..plan import Plan

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="cache",
    source="arXiv:2309.17453; 4 sinks as published. Keys keep their true positions; the paper renumbers them inside the cache",
)


def streaming(
    model: Any = None, heads: Heads | None = None, *, sink: int = 4, recent: int = 256, show_progress: bool = True
) -> Plan:
    """Lets heads (by default all) read only the first `sink` and the last `recent` tokens, and keep only those.

    Raises: SelectionError if `heads` is of another model.
    """
    subject = as_subject(model)
    chosen = subject.main.exists() if heads is None else heads
    about = {"recipe": "streaming", "sink": sink, "recent": recent, "streaming": chosen.count()}
    return Plan.empty(subject).use(chosen, Window(recent) | Sink(sink)).noting(**about)


def example(subject: Subject) -> Plan:
    """A window that is shorter than the checks' prompts."""
    return streaming(subject, sink=4, recent=48)
