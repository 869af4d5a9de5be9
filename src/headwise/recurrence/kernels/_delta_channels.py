"""What the delta rule's chunks are prepared of, and give gradients by, if each channel of keys has a decay of its own.

Walks are those of `delta` and `delta_backward`, of queries and keys that have their decay already. How products with decay
between are taken apart, so that no factor overflows, is in `channels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import added, product
from .channels import FINE, SLOW, beyond, from_middle, halves, log_decay, pieces, summed, upto
from .delta import inverse, keep, met, numbers, solved, square, tokens
from .delta_backward import written


@triton.jit
def scored(q, k, much, little, inside, low, C: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """inside, low (C, C) plus q_r . k_s and k_r . k_s, each channel times what is left of it from s to r, for s <= r; what is
    above the diagonal means nothing, and low's diagonal neither. C = 2^LEVELS."""
    r = tl.arange(0, C)
    below = r[:, None] > r[None, :]
    for level in range(FINE, LEVELS):
        _, apart, left = halves(much, little, level, C, EXACT)
        y = (k * left).to(TYPE)
        inside += tl.where(apart & below, product((q * left).to(TYPE), tl.trans(y), EXACT), 0.0)
        low += tl.where(apart & below, product(y, tl.trans(y), EXACT), 0.0)
    near, same = from_middle(much, little, C, EXACT)
    if tl.max(tl.max(tl.abs(near), 0), 0) < SLOW:
        y = tl.trans((k * tl.exp2(-near)).to(TYPE))
        near = tl.exp2(near)
        inside += tl.where(same, product((q * near).to(TYPE), y, EXACT), 0.0)
        low += tl.where(same, product((k * near).to(TYPE), y, EXACT), 0.0)
    else:
        for level in range(FINE):
            _, apart, left = halves(much, little, level, C, EXACT)
            y = (k * left).to(TYPE)
            inside += tl.where(apart & below, product((q * left).to(TYPE), tl.trans(y), EXACT), 0.0)
            low += tl.where(apart & below, product(y, tl.trans(y), EXACT), 0.0)
        inside += tl.where(r[:, None] == r[None, :], tl.sum(q.to(tl.float32) * k, 1)[:, None], 0.0)
    return inside, low


