"""Attention over pages in plain PyTorch: a sequence at a time where it lies, or all of them copied next to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .schedule import OPEN, Schedule, cut_runs, pages_of

CHUNK = 1024  # tokens of one sequence that a core of a CPU takes at once


@dataclass(frozen=True)
class PagedRead:
    """What is read, checked. q: (b, heads, n, d); table: (b * kv_heads, pages); lengths: (b * kv_heads,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch rows, key/value heads, query heads of each, new tokens."""
        b, heads, n, _ = self.q.shape
        kv_heads = self.table.shape[0] // b
        return b, kv_heads, heads // kv_heads, n


def wide(tensor: Tensor) -> torch.dtype:
    """Of sums: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) over all keys from those over parts of them: outs (parts, ..., dv), lses (parts, ...)."""
    out, lse = (each if isinstance(each, Tensor) else torch.stack(list(each)) for each in (outs, lses))
    whole = lse.logsumexp(0)
    weight = (lse - whole.masked_fill(whole == -torch.inf, 0.0)).exp()
    return (out * weight.unsqueeze(-1)).sum(0).to(out.dtype), whole


def _weighed(products: Tensor, read: PagedRead) -> Tensor:
    """Products -> scores, in at least float32."""
    scores = products.to(wide(products)) * read.scale
    return scores if read.softcap is None else read.softcap * torch.tanh(scores / read.softcap)


def _with_sinks(out: Tensor, lse: Tensor, read: PagedRead) -> tuple[Tensor, Tensor]:
    """One more key for every row that sees one, with a value of zero. out: (b, heads, n, dv)."""
    if read.sinks is None:
        return out, lse
    whole = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, read.sinks.to(lse)[:, None]))
    return out * _shares(lse, whole).unsqueeze(-1), whole


def _shares(scores: Tensor, whole: Tensor) -> Tensor:
    """e^(scores - whole); 0 where that sums nothing."""
    return (scores - whole.masked_fill(whole == -torch.inf, 0.0)).exp()


def by_gather(read: PagedRead) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp): the sequences copied next to each other, as long as the longest."""
    b, kv_heads, group, n = read.sizes
    page, count = read.k.shape[1], len(read.table)
    pages = int(pages_of(read.lengths, page).max(initial=0))
    index = read.table[:, :pages].long().clamp(min=0)
    slot = torch.arange(pages * page, device=read.q.device)
    held = (slot < read.lengths[:, None])[..., None]
    dtype = wide(read.q)
    k, v = (pool[index].flatten(1, 2).masked_fill(~held, 0.0).to(dtype) for pool in (read.k, read.v))
    limit = read.lengths[:, None] - n + 1 + torch.arange(n, device=slot.device)
    seen = (slot < limit[..., None]).repeat(1, group, 1)  # heads of the group, then tokens
    scores = _weighed(read.q.reshape(count, group * n, -1).to(dtype) @ k.mT, read).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    out = _shares(scores, lse.unsqueeze(-1)) @ v
    out, lse = _with_sinks(out.view(b, kv_heads * group, n, -1), lse.view(b, kv_heads * group, n), read)
    return out.to(read.q.dtype), lse


