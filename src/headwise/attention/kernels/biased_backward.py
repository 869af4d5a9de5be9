"""Gradients of the attention in biased.py, every one of them summed in a fixed order: the same bits every time.

Two sweeps recompute the weights from the log-sum-exps: one owns a tile of keys and adds up its queries (of all heads that
share the keys), the other owns a block of queries and adds up its keys. Nothing is added by two programs: what all
programs of a head share (its slope, its table) is written in parts and summed afterwards.

Diagonals. The gradient of a table is the sum of each diagonal of the scores' gradient. In a square tile of B x B, row r is
turned left by r, after which column u holds two diagonals: above the break that of distance base - u, below it that of
distance base + B - u, where base is the place of the first query less that of the first key. The next tile's base is lower
by B, so that its lower half continues this tile's upper half: the sum is carried there and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .biased import added, biased, distances, far_off, key_spans, masked_tile, rows_of, shown
from .parts import LOG2E, base2, log_sums, product


@triton.jit
def delta_kernel(out_ptr, grad_ptr, delta_ptr, grad_sb, grad_sh, grad_sn, heads, n, dv, M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """(rows, n): outputs . their gradients, which is what the weights' gradients are compared to."""
    blocks = tl.cdiv(n, M)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    inside = i < n
    grad_base = grad_ptr + row // heads * grad_sb + row % heads * grad_sh
    grad = rows_of(grad_base, grad_sn, i, inside, dv, BLOCK_DV, False, True).to(tl.float32)
    out = rows_of(out_ptr + row * n * dv, dv, i, inside, dv, BLOCK_DV, False, True).to(tl.float32)
    tl.store(delta_ptr + row * n + i, tl.sum(out * grad, 1), mask=inside)


@triton.jit
def sum_kernel(parts_ptr, sums_ptr, count, width, BLOCK: tl.constexpr):
    """sums (rows, width) += parts (rows, count, width), one after the other: in whatever portions they come, the same bits."""
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    c = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums_ptr + row * width + c, mask=c < width, other=0.0)
    for part in range(count):
        total += tl.load(parts_ptr + (row * count + part) * width + c, mask=c < width, other=0.0)
    tl.store(sums_ptr + row * width + c, total, mask=c < width)


