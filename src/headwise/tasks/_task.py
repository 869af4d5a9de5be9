"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from ..models.subject import NO_LANGUAGE_MODEL, Subject

Advance = Callable[[int], None]
Metrics = dict[str, Any]  # name -> number, or a JSON-able breakdown whose name says by what


class Task(ABC):
    """Measures a model as it runs now, under whatever plan is applied. Subclasses are frozen dataclasses of options."""

    @property
    def name(self) -> str:
        """The registered name: its file's stem."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def why_not(self, subject: Subject) -> str | None:
        """Why this task makes no sense for the model, in a few words; None if it does."""
        return None if subject.is_language_model else NO_LANGUAGE_MODEL

    def steps(self, subject: Subject) -> int:
        """How many steps of work `run` reports; 1 unless it says otherwise."""
        return 1

    @abstractmethod
    def run(self, subject: Subject, text: str | None, advance: Advance) -> Metrics:
        """Its metrics; `text` None stands for the embedded held-out text."""
