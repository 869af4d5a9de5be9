"""Checks for recipes and the plans they make, on the embedded models in float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..attention.mask import Mask
from ..caches import Rule
from ..models.cache import cache_argument, cache_of
from ..models.subject import Subject, open_model
from ..plans import Plan
from ._check import Item, require

NAMES = ("tiny", "tiny-gqa")
TOKENS = 12


@lru_cache(maxsize=4)
def _subject(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    return open_model(name, dtype=dtype)


def _make(item: Item, subject: Subject) -> Plan:
    """The recipe's plan for its own example options, or its defaults; made once for each model."""
    plan = _made(item.value, getattr(item.module, "example", None), subject)
    require(isinstance(plan, Plan), f"returns {type(plan).__name__}, not a Plan")
    return plan


@lru_cache(maxsize=32)
def _made(recipe: Callable[..., Plan], example: Callable[[Subject], Plan] | None, subject: Subject) -> Plan:
    return example(subject) if example else recipe(subject, show_progress=False)


def _prompt(subject: Subject, rows: int = 2, length: int = 256) -> Tensor:
    ids = torch.randint(3, 4096, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = subject.begin[0]
    return ids


def _logits(subject: Subject, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids, **{"use_cache": False, **options}).logits


def _generate(subject: Subject, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return subject.model.generate(
            ids,
            **{"attention_mask": torch.ones_like(ids), **options},
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=2,
        )  # type: ignore[no-any-return]


def _has_rules(plan: Plan) -> bool:
    """Whether it says how heads are cached: such a plan changes what is read from a cache, and no pass without one."""
    return any(isinstance(entry.stage, Rule) for entry in plan.entries)


def _next_logits(subject: Subject, ids: Tensor) -> Tensor:
    """Logits of the last token, read from the cache of those before it."""
    with torch.no_grad():
        cache = cache_of(subject.model(input_ids=ids[:, :-1], use_cache=True))
        return subject.model(input_ids=ids[:, -1:], **{str(cache_argument(subject.model)): cache}).logits  # type: ignore[no-any-return]


def check_makes_a_plan(item: Item) -> None:
    """It makes a plan that changes some heads, for plain and for grouped heads."""
    for name in NAMES:
        subject = _subject(name)
        plan = _make(item, subject)
        require(plan.heads().count() > 0, f"{name}: the plan touches no head")
        ids = _prompt(subject)
        read = _next_logits if _has_rules(plan) else _logits
        before = read(subject, ids)
        with plan(subject):
            after = read(subject, ids)
        require(bool(after.isfinite().all()), f"{name}: logits under the plan are not finite")
        require(not torch.equal(before, after), f"{name}: the plan changes nothing")


def check_restores(item: Item) -> None:
    """After the plan, and after an error under it, the model is as before, bit for bit."""
    subject = _subject(NAMES[0])
    plan, ids = _make(item, subject), _prompt(subject)
    before = _logits(subject, ids)
    with plan(subject):
        _logits(subject, ids)
    require(torch.equal(before, _logits(subject, ids)), "the model is not as before")
    try:
        with plan(subject):
            raise KeyError("an error of the user's")
    except KeyError:
        pass
    require(torch.equal(before, _logits(subject, ids)), "the model is not as before after an error")
    plan.apply(subject)
    plan.remove(subject)
    require(torch.equal(before, _logits(subject, ids)), "the model is not as before after apply and remove")
    require(subject.model.config._attn_implementation == "sdpa", "the attention implementation was not restored")


def check_untouched_heads(item: Item) -> None:
    """In the first layer that the plan touches, heads that it does not touch give the same bits (same kernel, same numbers)."""
    for name in NAMES:
        subject = _subject(name)
        plan, ids = _make(item, subject), _prompt(subject)
        touched = plan.heads()
        layer = touched.list()[0][0]
        outs: list[Tensor] = []

        def tap(call: Any, out: Tensor, layer: int = layer, outs: list[Tensor] = outs) -> None:
            if call.site.layer == layer:
                outs.append(out.clone())

        with subject.tap(tap):
            _logits(subject, ids)
            with plan(subject):
                _logits(subject, ids)
        others = [h for h in range(touched.shape[1]) if (layer, h) not in touched]
        same = torch.equal(outs[0][:, :, others], outs[1][:, :, others])
        require(same, f"{name}: heads of layer {layer} that the plan does not touch changed")


def check_generate(item: Item) -> None:
    """With the cache, in batches and behind left padding, generation gives what full forward passes under the plan give."""
    for name in NAMES:
        subject = _subject(name)
        plan, ids = _make(item, subject), _prompt(subject)
        with plan(subject):
            made, start = _generate(subject, ids), ids.shape[1]
            # one full pass over what was made tells the token that follows each of its beginnings
            wrong = []
            if not _has_rules(plan):
                likeliest = _logits(subject, made)[:, start - 1 : -1].argmax(-1)
                wrong = (made[:, start:] != likeliest).any(0).nonzero().flatten().tolist()
            require(
                not wrong, f"{name}: with the cache, tokens differ from full passes from token {start + wrong[0] if wrong else ''}"
            )
            alone = _generate(subject, ids[1:])
            require(torch.equal(alone[0], made[1]), f"{name}: a row's tokens depend on the other rows of its batch")
            padded = torch.cat([torch.full((2, 37), 2), ids], 1)
            mask = torch.cat([torch.zeros(2, 37, dtype=torch.long), torch.ones_like(ids)], 1)
            padded[1], mask[1] = torch.cat([ids[1, :37], ids[1]]), 1  # one padded row, one longer row
            padded[1, 37] = 3
            behind = _generate(subject, padded, attention_mask=mask)
            require(torch.equal(behind[0, 37:], made[0]), f"{name}: left padding changes the tokens")


def check_bytes(item: Item) -> None:
    """If heads are masked to less than everything, or have a rule of how they are cached, a long prompt allocates less."""
    subject = _subject(NAMES[0])
    plan = _make(item, subject)
    if not any(isinstance(entry.stage, Mask | Rule) for entry in plan.entries):
        return
    from ..tasks.kv_bytes import KvBytes

    task = KvBytes(length=1536)
    before = task.run(subject, None, lambda _: None)["kv_bytes"]
    with plan(subject):
        after = task.run(subject, None, lambda _: None)["kv_bytes"]
    require(after < before, f"the cache still takes {after} bytes, {before} without the plan")


def check_saved(item: Item) -> None:
    """Saved and loaded, it is the same plan."""
    subject = _subject(NAMES[1])
    plan, ids = _make(item, subject), _prompt(subject)
    with tempfile.TemporaryDirectory() as folder:
        again = Plan.from_pretrained(plan.save_pretrained(folder))
    read = _next_logits if _has_rules(plan) else _logits
    with plan(subject):
        first = read(subject, ids)
    with again(subject):
        second = read(subject, ids)
    require(torch.equal(first, second), "the loaded plan gives other logits")
    require(again.about == dict(plan.about), "the notes were not kept")
