"""Masks as an algebra: what a query may read, said once, and asked for in every form that a backend wants.

A mask is a predicate on places. From that one definition come `dense` (a table), `tiles` (which tiles of the score matrix
hold nothing, something or everything: block masks), `keys` (the list that one query reads: decoding) and, for masks of
simple form, `pattern` (what kernels know).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from .stage import Block, Places, Stage

FAR = 1 << 60
Interval = tuple[int, int]


@dataclass(frozen=True)
class Ranges:
    """Tiles of the score matrix: queries at positions i_low..i_high against keys at j_low..j_high, ends included.

    i_low, i_high: (rows, 1). j_low, j_high: (1, columns). heads: how many there are.
    """

    i_low: Tensor
    i_high: Tensor
    j_low: Tensor
    j_high: Tensor
    heads: int = 1


@dataclass(frozen=True)
class Tiles:
    """What a mask shows of each tile: `some` may be shown, `all` is. (b or 1, h or 1, rows, columns) booleans.

    Both are safe, not tight: a tile that is not `some` holds no visible pair, one that is `all` no hidden pair.
    """

    size: int
    some: Tensor
    all: Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask in the form that kernels know: places, and documents.

    A query reads a key if it is not later (causal), and less than `window` places away or one of the first `sink` (no
    window: everywhere), and of the same document: ids (positions,) or (b, positions).
    """

    causal: bool = False
    window: int | None = None
    sink: int = 0
    documents: Tensor | None = None

    def both(self, other: Pattern) -> Pattern | None:
        """What both show; None where that has no such form."""
        if self.documents is not None and other.documents is not None:
            return None
        narrow, wide = sorted((self, other), key=lambda p: FAR if p.window is None else p.window)
        if wide.window is not None and narrow.window != wide.window and narrow.sink != wide.sink:
            return None
        window = narrow.window
        sink = narrow.sink if wide.window is None or narrow.sink == wide.sink else min(narrow.sink, wide.sink)
        documents = self.documents if other.documents is None else other.documents
        return Pattern(self.causal or other.causal, window, sink, documents)

    def either(self, other: Pattern) -> Pattern | None:
        """What one of them shows; None where that has no such form."""
        if self.causal or other.causal or self.documents is not None or other.documents is not None:
            return None
        if self.window is None or other.window is None:
            return Pattern()
        return Pattern(window=max(self.window, other.window), sink=max(self.sink, other.sink))


def documents_at(ids: Tensor, places: Tensor) -> Tensor:
    """(b or 1, c): the documents at some positions (b or 1, c); those of empty slots mean nothing."""
    ids = torch.atleast_2d(ids).to(places.device)
    rows = max(len(ids), len(places))
    return ids.expand(rows, -1).gather(1, places.clamp(min=0).expand(rows, -1))


