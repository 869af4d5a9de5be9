"""A group of heads that keeps tokens in several ways, by their age: what grows old moves on, whole pages at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .arena import Sequences
from .groups import Group, View
from .rule import PLAIN, Codec, Seen


class Stairs(Group):
    """Segments from the newest to the oldest: new tokens come into the first, which is plain; each older one has a codec.

    A segment hands its oldest pages on once all of their tokens are `ages` old, so it may hold most of a page more.
    """

    def __init__(
        self, heads: tuple[int, ...], segments: Sequence[Sequences], places: Sequence[int], codecs: Sequence[Codec],
        ages: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__(heads, segments[0], places, PLAIN)
        self._segments = list(zip(segments, (PLAIN, *codecs), strict=True))
        self._ages = tuple(ages)
        self._like = torch.empty(0)  # keys of no token, for their type and place

    @property
    def segments(self) -> list[tuple[Sequences, Codec]]:
        return self._segments

    def extend(self, k: Tensor, v: Tensor, seen: int, read: bool = True) -> View:
        before = self._held()
        self._like = k[:, :, :0]
        self._append(self._parts(k, v, seen), seen)
        added = self._held() - before
        self.undo = lambda: self._take_back(added)
        if seen == 0 and k.shape[2] > 1:
            return View(self.heads, None, k, v, torch.arange(k.shape[2], device=k.device)[None], ordered=True, exact=False)
        pieces = [
            self._read(k, sequences, codec) for sequences, codec in reversed(self._segments) if sequences.longest(self.places)
        ]
        held_k, held_v, number = (torch.cat(parts, 2) for parts in zip(*pieces, strict=True))
        ordered = not self.pads.any()
        return View(self.heads, None, held_k, held_v, number[0, :1] if ordered else number[:, 0], ordered=ordered, exact=False)

    def settle(self, read: Callable[[], Seen]) -> None:
        """Moves what has grown old: straight to where it belongs, the oldest first."""
        for target in range(len(self._ages), 0, -1):
            for source in range(target - 1, -1, -1):
                surplus = np.maximum(self._held(target) - self._ages[target - 1], 0)
                lengths = self._lengths(source)
                pages = np.minimum(surplus, lengths) // self.sequences.arena.page
                self._move(source, target, pages)
                if self._lengths(source).any():
                    break  # what is newer stays behind it

    def _move(self, source: int, target: int, pages: np.ndarray) -> None:
        """The first pages (b,) of a segment."""
        if not pages.any():
            return
        (old, old_codec), (new, new_codec) = self._segments[source], self._segments[target]
        each = np.broadcast_to(pages[:, None], (len(pages), len(self.places)))
        tokens = int(pages.max()) * old.arena.page
        parts = old.taken(self.places, np.broadcast_to(np.arange(tokens), (*each.shape, tokens)))
        parts = {name: part.to(self._like.device) for name, part in parts.items()}
        number = parts.pop("number")
        encoded = {**new_codec.encode(*old_codec.decode(parts, self._like.dtype)), "number": number}
        new.append(self.places, encoded, self.layout, each * old.arena.page)
        old.shift(self.places, each)
        old.trim(self.layout)

    def _lengths(self, segment: int) -> np.ndarray:
        """(b,) tokens of a segment; all heads hold the same."""
        lengths: np.ndarray = self._segments[segment][0].lengths[:, self.places[0]]
        return lengths

    def _held(self, newest: int | None = None) -> np.ndarray:
        """(b,) tokens of the newest segments, or of all."""
        return sum((self._lengths(i) for i in range(len(self._segments) if newest is None else newest)), np.zeros(1, np.int64))

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`; what was encoded meanwhile stays so."""
        self._take_back(np.minimum(self._held(), tokens))

    def _take_back(self, tokens: np.ndarray) -> None:
        for sequences, _ in self._segments:
            own = sequences.lengths[:, self.places[0]]
            gone = np.minimum(own, tokens)
            sequences.lengths[:, list(self.places)] -= gone[:, None]
            tokens = tokens - gone
