"""What the delta rule's chunks are prepared of, and give gradients by, if each channel of keys has a decay of its own.

Walks are those of `delta` and `delta_backward`, of queries and keys that have their decay already. How products with decay
between are taken apart, so that no factor overflows, is in `channels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import added, product
from .channels import SLOW, beyond, halves, log_decay, pieces, slow, summed, to_middle, upto
from .delta import inverse, keep, met, numbers, solved, square, tokens
from .delta_backward import written


@triton.jit
def scored(q, k, much, little, inside, low, C: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """inside, low (C, C) plus q_r . k_s and k_r . k_s, each channel times what is left of it from s to r, for s <= r; what is
    above the diagonal means nothing, and low's diagonal neither. C = 2^LEVELS."""
    r = tl.arange(0, C)
    below = r[:, None] > r[None, :]
    for level in range(LEVELS):
        _, apart, left = halves(much, little, level, C, EXACT)
        y = (k * left).to(TYPE)
        inside += tl.where(apart & below, product((q * left).to(TYPE), tl.trans(y), EXACT), 0.0)
        low += tl.where(apart & below, product(y, tl.trans(y), EXACT), 0.0)
    inside += tl.where(r[:, None] == r[None, :], tl.sum(q.to(tl.float32) * k, 1)[:, None], 0.0)
    return inside, low


@triton.jit
def channel_chunk_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, x_ptr, w_ptr, u_ptr, mix_ptr, back_ptr, reads_ptr,
    keys_ptr, erasers_ptr, left_ptr, sums_ptr, inside_ptr, q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh, k_sn: tl.constexpr,
    v_sb, v_sh, v_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr, write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn,
    documents_sb, heads, n, d: tl.constexpr, dv: tl.constexpr, chunks,
    MEETS: tl.constexpr, BACK: tl.constexpr, KEPT: tl.constexpr, WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: what `chunk_kernel` makes, and queries and keys as they read the state before the chunk (BACK: keys
    times erase) and keys as they enter the state after it; left: what is left of the state, and sums of the decay, (b * h,
    chunks, d). KEPT: X and `inside` are. BACK: they are loaded. MEETS: of chunks whose decay is slow; without: of the others."""
    pid = tl.program_id(0)
    sums = sums_ptr + pid.to(tl.int64) * d
    if not MEETS:
        if slow(sums, 0, d, D):
            return
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
    matrix = pid.to(tl.int64) * C * C
    if BACK:
        x = tl.load(square(x_ptr + matrix, C))
        solving = x
        turned = tl.trans(x)
        mixed = product(turned, tl.trans(tl.load(square(inside_ptr + matrix, C))), EXACT)
        tl.store(square(mix_ptr + matrix, C), mixed.to(TYPE))
    else:
        low = tl.zeros([C, C], tl.float32)
        inside = tl.zeros([C, C], tl.float32)
        least = 0.0
        for column in tl.range(0, d, BLOCK, num_stages=STAGES):
            k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
            q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
            if MEETS:
                near, total = to_middle(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N)
                least = tl.minimum(least, tl.min(total, 0))
                at = column + tl.arange(0, BLOCK)
                tl.store(sums + at, total, mask=at < d)
                y = tl.trans((k * tl.exp2(-near)).to(TYPE))
                near = tl.exp2(near)
                inside = added((q * near).to(TYPE), y, inside, EXACT)
                low = added((k * near).to(TYPE), y, low, EXACT)
            else:
                much, little, _ = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
                inside, low = scored(q, k, much, little, inside, low, C, LEVELS, TYPE, EXACT)
        if MEETS:
            if -least >= 2 * SLOW:
                return
        x = inverse(tl.where(seen & (r[:, None] > r[None, :]), low * erase[:, None], 0.0), C, LEVELS, PRECISION)
        solving = x.to(TYPE)
        inside = tl.where(seen, inside, 0.0).to(TYPE)
        tl.store(square(mix_ptr + matrix, C), inside)
        if KEPT:
            tl.store(square(x_ptr + matrix, C), solving)
    for column in tl.range(0, d, BLOCK, num_stages=STAGES):
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
            back = product(turned, keys, EXACT)
            keep(back_ptr + place * d, d, start, n, column, d, back, C, BLOCK, True, WHOLE_D)
        at = column + tl.arange(0, BLOCK)
        tl.store(left_ptr + (bh.to(tl.int64) * chunks + i) * d + at, left, mask=at < d)
    solved(
        x, v_base, write_ptr + b * write_sb + head * write_sh, write_sn, u_ptr + place * dv, start, n, dv, BLOCK, WRITE, C,
        WHOLE_N, WHOLE_DV, TYPE, EXACT, v_sn,
    )  # fmt: skip


@triton.jit
def _pulled_apart(q, k, much, little, pairs, erased, turned, both, of_q, of_reads, of_k, level, C: tl.constexpr,
                  TYPE: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """What pairs of neighbouring stretches of 2^level tokens add, which meet at the border between them."""
    r = tl.arange(0, C)
    _, apart, left = halves(much, little, level, C, EXACT)
    before = apart & (r[:, None] > r[None, :])
    after = apart & (r[:, None] < r[None, :])
    x = (q * left).to(TYPE)
    y = (k * left).to(TYPE)
    of_q += left * product(tl.where(before, pairs, 0.0).to(TYPE), y, EXACT)
    of_reads += left * product(tl.where(before, erased, 0.0).to(TYPE), y, EXACT)
    found = product(tl.where(after, turned, 0.0).to(TYPE), x, EXACT)
    of_k += left * added(tl.where(after, both, 0.0).to(TYPE), y, found, EXACT)
    return of_q, of_reads, of_k


@triton.jit
def pulled(q, k, much, little, pairs, erased, turned, both, of_q, of_reads, of_k, C: tl.constexpr, LEVELS: tl.constexpr,
           TYPE: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Gradients (C, BLOCK) of queries, erasers and keys plus what comes of those of what they score.

    These are, below the diagonal, pairs of q with k and erased of erasers with k; transposed, turned and, times erase, both.
    """
    r = tl.arange(0, C)
    for level in range(LEVELS):
        of_q, of_reads, of_k = _pulled_apart(
            q, k, much, little, pairs, erased, turned, both, of_q, of_reads, of_k, level, C, TYPE, EXACT
        )
    own = tl.sum(tl.where(r[:, None] == r[None, :], pairs, 0.0).to(tl.float32), 1)[:, None]
    of_q += own * k
    of_k += own * q
    return of_q, of_reads, of_k


