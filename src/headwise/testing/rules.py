"""Checks for rules of how heads are cached, on the embedded models in float64.

A rule's file gives `example(heads)`: the rule for so many query heads, and, if it evicts, `whole(heads)`: the same rule with
room for everything. Plans give it to all heads. What a head may read is noted from its store at every call; the oracle is one
pass over the whole text in which every head reads just that, by an explicit mask.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..attention import attend
from ..caches import Codec, Evict, LayerStore, Rule
from ..models.cache import HeadCache, cache_argument, cache_bytes, cache_of
from ..models.call import Call
from ..models.masks import DenseMask
from ..models.subject import Subject
from ..plans import Plan
from ..stages.causal import Causal
from ..types import Heads
from ._check import CheckFailed, Item, Skipped, require
from .recipes import NAMES, _generate, _logits, _prompt, _subject

TOKENS = 12


@lru_cache(maxsize=64)
def _plan(item: Item, subject: Subject, which: str = "example") -> Plan:
    make = getattr(item.module, which, None)
    if make is None:
        raise CheckFailed(f"its file has no `{which}(heads)`, which makes the rule for so many heads")
    every, first = subject.main.exists(), getattr(item.module, "FIRST_LAYER", 0)
    every = Heads(every.mask & (torch.arange(len(every.mask)) >= first)[:, None], every.stack)
    rule = make(every.count())
    require(isinstance(rule, Rule), f"`{which}` returns {type(rule).__name__}, not a Rule")
    return Plan.empty(subject).use(every, rule)


@dataclass
class Record:
    """What each head could read: by layer, for every token of the text, the numbers of the tokens held then, by key/value head."""

    seen: dict[int, list[list[set[int]]]] = field(default_factory=dict)

    @contextmanager
    def of(self) -> Iterator[None]:
        """Within the block, stores note what they hold."""
        extend = LayerStore.extend

        def noted(store: LayerStore, k: Tensor, *args: Any, **kwargs: Any) -> Any:
            held = store.held()[0] if store.seen else [[] for _ in store.keeps]
            rows = self.seen.setdefault(store.layer[0], [])
            start, count = store.seen, k.shape[2]
            views = extend(store, k, *args, **kwargs)
            for i in range(count):
                new = range(start, start + i + 1)
                if count == 1:  # a ring has let go of what the token takes the place of
                    rows.append([set(own) | set(new) if rule else set(now) for own, now, rule in _each(store, held)])
                else:
                    rows.append([set(own) | set(new) for own in held])
            return views

        LayerStore.extend = noted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            LayerStore.extend = extend  # type: ignore[method-assign]

    def mask(self, layer: int, n: int, groups: int) -> Tensor:
        """(1, h, n, n)."""
        rows = self.seen[layer]
        table = torch.zeros(len(rows[0]), n, n, dtype=torch.bool)
        for i, heads in enumerate(rows[:n]):
            for head, numbers in enumerate(heads):
                table[head, i, list(numbers)] = True
        return table.repeat_interleave(groups, 0)[None]


def _each(store: LayerStore, held: list[list[int]]) -> Iterator[tuple[list[int], list[int], bool]]:
    now = store.held()[0]
    evicting = {head for heads, rule in store.rules if isinstance(rule, Evict) for head in heads}
    for head, (own, after) in enumerate(zip(held, now, strict=True)):
        yield own, after, head in evicting


def _taking(subject: Subject, cache: Any) -> dict[str, Any]:
    return {str(cache_argument(subject.model)): cache}


def _evicts(item: Item) -> None:
    if not issubclass(item.value, Evict):
        raise Skipped("it evicts nothing")


def check_exact(item: Item) -> None:
    """Generation with what the rule keeps is one pass over the whole text under an explicit mask, in float64."""
    _evicts(item)
    for name in NAMES:
        subject = _subject(name)
        plan, ids, record = _plan(item, subject), _prompt(subject, 1, 200), Record()
        steps: list[Tensor] = []
        with plan(subject), record.of(), torch.no_grad():
            out = subject.model(input_ids=ids, use_cache=True)
            cache = cache_of(out)
            text = ids
            for count in (1, 1, 1, 40, 1, 5, 1, 1):  # a prompt, tokens, a further prompt, tokens, a draft, tokens
                steps.append(out.logits[0, -1])
                more = _prompt(subject, 1, 600)[:, text.shape[1] :][:, :count]
                text = torch.cat([text, more], 1)
                out = subject.model(input_ids=more, **_taking(subject, cache))
            steps.append(out.logits[0, -1])
        ends = [200, 201, 202, 203, 243, 244, 249, 250, 251]
        n = text.shape[1]
        masks = [record.mask(site.layer, n, site.groups) for site in subject.main.sites]
        some = any(bool((mask.sum(-1) < torch.arange(1, n + 1)).any()) for mask in masks)

        def tap(call: Call, out: Tensor, masks: list[Tensor] = masks) -> Tensor:
            mask = masks[call.site.layer]
            return attend(call.q, call.k, call.v, Causal(), DenseMask(mask), backend="reference").transpose(1, 2)

        with subject.tap(tap):
            whole = _logits(subject, text)[0]
        require(some, f"{name}: the example evicts nothing, so it shows nothing")
        for end, step in zip(ends, steps, strict=True):
            off = float((whole[end - 1] - step).abs().max())
            require(off < 1e-9, f"{name}: after {end} tokens logits differ by {off:.1e} from a read of just what is held")


def check_whole(item: Item) -> None:
    """With room for everything it is the model's own generation, token for token."""
    _evicts(item)
    for name in NAMES[1:]:
        subject = _subject(name)
        plan, ids = _plan(item, subject, "whole"), _prompt(subject, 2, 200)
        with plan(subject):
            require(torch.equal(_generate(subject, ids), _plain(name)), f"{name}: generation differs, though nothing is evicted")


