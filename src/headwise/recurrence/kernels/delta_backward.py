"""The delta rule backward, from the row's end on; see `delta` for the forward pass and what is prepared of chunks.

With V what was written and Y its gradient, all that comes later included, the rule is a plain state of keys k and values V
that is read twice: by queries q, which give outputs, and, before it writes, by erase k, which takes from V. Of a chunk, with
S the gradient of the state after it,

    Y = (inside X)^T do + X^T (exp(c_C - c) k) S,    S = exp(c_C) S + (exp(c) q)^T do - (erase exp(c) k)^T Y

which is the walk again. All other gradients are made of chunks in parallel: those of a plain state with do of q and -Y of
erase k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import added, product
from .delta import keep, left_between, met, numbers, square, state_at, tokens


@triton.jit
def back_kernel(
    back_ptr, mix_ptr, x_ptr, y_ptr, do_ptr, near_ptr, gone_ptr, left_ptr, first_ptr, values_ptr, states_ptr, last_ptr, x_sb,
    x_sh, x_sn: tl.constexpr, y_sb, y_sh, y_sn: tl.constexpr, do_sb, do_sh, do_sn: tl.constexpr, heads, n, d: tl.constexpr,
    dv: tl.constexpr, chunks, segments, each,
    KIND: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ADDED: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: T columns of the gradient of the state of `each` chunks of one head, from those in first, if FIRST.

    x: queries; y: keys, of KIND 2 both as they read the state. Gives Y in `values`, the gradient of the state after each chunk
    in `states`, and, LAST, that of the row's first state. ADDED: instead, what segments make of no gradient, in `states`.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dv, T)
    column = (pid % tiles) * T
    segment = (pid // tiles) % segments
    bh = pid // (tiles * segments)
    head = (bh % heads).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    bh = bh.to(tl.int64)
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    r = tl.arange(0, C)
    at = tl.arange(0, D)
    slot = bh * segments + segment
    state = tl.zeros([D, T], tl.float32)
    if ADDED:
        if segment == 0:
            stop = begin  # nothing comes before it
    if FIRST:
        where, exists = state_at(first_ptr + slot * d * dv, d, dv, column, D, T)
        state = tl.load(where, mask=exists, other=0.0)
    x_base = x_ptr + b * x_sb + head * x_sh
    y_base = y_ptr + b * y_sb + head * y_sh
    do_base = do_ptr + b * do_sb + head * do_sh
    place = bh * chunks * C
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        i = stop - 1 - step
        start = i * C
        back = tokens(back_ptr + place * d, d, start, n, 0, d, C, D, True, WHOLE_D)
        mix = tl.load(square(mix_ptr + (bh * chunks + i) * C * C, C))
        do = tokens(do_base, do_sn, start, n, column, dv, C, T, WHOLE_N, WHOLE_T).to(TYPE)
        x = tokens(x_base, x_sn, start, n, 0, d, C, D, WHOLE_N, WHOLE_D).to(TYPE)
        y = tokens(y_base, y_sn, start, n, 0, d, C, D, WHOLE_N, WHOLE_D).to(TYPE)
        small = state.to(TYPE)
        values = added(mix, do, product(back, small, EXACT), EXACT)
        if not ADDED:
            cell, present = state_at(states_ptr + (bh * chunks + i) * d * dv, d, dv, column, D, T)
            if WHOLE_D and WHOLE_T:
                tl.store(cell, small)
            else:
                tl.store(cell, small, mask=present)
            keep(values_ptr + place * dv, dv, start, n, column, dv, values, C, T, True, WHOLE_T)
        if KIND == 2:
            if WHOLE_D:
                left = tl.load(left_ptr + (bh * chunks + i) * d + at)
            else:
                left = tl.load(left_ptr + (bh * chunks + i) * d + at, mask=at < d, other=1.0)
            state = added(tl.trans(x), do, state * left[:, None], EXACT)
            state = added(tl.trans(y), (-values).to(TYPE), state, EXACT)
        else:
            if KIND == 1:
                state = state * tl.load(left_ptr + bh * chunks + i)
                do = (do * tl.load(near_ptr + place + start + r)[:, None]).to(TYPE)
            gone = tl.load(gone_ptr + place + start + r)
            state = added(tl.trans(x), do, state, EXACT)
            state = added(tl.trans(y), (values * -gone[:, None]).to(TYPE), state, EXACT)
    if LAST:
        if segment == 0:
            where, exists = state_at(last_ptr + bh * d * dv, d, dv, column, D, T)
            tl.store(where, state, mask=exists)
    if ADDED:
        where, exists = state_at(states_ptr + slot * d * dv, d, dv, column, D, T)
        tl.store(where, state, mask=exists)


@triton.jit
def written(
    v_ptr, y, write_ptr, dv_ptr, dwrite_ptr, v_stride, write_stride, dv_stride, start, n, dv, WRITE: tl.constexpr,
    C: tl.constexpr, DV: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_DV: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of values and of how strongly they are written, from that of what is written."""
    if WRITE:
        v = tokens(v_ptr, v_stride, start, n, 0, dv, C, DV, WHOLE_N, WHOLE_DV)
        at = start + tl.arange(0, C)
        tl.store(dwrite_ptr + at, tl.sum(v.to(tl.float32) * y, 1), mask=at < n)
        y = y.to(tl.float32) * numbers(write_ptr, write_stride, start, n, C)[:, None]
    keep(dv_ptr, dv_stride, start, n, 0, dv, y, C, DV, WHOLE_N, WHOLE_DV)


