"""All tokens of one attention layer in pages that are taken one by one, and shared by rows that have them in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..attention.paged import Schedule, paged_attention
from ..attention.schedule import shared_pages
from ..attention.stage import Stage
from ..errors import ShapeError
from .arena import Arena, Sequences
from .groups import View
from .joining import stack
from .rule import Rotary


class PagedStore:
    """One layer whose heads keep everything. It is used as a `LayerStore` is; slot i of a row holds its i-th real token, so
    rows of other left padding may have the same pages.

    Args:
        heads: key/value heads. arena: of the pages; by default a new one of pages of so many tokens.
        plain: whether every head reads all that is held. window: or only so many of the last tokens.
    """

    keeps: tuple[None, ...] = ()
    rules: tuple[()] = ()

    def __init__(
        self, heads: int, page: int | None = None, *, arena: Arena | None = None, plain: bool = True, window: int | None = None
    ) -> None:
        self.heads, self.plain, self.window = heads, plain, window
        self.arena = Arena(page, packed=False) if arena is None else arena
        self.sequences = Sequences(self.arena, heads)
        self.seen = 0
        self.pads: list[int] = []
        self.broken = False
        self._before: np.ndarray | None = None  # lengths before the last call, while that can be taken back
        self._schedule: Schedule | None = None
        self._made = -1  # the version of the table that the schedule was made for

    def sibling(self) -> PagedStore:
        """An empty store in the same arena."""
        return PagedStore(self.heads, arena=self.arena, plain=self.plain, window=self.window)

    # ---- what a model does with it ----------------------------------------------------------------------------------

    def extend(
        self, k: Tensor, v: Tensor, pads: Sequence[int] | None = None, *, read: bool = True,
        sources: Mapping[int, Sequence[View]] | None = None,
    ) -> list[View]:  # fmt: skip
        """Takes the new tokens (b, kv heads, c, d) and returns a view of all that is held; see `LayerStore.extend`.

        Raises: ShapeError if the rows are not those that are held.
        """
        count, first = k.shape[2], not self.seen
        if first:
            self.pads = list(pads) if pads is not None else [0] * len(k)
            self.sequences.begin(len(k))
        if len(k) != self.sequences.rows:
            raise ShapeError(f"the cache holds {self.sequences.rows} rows, tokens of {len(k)} came; fork, free or reset it")
        self._before = self.sequences.lengths.copy()
        if first and len(k) > 1 and count > 1:
            self._begin_alike(k, v)
        else:
            self._append(k, v, self.pads)
        self.seen += count
        if not read:
            return []
        if first and count > 1:  # what came is read as it is
            return [View(self._all, None, k, v, torch.arange(count, device=k.device)[None], ordered=True, exact=False)]
        return [self._view(k.device)]

    @property
    def _all(self) -> tuple[int, ...]:
        return tuple(range(self.heads))

    def _begin_alike(self, k: Tensor, v: Tensor) -> None:
        """The first tokens, held once for rows next to each other that are equal bit for bit (samples, beams)."""
        pads = torch.tensor(self.pads, device=k.device)
        same = (k[1:] == k[:-1]).flatten(1).all(1) & (v[1:] == v[:-1]).flatten(1).all(1) & (pads[1:] == pads[:-1])
        other = [True, *(~same).tolist()]
        chosen = [row for row, new in enumerate(other) if new]
        if len(chosen) == len(k):
            self._append(k, v, self.pads)
            return
        self.sequences.begin(len(chosen))
        self._append(k[chosen], v[chosen], [self.pads[row] for row in chosen])
        self.sequences.select((np.cumsum(other) - 1).tolist())

    def _append(self, k: Tensor, v: Tensor, pads: Sequence[int]) -> None:
        """Adds new tokens, without left padding."""
        parts, c = {"k": k, "v": v}, k.shape[2]
        skip = np.maximum(np.array(pads, dtype=np.int64) - self.seen, 0)
        counts = None
        if skip.any():
            index = torch.from_numpy(np.minimum(np.arange(c) + skip[:, None], c - 1)).to(k.device)[:, None, :, None]
            parts = {name: part.gather(2, index.expand(part.shape)) for name, part in parts.items()}
            counts = np.repeat(np.maximum(c - skip, 0)[:, None], self.heads, 1)
        self.sequences.append(self._all, parts, [self._all], counts)

    def _view(self, device: torch.device) -> View:
        k, v = self.sequences.read("k", self._all), self.sequences.read("v", self._all)
        there = self.sequences.there([0], device)
        number = torch.arange(k.shape[2], device=device)[None]
        if any(self.pads):
            number = number + torch.tensor(self.pads, device=device)[:, None]
        if there is not None:
            number = torch.where(there[:, 0], number, -1)
        return View(self._all, None, k, v, number, ordered=not any(self.pads), exact=False)

    @property
    def in_place(self) -> bool:
        """Whether a single new token may read all that is held where it is."""
        page = self.arena.page
        fits = page >= 16 and not page & (page - 1)
        within = self.window is None or self.sequences.longest(self._all) < self.window
        return fits and within and self.plain and self.sequences.rows > 0

    def attend(self, q: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """(b, h, 1, dv): the newest tokens' queries read all that is held; pages that rows next to each other share are read once
        for all of them."""
        own, page = self.sequences, self.arena.page
        if self._schedule is None or self._made != own.version or self._schedule.stale(own.lengths):
            segments = shared_pages(own.table, own.lengths, page) if own.shared else []
            self._schedule = Schedule.of(own.lengths, self.heads, page=page, segments=segments, device=q.device)
            self._made = own.version
        table, lengths = own.on_device()
        pools = self.arena.pools
        found: Tensor = paged_attention(
            q, pools["k"], pools["v"], table, lengths, scale=scale, softcap=softcap, sinks=sinks, schedule=self._schedule
        )
        return found

    def settle(self, q: Tensor, scale: float, stages: Sequence[Stage], rotary: Rotary | None = None) -> None:
        """Nothing is evicted."""

    def rollback(self, seen: int) -> None:
        """Takes back what came after `seen` tokens, after an error."""
        if self.seen == seen:
            return
        self.seen = seen
        if not seen:
            self.clear()
        elif self._before is not None:
            self.sequences.lengths = self._before
            self._schedule = None
        else:
            self.broken = True

    def bytes(self) -> int:
        """Bytes allocated for this layer, those of siblings among them."""
        return self.arena.nbytes

    def host_bytes(self) -> int:
        """Nothing is offloaded."""
        return 0

    def held(self) -> list[list[list[int]]]:
        """By row and key/value head: the numbers of the tokens that are held, sorted."""
        return [
            [[pad + slot for slot in range(length)] for length in lengths]
            for pad, lengths in zip(self.pads, self.sequences.lengths.tolist(), strict=True)
        ]

    croppable = True

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`."""
        if tokens >= self.seen:
            self.clear()
        elif tokens > 0:
            real = self.seen - np.array(self.pads, dtype=np.int64)[:, None]
            kept = np.broadcast_to(np.maximum(real - tokens, 0), self.sequences.lengths.shape)
            self.sequences.lengths = kept.copy()
            self.seen -= tokens
            self._forget()

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """The rows are others: what was made for those before no longer holds."""
        self._before = self._schedule = None

    def clear(self) -> None:
        """Forgets all tokens and rows."""
        self.sequences.clear()
        self.seen, self.pads, self.broken = 0, [], False
        self._forget()

    def select(self, rows: Tensor) -> None:
        """Keeps these batch rows, in this order. A row named twice is held once, until it is written."""
        if self.sequences.rows:
            chosen = rows.tolist()
            self.sequences.select(chosen)
            self.pads = [self.pads[row] for row in chosen]
            self._forget()

    def tighten(self) -> None:
        """No more left padding than there must be, and no pages behind the last tokens."""
        spare = min(self.pads, default=0)
        self.pads = [pad - spare for pad in self.pads]
        self.seen -= spare
        self.sequences.trim()
        self._forget()

    def stack(self, other: PagedStore) -> None:
        """Adds the rows of another store of this arena. Shorter rows get more left padding, which takes no memory."""
        stack(self.sequences, other.sequences)
        seen = max(self.seen, other.seen)
        self.pads = [pad + seen - store.seen for store in (self, other) for pad in store.pads]
        self.seen = seen
        self._forget()

    def begin_with(self, pages: np.ndarray, tokens: int) -> None:
        """One row that holds `tokens` tokens in pages (heads, pages) of the arena, which others hold too."""
        self.clear()
        self.sequences.table = pages[None].astype(np.int32)
        self.arena.hold(self.sequences.table)
        self.sequences.lengths = np.full((1, self.heads), tokens, dtype=np.int64)
        self.sequences.changed()
        self.seen, self.pads = tokens, [0]
