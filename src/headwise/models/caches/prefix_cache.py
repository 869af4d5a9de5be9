"""A cache for many requests, which computes and holds what they begin with once and reads it for all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...caches import PAGE
from ...caches.prefix_tree import PrefixTree, Shelf, Text
from ...card import Card
from ..cache import cache_argument
from ..serving import Prompts, copies_of, ends_of, new_tokens, pad_of, prefill, rows_of
from ..subject import pad_rows
from .paged_cache import PagedCache

CARD = Card(
    paper="ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition",
    year=2024,
    room="cache",
    source=(
        "arXiv:2402.15220, sec. 3: a prefix tree of chunks, whole ones shared and tails private; a decoding step reads shared "
        "chunks for all rows that go through them, then each row's own, merged by log-sum-exp (scores scaled and maxima from minus "
        "infinity, as in the authors' code). One tree for all layers, whose pages are the chunks. Ours: the last token of a prompt "
        "is always read anew, for its logits; a chunk that two texts complete alike is held once; chunks may stay when their "
        "requests have ended (`spare`), and those longest unused go first"
    ),
)


@dataclass(eq=False)
class Batch:
    """Requests in progress. cache: their rows, which hold all but the last token; order: which prompt each row is.

    ids, mask: (rows, n), left padded, for the model's `generate`.
    """

    cache: PagedCache
    texts: list[Text]
    order: list[int]
    ids: Tensor
    mask: Tensor


class PrefixCache:
    """Generates for requests that begin alike. Whole chunks that are in the tree are neither computed nor held again.

    Args:
        model: a model, or a `Subject`; see `PagedCache`. chunk: tokens of a chunk, a power of two from 16 on, or what is shared is
            copied to be read. spare: chunks that stay when the requests that used them have ended, for later ones.

    computed: tokens that were read to fill the cache, since it was made.
    """

    def __init__(self, model: Any, chunk: int = PAGE, spare: int = 0) -> None:
        self.tree = PrefixTree(chunk, spare)
        self._pages = PagedCache(model, chunk)  # holds no rows itself
        self.tree.shelves = [Shelf(store.arena, store.heads) for store in self._pages.stores]
        self.computed = 0
        self._batches: list[Batch] = []

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all requests, forgets all chunks, and leaves the model as it was."""
        for batch in list(self._batches):
            self.release(batch)
        self.tree.evict()
        self._trim()
        self._pages.close()

    def bytes(self) -> int:
        """Bytes allocated for keys and values of chunks and of requests in progress."""
        return self._pages.bytes()

    @property
    def held(self) -> int:
        """Pages held, over all layers and heads."""
        return sum(shelf.arena.held for shelf in self.tree.shelves)

    def open(self, prompts: Prompts, pad: int = 0) -> Batch:
        """Fills the cache for requests: what the tree has is shared, the rest is computed, request by request.

        Rows are ordered so that those that begin alike stand together.
        """
        rows = rows_of(prompts)
        order = sorted(range(len(rows)), key=lambda i: rows[i])
        ids, mask = pad_rows([rows[i] for i in order], pad, self._pages.device)
        batch = Batch(self._pages.sibling(), [], order, ids, mask)
        self._batches.append(batch)
        try:
            for i in order:
                one, text = self._fill(rows[i])
                batch.texts.append(text)
                batch.cache.add(one)
                one.close()
        except BaseException:
            self.release(batch)
            raise
        return batch

    def _fill(self, tokens: list[int]) -> tuple[PagedCache, Text]:
        """A row that holds all tokens but the last, whose logits are still to come."""
        held, size = tokens[:-1], self.tree.chunk
        found = [chunk.slot for chunk in self.tree.match(held)]
        one = self._pages.sibling()
        if found:
            for store, shelf in zip(one.stores, self.tree.shelves, strict=True):
                store.begin_with(shelf.table[found].T, len(found) * size)
        rest = held[len(found) * size :]
        if rest:
            prefill(self._pages.subject, one.inputs([rest]))
            self.computed += len(rest)
        elif not found:  # a prompt of one token
            for store in one.stores:
                store.begin_with(np.zeros((store.heads, 0), dtype=np.int32), 0)
        text, new = self.tree.insert(held)
        self._shelve(one, 0, text, {chunk.slot for chunk in new})
        return one, text

    def _shelve(self, cache: PagedCache, row: int, text: Text, new: set[int]) -> None:
        """Holds the pages of new chunks of a row's text."""
        for store, shelf in zip(cache.stores, self.tree.shelves, strict=True):
            for place, chunk in enumerate(text.chunks):
                if chunk.slot in new:
                    shelf.put(chunk.slot, store.sequences.table[row, :, place])

    def release(self, batch: Batch, made: list[list[int]] | None = None) -> None:
        """Ends requests. made: the tokens that each of them got, if chunks of those may be of use to later requests."""
        if made is not None and self.tree.spare:
            lengths = batch.cache.lengths
            for row, (text, i) in enumerate(zip(batch.texts, batch.order, strict=True)):
                filled = len(text.chunks) * self.tree.chunk + len(text.tail)
                last = int(batch.ids[row, -1])
                new = self.tree.append(text, [last, *made[i]][: lengths[row] - filled])
                self._shelve(batch.cache, row, text, {chunk.slot for chunk in new})
        self._batches = [other for other in self._batches if other is not batch]
        batch.cache.close()
        while batch.texts:
            self.tree.remove(batch.texts.pop())
        self._trim()

    def _trim(self) -> None:
        for shelf in self.tree.shelves:
            shelf.arena.trim()

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, as many times as `num_return_sequences` says, decoded in one batch.

        options: of the model's own `generate`.
        """
        model: Any = self._pages.subject.model
        end = ends_of(model, options)
        pad, copies = pad_of(model, options, end), copies_of(model, options)
        batch, kept = self.open(prompts, pad), None
        try:
            if copies > 1:
                batch.cache.batch_repeat_interleave(copies)
            given = {"pad_token_id": pad, **options, str(cache_argument(model)): batch.cache}
            out = model.generate(batch.ids, attention_mask=batch.mask, **given)
            rows = new_tokens(out if isinstance(out, Tensor) else out.sequences, batch.ids.shape[1], end)
            each = len(rows) // len(batch.order)
            made = [rows[row * each + k] for row in np.argsort(batch.order) for k in range(each)]
            kept = made if copies == 1 else None
        finally:
            self.release(batch, kept)
        return made