@lru_cache(maxsize=4)
def _plain(name: str) -> Tensor:
    subject = _subject(name)
    return _generate(subject, _prompt(subject, 2, 200))


def check_rows(item: Item) -> None:
    """A row's tokens do not depend on the rows beside it, nor on padding before it."""
    for name in NAMES[1:]:
        subject = _subject(name)
        plan, ids = _plan(item, subject), _prompt(subject, 2, 200)
        with plan(subject):
            alone = [_generate(subject, ids[:1])[0, 200:], _generate(subject, ids[1:, 61:])[0, 139:]]
            padded, mask = ids.clone(), torch.ones_like(ids)
            padded[1, :61], mask[1, :61] = 2, 0
            both = _generate(subject, padded, attention_mask=mask)
        for row, own in enumerate(alone):
            require(torch.equal(both[row, 200:], own), f"{name}: row {row} of a padded batch differs from the row alone")


def check_beams(item: Item) -> None:
    """Beam search reorders what is held: the best beam's score is that of its tokens, read one by one from a cache of its own."""
    subject = _subject(NAMES[0])
    plan, ids = _plan(item, subject), _prompt(subject, 1, 200)
    with plan(subject):
        with torch.no_grad():
            found = subject.model.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                do_sample=False, pad_token_id=2, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        # generate divides by the length, and adds in float32
        total = float(_sum_of_logs(subject, ids, found.sequences[:, 200:])) / TOKENS
    off = abs(total - float(found.sequences_scores[0]))
    require(off < 1e-5, f"the best of 3 beams has a score that is {off:.1e} off that of its tokens")