@triton.jit
def channel_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, values_ptr, of_values_ptr, states_ptr,
    changes_ptr, sums_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dwrite_ptr, derase_ptr, q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh,
    k_sn: tl.constexpr, v_sb, v_sh, v_sn: tl.constexpr, do_sb, do_sh, do_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr,
    write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn, dq_sb, dq_sh, dq_sn: tl.constexpr, dk_sb, dk_sh,
    dk_sn: tl.constexpr, dv_sb, dv_sh, dv_sn: tl.constexpr, dg_sb, dg_sh, dg_sn: tl.constexpr, documents_sb, heads, n,
    d: tl.constexpr, dv: tl.constexpr, chunks,
    MEETS: tl.constexpr, WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr, WHOLE_PART: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk of one head, as `gradient_kernel` makes them; MEETS: if its decay is slow, else if it is not."""
    pid = tl.program_id(0)
    if slow(sums_ptr + pid.to(tl.int64) * d, 0, d, D) != MEETS:
        return
    bh = pid // chunks
    i = pid % chunks
    start = i * C
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    bh = bh.to(tl.int64)
    r = tl.arange(0, C)
    q_base = q_ptr + b * q_sb + head * q_sh
    k_base = k_ptr + b * k_sb + head * k_sh
    decay_base = decay_ptr + b * g_sb + head * g_sh
    documents = documents_ptr + b * documents_sb
    place = bh * chunks * C
    do_base = do_ptr + b * do_sb + head * do_sh
    y_base = of_values_ptr + place * dv
    values_base = values_ptr + place * dv
    written(
        v_ptr + b * v_sb + head * v_sh, tokens(y_base, dv, start, n, 0, dv, C, DV, True, WHOLE_DV),
        write_ptr + b * write_sb + head * write_sh, dv_ptr + b * dv_sb + head * dv_sh,
        dwrite_ptr + bh * n, v_sn, write_sn, dv_sn, start, n, dv, WRITE, C, DV, WHOLE_N, WHOLE_DV,
    )  # fmt: skip
    erase = numbers(erase_ptr + b * erase_sb + head * erase_sh, erase_sn, start, n, C)
    seen = r[:, None] >= r[None, :]
    later = r[:, None] <= r[None, :]
    if DOCUMENTS:
        own, before, last = met(documents, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
        later = later & (own[:, None] == own[None, :])
    pairs = tl.zeros([C, C], tl.float32)
    erased = tl.zeros([C, C], tl.float32)
    for part in tl.range(0, dv, PART, num_stages=STAGES):
        do = tokens(do_base, do_sn, start, n, part, dv, C, PART, WHOLE_N, WHOLE_PART).to(TYPE)
        y = tokens(y_base, dv, start, n, part, dv, C, PART, True, WHOLE_PART)
        values = tokens(values_base, dv, start, n, part, dv, C, PART, True, WHOLE_PART)
        pairs = added(do, tl.trans(values), pairs, EXACT)
        erased = added(y, tl.trans(values), erased, EXACT)
    pairs = tl.where(seen, pairs, 0.0).to(TYPE)
    erased = tl.where(seen & (r[:, None] > r[None, :]), -erased, 0.0)
    turned = tl.trans(pairs)
    both = tl.trans((erased * erase[:, None]).to(TYPE))
    erased = erased.to(TYPE)
    of_erase = tl.zeros([C], tl.float32)
    for column in tl.range(0, d, BLOCK, num_stages=1):
        at = column + tl.arange(0, BLOCK)
        of_q = tl.zeros([C, BLOCK], tl.float32)
        of_reads = tl.zeros([C, BLOCK], tl.float32)
        of_k = tl.zeros([C, BLOCK], tl.float32)
        kept = tl.zeros([BLOCK], tl.float32)
        for part in tl.range(0, dv, PART, num_stages=STAGES):
            do = tokens(do_base, do_sn, start, n, part, dv, C, PART, WHOLE_N, WHOLE_PART).to(TYPE)
            y = tokens(y_base, dv, start, n, part, dv, C, PART, True, WHOLE_PART)
            values = tokens(values_base, dv, start, n, part, dv, C, PART, True, WHOLE_PART)
            there = part + tl.arange(0, PART)
            cell = (bh * chunks + i) * d * dv + at[:, None] * dv + there[None, :]
            if WHOLE_D and WHOLE_PART:
                state = tl.load(states_ptr + cell)
                change = tl.load(changes_ptr + cell)
            else:
                exists = (at < d)[:, None] & (there < dv)[None, :]
                state = tl.load(states_ptr + cell, mask=exists, other=0.0)
                change = tl.load(changes_ptr + cell, mask=exists, other=0.0)
            kept += tl.sum(state.to(tl.float32) * change, 1)
            of_q = added(do, tl.trans(state), of_q, EXACT)
            of_reads = added(y, tl.trans(state), of_reads, EXACT)
            of_k = added(values, tl.trans(change), of_k, EXACT)
        of_reads = -of_reads
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D)
        much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
        kept *= tl.exp2(total)
        if DOCUMENTS:
            kept = tl.where(before == last, kept, 0.0)
            of_q = tl.where((own == before)[:, None], of_q, 0.0)
            of_reads = tl.where((own == before)[:, None], of_reads, 0.0)
            of_k = tl.where((own == last)[:, None], of_k, 0.0)
        if MEETS:
            near = upto(much, little, C, EXACT) - 0.5 * total[None, :]
            half = tl.exp2(0.5 * total)[None, :]
            far = tl.exp2(-near)
            near = tl.exp2(near)
            of_k *= half
            kept += tl.sum(of_k * (k * far), 0)
            z = (k * far).to(TYPE)
            of_q = near * added(pairs, z, of_q * half, EXACT)
            of_reads = near * added(erased, z, of_reads * half, EXACT)
            of_k = added(turned, (q * near).to(TYPE), of_k, EXACT)
            of_k = far * added(both, (k * near).to(TYPE), of_k, EXACT)
        else:
            near = tl.exp2(upto(much, little, C, EXACT))
            of_q *= near
            of_reads *= near
            of_k *= tl.exp2(beyond(much, little, C, EXACT))
            kept += tl.sum(of_k * k, 0)
            of_q, of_reads, of_k = pulled(
                q, k, much, little, pairs, erased, turned, both, of_q, of_reads, of_k, C, LEVELS, TYPE, EXACT
            )
        keep(dq_ptr + b * dq_sb + head * dq_sh, dq_sn, start, n, column, d, of_q, C, BLOCK, WHOLE_N, WHOLE_D)
        of_one = of_reads * k
        of_erase += tl.sum(of_one, 1)
        of_sum = q * of_q - k * of_k + erase[:, None] * of_one
        of_k += erase[:, None] * of_reads
        keep(dk_ptr + b * dk_sb + head * dk_sh, dk_sn, start, n, column, d, of_k, C, BLOCK, WHOLE_N, WHOLE_D)
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