@torch.no_grad()
def by_each(read: PagedRead, schedule: Schedule | None) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp): a run of pages at a time, in place where they follow each other in the pool."""
    b, kv_heads, group, n = read.sizes
    page, device = read.k.shape[1], read.q.device
    table, held = read.table.tolist(), read.lengths.tolist()
    runs = cut_runs(pages_of(read.lengths, page), kv_heads) if schedule is None else schedule.runs
    q = read.q.reshape(b * kv_heads, group * n, -1)
    parts: list[tuple[list[int], Tensor, Tensor]] = []  # sequences, and of each an output and a log-sum-exp
    done = set()
    if n == 1 and len(runs) == len(q):
        for sequences, k, v in _alike(read, table, held):
            parts += [(sequences, *found) for found in _attended(q[sequences], k, v, None, read)]
            done |= set(sequences)
    for sequence, row, rows, first, pages in runs.items():
        readers = list(range(row * kv_heads + sequence % kv_heads, (row + rows) * kv_heads, kv_heads))
        lengths = [held[reader] for reader in readers]
        stop = max(lengths) if pages == OPEN else min(max(lengths), (first + pages) * page)
        if stop <= first * page or sequence in done:
            continue
        k, v = (_run(pool, table[sequence][first : -(-stop // page)], stop - first * page) for pool in (read.k, read.v))
        limit = None
        if n > 1 or min(lengths) < stop:
            limit = torch.tensor(lengths, device=device) - first * page - n + 1
            limit = (limit[:, None] + torch.arange(n, device=device)).repeat(1, group).view(-1, 1)
        mine = q[sequence : sequence + 1] if rows == 1 else q[readers].view(1, rows * group * n, -1)
        for out, lse in _attended(mine, k[None], v[None], limit, read):
            chunks = len(out)
            parts.append((readers * chunks, out.reshape(chunks * rows, group * n, -1), lse.reshape(chunks * rows, group * n)))
    out, lse = _together(parts, q.new_zeros(1, group * n, read.v.shape[2], dtype=wide(q)), len(q))
    shape = (b, kv_heads * group, n)
    out, lse = _with_sinks(out.view(*shape, -1), lse.view(shape), read)
    return out.to(read.q.dtype), lse


def _together(parts: list[tuple[list[int], Tensor, Tensor]], nothing: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """(outputs (sequences, rows, dv), log-sum-exps) from parts, each sequence's in their order. nothing: zeros (1, rows, dv)."""
    of = np.array([sequence for owners, _, _ in parts for sequence in owners], dtype=np.int64)
    counts = np.bincount(of, minlength=sequences)
    order = np.argsort(of, kind="stable")
    nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.full((max(int(counts.max(initial=0)), 1), sequences), len(of))
    index[nth, of[order]] = order
    outs = torch.cat([*(out.to(nothing.dtype) for _, out, _ in parts), nothing])
    lses = torch.cat([*(lse.to(nothing.dtype) for _, _, lse in parts), torch.full_like(nothing[..., 0], -torch.inf)])
    if len(index) == 1:
        return outs[index[0]], lses[index[0]]
    return merge(outs[torch.from_numpy(index).to(nothing.device)], lses[torch.from_numpy(index).to(nothing.device)])


def _alike(read: PagedRead, table: list[list[int]], held: list[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Sequences of the same length that lie equally far apart, and their keys and values: (sequences, tokens, d) of the pools."""
    page = read.k.shape[1]
    for length in set(held) - {0}:
        sequences = [sequence for sequence, own in enumerate(held) if own == length]
        pages = -(-length // page)
        start = table[sequences[0]][0]
        apart = table[sequences[1]][0] - start if len(sequences) > 1 else 0
        span = slice(start, start + len(sequences) * apart)
        if apart < pages or span.stop > len(read.k):
            continue
        places = (list(range(start + i * apart, start + i * apart + pages)) for i in range(len(sequences)))
        if all(table[s][:pages] == place for s, place in zip(sequences, places, strict=True)):
            shape = (len(sequences), apart * page, -1)
            yield sequences, read.k[span].reshape(shape)[:, :length], read.v[span].reshape(shape)[:, :length]


def _run(pool: Tensor, pages: list[int], tokens: int) -> Tensor:
    """(tokens, d) of some pages: the pool itself if they follow each other in it."""
    start = pages[0]
    if pages == list(range(start, start + len(pages))):
        return pool[start : start + len(pages)].flatten(0, 1)[:tokens]
    return pool[torch.tensor(pages, device=pool.device)].flatten(0, 1)[:tokens]


def _attended(q: Tensor, k: Tensor, v: Tensor, limit: Tensor | None, read: PagedRead) -> list[tuple[Tensor, Tensor]]:
    """Parts: (outputs (c, rows, dv), log-sum-exps (c, rows)) of rows (s, rows, d) that see tokens below `limit` (rows, 1), or
    all. c is s, or, of one sequence that is cut in chunks, how many there are."""
    if limit is None and read.softcap is None and q.device.type == "cpu" and k.shape[2] == v.shape[2]:
        return _fused(q, k, v, read.scale)
    scores = _weighed(q @ k.mT, read)
    if limit is not None:
        scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) >= limit, -torch.inf)
    lse = scores.logsumexp(-1)
    return [(_shares(scores, lse.unsqueeze(-1)).to(v.dtype) @ v, lse)]


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """The same by PyTorch's fused attention for CPUs. A core takes a head at a time, so one long sequence becomes several."""
    tokens = k.shape[1]
    whole = tokens // CHUNK * CHUNK if len(q) == 1 and tokens >= 2 * CHUNK else 0
    pieces = [(q, k[:, whole:], v[:, whole:])] if tokens > whole else []
    if whole:
        pieces.append((q.expand(whole // CHUNK, -1, -1), *(t[0, :whole].unflatten(0, (-1, CHUNK)) for t in (k, v))))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = [fused(*(t[None] for t in piece), scale=scale) for piece in pieces]
    return [(out[0], lse[0]) for out, lse, *_ in found]
