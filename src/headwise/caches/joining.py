"""Sequences put together: rows behind rows, tokens behind tokens, and tokens in the middle forgotten. Pages are shared where
tokens keep their place within a page, and copied where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ShapeError
from .arena import Sequences


def stack(target: Sequences, other: Sequences) -> None:
    """Adds the rows of other sequences of the same arena behind the target's, in the same pages."""
    _check(target, other)
    copied = other.fork()
    for one, width in ((target, copied.table.shape[2]), (copied, target.table.shape[2])):
        one.widen(width)
    target.arena.hold(copied.table)
    target.table = np.concatenate([target.table, copied.table])
    target.lengths = np.concatenate([target.lengths, copied.lengths])
    target.changed()


def join(target: Sequences, other: Sequences, rows: Sequence[int] | None = None, start: Any = 0, stop: Any = None) -> None:
    """Adds what the same heads of other sequences of the same arena hold, at the target's ends.

    Args:
        rows: the other's row for each of the target's; by default the same. start, stop: which of its tokens (stop excluded;
            None: all), integers or (b, heads).

    Raises: ShapeError if the sequences do not fit together.
    """
    _check(target, other)
    source = other.fork(rows)  # so that what is read stays, even if it is the target's
    if source.rows != target.rows:
        raise ShapeError(f"{source.rows} rows cannot be joined to {target.rows}; name the row for each")
    end = np.minimum(source.lengths if stop is None else stop, source.lengths)
    _add(target, source, np.minimum(start, end), end)
    source.clear()


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """New sequences that hold what each of these holds, one part behind the other."""
    made = parts[0].fork()
    for part in parts[1:]:
        join(made, part)
    return made


def drop_range(target: Sequences, heads: Sequence[int], start: Any, stop: Any) -> None:
    """Forgets tokens start..stop-1 of each sequence of these heads, integers or (b, len(heads)); later tokens move up."""
    own = list(heads)
    first, last = target.lengths.copy(), target.lengths.copy()
    first[:, own] = np.minimum(start, target.lengths[:, own])
    last[:, own] = np.maximum(np.minimum(stop, target.lengths[:, own]), first[:, own])
    if (first == last).all():
        return
    rest = target.fork()
    target.lengths = first
    _add(target, rest, last, rest.lengths)
    target.let_go()
    rest.clear()


def _check(target: Sequences, other: Sequences) -> None:
    if other.arena is not target.arena:
        raise ShapeError("sequences of two arenas share no pages; fork one from the other, or make both in one arena")
    if other.heads != target.heads:
        raise ShapeError(f"sequences of {other.heads} heads cannot be put to those of {target.heads}")


def _add(target: Sequences, source: Sequences, start: np.ndarray, stop: np.ndarray) -> None:
    """Adds the source's tokens start..stop-1 (b, heads) at the ends."""
    page, own, count = target.arena.page, target.lengths, stop - start
    alike = (own - start) % page == 0  # then only what fills the last page has to be copied
    _copy(target, source, start, np.where(alike, np.minimum(-own % page, count), count))
    start = start + target.lengths - own
    more = stop > start
    if not more.any():
        return
    target.let_go()
    first, last, at = start // page, -(-stop // page), target.lengths // page
    target.widen(int(np.where(more, at + last - first, 0).max()))
    for row, head in np.argwhere(more):
        pages = source.table[row, head, first[row, head] : last[row, head]]
        target.table[row, head, at[row, head] : at[row, head] + len(pages)] = pages
        target.arena.hold(pages)
    target.lengths = target.lengths + stop - start
    target.changed()


def _copy(target: Sequences, source: Sequences, start: np.ndarray, count: np.ndarray) -> None:
    """Adds copies of the source's `count` (b, heads) tokens from `start` on."""
    steps, every = np.arange(int(count.max(initial=0))), range(target.heads)
    there = steps < count[..., None]
    if not there.any():
        return
    slots = np.where(there, start[..., None] + steps, 0)
    parts = {name: source.gather(name, every, slots) for name in target.arena.pools}
    target.reserve_anywhere(target.pages_of(target.lengths + count))
    target.write(every, target.lengths[..., None] + steps, parts, there)
    target.lengths = target.lengths + count
