"""Blocks of layers that look at distant tokens alike read them by one layer's keys."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ...attention import attention_weights
from ...caches.rules.shared_keys import CARD, SharedKeys
from ...errors import InputError, PlanError
from ...models.call import Call
from ...models.inputs import text_rows
from ...models.subject import Subject, as_subject
from ...stages.sink import Sink
from ...stages.window import Window
from ..plan import Plan

__all__ = ["CARD", "blocks", "example", "pod", "similarity"]


def pod(
    model: Any = None,
    *,
    threshold: float = 0.5,
    sink: int = 16,
    recent: int = 4080,
    skip: float | None = None,
    every: bool = True,
    text: str | None = None,
    rows: int = 2,
    length: int | None = None,
    queries: int = 16,
    show_progress: bool = True,
) -> Plan:
    """Lets heads read distant tokens by the keys of the first layer of their block, and keep own keys for near tokens only.

    A block is a run of layers in which a key/value head's weights on distant tokens are alike by `threshold` or more.

    Args:
        sink, recent: near tokens, read by own keys. skip: see `headwise.caches.rules.shared_keys.SharedKeys`.
        every: whether a layer must be like every layer of a block to join it, or only like the first.
        text: what to measure on, by default held-out text of headwise's own; `rows` windows of `length` tokens (by default
            twice the near ones, as far as the model goes), of which the last `queries` are asked.

    Raises: InputError for texts with no distant tokens; PlanError for settings that do not go.
    """
    subject = as_subject(model)
    rule = SharedKeys(0, sink, recent, skip)  # says what does not go
    if not 0 <= threshold <= 1:
        raise PlanError(f"a threshold of {threshold} is no similarity; give one from 0 to 1")
    size = length or min(subject.max_length, 2 * (sink + recent))
    like = similarity(subject, text_rows(subject, text, rows, size), sink=sink, recent=recent, queries=queries)
    sites = subject.main.sites
    kinds = getattr(subject.text_config, "layer_types", None) or ["full_attention"] * len(sites)
    shared: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by first layer of the block
    runs = {}
    for kv in range(max(site.key_value_heads for site in sites)):
        runs[kv] = blocks(like[kv], threshold, every, [kind == "full_attention" for kind in kinds])
        for first, *others in runs[kv]:
            shared[first] += [
                (layer, head) for layer in others for head in range(kv * sites[layer].groups, (kv + 1) * sites[layer].groups)
            ]
    plan = Plan.empty(subject)
    for first, heads in sorted(shared.items()):
        if heads:
            plan = plan.use(subject.heads(heads, subject.main.name), SharedKeys(first, sink, recent, rule.skip))
    about = {
        "recipe": "pod",
        "threshold": threshold,
        "sink": sink,
        "recent": recent,
        "blocks": {str(k): v for k, v in runs.items()},
    }
    return plan.noting(**about)


def similarity(subject: Subject, ids: Tensor, *, sink: int = 16, recent: int = 4080, queries: int = 16) -> Tensor:
    """(kv, layers, layers) in [0, 1]: how alike layers weigh tokens that are not near, one head of theirs against the other's.

    1 less the Jensen-Shannon divergence in bits, the mean over texts ids (b, n), their last `queries`, and the query heads of a
    key/value head. nan where layers have other numbers of heads.

    Raises: InputError if some query has no distant tokens.
    """
    n = ids.shape[1]
    if n - queries - recent < sink:
        raise InputError(
            f"of {n} tokens the last {queries} have no distant ones behind sink {sink} and recent {recent}; give a longer text, or "
            "fewer near tokens"
        )
    distant = ~(Window(recent) | Sink(sink)) if sink else ~Window(recent)
    layers = subject.main.sites
    found: list[Tensor] = []
    for row in ids.split(1):
        weights: dict[int, Tensor] = {}

        def tap(call: Call, out: Tensor, weights: dict[int, Tensor] = weights) -> None:
            if call.site.stack == subject.main.name:
                parts = [
                    attention_weights(r.q, r.k, *r.stages, distant, rows=slice(n - queries, n), scale=r.scale)
                    for r in call.readings
                ]
                own = torch.cat(parts, 1)[0, torch.tensor([h for r in call.readings for h in r.heads]).argsort()]
                weights[call.site.layer] = own / own.sum(-1, keepdim=True)  # without what a sink takes

        with torch.no_grad(), subject.tap(tap):
            subject.run({"input_ids": row})
        like = torch.full((max(site.key_value_heads for site in layers), len(layers), len(layers)), torch.nan, dtype=torch.float64)
        for i, own in weights.items():
            for j, other in weights.items():
                if j <= i and (layers[i].heads, layers[i].key_value_heads) == (layers[j].heads, layers[j].key_value_heads):
                    each = (1 - _divergence(own, other)).double().mean(-1).view(layers[i].key_value_heads, -1).mean(-1)
                    like[: len(each), i, j] = like[: len(each), j, i] = each.cpu()
        found.append(like)
    return torch.stack(found).mean(0)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """(...,) Jensen-Shannon divergence in bits of distributions (..., m)."""
    middle = (p + q) / 2

    def to_middle(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1)

    return (to_middle(p) + to_middle(q)) / (2 * math.log(2.0))


def blocks(like: Tensor, threshold: float, every: bool, sharing: list[bool] | None = None) -> list[list[int]]:
    """Runs of layers, from the first on, of a (layers, layers) similarity: each as long as it can be. `sharing`: which may join."""
    found: list[list[int]] = []
    may = sharing or [True] * len(like)
    for layer in range(len(like)):
        compared = found[-1] if found and every else found[-1][:1] if found else []
        joins = bool(compared) and may[layer] and may[compared[0]]
        if joins and all(float(like[layer, other]) >= threshold for other in compared):
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def example(subject: Subject) -> Plan:
    """Few near tokens, and blocks that are not all of one layer."""
    return pod(subject, threshold=0.3, sink=4, recent=48, rows=1, length=200, queries=8)
