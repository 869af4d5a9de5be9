"""Running tasks with and without a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from .. import registry
from ..models.subject import Subject, as_subject
from ..plans import Plan
from ..progress import bar
from ._task import Metrics, Task


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model without and with a plan (None where no plan was given), and tasks skipped with the reason."""

    model: str
    without: Metrics
    under_plan: Metrics | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: {"model", "without": {metric: value}, "with": {...} or null, "skipped"}."""
        return {"model": self.model, "without": self.without, "with": self.under_plan, "skipped": dict(self.skipped)}


def evaluate(
    model: Any = None,
    plan: Plan | None = None,
    tasks: Iterable[str | Task] | None = None,
    *,
    text: str | None = None,
    tokenizer: Any | None = None,
    show_progress: bool = True,
) -> Evaluation:
    """Runs tasks (names or Task objects; None for all) on a model, without and with a plan.

    Raises: RegistryError for an unknown task; GeometryError for a plan made for another model.
    """
    subject = as_subject(model, tokenizer)
    if plan is not None:
        plan.check(subject)
    names = registry.names("task") if tasks is None else list(tasks)
    chosen: list[Task] = [task if isinstance(task, Task) else registry.load("task", task)() for task in names]
    skipped = {task.name: reason for task in chosen if (reason := task.why_not(subject)) is not None}
    chosen = [task for task in chosen if task.name not in skipped]
    if text is not None and chosen:
        subject.encode(text)  # raises for a text that cannot be read, before any work is done
    runs = [None] if plan is None else [None, plan]
    total = len(runs) * sum(task.steps(subject) for task in chosen)
    results = []
    with bar(total, f"evaluating {subject.name}", show_progress) as advance:
        for run in runs:
            with run(subject) if run is not None else nullcontext():
                results.append(_metrics(chosen, subject, text, advance))
    return Evaluation(subject.name, results[0], results[1] if plan is not None else None, skipped)


def _metrics(tasks: list[Task], subject: Subject, text: str | None, advance: Any) -> Metrics:
    metrics: Metrics = {}
    for task in tasks:
        metrics.update(task.run(subject, text, advance))
    return metrics
