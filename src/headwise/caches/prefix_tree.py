"""The chunks of tokens that texts begin with, in a tree: texts that begin alike go through the same chunks.

Only whole chunks are in the tree; what a text has behind its last whole chunk is its own. The tree knows tokens, how many
texts go through each chunk, and in which order chunks were last used; shelves hold their pages of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from .arena import PAGE, Arena
from .tables import NONE, Pages, after_move


@dataclass(eq=False)
class Chunk:
    """A node: as many tokens as a page holds, behind those of its parent.

    slot: its row on every shelf. count: texts that go through it.
    """

    tokens: tuple[int, ...]
    parent: Chunk | None
    slot: int
    children: dict[tuple[int, ...], Chunk] = field(default_factory=dict)
    count: int = 0


@dataclass(eq=False)
class Text:
    """One text of a tree: its whole chunks, and the tokens behind them."""

    chunks: list[Chunk]
    tail: list[int]


class Shelf:
    """The pages of a tree's chunks in one arena: (slots, heads)."""

    def __init__(self, arena: Arena, heads: int) -> None:
        self.arena = arena
        self.table = np.full((0, heads), NONE, dtype=np.int32)
        arena.users.add(self)

    def __del__(self) -> None:
        self.arena.release(self.table)

    def moved(self, where: Pages) -> None:
        """See `Holder`."""
        self.table = after_move(self.table, where)

    def put(self, slot: int, pages: Pages) -> None:
        """Holds pages (heads,) in a free slot."""
        if slot >= len(self.table):
            more = max(slot + 1 - len(self.table), len(self.table))
            self.table = np.pad(self.table, ((0, more), (0, 0)), constant_values=NONE)
        self.table[slot] = pages
        self.arena.hold(pages)

    def drop(self, slot: int) -> None:
        """Lets go of a slot's pages, if it has any."""
        if slot < len(self.table):
            self.arena.release(self.table[slot])
            self.table[slot] = NONE


class PrefixTree:
    """A tree of chunks.

    Args:
        chunk: tokens of one. spare: chunks that stay although no text goes through them; those longest unused go first.
    """

    def __init__(self, chunk: int = PAGE, spare: int = 0) -> None:
        if chunk < 1 or spare < 0:
            raise InputError(f"chunks of {chunk} tokens and {spare} spare ones: give at least 1 and 0")
        self.chunk, self.spare = chunk, spare
        self.root = Chunk((), None, NONE)
        self.shelves: list[Shelf] = []
        self.texts = 0
        self._idle: dict[Chunk, None] = {}  # chunks of no text, longest unused first, children before their parents
        self._free: list[int] = []
        self._slots = 0

    def __len__(self) -> int:
        return self._slots - len(self._free)

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks, parents before children."""
        todo = list(self.root.children.values())
        while todo:
            chunk = todo.pop()
            yield chunk
            todo += chunk.children.values()

    @property
    def idle(self) -> int:
        """Chunks that no text goes through."""
        return len(self._idle)

    def match(self, tokens: Sequence[int]) -> list[Chunk]:
        """The whole chunks that tokens begin with and that are there."""
        found, node = [], self.root
        for start in range(0, len(tokens) - self.chunk + 1, self.chunk):
            child = node.children.get(tuple(tokens[start : start + self.chunk]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def insert(self, tokens: Sequence[int]) -> tuple[Text, list[Chunk]]:
        """A text of these tokens, and those of its chunks that were not there."""
        text = Text([], [])
        self.texts += 1
        return text, self.append(text, tokens)

    def append(self, text: Text, tokens: Sequence[int]) -> list[Chunk]:
        """Adds tokens to a text; returns the new chunks. A chunk that becomes whole and is there already is shared from then on."""
        new = []
        text.tail += tokens
        while len(text.tail) >= self.chunk:
            own, text.tail = tuple(text.tail[: self.chunk]), text.tail[self.chunk :]
            node = text.chunks[-1] if text.chunks else self.root
            child = node.children.get(own)
            if child is None:
                child = node.children[own] = Chunk(own, node, self._slot())
                new.append(child)
            child.count += 1
            self._idle.pop(child, None)
            text.chunks.append(child)
        return new

    def fork(self, text: Text) -> Text:
        """The same text once more."""
        for chunk in text.chunks:
            chunk.count += 1
        self.texts += 1
        return Text(list(text.chunks), list(text.tail))

    def remove(self, text: Text) -> None:
        """Takes a text out. Chunks that no other goes through are spare, and go when there are too many of those."""
        for chunk in reversed(text.chunks):
            chunk.count -= 1
            if not chunk.count:
                self._idle[chunk] = None
        self.texts -= 1
        text.chunks, text.tail = [], []
        self.evict(self.spare)

    def evict(self, spare: int = 0) -> None:
        """Lets go of chunks that no text goes through, until only so many of them are left."""
        while len(self._idle) > spare:
            chunk = next(iter(self._idle))
            del self._idle[chunk]
            assert chunk.parent is not None
            del chunk.parent.children[chunk.tokens]
            for shelf in self.shelves:
                shelf.drop(chunk.slot)
            self._free.append(chunk.slot)

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1