@triton.jit
def gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, values_ptr, of_values_ptr, states_ptr,
    changes_ptr, near_ptr, far_ptr, left_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dwrite_ptr, derase_ptr, q_sb, q_sh,
    q_sn: tl.constexpr, k_sb, k_sh, k_sn: tl.constexpr, v_sb, v_sh, v_sn: tl.constexpr, do_sb, do_sh, do_sn: tl.constexpr, g_sb,
    g_sh, g_sn, write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn, dq_sb, dq_sh, dq_sn: tl.constexpr, dk_sb, dk_sh,
    dk_sn: tl.constexpr, dv_sb, dv_sh, dv_sn: tl.constexpr, documents_sb, heads, n, d: tl.constexpr, dv: tl.constexpr, chunks,
    DECAY: tl.constexpr, WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one head, with one decay a token or none.

    values, of_values: what was written, and its gradient; states, changes: the state before each chunk, and the gradient of
    that after it. What a token's decay changes is what is read from it on of what was written before it.
    """
    pid = tl.program_id(0)
    bh = pid // chunks
    i = pid % chunks
    start = i * C
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    bh = bh.to(tl.int64)
    r = tl.arange(0, C)
    there = tl.arange(0, DV)
    q_base = q_ptr + b * q_sb + head * q_sh
    k_base = k_ptr + b * k_sb + head * k_sh
    documents = documents_ptr + b * documents_sb
    place = bh * chunks * C
    do = tokens(do_ptr + b * do_sb + head * do_sh, do_sn, start, n, 0, dv, C, DV, WHOLE_N, WHOLE_DV).to(TYPE)
    y = tokens(of_values_ptr + place * dv, dv, start, n, 0, dv, C, DV, True, WHOLE_DV)
    values = tokens(values_ptr + place * dv, dv, start, n, 0, dv, C, DV, True, WHOLE_DV)
    written(
        v_ptr + b * v_sb + head * v_sh, y, write_ptr + b * write_sb + head * write_sh, dv_ptr + b * dv_sb + head * dv_sh,
        dwrite_ptr + bh * n, v_sn, write_sn, dv_sn, start, n, dv, WRITE, C, DV, WHOLE_N, WHOLE_DV,
    )  # fmt: skip
    erase = numbers(erase_ptr + b * erase_sb + head * erase_sh, erase_sn, start, n, C)
    between, near, far, left = left_between(decay_ptr + b * g_sb + head * g_sh, g_sn, documents, start, n, DECAY, DOCUMENTS, C)
    pairs = (product(do, tl.trans(values), EXACT) * between).to(TYPE)
    erased = -product(y, tl.trans(values), EXACT) * between
    erased = tl.where(r[:, None] > r[None, :], erased, 0.0)
    both = (erased * erase[:, None]).to(TYPE)
    erased = erased.to(TYPE)
    of_erase = tl.zeros([C], tl.float32)
    of_sum = tl.zeros([C], tl.float32)
    crossed = 0.0
    for column in tl.range(0, d, BLOCK, num_stages=STAGES):
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D).to(TYPE)
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D).to(TYPE)
        at = column + tl.arange(0, BLOCK)
        cell = (bh * chunks + i) * d * dv + at[:, None] * dv + there[None, :]
        if WHOLE_D and WHOLE_DV:
            state = tl.load(states_ptr + cell)
            change = tl.load(changes_ptr + cell)
        else:
            exists = (at < d)[:, None] & (there < dv)[None, :]
            state = tl.load(states_ptr + cell, mask=exists, other=0.0)
            change = tl.load(changes_ptr + cell, mask=exists, other=0.0)
        of_q = product(do, tl.trans(state), EXACT)
        of_reads = -product(y, tl.trans(state), EXACT)
        of_k = product(values, tl.trans(change), EXACT)
        if DECAY or DOCUMENTS:
            of_q *= near[:, None]
            of_reads *= near[:, None]
            of_k *= far[:, None]
        if DECAY:
            crossed += left * tl.sum(state.to(tl.float32) * change) + tl.sum(of_k * k)
        of_q = added(pairs, k, of_q, EXACT)
        of_reads = added(erased, k, of_reads, EXACT)
        of_k = added(tl.trans(pairs), q, of_k, EXACT)
        of_k = added(tl.trans(both), k, of_k, EXACT)
        of_one = tl.sum(of_reads * k, 1)
        of_erase += of_one
        if DECAY:
            of_sum += tl.sum(of_q * q - of_k * k, 1) + erase * of_one
        keep(dq_ptr + b * dq_sb + head * dq_sh, dq_sn, start, n, column, d, of_q, C, BLOCK, WHOLE_N, WHOLE_D)
        of_k += erase[:, None] * of_reads
        keep(dk_ptr + b * dk_sb + head * dk_sh, dk_sn, start, n, column, d, of_k, C, BLOCK, WHOLE_N, WHOLE_D)
    tl.store(derase_ptr + bh * n + start + r, of_erase, mask=start + r < n)
    if DECAY:
        later = r[:, None] >= r[None, :]
        if DOCUMENTS:
            own, _, last = met(documents, start, n, C)
            later = later & (own[:, None] == own[None, :])
            crossed = tl.where(own == last, crossed, 0.0)
        of_decay = tl.sum(tl.where(later, of_sum[:, None], 0.0), 0) + crossed
        if DOCUMENTS:
            previous = tl.load(documents + tl.maximum(tl.minimum(start + r, n - 1) - 1, 0))
            of_decay = tl.where(own == tl.where(start + r > 0, previous, 0), of_decay, 0.0)  # nothing was there to decay
        tl.store(dg_ptr + bh * n + start + r, of_decay, mask=start + r < n)