def _sum_of_logs(subject: Subject, ids: Tensor, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = subject.model(input_ids=ids, use_cache=True)
        total = out.logits[0, -1].log_softmax(-1)[tokens[0, 0]]
        for i in range(tokens.shape[1] - 1):
            out = subject.model(input_ids=tokens[:, i : i + 1], **_taking(subject, cache_of(out)))
            total = total + out.logits[0, -1].log_softmax(-1)[tokens[0, i + 1]]
    return total


def check_bytes(item: Item) -> None:
    """After a long prompt, and tokens after it, the cache has fewer bytes allocated than without the rule."""
    subject = _subject(NAMES[0])
    ids = _prompt(subject, 1, 900)
    with torch.no_grad():
        full = cache_bytes(cache_of(subject.model(input_ids=ids, use_cache=True)))
        with _plan(item, subject)(subject):
            cache = cache_of(subject.model(input_ids=ids, use_cache=True))
            after = cache_bytes(cache)
            for _ in range(3):
                subject.model(input_ids=ids[:, :1], **_taking(subject, cache))
    require(isinstance(cache, HeadCache), "the rule's plan does not get a cache of its own")
    require(after < 0.9 * full, f"the cache takes {after} bytes, {full} without the rule")
    grown = cache_bytes(cache)
    require(grown <= 1.1 * after, f"three more tokens make {grown} bytes of {after}")


def check_interrupted(item: Item) -> None:
    """After an error in the middle of a call, the model and the cache go on as if the call had not been made, or say they can't."""
    from ..errors import PlanError

    subject = _subject(NAMES[0])
    plan, ids = _plan(item, subject), _prompt(subject, 1, 200)
    layers = subject.main.shape[0]

    def tap(call: Call, out: Tensor) -> None:
        if call.site.layer == layers - 1:
            raise MemoryError("no room")

    with plan(subject), torch.no_grad():
        first = subject.model(input_ids=ids, use_cache=True)
        cache = cache_of(first)
        wanted = subject.model(
            input_ids=ids[:, :1], **_taking(subject, cache_of(subject.model(input_ids=ids, use_cache=True)))
        ).logits
        try:
            with subject.tap(tap):
                subject.model(input_ids=ids[:, :1], **_taking(subject, cache))
        except MemoryError:
            pass
        try:
            again = subject.model(input_ids=ids[:, :1], **_taking(subject, cache)).logits
        except PlanError as error:
            require("start" in str(error), f"the error does not say what to do: {error}")
        else:
            require(torch.equal(again, wanted), "after an error, the same call gives other logits")
        cache.reset()
        fresh = subject.model(input_ids=ids, **_taking(subject, cache)).logits
        require(torch.equal(fresh, first.logits), "a cache that was reset reads a prompt otherwise")


def check_saved(item: Item) -> None:
    """Saved and loaded, a plan with the rule is the same plan."""
    if not item.module.__name__.startswith("headwise."):
        raise Skipped("plans name rules by the inventory, and it is not in it")
    subject = _subject(NAMES[1])
    plan, ids = _plan(item, subject), _prompt(subject, 1, 200)
    with tempfile.TemporaryDirectory() as folder:
        again = Plan.from_pretrained(plan.save_pretrained(folder))
    with plan(subject):
        first = _generate(subject, ids)
    with again(subject):
        require(torch.equal(_generate(subject, ids), first), "the loaded plan generates other tokens")


def check_near(item: Item) -> None:
    """What is encoded reads nearly as it was: logits of the next token stay within a tenth of their spread."""
    if not issubclass(item.value, Codec):
        raise Skipped("it encodes nothing")
    subject = _subject(NAMES[0])
    ids = _prompt(subject, 1, 300)
    with torch.no_grad():
        cache = cache_of(subject.model(input_ids=ids, use_cache=True))
        wanted = subject.model(input_ids=ids[:, :1], **_taking(subject, cache)).logits[0, -1]
        with _plan(item, subject)(subject):
            cache = cache_of(subject.model(input_ids=ids, use_cache=True))
            found = subject.model(input_ids=ids[:, :1], **_taking(subject, cache)).logits[0, -1]
    off = float((found - wanted).abs().mean() / wanted.std())
    require(0 < off < 0.1, f"logits are off by {off:.2g} of their spread")
