"""Attention of a few new tokens over pages of keys and values, for sequences of any lengths in one launch; and the merge.

One program: an item of work, a run of pages that the query rows of one or more sequences read. Heads of a group, new tokens
and sequences that share the pages are rows of one product. Scores are kept in base 2, so `scale` arrives multiplied by
log2(e). Lengths are read on the device: what a program is given to do may be older than they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .biased import LN2, LOW, NEG, added, rows_of
from .parts import LOG2E, base2, product

FIELDS = tl.constexpr(8)  # int32 of an item: see `paged_kernel`


@triton.jit
def _step(
    acc, top, total, q, limit, held, j, page, k_ptr, v_ptr, k_sp, k_st, v_sp, v_st, d, dv, scale,
    P: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over N more tokens, from slot j of the sequence on, which are in one page."""
    inside = j + tl.arange(0, N) < held  # what is behind the last token may be anything: it is read as zeros
    slot = j % P + tl.arange(0, N)
    k = rows_of(k_ptr + page.to(tl.int64) * k_sp, k_st, slot, inside, d, BLOCK_D, WHOLE_D, MASKED)
    s = base2(product(q, tl.trans(k), EXACT), scale, SOFTCAP)
    if MASKED:
        s = tl.where((j + tl.arange(0, N))[None, :] < limit[:, None], s, NEG)
    peak = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - tl.maximum(peak, LOW)[:, None])  # hidden ones: 2^(NEG - LOW) = 0, also where nothing was seen yet
    alpha = tl.exp2(top - peak)
    total = total * alpha + tl.sum(p, 1)
    v = rows_of(v_ptr + page.to(tl.int64) * v_sp, v_st, slot, inside, dv, BLOCK_DV, WHOLE_DV, MASKED)
    acc = added(p.to(v.dtype), v, acc * alpha[:, None], EXACT)
    return acc, peak, total