@triton.jit
def channel_chunk_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, x_ptr, w_ptr, u_ptr, mix_ptr, back_ptr, reads_ptr,
    keys_ptr, erasers_ptr, left_ptr, q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh, k_sn: tl.constexpr, v_sb, v_sh,
    v_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr, write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn, documents_sb,
    heads, n, d: tl.constexpr, dv: tl.constexpr, chunks,
    BACK: tl.constexpr, KEPT: tl.constexpr, WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, TYPE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: what `chunk_kernel` makes, and queries and keys as they read the state before the chunk (BACK: keys
    times erase) and keys as they enter the state after it; left: what is left of the state, (b * h, chunks, d)."""
    pid = tl.program_id(0)
    bh = pid // chunks
    i = pid % chunks
    start = i * C
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    r = tl.arange(0, C)
    q_base = q_ptr + b * q_sb + head * q_sh
    k_base = k_ptr + b * k_sb + head * k_sh
    v_base = v_ptr + b * v_sb + head * v_sh
    decay_base = decay_ptr + b * g_sb + head * g_sh
    place = bh.to(tl.int64) * chunks * C
    seen = r[:, None] >= r[None, :]
    if DOCUMENTS:
        own, before, last = met(documents_ptr + b * documents_sb, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
    erase = numbers(erase_ptr + b * erase_sb + head * erase_sh, erase_sn, start, n, C)
    low = tl.zeros([C, C], tl.float32)
    inside = tl.zeros([C, C], tl.float32)
    for column in range(0, d, BLOCK):
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
        if tl.max(-total, 0) < 2 * SLOW:  # queries and keys meet in the middle of the chunk
            near = upto(much, little, C, EXACT) - 0.5 * total[None, :]
            y = tl.trans((k * tl.exp2(-near)).to(TYPE))
            near = tl.exp2(near)
            inside += product((q * near).to(TYPE), y, EXACT)
            low += product((k * near).to(TYPE), y, EXACT)
        else:
            inside, low = scored(q, k, much, little, inside, low, C, LEVELS, TYPE, EXACT)
    matrix = (bh.to(tl.int64) * chunks + i) * C * C
    if BACK and KEPT:
        x = tl.load(square(x_ptr + matrix, C)).to(tl.float32)
    else:
        x = inverse(tl.where(seen & (r[:, None] > r[None, :]), low * erase[:, None], 0.0), C, LEVELS, PRECISION)
        if KEPT:
            tl.store(square(x_ptr + matrix, C), x.to(TYPE))
    inside = tl.where(seen, inside, 0.0).to(TYPE)
    cell = square(mix_ptr + matrix, C)
    solving = x.to(TYPE)
    if BACK:
        tl.store(cell, tl.trans(product(inside, solving, EXACT)).to(TYPE))
    else:
        tl.store(cell, inside)
    for column in range(0, d, BLOCK):
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
        near = tl.exp2(upto(much, little, C, EXACT))
        far = tl.exp2(beyond(much, little, C, EXACT))
        left = tl.exp2(total)
        if DOCUMENTS:
            near = tl.where((own == before)[:, None], near, 0.0)
            far = tl.where((own == last)[:, None], far, 0.0)
            left = tl.where(before == last, left, 0.0)
        keys = (k * far).to(TYPE)
        erasers = (k * (near * erase[:, None])).to(TYPE)
        keep(reads_ptr + place * d, d, start, n, column, d, q * near, C, BLOCK, True, WHOLE_D)
        keep(keys_ptr + place * d, d, start, n, column, d, keys, C, BLOCK, True, WHOLE_D)
        keep(w_ptr + place * d, d, start, n, column, d, product(solving, erasers, EXACT), C, BLOCK, True, WHOLE_D)
        if BACK:
            keep(erasers_ptr + place * d, d, start, n, column, d, erasers, C, BLOCK, True, WHOLE_D)
            back = product(tl.trans(solving), keys, EXACT)
            keep(back_ptr + place * d, d, start, n, column, d, back, C, BLOCK, True, WHOLE_D)
        at = column + tl.arange(0, BLOCK)
        tl.store(left_ptr + (bh.to(tl.int64) * chunks + i) * d + at, left, mask=at < d)
    solved(
        x, v_base, write_ptr + b * write_sb + head * write_sh, write_sn, u_ptr + place * dv, start, n, dv, BLOCK, WRITE, C,
        WHOLE_N, WHOLE_DV, TYPE, EXACT, v_sn,
    )  # fmt: skip


@triton.jit
def _pulled_apart(q, k, much, little, pairs, erased, both, of_q, of_reads, of_k, level, C: tl.constexpr, TYPE: tl.constexpr,
                  EXACT: tl.constexpr):  # fmt: skip
    """What pairs of neighbouring stretches of 2^level tokens add, which meet at the border between them."""
    r = tl.arange(0, C)
    _, apart, left = halves(much, little, level, C, EXACT)
    apart = apart & (r[:, None] > r[None, :])
    x = (q * left).to(TYPE)
    y = (k * left).to(TYPE)
    these = tl.where(apart, pairs, 0.0).to(TYPE)
    of_q += left * product(these, y, EXACT)
    of_reads += left * product(tl.where(apart, erased, 0.0).to(TYPE), y, EXACT)
    found = product(tl.trans(these), x, EXACT)
    of_k += left * added(tl.trans(tl.where(apart, both, 0.0).to(TYPE)), y, found, EXACT)
    return of_q, of_reads, of_k


@triton.jit
def pulled(q, k, much, little, pairs, erased, both, of_q, of_reads, of_k, C: tl.constexpr, LEVELS: tl.constexpr,
           TYPE: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Gradients (C, BLOCK) of queries, erasers and keys plus what comes of those of what they score.

    These are, below the diagonal, pairs of q with k and erased of erasers with k; both: erased times erase.
    """
    r = tl.arange(0, C)
    for level in range(FINE, LEVELS):
        of_q, of_reads, of_k = _pulled_apart(q, k, much, little, pairs, erased, both, of_q, of_reads, of_k, level, C, TYPE, EXACT)
    near, same = from_middle(much, little, C, EXACT)
    if tl.max(tl.max(tl.abs(near), 0), 0) < SLOW:
        far = tl.exp2(-near)
        near = tl.exp2(near)
        these = tl.where(same, pairs, 0.0).to(TYPE)
        y = (k * far).to(TYPE)
        of_q += near * product(these, y, EXACT)
        of_reads += near * product(tl.where(same, erased, 0.0).to(TYPE), y, EXACT)
        found = product(tl.trans(these), (q * near).to(TYPE), EXACT)
        of_k += far * added(tl.trans(tl.where(same, both, 0.0).to(TYPE)), (k * near).to(TYPE), found, EXACT)
    else:
        for level in range(FINE):
            of_q, of_reads, of_k = _pulled_apart(
                q, k, much, little, pairs, erased, both, of_q, of_reads, of_k, level, C, TYPE, EXACT
            )
        own = tl.sum(tl.where(r[:, None] == r[None, :], pairs, 0.0).to(tl.float32), 1)[:, None]
        of_q += own * k
        of_k += own * q
    return of_q, of_reads, of_k


