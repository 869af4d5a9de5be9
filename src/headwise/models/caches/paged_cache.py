"""A cache in pages: rows of any lengths, that fork and go one by one, and share pages until they write."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...caches import LayerStore
from ...caches.paged import PagedStore
from ...card import Card
from ...errors import InputError, PlanError, UnsupportedModelError
from ..cache import HeadCache, HeadCacheLayer, cache_argument
from ..serving import (
    Prompts,
    checker,
    copies_of,
    ends_of,
    layers_of,
    new_tokens,
    pad_of,
    prefill,
    rows_of,
    subject_for,
    window_of,
)
from ..subject import Subject, pad_rows

CARD = Card(
    paper="Efficient Memory Management for Large Language Model Serving with PagedAttention",
    year=2023,
    room="cache",
    source=(
        "arXiv:2309.06180, sec. 4: blocks taken on demand, one table a sequence, reference counts, copy on write. Tables are of a "
        "key/value head here, and pages of 64 tokens by default (16 in the paper). Equal rows of a first prompt, which `generate` "
        "makes for samples and beams, share its pages from the start. Prefixes that requests have in common: see PrefixCache. "
        "Left out: swapping to the host, preemption, several devices"
    ),
)


class PagedLayer(HeadCacheLayer):
    """One layer; see `PagedCache`."""

    def __init__(self, store: PagedStore, window: int | None, check: Any) -> None:
        super().__init__(cast(LayerStore, store), window, check)
        self.paged = store

    def reset(self) -> None:
        """Forgets everything."""
        self.pending = None
        self.paged.clear()


class PagedCache(HeadCache):
    """Keys and values of many rows of one model in pages that are taken as tokens come, and shared until they are written.

    Pass it as the model's cache, or to `generate`. While it lives and is not closed, the model's attention reads through
    headwise. Rows may be of any lengths, which is left padding to the model; padding is not held. A layer with a window of
    its own holds all tokens nevertheless.

        with PagedCache(model) as cache:
            model(**cache.inputs(ids))                 # a prompt
            cache.fork(0, 3)                           # three more rows like the first, in the same pages
            model(**cache.inputs(next_tokens))         # a token each; what rows share stays as it is
            cache.free([1])

    Args:
        model: a model, or a `Subject`. page: tokens of a page; a power of two from 16 on is read where it is, others are copied.

    Raises: UnsupportedModelError for a model that is no decoder with a cache of keys and values, PlanError while a plan is in
    force that says how heads are cached.
    """

    def __init__(self, model: Any, page: int | None = None) -> None:
        if page is not None and page < 1:
            raise InputError(f"a page of {page} tokens holds nothing; give at least 1")
        subject = subject_for(model)
        stores = []
        for site, layer in layers_of(subject):
            if site is None:
                raise UnsupportedModelError(
                    f"{type(subject.model).__name__} has layers that cache no keys and values ({type(layer).__name__})"
                )
            plain, window = subject.session.program(site).plain, window_of(layer)
            stores.append(PagedStore(site.key_value_heads, page, plain=plain, window=window))
        self._open(subject, stores)

    def _open(self, subject: Subject, stores: Sequence[PagedStore]) -> None:
        self._state, self.subject = {"closed": False}, subject
        check = checker(subject.session, self._state)
        super().__init__(layers=[PagedLayer(store, store.window, check) for store in stores])
        # Removed with the last reference at the latest. Nothing in it refers to the cache itself.
        self._remove = weakref.finalize(self, subject.session.install(cache=True))

    def sibling(self) -> PagedCache:
        """An empty cache for the same model in the same pages; its rows can be added to these."""
        self._check()
        made = PagedCache.__new__(PagedCache)
        made._open(self.subject, [store.sibling() for store in self.stores])
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        made = memo[id(self)] = self.sibling()
        made.add(self)
        return made

    def __enter__(self) -> PagedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets everything, and leaves the model as it was."""
        self.reset()
        self._state["closed"] = True
        self._remove()

    def _check(self) -> None:
        if self._state["closed"]:
            raise PlanError("this cache is closed; make a new one")
        self.rollback()

    # ---- what is held -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.subject.device

    @property
    def stores(self) -> list[PagedStore]:
        """One a layer."""
        return [layer.paged for layer in self.layers]

    @property
    def rows(self) -> int:
        """Rows held."""
        return self.stores[0].sequences.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens held of each row, the same in all layers and heads."""
        return [max(self.stores[0].seen - pad, 0) for pad in self.stores[0].pads]

    @property
    def held_bytes(self) -> int:
        """Bytes of pages that hold something, of all siblings; `bytes` has those that wait for use too."""
        return sum(store.arena.nbytes * store.arena.held // max(len(store.arena.refs), 1) for store in self.stores)

    @property
    def wasted(self) -> int:
        """Tokens that the rows' pages have room for beyond what they hold, over all layers and heads."""
        return sum(store.sequences.pages * store.arena.page - int(store.sequences.lengths.sum()) for store in self.stores)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; one that is named twice is held once until it is written.

        Raises: InputError for a row that is not there.
        """
        self._exist(rows)
        for store in self.stores:
            store.select(torch.tensor(list(rows), dtype=torch.long))

    def _exist(self, rows: Sequence[int]) -> None:
        self._check()
        wrong = [row for row in rows if not 0 <= row < self.rows]
        if wrong:
            raise InputError(f"there is no row {wrong[0]}; the cache holds {self.rows}")

    def fork(self, row: int, times: int = 1) -> list[int]:
        """More rows like this one, in the same pages; returns their numbers."""
        before = self.rows
        self.select([*range(before), *[row] * times])
        return list(range(before, before + times))

    def free(self, rows: Sequence[int]) -> None:
        """Forgets rows; those behind them move up. Pages that no other row has are free, and left padding that no row needs goes,
        so `get_seq_length` may be less.

        Raises: InputError for a row that is not there.
        """
        self._exist(rows)
        kept = [row for row in range(self.rows) if row not in set(rows)]
        if not kept:
            self.reset()
            return
        self.select(kept)
        for store in self.stores:
            store.tighten()

    def add(self, other: PagedCache) -> list[int]:
        """Adds the rows of a sibling behind the own ones, in the same pages; returns their numbers.

        Raises: InputError for a cache that is no sibling.
        """
        self._check()
        if any(own.arena is not theirs.arena for own, theirs in zip(self.stores, other.stores, strict=True)):
            raise InputError("rows can be added from siblings only, which hold theirs in the same pages: see `sibling`")
        before = self.rows
        for own, theirs in zip(self.stores, other.stores, strict=True):
            own.stack(theirs)
        return list(range(before, self.rows))

    def inputs(self, tokens: Tensor | Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the model's forward takes to read tokens (rows, n) after what is held: with mask, places and this cache."""
        self._check()
        model = self.subject.model
        ids = torch.as_tensor(tokens, device=self.subject.device)
        start = torch.tensor(self.lengths or [0] * len(ids), device=ids.device)[:, None]
        seen, n = self.get_seq_length(), ids.shape[1]
        mask = torch.arange(seen + n, device=ids.device) >= seen - start
        given = {"input_ids": ids, "attention_mask": mask.long(), str(cache_argument(model)): self}
        if "position_ids" in self.subject.forward_names:
            given["position_ids"] = start + torch.arange(n, device=ids.device)
        return given

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, as many times as `num_return_sequences` says; samples and beams of one prompt share its
        pages, and read it once.

        options: of the model's own `generate`. What was held before is forgotten; what is held then stays.
        """
        self._check()
        self.reset()
        model: Any = self.subject.model
        end, name = ends_of(model, options), str(cache_argument(model))
        pad = pad_of(model, options, end)
        ids, mask = pad_rows(rows_of(prompts), pad, self.device)
        copies = copies_of(model, options)
        if copies > 1 and ids.shape[1] > 1:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
            more = {"position_ids": places} if "position_ids" in self.subject.forward_names else {}
            prefill(self.subject, {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], name: self, **more})
            self.batch_repeat_interleave(copies)
        made = model.generate(ids, attention_mask=mask, **{"pad_token_id": pad, **options, name: self})
        return new_tokens(made if isinstance(made, Tensor) else made.sequences, ids.shape[1], end)
