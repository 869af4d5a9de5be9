"""Pages of keys and values, and the sequences of tokens that are held in them.

An arena belongs to one layer. It has a pool for each part of a token (its key, its value, its number, ...), cut into pages
of PAGE tokens; a sequence, the tokens of one batch row and one head, is a list of pages. Sequences may share pages (beams,
forks, common prefixes); who writes into a shared page gets a copy of it first. A page that nobody holds is used again, and
the memory of many such pages is given back.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DeviceError, ShapeError
from .tables import NONE, Pages, after_move, even, index_of

PAGE = 64  # tokens of a page
SPARE = 16  # a pool that must grow while decoding grows by a SPARE-th, so that copying it costs little
LOOSE = 8  # memory is given back when a LOOSE-th of the pages holds nothing

Parts = dict[str, Tensor]


class Arena:
    """Pages of some tensors, and how many sequences hold each.

    Args:
        page: tokens of a page.
        packed: sequences lie one after another as long as they share nothing, so that they are read without a copy; a
            sequence that grows then gets a few pages ahead. Otherwise pages are taken one by one, when they are needed.
    """

    def __init__(self, page: int | None = None, *, packed: bool = True) -> None:
        self.page, self.packed = PAGE if page is None else page, packed
        self.pools: Parts = {}  # name -> (pages, page, ...)
        self.refs = np.zeros(0, dtype=np.int32)
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # of Holder

    def __deepcopy__(self, memo: dict[int, Any]) -> Arena:
        made = memo[id(self)] = Arena(self.page, packed=self.packed)
        made.pools = {name: pool.clone() for name, pool in self.pools.items()}
        made.refs = np.zeros_like(self.refs)  # sequences that are copied too hold theirs
        return made

    def prepare(self, parts: Mapping[str, Tensor]) -> None:
        """Makes pools for tensors of the given names, types and last sizes, if there are none yet.

        A pool of narrower numbers than what comes is made wider, as joining the tensors would.

        Raises: ShapeError or DeviceError for parts that are unlike those that are held.
        """
        for name, part in parts.items():
            pool = self.pools.get(name)
            if pool is None or (self._unlike(pool, part) and not self.held):
                self.pools[name] = self._made(part, len(self.refs), part.shape[3:])
                continue
            if pool.shape[2:] != part.shape[3:]:
                raise ShapeError(
                    f"{name} of a token is {tuple(part.shape[3:])}, what is held is {tuple(pool.shape[2:])}; fill a new cache"
                )
            if pool.device != part.device:
                raise DeviceError(f"{name} came on {part.device}, what is held is on {pool.device}; fill a new cache there")
            if part.is_floating_point() and pool.dtype != part.dtype:
                wide = torch.promote_types(pool.dtype, part.dtype)
                if wide != pool.dtype:
                    with torch.inference_mode(False):
                        self.pools[name] = pool.to(wide)

    def _unlike(self, pool: Tensor, part: Tensor) -> bool:
        return (pool.shape[2:], pool.dtype, pool.device) != (part.shape[3:], part.dtype, part.device)

    def _made(self, like: Tensor, pages: int, sizes: Sequence[int]) -> Tensor:
        with torch.inference_mode(False):  # a pool is written in later calls, in whatever mode those are
            return torch.zeros(pages, self.page, *sizes, dtype=like.dtype, device=like.device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(pool.untyped_storage().nbytes() for pool in self.pools.values())

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return int((self.refs > 0).sum())

    def take(self, count: int) -> Pages:
        """(count,) pages that nobody held, now held once; the lowest ones first."""
        free = np.flatnonzero(self.refs == 0)[:count]
        if len(free) < count:
            have = len(self.refs)
            self._resize(have + max(count - len(free), have // SPARE))
            free = np.flatnonzero(self.refs == 0)[:count]
        self.refs[free] = 1
        return free.astype(np.int32)

    def hold(self, pages: Pages) -> None:
        """Holds pages (any shape; NONE is no page) once more."""
        np.add.at(self.refs, pages[pages >= 0], 1)

    def release(self, pages: Pages) -> None:
        """Holds pages once less."""
        np.subtract.at(self.refs, pages[pages >= 0], 1)

    def copy(self, source: Pages, target: Pages) -> None:
        """Copies what is in pages."""
        for pool in self.pools.values():
            pool[index_of(target, pool)] = pool[index_of(source, pool)]

    def _resize(self, pages: int) -> None:
        """More pages, the new ones unheld."""
        users = list(self.users)  # held, so that none lets go of pages meanwhile
        made = {}
        for name, pool in self.pools.items():
            made[name] = self._made(pool, pages, pool.shape[2:])
            made[name][: len(pool)] = pool
        self.pools = made  # only now: what had no room leaves everything as it was
        self.refs = np.concatenate([self.refs, np.zeros(pages - len(self.refs), dtype=np.int32)])
        del users

    def empty(self) -> None:
        """Gives all memory back, if nobody holds a page."""
        if len(self.refs) and not self.held:
            self.pools = {name: self._made(pool, 0, pool.shape[2:]) for name, pool in self.pools.items()}
            self.refs = np.zeros(0, dtype=np.int32)

    @property
    def movable(self) -> bool:
        """Whether all who hold pages can be told that they move."""
        return sum(int((user.table >= 0).sum()) for user in self.users) == int(self.refs.sum())

    @property
    def loose(self) -> bool:
        """Whether so many pages are free that their memory should be given back, and can be."""
        free = len(self.refs) - self.held
        return free > 0 and free * LOOSE >= len(self.refs) and self.movable

    def trim(self) -> None:
        """Gives the memory of free pages back, if they are a LOOSE-th of all or more."""
        if self.loose:
            self.arrange(np.zeros(0, dtype=np.int32))

    def arrange(self, order: Pages) -> Pages:
        """Makes the pools anew: pages in the order given, NONE for an empty one held once, and behind them all others that are
        held. A page named again is where it was named first; pages that nobody holds are lost. Tells all users; returns where
        each of `order` now is.
        """
        users = list(self.users)  # held, so that none lets go of pages meanwhile
        named = order >= 0
        unique, first = np.unique(order[named], return_index=True)
        kept = ~named
        kept[np.flatnonzero(named)[first]] = True
        others = np.setdiff1d(np.flatnonzero(self.refs > 0), unique)
        source = np.concatenate([order[kept], others]).astype(np.int64)
        old = source >= 0
        made = {}
        for name, pool in self.pools.items():
            with torch.inference_mode(False):
                made[name] = (
                    pool[index_of(np.maximum(source, 0), pool)] if old.any() else self._made(pool, len(old), pool.shape[2:])
                )
                if not old.all():
                    made[name][index_of(np.flatnonzero(~old), pool)] = torch.zeros((), dtype=pool.dtype, device=pool.device)
        where = np.full(len(self.refs), NONE, dtype=np.int32)
        where[source[old]] = np.flatnonzero(old)
        refs = np.ones(len(source), dtype=np.int32)
        refs[old] = self.refs[source[old]]
        found = np.empty(len(order), dtype=np.int32)
        found[named] = where[order[named]]
        found[~named] = (np.cumsum(kept) - 1)[~named]
        self.pools, self.refs = made, refs
        for user in users:
            user.moved(where)
        return found


class Sequences:
    """The tokens of `heads` heads of some batch rows, in an arena. Slot i of a sequence is the i-th token that it holds.

    table: (b, heads, pages) of page numbers. lengths: (b, heads) tokens held. Both are known on the host, so that nothing
    waits for the device. version: another number whenever the table has changed.
    """

    def __init__(self, arena: Arena, heads: int) -> None:
        self.arena, self.heads = arena, heads
        self.table = np.full((0, heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((0, heads), dtype=np.int64)
        self.version = 0
        self._on_device: Tensor | None = None  # the table there
        arena.users.add(self)

    def __del__(self) -> None:
        self.arena.release(self.table)  # pages go with who holds them

    def __copy__(self) -> Sequences:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequences:
        made = memo[id(self)] = Sequences(copy.deepcopy(self.arena, memo), self.heads)
        made.table, made.lengths = self.table.copy(), self.lengths.copy()
        made.arena.hold(made.table)
        return made

    @property
    def rows(self) -> int:
        """Batch rows."""
        return len(self.table)

    @property
    def pages(self) -> int:
        """Pages that these sequences hold, one that several share counted for each."""
        return int((self.table >= 0).sum())

    def begin(self, rows: int) -> None:
        """Empty sequences for so many rows."""
        self.clear()
        self.table = np.full((rows, self.heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((rows, self.heads), dtype=np.int64)

    def clear(self) -> None:
        """Forgets all tokens and rows; the memory is given back if no others hold pages of the arena."""
        self.arena.release(self.table)
        self.table = np.full((0, self.heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((0, self.heads), dtype=np.int64)
        self.changed()
        self.arena.empty()

    def moved(self, where: Pages) -> None:
        """See `Holder`."""
        self.table = after_move(self.table, where)
        self.changed()

    def changed(self) -> None:
        """The table is another one."""
        self._on_device = None
        self.version += 1

    # ---- pages ------------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether every page that is held is in one sequence of these, so that they may lie one after another."""
        return not self.shared and self.arena.held == self.pages

    def pages_of(self, lengths: np.ndarray) -> np.ndarray:
        """How many pages so many tokens take."""
        return -(-lengths // self.arena.page)

    def _spare(self) -> np.ndarray:
        """(b, heads, pages): which places of the table are behind the last token."""
        return np.arange(self.table.shape[2]) >= self.pages_of(self.lengths)[..., None]

    def reserve(self, lengths: np.ndarray, groups: Sequence[Sequence[int]]) -> None:
        """Pages for so many tokens (b, heads). Heads of a group lie one after another if no page is shared."""
        need = self.pages_of(lengths)
        have = (self.table >= 0).sum(-1)
        if (need <= have).all():
            return
        if self.arena.packed and self._alone:
            spare = np.where(self.lengths > 0, np.maximum(-(-need // SPARE) - 1, 0), 0)
            self._arrange(np.where(need > have, need + spare, have), groups)
        else:
            self.reserve_anywhere(need)

    def reserve_anywhere(self, need: np.ndarray) -> None:
        """Pages (b, heads) wherever they are."""
        self.widen(int(need.max(initial=0)))
        missing = (np.arange(self.table.shape[2]) < need[..., None]) & (self.table == NONE)
        if missing.any():
            self.table[missing] = self.arena.take(int(missing.sum()))
            self.changed()

    def widen(self, pages: int) -> None:
        """A table of so many pages at least."""
        more = pages - self.table.shape[2]
        if more > 0:
            self.table = np.pad(self.table, ((0, 0), (0, 0), (0, more)), constant_values=NONE)
            self.changed()

    def _arrange(self, wide: np.ndarray, groups: Sequence[Sequence[int]]) -> None:
        """Pools with just so many pages (b, heads) for each sequence, group by group, and those of others."""
        self.widen(int(wide.max(initial=0)))
        exists = np.arange(self.table.shape[2]) < wide[..., None]
        order = np.argsort([head for group in groups for head in group])
        flat = [self.table[:, list(group)][exists[:, list(group)]] for group in groups]
        found = np.split(self.arena.arrange(np.concatenate(flat)), np.cumsum([len(part) for part in flat])[:-1])
        tables = []
        for group, pages in zip(groups, found, strict=True):
            part = np.full((self.rows, len(group), self.table.shape[2]), NONE, dtype=np.int32)
            part[exists[:, list(group)]] = pages
            tables.append(part)
        self.table = np.concatenate(tables, 1)[:, order]
        self.changed()

    def let_go(self) -> None:
        """Gives pages behind the last tokens back."""
        spare = self._spare()
        if spare.any():
            self.arena.release(self.table[spare])
            self.table[spare] = NONE
            self.table = self.table[:, :, : int(self.pages_of(self.lengths).max(initial=0))]
            self.changed()

    def trim(self, groups: Sequence[Sequence[int]] | None = None) -> None:
        """Gives pages back that hold nothing, and their memory if they are a LOOSE-th of all or more.

        groups: heads that are to lie one after another; by default all.
        """
        self.let_go()
        if self.arena.loose:
            self._arrange(self.pages_of(self.lengths), groups or [range(self.heads)])

    # ---- reading and writing ----------------------------------------------------------------------------------------

    def _flat(self, heads: Sequence[int], slots: np.ndarray) -> np.ndarray:
        """Where slots (b, len(heads), c) are in a pool seen as tokens; anything below 0 where there is no page."""
        page = self.arena.page
        pages = np.take_along_axis(self.table[:, list(heads)], slots // page, -1)
        return pages.astype(np.int64) * page + slots % page

    def _own(self, heads: Sequence[int], slots: np.ndarray, there: np.ndarray) -> None:
        """Copies pages that are to be written and that others hold too; the last who holds a page keeps it."""
        pages = slots // self.arena.page
        held = np.take_along_axis(self.table[:, list(heads)], pages, -1)
        shared = there & (self.arena.refs[np.maximum(held, 0)] > 1)
        if not shared.any():
            return
        row, head, page = np.unique(np.stack([*np.nonzero(shared)[:2], pages[shared]]), axis=1)
        head = np.asarray(heads)[head]
        old = self.table[row, head, page]
        order = np.argsort(old, kind="stable")
        _, first, count = np.unique(old[order], return_index=True, return_counts=True)
        rank = np.empty(len(old), dtype=np.int64)  # of several that write the same page
        rank[order] = np.arange(len(old)) - np.repeat(first, count)
        copied = rank < self.arena.refs[old] - 1
        new = self.arena.take(int(copied.sum()))
        self.arena.copy(old[copied], new)
        self.arena.release(old[copied])
        self.table[row[copied], head[copied], page[copied]] = new
        self.changed()

    def write(self, heads: Sequence[int], slots: np.ndarray, parts: Mapping[str, Tensor], there: np.ndarray | None = None) -> None:
        """Writes tokens (b, len(heads), c, ...) into slots (b, len(heads), c), for which pages are reserved.

        there: (b, len(heads), c), which of them; None for all.
        """
        self.arena.prepare(parts)
        if there is None:
            there = np.ones(slots.shape, dtype=bool)
        if not there.any():
            return
        slots = np.where(there, slots, 0)
        if self.shared:
            self._own(heads, slots, there)
        flat = self._flat(heads, slots)
        chosen = None if there.all() else index_of(np.flatnonzero(there), next(iter(self.arena.pools.values())))
        for name, part in parts.items():
            pool = self.arena.pools[name]
            tokens = part.expand(*slots.shape, *part.shape[3:]).reshape(slots.size, *part.shape[3:])
            at = index_of(flat.reshape(-1), pool)
            if chosen is not None:
                tokens, at = tokens[chosen], at[chosen]
            pool.view(-1, *pool.shape[2:])[at] = tokens.to(pool.dtype)

    def append(
        self, heads: Sequence[int], parts: Mapping[str, Tensor], groups: Sequence[Sequence[int]], counts: np.ndarray | None = None
    ) -> None:
        """Adds tokens (b, len(heads), c, ...) at the ends; counts: (b, len(heads)), how many of each sequence's first ones."""
        c = next(iter(parts.values())).shape[2]
        own = self.lengths[:, list(heads)]
        counts = np.full_like(own, c) if counts is None else counts
        lengths = self.lengths.copy()
        lengths[:, list(heads)] = own + counts
        self.arena.prepare(parts)
        self.reserve(lengths, groups)
        steps = np.arange(c)
        there = steps < counts[..., None]
        self.write(heads, own[..., None] + steps, parts, there)
        self.lengths = lengths

    def keep(self, heads: Sequence[int], slots: Tensor, counts: np.ndarray, groups: Sequence[Sequence[int]]) -> None:
        """Keeps, of each sequence, the tokens in the first `counts` (b, len(heads)) of slots (b, len(heads), m), in that order."""
        most = int(counts.max(initial=0))
        steps = np.arange(most)
        wanted = np.where(steps < counts[..., None], slots[..., :most].cpu().numpy(), steps)
        other = wanted != steps  # what stays where it is is not written, so that a page shared with others stays so
        if other.any():
            kept = {name: self.gather(name, heads, np.where(other, wanted, 0)) for name in self.arena.pools}
            self.write(heads, np.broadcast_to(steps, other.shape), kept, other)
        self.lengths[:, list(heads)] = counts
        self.trim(groups)

    def drop(self, heads: Sequence[int], slots: np.ndarray) -> None:
        """Forgets one token of each sequence that has any, in slots (b, len(heads)); the last token takes its slot."""
        own = self.lengths[:, list(heads)]
        last = np.maximum(own - 1, 0)
        there = (own > 0) & (slots != last)
        if there.any():
            moved = {name: self.gather(name, heads, np.where(there, last, 0)[..., None]) for name in self.arena.pools}
            self.write(heads, slots[..., None], moved, there[..., None])
        self.lengths[:, list(heads)] = last

    def shift(self, heads: Sequence[int], pages: np.ndarray) -> None:
        """Forgets the first pages (b, len(heads)) of each sequence, which are full."""
        own, wide = list(heads), self.table.shape[2]
        table, places = self.table[:, own], np.arange(wide) + pages[..., None]
        self.arena.release(np.where(np.arange(wide) < pages[..., None], table, NONE))
        self.table[:, own] = np.where(places < wide, np.take_along_axis(table, np.minimum(places, wide - 1), -1), NONE)
        self.lengths[:, own] -= pages * self.arena.page
        self._on_device = None

    def crop(self, heads: Sequence[int], tokens: int) -> None:
        """Forgets the last tokens of each sequence."""
        own = list(heads)
        self.lengths[:, own] = np.maximum(self.lengths[:, own] - tokens, 0)

    def gather(self, name: str, heads: Sequence[int], slots: np.ndarray) -> Tensor:
        """(b, len(heads), c, ...): a copy of one part of the tokens in slots (b, len(heads), c)."""
        pool = self.arena.pools[name]
        tokens = pool.view(-1, *pool.shape[2:])
        flat = np.maximum(self._flat(heads, slots), 0)
        return tokens[index_of(flat.reshape(-1), pool)].view(*slots.shape, *pool.shape[2:])

    def taken(self, heads: Sequence[int], slots: np.ndarray) -> Parts:
        """What is in slots (b, len(heads), c), of all parts; of slots that are not there, anything."""
        pages = self.table.shape[2] * self.arena.page
        return {name: self.gather(name, heads, np.minimum(slots, pages - 1)) for name in self.arena.pools}

    def longest(self, heads: Sequence[int]) -> int:
        """Tokens of the longest of these sequences."""
        return int(self.lengths[:, list(heads)].max(initial=0))

    def read(self, name: str, heads: Sequence[int]) -> Tensor:
        """(b, len(heads), longest, ...) of one part: the pool itself where pages of rows and heads follow each other evenly, or
        are the same; else a copy. What is behind a sequence's end means nothing. Not to be written."""
        pool, length = self.arena.pools[name], self.longest(heads)
        pages = -(-length // self.arena.page)
        table = self.table[:, list(heads), :pages]
        shape = (*table.shape[:2], length, *pool.shape[2:])
        if not length:
            return pool.new_zeros(shape)
        places = even(table)
        if places is not None:
            start, row, head = (distance * pool.stride(0) for distance in places)
            return pool.as_strided(shape, (row, head, *pool.stride()[1:]), pool.storage_offset() + start)
        found = pool[index_of(np.maximum(table, 0).reshape(-1), pool)]
        return found.view(*table.shape[:2], pages * self.arena.page, *pool.shape[2:])[:, :, :length]

    def there(self, heads: Sequence[int], device: torch.device) -> Tensor | None:
        """(b, len(heads), longest): which slots hold something; None if all do."""
        own = self.lengths[:, list(heads)]
        longest = self.longest(heads)
        if (own == longest).all():
            return None
        return torch.arange(longest, device=device) < torch.from_numpy(own).to(device)[..., None]

    def on_device(self) -> tuple[Tensor, Tensor]:
        """The table (b * heads, pages) and lengths (b * heads,) as int32 tensors beside the pools."""
        device = next(iter(self.arena.pools.values())).device
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.table.reshape(-1, self.table.shape[2]).copy()).to(device)
        return self._on_device, torch.from_numpy(self.lengths.reshape(-1).astype(np.int32)).to(device)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> None:
        """These rows, in this order, any of them more than once: they share pages until they write."""
        table, lengths = self._of(list(rows))
        self.arena.hold(table)
        self.arena.release(self.table)
        self.table, self.lengths = table, lengths
        self.changed()

    def _of(self, rows: list[int], again: bool = False) -> tuple[Pages, np.ndarray]:
        """Table and lengths of some rows. Pages behind the last token are only in a row's first one, or if `again` in none."""
        table = self.table[rows]
        repeated = np.array([again or row in rows[:i] for i, row in enumerate(rows)], dtype=bool)
        table[repeated] = np.where(self._spare()[rows], NONE, table)[repeated]
        return table, self.lengths[rows]

    def fork(self, rows: Sequence[int] | None = None) -> Sequences:
        """The same tokens of these rows (by default all) once more, in the same pages."""
        made = Sequences(self.arena, self.heads)
        made.table, made.lengths = self._of(list(range(self.rows) if rows is None else rows), again=True)
        self.arena.hold(made.table)
        return made

    @property
    def shared(self) -> bool:
        """Whether any page is held more than once."""
        return bool(self.arena.refs.max(initial=0) > 1)
