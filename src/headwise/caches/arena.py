"""Pages of keys and values, and the sequences of tokens that are held in them.

An arena belongs to one layer. It has a pool for each part of a token (its key, its value, its number, ...), cut into pages
of PAGE tokens; a sequence, the tokens of one batch row and one head, is a list of pages. Sequences may share pages (beams,
forks, common prefixes); who writes into a shared page gets a copy of it first. A page that nobody holds is used again, and
the memory of many such pages is given back.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

PAGE = 64  # tokens of a page
SPARE = 16  # a pool that must grow while decoding grows by a SPARE-th, so that copying it costs little
NONE = -1

Parts = dict[str, Tensor]
Pages = np.ndarray


class Arena:
    """Pages of some tensors, and how many sequences hold each."""

    def __init__(self, page: int | None = None) -> None:
        self.page = PAGE if page is None else page
        self.pools: Parts = {}  # name -> (pages, page, ...)
        self.refs = np.zeros(0, dtype=np.int32)
        self.users: weakref.WeakSet[Sequences] = weakref.WeakSet()

    def prepare(self, parts: Mapping[str, Tensor]) -> None:
        """Makes pools for tensors of the given names, types and last sizes, if there are none yet."""
        for name, part in parts.items():
            if name not in self.pools:
                self.pools[name] = part.new_zeros(len(self.refs), self.page, *part.shape[3:])

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
            self._resize(len(self.refs) + count - len(free))
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
            pool[_index(target, pool)] = pool[_index(source, pool)]

    def _resize(self, pages: int) -> None:
        """More pages, the new ones unheld."""
        for name, pool in self.pools.items():
            grown = pool.new_zeros(pages, *pool.shape[1:])
            grown[: len(pool)] = pool
            self.pools[name] = grown
        self.refs = np.concatenate([self.refs, np.zeros(pages - len(self.refs), dtype=np.int32)])

    def arrange(self, order: Pages) -> Pages:
        """Makes the pools anew from pages in the order given, NONE for an empty one; returns where each now is.

        Pages that are not named are lost, each is held once for every time that it is named.
        """
        _, first, place = np.unique(order, return_index=True, return_inverse=True)
        place = place.reshape(-1)
        moved = first[place]  # a page that is named again is where it was named first
        moved[order == NONE] = np.flatnonzero(order == NONE)
        kept, where = np.unique(moved, return_inverse=True)
        for name, pool in self.pools.items():
            made = pool.new_zeros(len(kept), *pool.shape[1:])
            source = order[kept]
            made[_index(np.flatnonzero(source >= 0), pool)] = pool[_index(source[source >= 0], pool)]
            self.pools[name] = made
        self.refs = np.bincount(where.reshape(-1), minlength=len(kept)).astype(np.int32)
        return where.reshape(-1).astype(np.int32)


def _index(pages: Pages, pool: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pages, dtype=np.int64)).to(pool.device)


class Sequences:
    """The tokens of `heads` heads of some batch rows, in an arena. Slot i of a sequence is the i-th token that it holds.

    table: (b, heads, pages) of page numbers. lengths: (b, heads) tokens held. Both are known on the host, so that nothing
    waits for the device.
    """

    def __init__(self, arena: Arena, heads: int) -> None:
        self.arena, self.heads = arena, heads
        self.table = np.full((0, heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((0, heads), dtype=np.int64)
        self._on_device: Tensor | None = None  # the table there
        arena.users.add(self)

    @property
    def rows(self) -> int:
        """Batch rows."""
        return len(self.table)

    def begin(self, rows: int) -> None:
        """Empty sequences for so many rows."""
        self.clear()
        self.table = np.full((rows, self.heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((rows, self.heads), dtype=np.int64)

    def clear(self) -> None:
        """Forgets all tokens."""
        self.arena.release(self.table)
        self.table = np.full((0, self.heads, 0), NONE, dtype=np.int32)
        self.lengths = np.zeros((0, self.heads), dtype=np.int64)
        self._on_device = None

    # ---- pages ------------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether every page is in one sequence of these at most, so that pages may be moved."""
        return len(self.arena.users) == 1 and not self.shared

    def _pages_of(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.arena.page)

    def reserve(self, lengths: np.ndarray, groups: Sequence[Sequence[int]]) -> None:
        """Pages for so many tokens (b, heads). Heads of a group lie one after another if no page is shared."""
        need = self._pages_of(lengths)
        have = (self.table >= 0).sum(-1)
        if (need <= have).all():
            return
        self._widen(int(need.max()))
        if self._alone:
            spare = np.where(self.lengths > 0, np.maximum(-(-need // SPARE) - 1, 0), 0)
            wide = np.where(need > have, need + spare, have)
            self._arrange(wide, groups)
        else:
            missing = np.argwhere(np.arange(self.table.shape[2]) < need[..., None])
            missing = missing[self.table[tuple(missing.T)] == NONE]
            self.table[tuple(missing.T)] = self.arena.take(len(missing))
        self._on_device = None

    def _widen(self, pages: int) -> None:
        more = pages - self.table.shape[2]
        if more > 0:
            self.table = np.pad(self.table, ((0, 0), (0, 0), (0, more)), constant_values=NONE)

    def _arrange(self, wide: np.ndarray, groups: Sequence[Sequence[int]]) -> None:
        """Pools with just so many pages (b, heads) for each sequence, group by group."""
        self._widen(int(wide.max(initial=0)))
        exists = np.arange(self.table.shape[2]) < wide[..., None]
        order = np.argsort([head for group in groups for head in group])
        flat, where = [], []
        for group in groups:
            part = self.table[:, list(group)]
            flat.append(part[exists[:, list(group)]])
            where.append(len(flat[-1]))
        moved = np.split(self.arena.arrange(np.concatenate(flat)), np.cumsum(where)[:-1])
        tables = []
        for group, pages in zip(groups, moved, strict=True):
            part = np.full_like(self.table[:, list(group)], NONE)
            part[exists[:, list(group)]] = pages
            tables.append(part)
        self.table = np.concatenate(tables, 1)[:, order]
        self._on_device = None

    def trim(self, groups: Sequence[Sequence[int]]) -> None:
        """Gives pages back that hold nothing, and their memory if they are an eighth of it or more."""
        need = self._pages_of(self.lengths)
        spare = np.arange(self.table.shape[2]) >= need[..., None]
        self.arena.release(np.where(spare, self.table, NONE))
        self.table[spare] = NONE
        self.table = self.table[:, :, : int(need.max(initial=0))]
        self._on_device = None
        free = int((self.arena.refs == 0).sum())
        if free and free * 8 >= len(self.arena.refs) and self._alone:
            self._arrange(need, groups)

    # ---- reading and writing ----------------------------------------------------------------------------------------

    def _flat(self, heads: Sequence[int], slots: np.ndarray) -> np.ndarray:
        """Where slots (b, len(heads), c) are in a pool seen as tokens."""
        page = self.arena.page
        pages = np.take_along_axis(self.table[:, list(heads)], slots // page, -1)
        return pages.astype(np.int64) * page + slots % page

    def _own(self, heads: Sequence[int], slots: np.ndarray, there: np.ndarray) -> None:
        """Copies pages that are to be written and that others hold too."""
        table = self.table[:, list(heads)]
        pages = slots // self.arena.page
        shared = (np.take_along_axis(self.arena.refs[table], pages, -1) > 1) & there
        if not shared.any():
            return
        places = np.unique(np.stack([*np.nonzero(shared)[:2], pages[shared]], 1), axis=0)
        for row, head, page in places:  # one by one: the last holder of a page keeps it
            old = self.table[row, list(heads)[head], page]
            if self.arena.refs[old] > 1:
                new = self.arena.take(1)
                self.arena.copy(np.array([old]), new)
                self.arena.refs[old] -= 1
                self.table[row, list(heads)[head], page] = new[0]
        self._on_device = None

    def write(self, heads: Sequence[int], slots: np.ndarray, parts: Mapping[str, Tensor], there: np.ndarray | None = None) -> None:
        """Writes tokens (b, len(heads), c, ...) into slots (b, len(heads), c), for which pages are reserved.

        there: (b, len(heads), c), which of them; None for all.
        """
        self.arena.prepare(parts)
        if there is None:
            there = np.ones(slots.shape, dtype=bool)
        elif not there.any():
            return
        slots = np.where(there, slots, 0)
        if self.shared:
            self._own(heads, slots, there)
        flat = self._flat(heads, slots)
        chosen = None if there.all() else _index(np.flatnonzero(there), next(iter(self.arena.pools.values())))
        for name, part in parts.items():
            pool = self.arena.pools[name]
            tokens = part.expand(*slots.shape, *part.shape[3:]).reshape(slots.size, *part.shape[3:])
            at = _index(flat.reshape(-1), pool)
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
        kept = {name: self._gather(name, heads, slots[..., :most].cpu().numpy()) for name in self.arena.pools}
        self.lengths[:, list(heads)] = 0
        steps = np.arange(most)
        there = np.broadcast_to(steps < counts[..., None], (*counts.shape, most))
        if most:
            self.write(heads, np.broadcast_to(steps, there.shape), kept, there)
        self.lengths[:, list(heads)] = counts
        self.trim(groups)

    def drop(self, heads: Sequence[int], slots: np.ndarray) -> None:
        """Forgets one token of each sequence, in slots (b, len(heads)); the last token takes its slot."""
        last = self.lengths[:, list(heads)] - 1
        moved = {name: self._gather(name, heads, last[..., None]) for name in self.arena.pools}
        self.write(heads, slots[..., None], moved)
        self.lengths[:, list(heads)] = last

    def crop(self, heads: Sequence[int], tokens: int) -> None:
        """Forgets the last tokens of each sequence."""
        own = list(heads)
        self.lengths[:, own] = np.maximum(self.lengths[:, own] - tokens, 0)

    def _gather(self, name: str, heads: Sequence[int], slots: np.ndarray) -> Tensor:
        pool = self.arena.pools[name]
        tokens = pool.view(-1, *pool.shape[2:])
        flat = np.maximum(self._flat(heads, slots), 0)
        return tokens[_index(flat.reshape(-1), pool)].view(*slots.shape, *pool.shape[2:])

    def taken(self, heads: Sequence[int], slots: np.ndarray) -> Parts:
        """What is in slots (b, len(heads), c), of all parts; of slots that are not there, anything."""
        pages = self.table.shape[2] * self.arena.page
        return {name: self._gather(name, heads, np.minimum(slots, pages - 1)) for name in self.arena.pools}

    def longest(self, heads: Sequence[int]) -> int:
        """Tokens of the longest of these sequences."""
        return int(self.lengths[:, list(heads)].max(initial=0))

    def read(self, name: str, heads: Sequence[int]) -> Tensor:
        """(b, len(heads), longest, ...) of one part: the pool itself where the sequences lie in it one after another, else a
        copy. What is behind a sequence's end means nothing."""
        pool, length, table = self.arena.pools[name], self.longest(heads), self.table[:, list(heads)]
        pages = -(-length // self.arena.page)
        start, wide = self._regular(table, pages)
        if start is not None:
            count = table.shape[0] * table.shape[1]
            block = pool[start : start + count * wide] if count else pool[:0]
            return block.view(*table.shape[:2], wide * self.arena.page, *pool.shape[2:])[:, :, :length]
        found = pool[_index(np.maximum(table[..., :pages], 0).reshape(-1), pool)]
        return found.view(*table.shape[:2], pages * self.arena.page, *pool.shape[2:])[:, :, :length]

    def _regular(self, table: np.ndarray, pages: int) -> tuple[int | None, int]:
        """First page and distance, if sequences (b, heads, pages) lie one after another."""
        if not table.size or (table[..., :pages] < 0).any():
            return None, 0
        flat = table.reshape(-1, table.shape[2])
        start = int(flat[0, 0])
        wide = int(flat[1, 0]) - start if len(flat) > 1 else pages
        if wide < pages or start + wide * len(flat) > len(self.arena.refs):
            return None, 0
        wanted = start + np.arange(len(flat))[:, None] * wide + np.arange(pages)
        return (start, wide) if (flat[:, :pages] == wanted).all() else (None, 0)

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
        table = self.table[list(rows)]
        self.arena.hold(table)
        self.arena.release(self.table)
        self.table, self.lengths = table, self.lengths[list(rows)]
        self._on_device = None

    def fork(self, rows: Sequence[int] | None = None) -> Sequences:
        """The same tokens of these rows (by default all) once more, in the same pages."""
        made = Sequences(self.arena, self.heads)
        chosen = list(range(self.rows) if rows is None else rows)
        made.table, made.lengths = self.table[chosen].copy(), self.lengths[chosen].copy()
        self.arena.hold(made.table)
        return made

    @property
    def shared(self) -> bool:
        """Whether any page is held more than once."""
        return bool(self.arena.refs.max(initial=0) > 1)
