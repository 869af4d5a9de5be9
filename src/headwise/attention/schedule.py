"""How the reading of paged sequences of any lengths is cut into even pieces of work, and which pages are read for many at once.

All of it is made on the host from lengths that are known there: nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError

OPEN = 1 << 24  # pages of a run that goes on to the end of its sequence, wherever that is when it is read
FIELDS = 8  # int32 of an item of work, six of them used
START = 1  # what beginning an item costs, in pages
BUSY = 2  # items that a multiprocessor works on at once
ROWS = 16  # sequences that a program takes at once of those that share an item, about
GROWN = 1.25  # a schedule is stale once its longest item is so much longer than it was
Array = np.ndarray
Lengths = Tensor | Array | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Segment:
    """Pages that batch rows start..stop-1 share, of one key/value head: `pages` of them, from the first-th of each row on."""

    start: int
    stop: int
    head: int
    first: int
    pages: int


@dataclass(frozen=True)
class Runs:
    """Pages, next to each other in the table of `sequence`, that rows row..row+rows-1 read. One array an attribute.

    pages: how many, OPEN if up to the sequence's end; known: how many there were when this was made.
    """

    sequence: Array
    row: Array
    rows: Array
    first: Array
    pages: Array
    known: Array

    def __len__(self) -> int:
        return len(self.sequence)

    def items(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(sequence, row, rows, first, pages) of each."""
        columns = (self.sequence, self.row, self.rows, self.first, self.pages)
        return zip(*(column.tolist() for column in columns), strict=True)


