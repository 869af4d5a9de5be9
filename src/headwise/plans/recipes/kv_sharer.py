"""Whole layers read the keys and values of earlier ones, which a search on texts finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...caches.rules.shared import Shared
from ...card import Card
from ...errors import PlanError
from ...models.call import Call
from ...models.inputs import text_rows
from ...models.subject import Subject, as_subject
from ..plan import Plan

CARD = Card(
    paper="KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.18517 and the authors' code: keys (with rotary positions) and values averaged over 30 texts of 64 tokens, "
        "Euclidean distances of a head's vectors as in the code (a digest of the paper flattens them), most distant pairs first, "
        "the deeper layer reads the shallower, kept where last hidden states stay within a cosine. A quarter of the layers as in "
        "the paper. The other two orders are there to measure the paper's claim, which others doubt"
    ),
)
ORDERS = ("dissimilar", "similar", "random")


def kv_sharer(
    model: Any = None,
    *,
    layers: int | None = None,
    threshold: float = 0.5,
    order: str = "dissimilar",
    text: str | None = None,
    rows: int = 30,
    length: int = 64,
    seed: int = 0,
    show_progress: bool = True,
) -> Plan:
    """Lets `layers` layers (by default a quarter of them) read the keys and values of earlier ones, and keep none.

    Fewer than that, where no more pairs leave the last hidden states within a cosine of `threshold`; `about` has the map.

    Args:
        order: which pairs of layers are tried first: "dissimilar" as published, "similar" or "random" (by `seed`).
        text: what to measure on, by default held-out text of headwise's own; `rows` windows of `length` tokens.

    Raises: PlanError for another order, or more layers than could share; InputError where the model reads no text.
    """
    subject = as_subject(model)
    total = len(subject.main.sites)
    wanted = round(total / 4) if layers is None else layers
    if not 0 <= wanted < total or order not in ORDERS:
        raise PlanError(f"cannot let {wanted} of {total} layers share in the order {order!r}; orders are {', '.join(ORDERS)}")
    ids = text_rows(subject, text, rows, length)
    pairs = list(_ordered(subject, _distances(subject, ids), order, seed))
    base = _last_hidden(subject, ids, Plan.empty(subject))
    shared: dict[int, int] = {}
    for deep, shallow in pairs:
        if len(shared) == wanted:
            break
        if deep in shared:
            continue
        tried = _resolved({**shared, deep: shallow})
        hidden = _last_hidden(subject, ids, _plan(subject, tried))
        if float(torch.cosine_similarity(base, hidden, dim=-1).mean()) > threshold:
            shared = tried
    named = {str(deep): shallow for deep, shallow in sorted(shared.items())}
    return _plan(subject, shared).noting(recipe="kv_sharer", order=order, shared=named)


def _plan(subject: Subject, shared: Mapping[int, int]) -> Plan:
    plan = Plan.empty(subject)
    for source in sorted(set(shared.values())):
        readers = [layer for layer, other in shared.items() if other == source]
        own = [(layer, head) for layer in readers for head in range(subject.main.sites[layer].heads)]
        plan = plan.use(subject.heads(own, subject.main.name), Shared(source))
    return plan


def _resolved(shared: Mapping[int, int]) -> dict[int, int]:
    """The same map, to layers that do not share themselves."""

    def end(layer: int) -> int:
        return end(shared[layer]) if layer in shared else layer

    return {layer: end(other) for layer, other in shared.items()}


def _distances(subject: Subject, ids: Tensor) -> Tensor:
    """(layers, layers): mean Euclidean distance of the mean keys and values of a head at a place; inf where sizes differ."""
    means: dict[int, tuple[Tensor, Tensor]] = {}

    def tap(call: Call, out: Tensor) -> None:
        if call.site.stack == subject.main.name:
            means[call.site.layer] = call.k.double().mean(0), call.v.double().mean(0)

    with torch.no_grad(), subject.tap(tap):
        subject.run({"input_ids": ids})
    total = len(subject.main.sites)
    found = torch.full((total, total), torch.inf, dtype=torch.float64)
    for i, (k, v) in means.items():
        for j, (other_k, other_v) in means.items():
            if (k.shape, v.shape) == (other_k.shape, other_v.shape):
                found[i, j] = ((k - other_k).norm(dim=-1).mean() + (v - other_v).norm(dim=-1).mean()) / 2
    return found


def _ordered(subject: Subject, distances: Tensor, order: str, seed: int) -> Iterator[tuple[int, int]]:
    """(deep, shallow) pairs of layers of like sizes and kind, those to be tried first in front."""
    kinds = getattr(subject.text_config, "layer_types", None) or [""] * len(distances)
    pairs = [(i, j) for i in range(len(distances)) for j in range(i) if distances[i, j].isfinite() and kinds[i] == kinds[j]]
    if order == "random":
        places = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        yield from (pairs[place] for place in places)
    else:
        yield from sorted(pairs, key=lambda pair: float(distances[pair]), reverse=order == "dissimilar")


def _last_hidden(subject: Subject, ids: Tensor, plan: Plan) -> Tensor:
    """(rows, tokens * width): hidden states after the last layer and norm."""
    with torch.no_grad(), plan(subject):
        out = subject.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    states: Tensor = out.hidden_states[-1]
    return states.double().flatten(1)


def example(subject: Subject) -> Plan:
    """Fewer texts, and a guard that lets two layers pass."""
    return kv_sharer(subject, layers=2, threshold=0.0, rows=2)