@triton.jit(do_not_specialize=["width"])
def paged_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, item_ptr, sink_ptr, out_ptr, lse_ptr,
    q_sb, q_sh, q_sn, k_sp, k_st, v_sp, v_st, table_s, width, blocks, kv_heads, group, n, d, dv, scale,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: M query rows of an item, which says: the sequence whose table has the pages; the first of them and how
    many; the first batch row that reads them and how many; and where results go, counted in rows of one sequence.

    width: of the table. LAST: results are outputs; else they are parts that `merge_kernel` puts together. EARLY: what comes
    next may be launched before the results are there.
    """
    item = item_ptr + (tl.program_id(0) // blocks) * FIELDS
    each = group * n  # query rows of one sequence: heads of the group, then tokens
    count = tl.load(item + 4) * each
    x = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    if (tl.program_id(0) % blocks) * M >= count:
        return
    sequence = tl.load(item)
    first = tl.load(item + 1)
    pages = tl.load(item + 2)
    kv = sequence % kv_heads
    inside = x < count
    b = tl.load(item + 3) + x // each
    head = kv * group + (x % each) // n
    q_row = q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh + (x % n).to(tl.int64) * q_sn
    c = tl.arange(0, BLOCK_D)
    q = tl.load(q_row[:, None] + c[None, :], mask=inside[:, None] & (c < d)[None, :], other=0.0)
    table = table_ptr + sequence.to(tl.int64) * table_s + first
    page = tl.load(table, mask=first < width, other=0)
    # Tokens that a row sees: all that its sequence holds, less the new ones after its own.
    limit = tl.load(length_ptr + b * kv_heads + kv, mask=inside, other=0) - (n - 1) + x % n
    held = tl.max(tl.where(inside, limit, 0))
    least = tl.min(tl.where(inside, limit, held))

    begin = first * P
    end = tl.minimum(held, (first + tl.minimum(pages, tl.cdiv(held, P))) * P)
    full = tl.maximum(tl.minimum(least, end) - begin, 0) // N
    stop = tl.cdiv(tl.maximum(end - begin, 0), N)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    top = tl.full([M], NEG, tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(0, full, num_stages=STAGES):
        after = tl.load(table + (tile + 1) * N // P, mask=tile + 1 < stop, other=0)
        acc, top, total = _step(
            acc, top, total, q, limit, end, begin + tile * N, page, k_ptr, v_ptr, k_sp, k_st, v_sp, v_st, d, dv, scale,
            P, N, SOFTCAP, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, False,
        )  # fmt: skip
        page = after
    for tile in tl.range(full, stop, num_stages=1):
        page = tl.load(table + tile * N // P)
        acc, top, total = _step(
            acc, top, total, q, limit, end, begin + tile * N, page, k_ptr, v_ptr, k_sp, k_st, v_sp, v_st, d, dv, scale,
            P, N, SOFTCAP, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
        )  # fmt: skip

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    some = total > 0.0
    whole = tl.where(some, total, 1.0)
    inverse = tl.where(some, 1.0 / whole, 0.0)
    if SINKS and LAST:
        extra = tl.load(sink_ptr + head, mask=inside, other=0.0) * LOG2E
        peak = tl.maximum(top, extra)
        shrink = tl.exp2(top - peak)
        whole = tl.where(some, total * shrink + tl.exp2(extra - peak), 1.0)
        inverse = tl.where(some, shrink / whole, 0.0)
        top = peak
    place = tl.load(item + 5).to(tl.int64) * each + x
    lse = (tl.log2(whole) + top) * LN2
    tl.store(lse_ptr + place, tl.where(some, lse, float("-inf")), mask=inside)
    e = tl.arange(0, BLOCK_DV)
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * dv + e[None, :], out, mask=inside[:, None] & (e < dv)[None, :])


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, offset_ptr, start_ptr, sink_ptr, out_ptr, lse_ptr, blocks, kv_heads, group, n, dv,
    PARTS: tl.constexpr, ORDERED: tl.constexpr, SINKS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: some columns of one query row of one sequence, put together from its parts, in their order.

    Parts of sequence s start at `start_ptr[offset_ptr[s] .. offset_ptr[s + 1]]`, counted in rows of one sequence; ORDERED: at
    offset_ptr[s] .. offset_ptr[s + 1]. EARLY: launched before the parts are there.
    """
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    each = group * n
    sequence = row // each
    begin = tl.load(offset_ptr + sequence)
    end = tl.load(offset_ptr + sequence + 1)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], tl.float32)
    top = tl.full([1], NEG, tl.float32)
    total = tl.zeros([1], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for at in tl.range(begin, end, PARTS):
        part = at + tl.arange(0, PARTS)
        start = part
        if not ORDERED:
            start = tl.load(start_ptr + part, mask=part < end, other=0)
        place = start.to(tl.int64) * each + row % each
        lse = tl.load(part_lse_ptr + place, mask=part < end, other=float("-inf")) * LOG2E
        out = tl.load(part_ptr + place[:, None] * dv + c[None, :], mask=(part < end)[:, None] & (c < dv)[None, :], other=0.0)
        some = lse > NEG
        peak = tl.maximum(top, tl.max(tl.where(some, lse, NEG), 0))
        weight = tl.where(some, tl.exp2(lse - peak), 0.0)
        alpha = tl.exp2(top - peak)
        acc = acc * alpha + tl.sum(out * weight[:, None], 0)
        total = total * alpha + tl.sum(weight, 0)
        top = peak
    some = total > 0.0
    if SINKS:
        extra = tl.load(sink_ptr + (sequence % kv_heads) * group + (row % each) // n) * LOG2E
        peak = tl.maximum(top, extra)
        shrink = tl.exp2(top - peak)
        acc *= shrink
        total = total * shrink + tl.exp2(extra - peak)
        top = peak
    whole = tl.where(some, total, 1.0)
    lse = tl.where(some, (tl.log2(whole) + top) * LN2, float("-inf"))
    tl.store(lse_ptr + row + tl.arange(0, 1), lse, mask=block + tl.arange(0, 1) == 0)
    out = acc * tl.where(some, 1.0 / whole, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * dv + c, out.to(out_ptr.dtype.element_ty), mask=c < dv)