@dataclass(frozen=True)
class Schedule:
    """Items of work for sequences of certain lengths. Right for any others, only less even: lengths are read on the device.

    One with segments is right as long as those rows share those pages. narrow: items that one sequence reads; wide: those
    that several do. starts[offsets[s]:offsets[s + 1]]: where the parts of sequence s are, in the order of its tokens.
    """

    sequences: int
    heads: int
    page: int
    runs: Runs
    narrow: Tensor
    wide: Tensor
    offsets: Tensor
    starts: Tensor
    parts: int
    most_rows: int
    most_parts: int
    longest: int

    @property
    def single(self) -> bool:
        """Whether every sequence is one item, so that nothing is merged."""
        return self.parts == self.sequences and not len(self.wide)

    @staticmethod
    def of(
        lengths: Lengths, heads: int, *, page: int = 64, segments: Sequence[Segment] = (), programs: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Schedule:  # fmt: skip
        """For sequences (b, heads), or flat, of so many tokens.

        Args:
            heads: key/value heads. programs: items that run at the same time; by default what the device has room for.

        Raises: ShapeError if segments overlap, or are not within the rows, heads and pages.
        """
        device = torch.device(device)
        found = pages_of(lengths, page)
        runs = cut_runs(found, heads, segments)
        count = programs if programs is not None else _room(device)
        split = np.ones(len(runs), dtype=np.int64)
        for some in (runs.rows == 1, runs.rows > 1):  # each kind is a launch of its own
            programs_of_one = -(-int(runs.rows[some].max(initial=1)) // ROWS)
            split[some] = _even(runs.known[some], max(count // programs_of_one, 1))
        run = np.repeat(np.arange(len(runs)), split)
        k = np.arange(len(run)) - np.repeat(np.cumsum(split) - split, split)  # the k-th item of its run
        known, parts = runs.known[run], split[run]
        begin, end = known * k // parts, known * (k + 1) // parts
        slots = np.cumsum(runs.rows[run]) - runs.rows[run]
        items = np.zeros((len(run), FIELDS), dtype=np.int32)
        items[:, 0], items[:, 3], items[:, 4], items[:, 5] = runs.sequence[run], runs.row[run], runs.rows[run], slots
        items[:, 1] = runs.first[run] + begin
        items[:, 2] = np.where((runs.pages[run] == OPEN) & (k == parts - 1), OPEN, end - begin)
        offsets, starts = _parts(items, heads, len(found))
        longest_first = np.argsort(begin - end, kind="stable")
        items, size = items[longest_first], (end - begin)[longest_first]
        alone = items[:, 4] == 1
        blocks = [items[alone].reshape(-1), items[~alone].reshape(-1), offsets, starts]
        sent = torch.from_numpy(np.concatenate(blocks).astype(np.int32)).to(device, non_blocking=True)  # one copy
        narrow, wide, offset, start = sent.split([len(block) for block in blocks])
        return Schedule(
            len(found), heads, page, runs, narrow.view(-1, FIELDS), wide.view(-1, FIELDS), offset, start,
            int(runs.rows[run].sum()), int(runs.rows.max(initial=1)), int(np.diff(offsets).max(initial=1)),
            int(size[alone].max(initial=0)),
        )  # fmt: skip

    def stale(self, lengths: Lengths) -> bool:
        """Whether sequences have grown so much, or are so many others, that making it anew is worth it."""
        found = pages_of(lengths, self.page)
        if len(found) != self.sequences:
            return True
        last = self.runs.pages == OPEN
        grown = (found[self.runs.sequence[last]] - self.runs.first[last] - self.runs.known[last]).max(initial=0)
        return bool(grown > (GROWN - 1) * self.longest + 1)


def pages_of(lengths: Lengths, page: int) -> Array:
    """Pages that each sequence has, flat."""
    if isinstance(lengths, Tensor):
        lengths = lengths.detach().cpu().numpy()
    return -(-np.asarray(lengths, dtype=np.int64).reshape(-1) // page)


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return BUSY * torch.cuda.get_device_properties(device).multi_processor_count


def cut_runs(pages: Array, heads: int, segments: Sequence[Segment] = ()) -> Runs:
    """What every sequence has to read: the segments, and the rest of each sequence, the last of it open.

    Raises: ShapeError if segments overlap, or are not within the rows, heads and pages.
    """
    everyone = np.arange(len(pages))
    rest = [everyone, np.zeros_like(pages), np.full_like(pages, OPEN), pages]
    shared = np.array([[s.start * heads + s.head, s.start, s.stop - s.start, s.first, s.pages] for s in segments], dtype=np.int64)
    if len(shared):
        covered = _covered(pages, heads, segments)
        # Runs of pages that no segment has; a sequence's last one begins with its last own pages, if only with the next one.
        edge = np.diff(covered.astype(np.int8), prepend=1, axis=1)
        sequence, first = np.nonzero(edge == -1)
        stop = np.nonzero(np.diff(covered.astype(np.int8), append=1, axis=1) == 1)[1] + 1
        last = np.append(sequence[1:] != sequence[:-1], True)
        known = np.where(last, np.maximum(pages[sequence] - first, 0), stop - first)
        rest = [sequence, first, np.where(last, OPEN, known), known]
    ones = np.ones_like(rest[0])
    alone = Runs(rest[0], rest[0] // heads, ones, rest[1], rest[2], rest[3])
    if not len(shared):
        return alone
    joint = (shared[:, 0], shared[:, 1], shared[:, 2], shared[:, 3], shared[:, 4], shared[:, 4])
    names = ("sequence", "row", "rows", "first", "pages", "known")
    return Runs(*(np.concatenate([one, getattr(alone, name)]) for name, one in zip(names, joint, strict=True)))


def _covered(pages: Array, heads: int, segments: Sequence[Segment]) -> Array:
    """(sequences, most pages + 1): which pages segments have."""
    rows = len(pages) // heads
    table = np.zeros((rows, heads, int(pages.max(initial=0)) + 1), dtype=bool)
    for s in segments:
        inside = 0 <= s.start < s.stop <= rows and 0 <= s.head < heads and s.first >= 0 and s.pages > 0
        if not inside or s.first + s.pages > pages.reshape(rows, heads)[s.start : s.stop, s.head].min():
            raise ShapeError(f"{s} is not within {rows} rows, {heads} heads and the pages that all of its rows have")
        part = table[s.start : s.stop, s.head, s.first : s.first + s.pages]
        if part.any():
            raise ShapeError(f"{s} has pages that another segment has too")
        part[:] = True
    return table.reshape(len(pages), -1)


def _even(pages: Array, programs: int) -> Array:
    """Into how many items runs of so many pages are cut, so that `programs` at a time finish soonest."""
    sizes = np.unique(np.geomspace(max(int(pages.max(initial=0)), 1), 1, 96).round().astype(np.int64))[::-1]
    parts = np.maximum(-(-pages // sizes[:, None]), 1)
    items = parts.sum(1)
    longest = (-(-pages // parts)).max(1, initial=0) + START
    # Those that don't fit at once queue up, longest first: the last ones end about half an item after the mean.
    ends = np.where(items <= programs, longest, (pages.sum() + START * items + longest * (programs - 1) / 2) / programs)
    return np.asarray(parts[int(ends.argmin())])


def _parts(items: Array, heads: int, sequences: int) -> tuple[Array, Array]:
    """(offsets (sequences + 1,), starts): see `Schedule`."""
    rows = items[:, 4]
    item = np.repeat(np.arange(len(items)), rows)
    nth = np.arange(len(item)) - np.repeat(np.cumsum(rows) - rows, rows)
    sequence = (items[item, 3] + nth) * heads + items[item, 0] % heads
    order = np.lexsort((items[item, 1], sequence))
    return np.append(0, np.cumsum(np.bincount(sequence, minlength=sequences))), (items[item, 5] + nth)[order]


def shared_pages(table: Array | Tensor, lengths: Lengths, page: int = 64) -> list[Segment]:
    """The pages that rows next to each other share. table: (b, heads, pages), on the host; rows of one prefix belong together."""
    held = np.asarray(table)
    used = np.arange(held.shape[2]) < pages_of(lengths, page).reshape(*held.shape[:2], 1)
    found = []
    for head in range(held.shape[1]):
        same = (held[1:, head] == held[:-1, head]) & used[1:, head] & used[:-1, head]  # (b - 1, pages): as the row before
        new = np.append(True, (same[:, 1:] != same[:, :-1]).any(0))
        for first, stop in zip(np.flatnonzero(new), np.append(np.flatnonzero(new)[1:], same.shape[1]), strict=True):
            edges = np.diff(same[:, first].astype(np.int8), prepend=0, append=0)
            starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
            found += [Segment(int(a), int(b) + 1, head, int(first), int(stop - first)) for a, b in zip(starts, ends, strict=True)]
    return found