@triton.jit
def _scores_gradient(a, b, a_out, b_out, seen, lse, delta, place, there, key, low, high, slope, table_ptr, reach, scale,
                     SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, TABLE: tl.constexpr, LINEAR: tl.constexpr,
                     ALIGNED: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Of the tile a @ b': (weights, gradient of the scores after cap and biases, gradient of scale * products before them)."""
    z = base2(product(a, tl.trans(b), EXACT), scale, SOFTCAP)
    if LINEAR:
        lse = lse + far_off(slope, place, key)
    p = tl.exp2(biased(z, place, there, key, low, high, slope, table_ptr, reach, SLOPES, TABLE, LINEAR, ALIGNED) - lse)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (product(a_out, tl.trans(b_out), EXACT) - delta)
    inner = ds
    if SOFTCAP > 0.0:
        t = z * (1.0 / (SOFTCAP * LOG2E))
        inner = ds * (1.0 - t * t)
    return p, ds, inner


# ---- keys and values -----------------------------------------------------------------------------------------------------


@triton.jit
def query_spans(first, n, offset, window, sink, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr,
                DOCUMENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Blocks of queries that reach the N keys from `first` on: (low, edge, end, stop); edge..end see all of them."""
    low = 0
    stop = tl.cdiv(n, M)
    if ALIGNED and CAUSAL:
        low = tl.maximum(first - offset, 0) // M
    if ALIGNED and WINDOWED:
        near_stop = tl.minimum(stop, tl.cdiv(tl.maximum(first + N - 1 + window - offset, 0), M))
        near_low = tl.maximum(low, tl.maximum(first - window + 1 - offset, 0) // M)
        stop = tl.where(first >= sink, near_stop, stop)  # a sink is read from everywhere
        low = tl.where(first >= sink, near_low, low)
    low = tl.minimum(low, stop)
    edge = stop
    end = stop
    if ALIGNED and not DOCUMENTS:
        edge = low
        end = n // M
        if CAUSAL:
            edge = tl.maximum(edge, tl.cdiv(tl.maximum(first + N - 1 - offset, 0), M))
        if WINDOWED:
            near_end = tl.minimum(end, tl.maximum(first + window - offset, 0) // M)
            near_edge = tl.maximum(edge, tl.cdiv(tl.maximum(first + N - window - offset, 0), M))
            end = tl.where(first + N <= sink, end, near_end)  # nothing but sinks
            edge = tl.where(first + N <= sink, edge, near_edge)
        edge = tl.minimum(edge, stop)
        end = tl.minimum(tl.maximum(end, edge), stop)
    return low, edge, end, stop


@triton.jit
def _key_step(
    dk, dv_, k, v, first, there, doc, whole, block, q_base, g_base, q_sn, g_sn, lse_ptr, delta_ptr, row, query_pos_ptr,
    query_doc_ptr, slope, table_ptr, reach, n, d, dv, offset, scale, window, sink,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what one block of queries gives the keys and the values. Queries that are not there have weights of zero."""
    i = block * M + tl.arange(0, M)
    inside = i < n
    q = rows_of(q_base, q_sn, i, inside, d, BLOCK_D, WHOLE_D, MASKED)
    grad = rows_of(g_base, g_sn, i, inside, dv, BLOCK_DV, WHOLE_DV, MASKED)
    lse = log_sums(lse_ptr, row, n, i, inside)
    delta = tl.load(delta_ptr + row.to(tl.int64) * n + i, mask=inside, other=0.0)
    place = i + offset
    if not ALIGNED:
        place = tl.load(query_pos_ptr + i, mask=inside, other=0)
    own = place
    if DOCUMENTS:
        own = tl.load(query_doc_ptr + i, mask=inside, other=-1)
    seen = whole[:, None]
    if MASKED:
        seen = shown(whole[:, None], place[None, :], there[:, None], own[None, :], doc[:, None], window, sink,
                     CAUSAL, WINDOWED, DOCUMENTS)  # fmt: skip
    low, high = distances(block * M + offset, first, M, N, ALIGNED)
    p, _, inner = _scores_gradient(k, q, v, grad, seen, lse[None, :], delta[None, :], place[None, :], there[:, None],
                                   first, low, high, slope, table_ptr, reach, scale, SOFTCAP, SLOPES, TABLE,
                                   SLOPES and CAUSAL and ALIGNED, ALIGNED, EXACT, MASKED)  # fmt: skip
    return added(inner.to(q.dtype), q, dk, EXACT), added(p.to(grad.dtype), grad, dv_, EXACT)


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr, slope_ptr, table_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, g_sb, g_sh, g_sn, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k, table_sh,
    heads, kv_heads, n, m, d, dv, scale, unit, window, sink, reach,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: gradients of N keys and values, from the queries of all heads that read them. unit: scale, not in base 2."""
    tiles = tl.cdiv(m, N)
    tile = tl.program_id(0) % tiles  # where causal, the first keys have the most queries: long ones first
    kv_row = tl.program_id(0) // tiles
    b = kv_row // kv_heads
    kv = kv_row % kv_heads
    group = heads // kv_heads
    j = tile * N + tl.arange(0, N)
    whole = j < m
    there = j
    if not ALIGNED:
        there = tl.load(key_pos_ptr + b * pos_sb_k + j, mask=whole, other=-1)
        whole = there >= 0
    doc = there
    if DOCUMENTS:
        doc = tl.load(key_doc_ptr + b * doc_sb_k + j, mask=j < m, other=-2)
    k = rows_of(k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh, k_sn, j, whole, d, BLOCK_D, WHOLE_D, True)
    v = rows_of(v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh, v_sn, j, whole, dv, BLOCK_DV, WHOLE_DV, True)
    query_pos_ptr += b * pos_sb_q
    query_doc_ptr += b * doc_sb_q
    offset = m - n
    first = tile * N
    low, edge, end, stop = query_spans(first, n, offset, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, M, N)
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv_ = tl.zeros([N, BLOCK_DV], tl.float32)
    for g in range(group):
        head = kv * group + g
        row = b * heads + head
        q_base = q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
        g_base = grad_ptr + b.to(tl.int64) * g_sb + head.to(tl.int64) * g_sh
        own_table = table_ptr + head * table_sh
        slope = 0.0
        if SLOPES:
            slope = tl.load(slope_ptr + head)
        for step in tl.range(0, edge - low + stop - end, num_stages=STAGES):
            block = tl.where(step < edge - low, low + step, end + step - (edge - low))
            dk, dv_ = _key_step(
                dk, dv_, k, v, first, there, doc, whole, block, q_base, g_base, q_sn, g_sn, lse_ptr, delta_ptr, row,
                query_pos_ptr, query_doc_ptr, slope, own_table, reach, n, d, dv, offset, scale, window, sink,
                CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE,
                M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
            )  # fmt: skip
        for block in tl.range(edge, end, num_stages=STAGES):
            dk, dv_ = _key_step(
                dk, dv_, k, v, first, there, doc, whole, block, q_base, g_base, q_sn, g_sn, lse_ptr, delta_ptr, row,
                query_pos_ptr, query_doc_ptr, slope, own_table, reach, n, d, dv, offset, scale, window, sink,
                CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE,
                M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, False,
            )  # fmt: skip
    at = kv_row.to(tl.int64) * m + j[:, None]
    c = tl.arange(0, BLOCK_D)
    tl.store(dk_ptr + at * d + c[None, :], (dk * unit).to(dk_ptr.dtype.element_ty), mask=(j < m)[:, None] & (c < d)[None, :])
    cv = tl.arange(0, BLOCK_DV)
    tl.store(dv_ptr + at * dv + cv[None, :], dv_.to(dv_ptr.dtype.element_ty), mask=(j < m)[:, None] & (cv < dv)[None, :])


# ---- queries, slopes and tables ------------------------------------------------------------------------------------------


@triton.jit
def _query_step(
    dq, slope_sum, q, grad, lse, delta, first, place, own, tile, k_base, v_base, k_sn, v_sn, key_pos_ptr, key_doc_ptr,
    slope, table_ptr, reach, m, d, dv, scale, window, sink,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, SLOPES_GRAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys gives the queries; also the gradient of the tile's scores after cap and biases."""
    j = tile * N + tl.arange(0, N)
    inside = j < m
    there = j
    if not ALIGNED:
        there = tl.load(key_pos_ptr + j, mask=inside, other=-1)
        inside = there >= 0
    k = rows_of(k_base, k_sn, j, inside, d, BLOCK_D, WHOLE_D, MASKED)
    v = rows_of(v_base, v_sn, j, inside, dv, BLOCK_DV, WHOLE_DV, MASKED)
    seen = inside[None, :]
    if MASKED:
        doc = there
        if DOCUMENTS:
            doc = tl.load(key_doc_ptr + j, mask=j < m, other=-2)
        seen = shown(inside[None, :], place[:, None], there[None, :], own[:, None], doc[None, :], window, sink,
                     CAUSAL, WINDOWED, DOCUMENTS)  # fmt: skip
    low, high = distances(first, tile * N, M, N, ALIGNED)
    _, ds, inner = _scores_gradient(q, k, grad, v, seen, lse[:, None], delta[:, None], place[:, None], there[None, :],
                                    tile * N, low, high, slope, table_ptr, reach, scale, SOFTCAP, SLOPES, TABLE,
                                    SLOPES and CAUSAL and ALIGNED, ALIGNED, EXACT, MASKED)  # fmt: skip
    if SLOPES_GRAD:
        slope_sum -= tl.sum(ds * tl.abs(place.to(tl.float32)[:, None] - there.to(tl.float32)[None, :]), 1)
    return added(inner.to(k.dtype), k, dq, EXACT), slope_sum, ds


@triton.jit
def _store_segment(parts_ptr, segment, segments, value, B: tl.constexpr):
    """Writes the sums of B diagonals, u counting down from the longest distance: in memory they ascend. Not outside of parts."""
    at = B - 1 - tl.arange(0, B) + segment * B
    tl.store(parts_ptr + at, value, mask=(at >= 0) & (at < segments * B))


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, sums_ptr, parts_ptr,
    query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr, slope_ptr, table_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, g_sb, g_sh, g_sn, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k, table_sh,
    sums_stride, heads, kv_heads, n, m, d, dv, scale, unit, window, sink, reach, first_row, first_block, count,
    first_segment, segments,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, SLOPES_GRAD: tl.constexpr, TABLE_GRAD: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: gradients of M queries of one head, and this block's part of those of its slope and its table.

    sums (3, rows, blocks): of the slope, and of the table's last and first entry from tiles wholly beyond its reach. parts
    (rows, count, segments * B): diagonals within reach; segment `first_segment` + s has distances up to
    (first_segment + s) * B + m - n. Runs rows from `first_row` on, and `count` blocks from `first_block` on.
    """
    pid = tl.program_id(0)
    row = first_row + pid // count
    local = pid % count
    if CAUSAL:
        local = count - 1 - local  # long rows first
    block = first_block + local
    b = row // heads
    head = row % heads
    kv = head // (heads // kv_heads)
    i = block * M + tl.arange(0, M)
    inside = i < n
    q = rows_of(q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, q_sn, i, inside, d, BLOCK_D, WHOLE_D, True)
    grad = rows_of(grad_ptr + b.to(tl.int64) * g_sb + head.to(tl.int64) * g_sh, g_sn, i, inside, dv, BLOCK_DV, WHOLE_DV, True)
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    v_base = v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh
    key_pos_ptr += b * pos_sb_k
    key_doc_ptr += b * doc_sb_k
    table_ptr += head * table_sh
    lse = log_sums(lse_ptr, row, n, i, inside)
    delta = tl.load(delta_ptr + row.to(tl.int64) * n + i, mask=inside, other=0.0)
    place = i + m - n
    if not ALIGNED:
        place = tl.load(query_pos_ptr + b * pos_sb_q + i, mask=inside, other=0)
    own = place
    if DOCUMENTS:
        own = tl.load(query_doc_ptr + b * doc_sb_q + i, mask=inside, other=-1)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slope_ptr + head)

    low = block * M + m - n
    head_tiles, begin, edge, end, stop = key_spans(low, low + M - 1, m, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, N)
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    slope_sum = tl.zeros([M], tl.float32)
    sums = sums_ptr + row.to(tl.int64) * tl.cdiv(n, M) + block
    if TABLE_GRAD:
        # tiles in order of their keys: `left` are all farther back than the table reaches, those from `right` on farther ahead
        left = tl.maximum(low - reach + 1, 0) // N
        right = tl.maximum(low + reach + 2 * N - 2, 0) // N
        near = tl.minimum(head_tiles, left) + tl.minimum(tl.maximum(left - begin, 0), stop - begin)
        near_stop = tl.minimum(head_tiles, right) + tl.minimum(tl.maximum(right - begin, 0), stop - begin)
        far_left = tl.zeros([M], tl.float32)
        far_right = tl.zeros([M], tl.float32)
        for step in tl.range(0, near + head_tiles + stop - begin - near_stop, num_stages=STAGES):
            g = tl.where(step >= near, near_stop + step - near, step)
            tile = tl.where(g >= head_tiles, begin + g - head_tiles, g)
            dq, slope_sum, ds = _query_step(
                dq, slope_sum, q, grad, lse, delta, low, place, own, tile, k_base, v_base, k_sn, v_sn, key_pos_ptr, key_doc_ptr,
                slope, table_ptr, reach, m, d, dv, scale, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP,
                SLOPES, TABLE, SLOPES_GRAD, M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
            )  # fmt: skip
            share = tl.sum(ds, 1)
            far_left += tl.where(step < near, share, 0.0)
            far_right += tl.where(step < near, 0.0, share)
        tl.store(sums + sums_stride, tl.sum(far_left, 0))
        tl.store(sums + 2 * sums_stride, tl.sum(far_right, 0))

        own_parts = parts_ptr + pid.to(tl.int64) // count * count * segments * N + local.to(tl.int64) * segments * N
        turn = tl.arange(0, M)[:, None] + tl.arange(0, N)[None, :]
        carry = tl.zeros([N], tl.float32)
        last = tl.full([], -2, tl.int32)  # no tile yet
        for g in tl.range(near, near_stop, num_stages=STAGES):
            tile = tl.where(g >= head_tiles, begin + g - head_tiles, g)
            dq, slope_sum, ds = _query_step(
                dq, slope_sum, q, grad, lse, delta, low, place, own, tile, k_base, v_base, k_sn, v_sn, key_pos_ptr, key_doc_ptr,
                slope, table_ptr, reach, m, d, dv, scale, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP,
                SLOPES, TABLE, SLOPES_GRAD, M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
            )  # fmt: skip
            turned = tl.gather(ds, turn % N, 1)
            lower = tl.sum(tl.where(turn >= N, turned, 0.0), 0)
            segment = block - tile - first_segment  # of this tile's upper half; its lower half belongs to the one after it
            broken = (last >= 0) & (last + 1 < tile)  # between the sinks and the window
            _store_segment(own_parts, tl.where(broken, block - last - first_segment, -1), segments, carry, N)
            joined = lower + tl.where(last + 1 == tile, carry, 0.0)
            _store_segment(own_parts, segment + 1, segments, joined, N)
            carry = tl.sum(tl.where(turn < N, turned, 0.0), 0)
            last = tile
        _store_segment(own_parts, tl.where(last >= 0, block - last - first_segment, -1), segments, carry, N)
    else:
        for g in tl.range(0, head_tiles + edge - begin + stop - end, num_stages=STAGES):
            dq, slope_sum, _ = _query_step(
                dq, slope_sum, q, grad, lse, delta, low, place, own, masked_tile(g, head_tiles, begin, edge, end), k_base, v_base,
                k_sn, v_sn, key_pos_ptr, key_doc_ptr, slope, table_ptr, reach, m, d, dv, scale, window, sink,
                CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE, SLOPES_GRAD,
                M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
            )  # fmt: skip
        for tile in tl.range(edge, end, num_stages=STAGES):
            dq, slope_sum, _ = _query_step(
                dq, slope_sum, q, grad, lse, delta, low, place, own, tile, k_base, v_base,
                k_sn, v_sn, key_pos_ptr, key_doc_ptr, slope, table_ptr, reach, m, d, dv, scale, window, sink,
                CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE, SLOPES_GRAD,
                M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, False,
            )  # fmt: skip
    if SLOPES_GRAD:
        tl.store(sums, tl.sum(slope_sum, 0))
    c = tl.arange(0, BLOCK_D)
    at = dq_ptr + (row.to(tl.int64) * n + i[:, None]) * d + c[None, :]
    tl.store(at, (dq * unit).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (c < d)[None, :])