class Mask(Stage):
    """Says which keys a query may read. Masks combine with & (both), | (either) and ~ (not)."""

    @abstractmethod
    def visible(self, places: Places) -> Tensor:
        """Booleans at some places; broadcast to (b, h, c, m)."""

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        """Whether some, and whether all of each tile is visible; broadcast to (b, h, rows, columns). See `Tiles`."""
        anywhere = torch.ones(1, 1, dtype=torch.bool, device=ranges.i_low.device)
        return anywhere, ~anywhere

    def reach(self, low: int, high: int) -> list[Interval]:
        """Key positions that queries at positions low..high-1 could read: sorted, disjoint [start, stop); may hold more."""
        return [(0, FAR)]

    def pattern(self) -> Pattern | None:
        """The same mask in the form that kernels know; None if it has none."""
        return None

    def dense(self, n: int, m: int, heads: int = 1, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """(b or 1, h or 1, n, m) booleans, for queries that are the last n of m positions."""
        i, j = torch.arange(m - n, m, device=device), torch.arange(m, device=device)
        shown = self.visible(Block.of_places(i - (m - n), j, i[None], j[None], batch, heads).places)
        return shown.expand(*shown.shape[:-2], n, m).view((1,) * (4 - shown.dim()) + (*shown.shape[:-2], n, m))

    def tiles(self, n: int, m: int, size: int = 128, heads: int = 1, device: torch.device | str = "cpu") -> Tiles:
        """Which tiles of `size` x `size` pairs hold what, without asking about pairs: O((n / size) (m / size)) work."""
        i, j = torch.arange(0, n, size, device=device)[:, None], torch.arange(0, m, size, device=device)[None]
        offset = m - n
        ends = ((i + size).clamp(max=n) - 1 + offset, (j + size).clamp(max=m) - 1)
        some, every = self.bounds(Ranges(i + offset, ends[0], j, ends[1], heads))
        shape = torch.broadcast_shapes(some.shape, every.shape, (1, 1, i.shape[0], j.shape[1]))
        return Tiles(size, some.expand(shape), every.expand(shape))

    def keys(self, position: int, total: int, heads: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """The keys among 0..total-1 that a query at `position` reads, in order; with heads that differ, what any of them reads."""
        inside = [(max(0, a), min(total, b)) for a, b in self.reach(position, position + 1)]
        parts = [torch.arange(a, b, device=device) for a, b in inside if a < b]
        if not parts:
            return torch.arange(0, device=device)
        j = torch.cat(parts)
        at = torch.tensor([position], device=device)
        shown = self.visible(Block.of_places(at, j, at[None], j[None], heads=heads).places)
        shown = shown.expand(*shown.shape[:-1], len(j))  # the same for all keys, if the mask does not ask which
        return j[shown.reshape(-1, len(j)).any(0)]

    def __and__(self, other: Mask) -> Mask:
        return And((self, other))

    def __or__(self, other: Mask) -> Mask:
        return Or((self, other))

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True)
class _Joined(Mask):
    parts: tuple[Mask, ...]

    def given(self) -> torch.dtype | None:
        return next((dtype for part in self.parts if (dtype := part.given()) is not None), None)

    def select(self, heads: Sequence[int]) -> Self:
        return type(self)(tuple(part.select(heads) for part in self.parts))

    def check_heads(self, heads: int) -> None:
        for part in self.parts:
            part.check_heads(heads)


@dataclass(frozen=True)
class And(_Joined):
    """Visible where all parts are."""

    def visible(self, places: Places) -> Tensor:
        return reduce(torch.logical_and, (part.visible(places) for part in self.parts))

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        some, every = zip(*(part.bounds(ranges) for part in self.parts), strict=True)
        return reduce(torch.logical_and, some), reduce(torch.logical_and, every)

    def reach(self, low: int, high: int) -> list[Interval]:
        return reduce(_intersect, (part.reach(low, high) for part in self.parts))

    def pattern(self) -> Pattern | None:
        return _patterns(self.parts, Pattern.both)

    def __str__(self) -> str:
        return " & ".join(_inside(part) for part in self.parts)


@dataclass(frozen=True)
class Or(_Joined):
    """Visible where any part is."""

    def visible(self, places: Places) -> Tensor:
        return reduce(torch.logical_or, (part.visible(places) for part in self.parts))

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        some, every = zip(*(part.bounds(ranges) for part in self.parts), strict=True)
        return reduce(torch.logical_or, some), reduce(torch.logical_or, every)

    def reach(self, low: int, high: int) -> list[Interval]:
        return merge([interval for part in self.parts for interval in part.reach(low, high)])

    def pattern(self) -> Pattern | None:
        return _patterns(self.parts, Pattern.either)

    def __str__(self) -> str:
        return " | ".join(_inside(part) for part in self.parts)


@dataclass(frozen=True)
class Not(Mask):
    """Visible where its part is not. Empty key slots stay invisible: they are no keys at all."""

    part: Mask

    def visible(self, places: Places) -> Tensor:
        return ~self.part.visible(places)

    def bounds(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        some, every = self.part.bounds(ranges)
        return ~every, ~some

    def select(self, heads: Sequence[int]) -> Not:
        return Not(self.part.select(heads))

    def check_heads(self, heads: int) -> None:
        self.part.check_heads(heads)

    def __str__(self) -> str:
        return f"~{_inside(self.part)}"


def _patterns(parts: Sequence[Mask], join: Callable[[Pattern, Pattern], Pattern | None]) -> Pattern | None:
    joined = parts[0].pattern()
    for part in parts[1:]:
        other = part.pattern()
        joined = None if joined is None or other is None else join(joined, other)
    return joined


def _inside(mask: Mask) -> str:
    return f"({mask})" if isinstance(mask, And | Or) else str(mask)


def _intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    return [(max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) < min(b, d)]


def merge(intervals: list[Interval]) -> list[Interval]:
    """Sorted, disjoint intervals that cover the same."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        elif start < stop:
            merged.append((start, stop))
    return merged
