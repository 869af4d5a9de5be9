"""Heads keep the parts of keys and values that lie in their own main directions."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ...caches.rules.low_rank import CARD as RULE
from ...caches.rules.low_rank import LowRank
from ...card import Card
from ...errors import PlanError
from ...models.call import Call
from ...models.inputs import text_rows
from ...models.subject import Subject, as_subject
from ...types import Heads
from ..plan import Plan

CARD = Card(paper=RULE.paper, year=RULE.year, room=RULE.room, source=RULE.source)

Squares = dict[int, tuple[Tensor, Tensor]]


def low_rank(
    model: Any = None,
    heads: Heads | None = None,
    *,
    rank: float = 0.5,
    energy: float | None = None,
    queries: bool = True,
    text: str | None = None,
    rows: int = 4,
    length: int = 512,
    show_progress: bool = True,
) -> Plan:
    """Lets heads (by default all, and heads that share keys with one) keep coordinates in the main directions of a text.

    Args:
        rank: directions for each head, or up to 1.0 their share of the head's size.
        energy: instead, as many as hold this share of the squares, for keys and for values of each head alone.
        queries: whether directions of keys are those of keys and queries together, as published.
        text: what to measure on, by default held-out text of headwise's own; `rows` windows of `length` tokens.

    Raises: PlanError for a rank or an energy that is none; InputError where the model reads no text.
    """
    subject = as_subject(model)
    chosen = subject.main.key_value_groups(subject.main.exists() if heads is None else heads)
    if rank <= 0 or (energy is not None and not 0 < energy <= 1):
        raise PlanError(f"rank {rank} and energy {energy} keep nothing; give a rank above 0, or an energy up to 1")
    squares = _squares(subject, text_rows(subject, text, rows, length), queries)
    alike: dict[tuple[int, int], list[tuple[int, int, Tensor, Tensor]]] = defaultdict(list)
    kept = total = 0
    for site in subject.main.sites:
        found = [_directions(square, rank, energy) for square in squares[site.layer]]
        for head in range(site.heads):
            if (site.layer, head) in chosen:
                keys, values = (each[head // site.groups] for each in found)
                alike[keys.shape[1], values.shape[1]].append((site.layer, head, keys, values))
                kept, total = kept + keys.shape[1] + values.shape[1], total + len(keys) + len(values)
    plan = Plan.empty(subject)
    for of_rank in alike.values():
        own = subject.heads([(layer, head) for layer, head, _, _ in of_rank], subject.main.name)
        rule = LowRank(torch.stack([keys for _, _, keys, _ in of_rank]), torch.stack([values for *_, values in of_rank]))
        plan = plan.use(own, rule)
    return plan.noting(recipe="low_rank", rank=rank, energy=energy, share=kept / max(total, 1))


def _squares(subject: Subject, ids: Tensor, queries: bool) -> Squares:
    """By layer: sums of products of the entries of keys (and queries) and of values, (kv, d, d) in float64."""
    found: Squares = {}

    def tap(call: Call, out: Tensor) -> None:
        if call.site.stack != subject.main.name:
            return
        kv = call.site.key_value_heads
        of = {"k": _every(call.k, kv), "v": _every(call.v, kv), "q": call.q.unflatten(1, (kv, -1))}
        sums = {name: torch.einsum("bhgnd,bhgne->hde", x.double(), x.double()) for name, x in of.items()}
        found[call.site.layer] = (sums["k"] + sums["q"] if queries else sums["k"]).cpu(), sums["v"].cpu()

    with torch.no_grad(), subject.tap(tap):
        subject.run({"input_ids": ids})
    return found


def _every(x: Tensor, kv: int) -> Tensor:
    """(b, kv, 1, n, d), where a model may have repeated heads already."""
    return x[:, :: x.shape[1] // kv, None]


def _directions(squares: Tensor, rank: float, energy: float | None) -> list[Tensor]:
    """For each head, (d, its rank): the directions of most squares, the first ones first."""
    values, vectors = torch.linalg.eigh(squares)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    d = squares.shape[-1]
    if energy is None:
        each = [min(d, max(1, round(rank * d) if rank <= 1 and isinstance(rank, float) else int(rank)))] * len(squares)
    else:
        share = values.cumsum(-1) / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        each = ((share < energy * (1 - 1e-12)).sum(-1) + 1).clamp(max=d).tolist()
    return [own[:, :r].contiguous() for own, r in zip(vectors, each, strict=True)]


def example(subject: Subject) -> Plan:
    """Other ranks for other heads."""
    return low_rank(subject, energy=0.97, rows=1, length=256)
