"""What each key receives: weights summed over queries, in one sweep over the queries with known log-sum-exps.

A program owns a tile of keys and adds up all of its queries (of one head, or of all heads that share the keys), so that
nothing is added by two programs and the result is the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import base2, log_sums, owner, product, visible


@triton.jit
def _weights(q_base, q_sn, lse_ptr, row, k, place_k, doc_k, block, rows_stop, n, offset, d, scale, window, sink, near, far,
             query_pos_ptr, query_doc_ptr, pos_row, doc_row, count_ptr, count_row,
             CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, HORIZON: tl.constexpr,
             COUNTED: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """(N, M): weights of M queries on the tile's N keys, times how much each query counts."""
    i = block * M + tl.arange(0, M)
    c = tl.arange(0, BLOCK_D)
    inside = i < rows_stop
    where = q_base + i[None, :].to(tl.int64) * q_sn + c[:, None]
    if MASKED or not WHOLE_D:
        q = tl.load(where, mask=inside[None, :] & (c < d)[:, None], other=0.0)
    else:
        q = tl.load(where)
    lse = log_sums(lse_ptr, row, n, i, inside)
    s = base2(product(k, q, EXACT), scale, SOFTCAP)
    p = tl.exp2(s - lse[None, :])
    if MASKED:
        if ALIGNED:
            place = i + offset
        else:
            place = tl.load(query_pos_ptr + pos_row + i, mask=inside, other=0)
        away = place[None, :] - place_k[:, None]
        seen = visible(inside[None, :] & (place_k >= 0)[:, None], away, place_k[:, None], window, sink, CAUSAL, WINDOWED)
        if DOCUMENTS:
            own = tl.load(query_doc_ptr + doc_row + i, mask=inside, other=-1)
            seen = seen & (doc_k[:, None] == own[None, :])
        if HORIZON:
            seen = seen & (away >= near) & (away <= far)
        p = tl.where(seen, p, 0.0)
    if COUNTED:
        p = p * tl.load(count_ptr + count_row + i, mask=inside, other=0.0)[None, :]
    return p


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr, count_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k, count_sb,
    heads, kv_heads, n, m, d, scale, window, sink, near, far, rows_start, rows_stop,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, HORIZON: tl.constexpr,
    COUNTED: tl.constexpr, SOFTCAP: tl.constexpr, PER_KV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, CLASSES: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: N keys, and the queries of one head (PER_KV: of all heads of the group).

    Blocks of queries outside rows_start..rows_stop-1 are not read; within a block, COUNTED says which queries count.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(m, N)
    group = heads // kv_heads
    if PER_KV:
        tile, b, kv, _ = owner(pid, tiles, kv_heads, kv_heads)
        first_head = 0
        last_head = group
    else:
        tile, b, kv, head = owner(pid, tiles, heads, kv_heads)
        first_head = head - kv * group
        last_head = first_head + 1
    j = tile * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK_D)
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    k = tl.load(k_base + j[:, None].to(tl.int64) * k_sn + c[None, :], mask=(j < m)[:, None] & (c < d)[None, :], other=0.0)
    if ALIGNED:
        place_k = tl.where(j < m, j, -1)
    else:
        place_k = tl.load(key_pos_ptr + b * pos_sb_k + j, mask=j < m, other=-1)
    doc_k = place_k
    if DOCUMENTS:
        doc_k = tl.load(key_doc_ptr + b * doc_sb_k + j, mask=j < m, other=-2)
    offset = m - n
    low = rows_start // M
    stop = tl.cdiv(rows_stop, M)
    masked_stop = stop
    if ALIGNED and not DOCUMENTS and not HORIZON and not WINDOWED:
        if CAUSAL:
            low = tl.maximum(low, tl.maximum(tile * N - offset, 0) // M)
            masked_stop = tl.cdiv(tl.maximum(tile * N + N - 1 - offset, 0), M)
        else:
            masked_stop = low
        masked_stop = tl.maximum(masked_stop, low)
        if tile * N + N > m:  # the last keys are not a whole tile
            masked_stop = stop
        whole_stop = tl.maximum(rows_stop // M, masked_stop)
        masked_stop = tl.minimum(masked_stop, stop)
        whole_stop = tl.minimum(whole_stop, stop)
    else:
        if ALIGNED and CAUSAL:
            low = tl.maximum(low, tl.maximum(tile * N - offset, 0) // M)
        if ALIGNED and HORIZON:
            low = tl.maximum(low, tl.maximum(tile * N + near - offset, 0) // M)
            stop = tl.minimum(stop, tl.cdiv(tl.maximum(tile * N + N + far - offset, 0), M))
        if ALIGNED and WINDOWED:
            if tile * N >= sink:
                low = tl.maximum(low, tl.maximum(tile * N - window + 1 - offset, 0) // M)
                stop = tl.minimum(stop, tl.cdiv(tl.maximum(tile * N + N - 1 + window - offset, 0), M))
        masked_stop = stop
        whole_stop = stop
    got = tl.zeros([N, CLASSES], tl.float32)
    for g in range(first_head, last_head):
        head = kv * group + g
        row = b * heads + head
        q_base = q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
        first_rows = masked_stop - low
        for step in range(first_rows + stop - whole_stop):  # the diagonal, and the rows that are no whole block
            block = tl.where(step < first_rows, low + step, whole_stop + step - first_rows)
            p = _weights(q_base, q_sn, lse_ptr, row, k, place_k, doc_k, block, rows_stop, n, offset, d, scale, window, sink,
                         near, far, query_pos_ptr, query_doc_ptr, b * pos_sb_q, b * doc_sb_q, count_ptr, b * count_sb,
                         CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, HORIZON, COUNTED, SOFTCAP, True,
                         M, N, BLOCK_D, WHOLE_D, EXACT)  # fmt: skip
            got += tl.sum(tl.reshape(p, [N, M // CLASSES, CLASSES]), 1)
        for block in tl.range(masked_stop, whole_stop, num_stages=STAGES):
            p = _weights(q_base, q_sn, lse_ptr, row, k, place_k, doc_k, block, rows_stop, n, offset, d, scale, window, sink,
                         near, far, query_pos_ptr, query_doc_ptr, b * pos_sb_q, b * doc_sb_q, count_ptr, b * count_sb,
                         CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, HORIZON, COUNTED, SOFTCAP, False,
                         M, N, BLOCK_D, WHOLE_D, EXACT)  # fmt: skip
            got += tl.sum(tl.reshape(p, [N, M // CLASSES, CLASSES]), 1)
    if PER_KV:
        out_row = b * kv_heads + kv
    else:
        out_row = b * heads + kv * group + first_head
    tl.store(out_ptr + out_row.to(tl.int64) * m + j, tl.sum(got, 1), mask=j < m)
