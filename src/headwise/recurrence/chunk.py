"""The form for many tokens: within a chunk the quadratic form, between chunks one state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .parallel import parallel
from .parts import decayed, level_weights, merged
from .recurrent import recurrent


class Chunks(NamedTuple):
    """What each chunk does, whatever state it starts from; (b, h, chunks, ...).

    out = inside @ values + reads @ state, where values are `values` less `erases` @ state; the next state is
    carry * state + keys^T values.
    """

    inside: Tensor
    reads: Tensor
    keys: Tensor
    values: Tensor
    carry: Tensor
    erases: Tensor | None = None
    overlap: Tensor | None = None  # erase_i k_i k_j of earlier tokens j, decayed, by which values were solved


def chunked(given: Inputs, size: int, *, last: bool = True) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state. last: whether that state is wanted; with levels it costs, so may be left out."""
    n = given.k.shape[2]
    if given.levels is not None:
        return _of_levels(given, size, last)
    chunks, state, states, written = _chunks(given.padded(size), size), given.first, [], []
    added = None if chunks.erases is not None else chunks.keys.mT @ chunks.values
    for i in range(chunks.keys.shape[2]):
        states.append(state)
        if chunks.erases is not None:
            written.append(chunks.values[:, :, i] - chunks.erases[:, :, i] @ state)
        new = chunks.keys[:, :, i].mT @ written[-1] if added is None else added[:, :, i]
        state = torch.addcmul(new, chunks.carry[:, :, i], state)
    if not states:
        return given.v, state
    values = torch.stack(written, 2) if written else chunks.values
    out = chunks.inside @ values + chunks.reads @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :n], state


def _chunks(given: Inputs, size: int) -> Chunks:
    """Of tokens that are a multiple of a chunk."""
    count = given.k.shape[2] // size

    def split(t: Tensor) -> Tensor:
        return t.unflatten(2, (count, size))

    q, k, values = split(given.q), split(given.k), split(given.values)
    total = None if given.decay is None else split(given.decay).cumsum(3)
    shown = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    reads, keys, writes = q, k, k
    carry = k.new_ones(1, 1, 1, 1, 1).expand(1, 1, count, 1, 1)
    if total is not None:
        reads, writes = q * total.exp(), k * total.exp()
        keys = k * (total[:, :, :, -1:] - total).exp()
        carry = total[:, :, :, -1:].mT.exp()
    if given.documents is not None:
        document = given.documents.unflatten(1, (count, size))[:, None]
        before = torch.cat([torch.zeros_like(document[:, :, :1, -1:]), document[:, :, :-1, -1:]], 2)
        shown = shown & (document[..., :, None] == document[..., None, :])
        same, end = (document == before)[..., None], (document == document[..., -1:])[..., None]
        reads, writes, keys, carry = reads * same, writes * same, keys * end, carry * same[..., -1:, :]
    inside = decayed(q, k, total, shown)
    if given.erase is None:
        return Chunks(inside, reads, keys, values, carry)
    erase = split(given.erase)[..., None]
    overlap = erase * decayed(k, k, total, shown).tril(-1)
    both = torch.linalg.solve_triangular(overlap, torch.cat([values, erase * writes], -1), upper=False, unitriangular=True)
    values, erases = both.split([values.shape[-1], k.shape[-1]], -1)
    return Chunks(inside, reads, keys, values, carry, erases, overlap)


def _of_levels(given: Inputs, size: int, last: bool) -> tuple[Tensor, Tensor]:
    """Levels within a chunk are a mask on its quadratic form; older ones are states of whole chunks, each moved on like one state.

    Chunks must begin at a multiple of their size, a power of two. Tokens before the first such place and after the last run one
    by one; documents, padding, and rows that have read different numbers of tokens run in other forms.
    """
    assert given.levels is not None
    size = 1 << (size.bit_length() - 1)
    if given.documents is not None or given.real is not None:
        return parallel(given) if given.state is None else recurrent(given)
    n, count = given.k.shape[2], given.count
    start = 0 if count is None else int(count[0])
    if count is not None and bool((count != start).any()):
        return recurrent(given)
    head = min(-start % size, n)
    body = (n - head) // size * size
    tail = n - head - body
    outs, state = [], given.first

    def counted(done: int) -> Tensor:
        return torch.full((len(given.k),), start + done, dtype=torch.long, device=given.k.device)

    if head:
        out, state = recurrent(given.part(0, head, state, counted(0)))
        outs.append(out)
    if tail and not last:
        out, state = _aligned(given.part(head, n, state, counted(head)).padded(size), size, start + head)
        return torch.cat([*outs, out[:, :, : body + tail]], 2), state
    if body:
        out, state = _aligned(given.part(head, head + body, state, counted(head)), size, start + head)
        outs.append(out)
    if tail:
        out, state = recurrent(given.part(head + body, n, state, counted(head + body)))
        outs.append(out)
    return (torch.cat(outs, 2) if outs else given.v), state


def _aligned(given: Inputs, size: int, start: int) -> tuple[Tensor, Tensor]:
    assert given.levels is not None
    count, bits = given.k.shape[2] // size, size.bit_length() - 1
    chunks, weights = _chunks(given, size), given.levels.unflatten(2, (count, size))
    place = torch.arange(size, device=given.k.device)
    inside = chunks.inside
    if chunks.overlap is not None:  # levels weigh what was written, before anything of it was erased
        inside = torch.linalg.solve_triangular(chunks.overlap, inside, upper=False, left=False, unitriangular=True)
    near = (inside * level_weights(weights, place, place)) @ given.values.unflatten(2, (count, size))
    added = chunks.keys.mT @ chunks.values
    buckets, outs = given.first, []
    low = min(bits, buckets.shape[2] - 1)  # younger buckets are empty between chunks
    for i in range(count):
        older, reads, carry = buckets[:, :, low:], chunks.reads[:, :, i, None], chunks.carry[:, :, i, None]
        read, moved = reads @ older, carry * older
        if chunks.erases is not None:  # what this chunk erases of older writes
            gone = chunks.erases[:, :, i, None] @ older
            read = read - chunks.inside[:, :, i, None] @ gone
            moved = moved - chunks.keys[:, :, i, None].mT @ gone
        outs.append((weights[:, :, i, :, 1 + low :].mT[..., None] * read).sum(2))
        number = torch.full((len(given.k),), start // size + i + 1, dtype=torch.long, device=given.k.device)
        buckets = torch.cat([buckets[:, :, :low], merged(moved, added[:, :, i], number)], 2)
    return (near + torch.stack(outs, 2)).flatten(2, 3), buckets
