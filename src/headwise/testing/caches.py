"""Checks for caches that serve many requests, on the embedded models in float64.

A cache is made for a model, or by its file's `example(model)`; see `models.serving.Serves` for what it can do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.cache import cache_bytes, cache_of
from ..models.serving import Serves
from ..models.subject import Subject
from ._check import Item, require
from .recipes import NAMES, _prompt, _subject

TOKENS = 8
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 2}
BEGINNING = 150  # tokens that the prompts have in common


def _made(item: Item, subject: Subject) -> Serves:
    make = getattr(item.module, "example", item.value)
    made: Serves = make(subject)
    return made


def _prompts(subject: Subject) -> list[list[int]]:
    """Ragged ones, that begin alike as far as different tokens, or not at all."""
    ids = _prompt(subject, 3, 220).tolist()
    beginning = ids[0][:BEGINNING]
    return [beginning + ids[1][1:20], ids[2][:97], beginning + ids[2][1:5], beginning[:70] + ids[1][1:40], beginning]


def _alone(subject: Subject, prompt: list[int], **options: Any) -> list[list[int]]:
    """What the model generates for one prompt by itself, with its own cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        made = subject.model.generate(ids, attention_mask=torch.ones_like(ids), **{**OPTIONS, **options})
    return [row[len(prompt) :] for row in made.tolist()]


class _Noted:
    """A logits processor that changes nothing, and notes how many bytes a cache has allocated; or ends in an error."""

    def __init__(self, cache: Serves, error: Exception | None = None) -> None:
        self.cache, self.error, self.most, self.calls = cache, error, 0, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.most, self.calls = max(self.most, self.cache.bytes()), self.calls + 1
        if self.error is not None and self.calls > 2:
            raise self.error
        return scores


def check_alike(item: Item) -> None:
    """Requests of all lengths served together get, token for token, what each gets alone from the model's own cache."""
    for name in NAMES:
        subject = _subject(name)
        prompts = _prompts(subject)
        wanted = [_alone(subject, prompt)[0] for prompt in prompts]
        cache = _made(item, subject)
        try:
            found = [cache.generate(prompts, **OPTIONS), cache.generate(prompts[::-1], **OPTIONS)[::-1]]
            one = cache.generate(prompts[:1], **OPTIONS)
        finally:
            cache.close()
        for i, own in enumerate(wanted):
            require(found[0][i] == own, f"{name}: request {i} of {len(prompts)} gets other tokens than alone")
            require(found[1][i] == own, f"{name}: request {i} gets other tokens when the requests come in another order")
        require(one == wanted[:1], f"{name}: a single request gets other tokens than from the model's own cache")


def check_samples(item: Item) -> None:
    """Samples and beams of a prompt are those of the model's own cache."""
    subject = _subject(NAMES[1])
    prompts = _prompts(subject)[1:3]
    cache = _made(item, subject)
    try:
        for options in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
            torch.manual_seed(5)
            wanted = [row for prompt in prompts[:1] for row in _alone(subject, prompt, **options)]
            torch.manual_seed(5)
            found = cache.generate(prompts[:1], **{**OPTIONS, **options})
            require(found == wanted, f"with {options} it generates other tokens")
        beams = cache.generate(prompts, **{**OPTIONS, "num_beams": 3})
        require(beams == [_alone(subject, prompt, num_beams=3)[0] for prompt in prompts], "beams of two prompts mix")
    finally:
        cache.close()


def check_bytes(item: Item) -> None:
    """Five samples of a long prompt have far fewer bytes allocated at any time than the model's own cache has for five rows."""
    subject = _subject(NAMES[0])
    ids = _prompt(subject, 1, 640)
    with torch.no_grad():
        full = cache_bytes(cache_of(subject.model(input_ids=ids.expand(5, -1), use_cache=True)))
    cache = _made(item, subject)
    try:
        noted = _Noted(cache)
        cache.generate(ids.tolist(), **{**OPTIONS, "do_sample": True}, num_return_sequences=5, logits_processor=[noted])
    finally:
        cache.close()
    require(noted.calls == TOKENS, "it does not generate with the processors that it is given")
    require(0 < noted.most < 0.5 * full, f"five samples take {noted.most} bytes, {full} without the cache")


def check_closed(item: Item) -> None:
    """After an error it goes on as if nothing had been; closed it holds nothing, and the model is as before."""
    from ..errors import PlanError

    subject = _subject(NAMES[0])
    named, prompts = subject.model.config._attn_implementation, _prompts(subject)
    with torch.no_grad():
        before = subject.model(input_ids=torch.tensor(prompts[:1]), use_cache=False).logits
    cache = _made(item, subject)
    try:
        wanted = cache.generate(prompts, **OPTIONS)
        try:
            cache.generate(prompts[1:], **OPTIONS, logits_processor=[_Noted(cache, MemoryError("no room"))])
        except MemoryError:
            pass
        else:
            require(False, "an error in `generate` does not arrive")
        require(cache.generate(prompts, **OPTIONS) == wanted, "after an error it generates other tokens")
    finally:
        cache.close()
    require(cache.bytes() == 0, f"closed, it still has {cache.bytes()} bytes allocated")
    require(subject.model.config._attn_implementation == named, "the attention implementation was not restored")
    with torch.no_grad():
        after = subject.model(input_ids=torch.tensor(prompts[:1]), use_cache=False).logits
    require(torch.equal(before, after), "the model is not as before")
    try:
        cache.generate(prompts, **OPTIONS)
    except PlanError as error:
        require("closed" in str(error), f"the error does not say that it is closed: {error}")
    else:
        require(False, "closed, it still generates")
