"""Checks for tasks, on the planted model."""

from __future__ import annotations

import json

import torch

from ._check import Item, require
from .probes import planted_subject


def _run(item: Item) -> dict[str, object]:
    subject = planted_subject()
    task = item.value()
    steps = [0]

    def advance(count: int) -> None:
        steps[0] += count

    metrics = task.run(subject, None, advance)
    require(steps[0] == task.steps(subject), f"announced {task.steps(subject)} steps of work, reported {steps[0]}")
    return metrics


def _applies(item: Item) -> bool:
    """Tasks that generate or hold a cache need a model that does."""
    return item.name not in ("kv_bytes", "speed", "continuation")


def check_metrics(item: Item) -> None:
    """It returns named, finite, JSON-able numbers and does its announced steps."""
    if not _applies(item):
        from ..models.subject import open_model

        metrics = item.value(length=96).run(open_model("tiny-gqa"), None, lambda _: None)
    else:
        metrics = _run(item)
    require(bool(metrics), "returns no metric")
    json.dumps(metrics)
    numbers = [v for v in metrics.values() if isinstance(v, int | float)]
    require(bool(numbers) and all(torch.tensor(float(v)).isfinite() for v in numbers), f"not finite: {metrics}")


def check_repeatable(item: Item) -> None:
    """Running again gives the same numbers."""
    if _applies(item):
        require(_run(item) == _run(item), "running again gives other numbers")
