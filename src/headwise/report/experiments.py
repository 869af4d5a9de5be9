"""What the findings rest on: do retrieval heads cause retrieval, how many heads can go, does the choice of heads matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from ..models.subject import Subject
from ..plans import Plan
from ..plans.recipes.duo import duo
from ..progress import bar
from ..stages.gate import Gate
from ..tasks.needle import Needle
from ..tasks.perplexity import Perplexity
from ..types import Heads, HeadTable


def _silent(steps: int) -> None:
    """Work whose progress is shown one level up."""


def closed(subject: Subject, heads: Heads) -> Plan:
    """The plan that closes these heads."""
    return Plan.empty(subject).use(heads, Gate(torch.zeros(1)))


def needle_recall(subject: Subject, plan: Plan, task: Needle, text: str | None) -> float:
    """Mean exact needle recall under a plan."""
    with plan(subject):
        return float(task.run(subject, text, _silent)["needle"])


def bits(subject: Subject, plan: Plan, task: Perplexity, text: str | None) -> float:
    """Bits per byte under a plan, or nats per token where there is no tokenizer to count bytes with."""
    with plan(subject):
        metrics = task.run(subject, text, _silent)
    return float(metrics["bits_per_byte"] if "bits_per_byte" in metrics else metrics["loss"])


@dataclass(frozen=True)
class Causality:
    """Needle recall with nothing closed, with the chosen heads closed, and with as many others drawn at random."""

    heads: tuple[str, ...]
    base: float
    chosen: float
    random: tuple[float, ...]

    @property
    def random_median(self) -> float:
        """The middle of the random draws."""
        return median(self.random)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "heads": list(self.heads),
            "base": self.base,
            "closed": self.chosen,
            "random": list(self.random),
            "random_median": self.random_median,
        }


def retrieval_causality(
    subject: Subject, heads: Heads, *, draws: int = 20, task: Needle | None = None, text: str | None = None, seed: int = 0,
    show_progress: bool = True,
) -> Causality:  # fmt: skip
    """Closes heads and asks needles; then as many random other heads, `draws` times."""
    task = task or Needle(depths=(0.1, 0.5, 0.9), count=2, length=min(subject.max_length, 512))
    others = subject.main.exists() - heads
    with bar(draws + 2, "closing retrieval heads", show_progress) as advance:

        def recall(which: Heads) -> float:
            value = needle_recall(subject, closed(subject, which), task, text)
            advance(1)
            return value

        base = recall(heads - heads)
        chosen = recall(heads)
        count = min(heads.count(), others.count())
        random = tuple(recall(others.random(count, seed + i)) for i in range(draws))
    return Causality(tuple(heads.names()), base, chosen, random)


@dataclass(frozen=True)
class PruningCurve:
    """Bits per byte as heads are closed, least important first, beside random orders. counts[0] is 0."""

    by: str
    counts: tuple[int, ...]
    greedy: tuple[float, ...]
    random: tuple[tuple[float, ...], ...]

    def removable(self, rise: float, values: Sequence[float]) -> int:
        """How many heads go before the first count at which the value has risen by more than `rise` (0.01 = 1 %)."""
        most = 0
        for count, value in zip(self.counts, values, strict=True):
            if value > self.counts_base * (1 + rise):
                break
            most = count
        return most

    @property
    def counts_base(self) -> float:
        """The value with every head open."""
        return self.greedy[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with how many heads go before a rise of 1, 3 and 10 %."""
        rises = {"1%": 0.01, "3%": 0.03, "10%": 0.1}
        return {
            "by": self.by,
            "counts": list(self.counts),
            "greedy": list(self.greedy),
            "random": [list(order) for order in self.random],
            "removable": {name: self.removable(rise, self.greedy) for name, rise in rises.items()},
            "removable_random": {
                name: median(self.removable(rise, order) for order in self.random) for name, rise in rises.items()
            },
        }


def pruning_curve(
    subject: Subject,
    importance: HeadTable,
    *,
    counts: Sequence[int] | None = None,
    orders: int = 2,
    task: Perplexity | None = None,
    text: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> PruningCurve:
    """Closes 0, 1, 2, ... heads in the order of importance, and in `orders` random orders."""
    task = task or Perplexity(rows=2, length=min(subject.max_length, 512))
    heads = importance.heads()
    total = heads.count()
    if counts is None:
        steps = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40)
        counts = [round(step * total / 64) for step in steps] if total > 64 else [step for step in steps if step < total]
    counts = (0, *sorted({count for count in counts if count > 0}))
    with bar(1 + (len(counts) - 1) * (1 + orders), "closing heads one after another", show_progress) as advance:

        def value(which: Heads) -> float:
            result = bits(subject, closed(subject, which), task, text)
            advance(1)
            return result

        base = value(heads - heads)
        greedy = (base, *(value(importance.bottom(count)) for count in counts[1:]))
        shuffled = [_random_order(heads, seed + i) for i in range(orders)]
        random = tuple(
            (base, *(value(Heads.of(order[:count], heads.shape, heads.stack)) for count in counts[1:])) for order in shuffled
        )
    return PruningCurve(importance.name, tuple(counts), greedy, random)


def _random_order(heads: Heads, seed: int) -> list[tuple[int, int]]:
    order = heads.list()
    generator = torch.Generator().manual_seed(seed)
    return [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]


def random_duo(
    subject: Subject, plan: Plan, *, draws: int = 3, task: Needle | None = None, text: str | None = None, seed: int = 0,
    show_progress: bool = True,
) -> list[float]:  # fmt: skip
    """Needle recall when the full caches of a duo plan go to as many key/value heads drawn at random instead."""
    task = task or Needle(depths=(0.05, 0.25, 0.5, 0.75, 0.9))
    stack = subject.main
    full = stack.exists() - plan.heads(stack=stack.name)
    leaders = replace(stack.exists(), mask=torch.zeros(stack.shape, dtype=torch.bool))
    for site in stack.sites:
        leaders.mask[site.layer, : site.heads : site.groups] = True  # one head of each key/value group
    count = (leaders & full).count()
    results = []
    with bar(draws, "the same budget for random heads", show_progress) as advance:
        for draw in range(draws):
            heads = stack.key_value_groups(leaders.random(count, seed + draw))
            other = duo(subject, heads, sink=plan.about["sink"], recent=plan.about["recent"], show_progress=False)
            results.append(needle_recall(subject, other, task, text))
            advance(1)
    return results