@triton.jit
def channel_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, values_ptr, of_values_ptr, states_ptr,
    changes_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dwrite_ptr, derase_ptr, q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh,
    k_sn: tl.constexpr, v_sb, v_sh, v_sn: tl.constexpr, do_sb, do_sh, do_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr,
    write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn, dq_sb, dq_sh, dq_sn: tl.constexpr, dk_sb, dk_sh,
    dk_sn: tl.constexpr, dv_sb, dv_sh, dv_sn: tl.constexpr, dg_sb, dg_sh, dg_sn: tl.constexpr, documents_sb, heads, n,
    d: tl.constexpr, dv: tl.constexpr, chunks,
    WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one head, as `gradient_kernel` makes them."""
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
    decay_base = decay_ptr + b * g_sb + head * g_sh
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
    seen = r[:, None] >= r[None, :]
    if DOCUMENTS:
        own, before, last = met(documents, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
    pairs = tl.where(seen, product(do, tl.trans(values), EXACT), 0.0).to(TYPE)
    erased = tl.where(seen & (r[:, None] > r[None, :]), -product(y, tl.trans(values), EXACT), 0.0)
    both = (erased * erase[:, None]).to(TYPE)
    erased = erased.to(TYPE)
    of_erase = tl.zeros([C], tl.float32)
    for column in range(0, d, BLOCK):
        at = column + tl.arange(0, BLOCK)
        cell = (bh * chunks + i) * d * dv + at[:, None] * dv + there[None, :]
        if WHOLE_D and WHOLE_DV:
            state = tl.load(states_ptr + cell)
            change = tl.load(changes_ptr + cell)
        else:
            exists = (at < d)[:, None] & (there < dv)[None, :]
            state = tl.load(states_ptr + cell, mask=exists, other=0.0)
            change = tl.load(changes_ptr + cell, mask=exists, other=0.0)
        kept = tl.sum(state.to(tl.float32) * change, 1)
        of_q = product(do, tl.trans(state), EXACT)
        of_reads = -product(y, tl.trans(state), EXACT)
        of_k = product(values, tl.trans(change), EXACT)
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
        kept *= tl.exp2(total)
        if DOCUMENTS:
            kept = tl.where(before == last, kept, 0.0)
            of_q = tl.where((own == before)[:, None], of_q, 0.0)
            of_reads = tl.where((own == before)[:, None], of_reads, 0.0)
            of_k = tl.where((own == last)[:, None], of_k, 0.0)
        if tl.max(-total, 0) < 2 * SLOW:
            near = upto(much, little, C, EXACT) - 0.5 * total[None, :]
            half = tl.exp2(0.5 * total)[None, :]
            far = tl.exp2(-near)
            near = tl.exp2(near)
            of_k *= half
            kept += tl.sum(of_k * (k * far), 0)
            z = (k * far).to(TYPE)
            of_q = near * added(pairs, z, of_q * half, EXACT)
            of_reads = near * added(erased, z, of_reads * half, EXACT)
            of_k = added(tl.trans(pairs), (q * near).to(TYPE), of_k, EXACT)
            of_k = far * added(tl.trans(both), (k * near).to(TYPE), of_k, EXACT)
        else:
            near = tl.exp2(upto(much, little, C, EXACT))
            of_q *= near
            of_reads *= near
            of_k *= tl.exp2(beyond(much, little, C, EXACT))
            kept += tl.sum(of_k * k, 0)
            of_q, of_reads, of_k = pulled(q, k, much, little, pairs, erased, both, of_q, of_reads, of_k, C, LEVELS, TYPE, EXACT)
        keep(dq_ptr + b * dq_sb + head * dq_sh, dq_sn, start, n, column, d, of_q, C, BLOCK, WHOLE_N, WHOLE_D)
        of_one = of_reads * k
        of_erase += tl.sum(of_one, 1)
        of_sum = q * of_q - k * of_k + erase[:, None] * of_one
        of_k += erase[:, None] * of_reads
        keep(dk_ptr + b * dk_sb + head * dk_sh, dk_sn, start, n, column, d, of_k, C, BLOCK, WHOLE_N, WHOLE_D)
        later = r[:, None] <= r[None, :]
        if DOCUMENTS:
            later = later & (own[:, None] == own[None, :])
        much, little = pieces(of_sum, EXACT)
        of_decay = summed(tl.where(later, 1.0, 0.0), much, little, EXACT)
        if DOCUMENTS:
            previous = tl.load(documents + tl.maximum(tl.minimum(start + r, n - 1) - 1, 0))
            begins = own != tl.where(start + r > 0, previous, 0)  # nothing was there to decay
            of_decay += tl.where((own == last)[:, None], kept[None, :], 0.0)
            of_decay = tl.where(begins[:, None], 0.0, of_decay)
        else:
            of_decay += kept[None, :]
        keep(dg_ptr + b * dg_sb + head * dg_sh, dg_sn, start, n, column, d, of_decay, C, BLOCK, WHOLE_N, WHOLE_D)
    tl.store(derase_ptr + bh * n + start + r, of_erase, mask=start + r < n)
