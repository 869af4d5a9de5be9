"""What caches for many requests have in common: a model that reads them, prompts of any lengths, and its own `generate`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError, PlanError, UnsupportedModelError
from .cache import cache_argument
from .layout import Site
from .session import Session
from .subject import Subject, as_subject

Prompts = Sequence[Sequence[int] | Tensor]


class Serves(Protocol):
    """A cache of the inventory: made for a model, it generates for many prompts and gives all memory back when it is closed."""

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt. options: of the model's own `generate`."""
        ...

    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        ...

    def close(self) -> None:
        """Gives all memory back; the model is as it was before the cache was made."""
        ...


def subject_for(model: Any) -> Subject:
    """A model whose layers' keys and values can be held in pages.

    Raises: UnsupportedModelError if they cannot, PlanError if a plan in force says how heads are cached.
    """
    subject = as_subject(model)
    name, layout = type(subject.model).__name__, subject.layout
    if layout.encoder_decoder or cache_argument(subject.model) is None:
        raise UnsupportedModelError(f"{name} is no decoder that takes a cache; pages of keys and values are for those")
    if any(site.latent for site in layout.main.sites):
        raise UnsupportedModelError(f"{name} caches one latent for all heads of a layer, which is not held in pages")
    if any(subject.session.program(site).rules for site in subject.main.sites):
        raise PlanError("a plan in force says how heads are cached; remove it, or generate with its own cache")
    return subject


def layers_of(subject: Subject) -> list[tuple[Site | None, Any]]:
    """Each layer that the model's own cache would have, and the attention that fills it, if any does so as we know it."""
    template = DynamicCache(config=subject.model.config)
    sites = {site.cache_layer: site for site in subject.main.sites}
    if template.layer_class_to_replicate is not None:
        template.layers = [DynamicLayer() for _ in sites]
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return [(sites.get(i) if type(layer) in known else None, layer) for i, layer in enumerate(template.layers)]


def window_of(layer: Any) -> int | None:
    """The window of a layer of transformers' caches; None if it has none."""
    return int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None


def rows_of(prompts: Prompts) -> list[list[int]]:
    """Prompts as lists of tokens.

    Raises: InputError for none, or one without tokens.
    """
    rows = [row.reshape(-1).tolist() if isinstance(row, Tensor) else [int(token) for token in row] for row in prompts]
    if not rows or not all(rows):
        raise InputError("give at least one prompt, and each at least one token")
    return rows


def prefill(subject: Subject, given: dict[str, Any]) -> None:
    """One pass that only fills the cache that is given."""
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in subject.forward_names else {}  # the rest would be thrown away
    with torch.no_grad():
        subject.model(**fewer, **given)


def ends_of(model: Any, options: dict[str, Any]) -> frozenset[int]:
    """The tokens that end a text."""
    config = options.get("generation_config") or model.generation_config
    end = options.get("eos_token_id", config.eos_token_id)
    return frozenset() if end is None else frozenset(int(token) for token in torch.as_tensor(end).reshape(-1))


def pad_of(model: Any, options: dict[str, Any], end: Iterable[int]) -> int:
    """The token that stands where there is none."""
    config = options.get("generation_config") or model.generation_config
    found = options.get("pad_token_id", config.pad_token_id)
    return int(found) if found is not None else min(end, default=0)


def copies_of(model: Any, options: dict[str, Any]) -> int:
    """How many rows `generate` makes of each."""
    config = options.get("generation_config") or model.generation_config
    asked = (options.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(1, *(int(count or 1) for count in asked))


def new_tokens(ids: Tensor, start: int, end: frozenset[int]) -> list[list[int]]:
    """Of each row the tokens from `start` on, up to one that ends the text."""
    rows = []
    for row in ids[:, start:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in end), len(row))
        rows.append(row[:stop])
    return rows


def checker(session: Session, state: dict[str, bool]) -> Callable[[], None]:
    """What raises PlanError when a cache made now can no longer be read: closed, or under another plan."""
    version, own = session.version, weakref.ref(session)

    def check() -> None:
        found = own()
        if state["closed"]:
            raise PlanError("this cache is closed; make a new one")
        if found is None or found.version != version:
            raise PlanError("this cache was filled under another plan; continue it under the plan that it was filled under")

    return check
