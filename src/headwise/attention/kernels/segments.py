"""Weight on each of many segments of keys, in one sweep with known log-sum-exps.

Which segments a tile of keys holds is found beforehand, so that a tile costs one row sum for each segment in it: one, where
segments are long. A program owns its rows of the output and adds to them in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import base2, log_sums, owner, product, visible


@triton.jit
def segments_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, segment_ptr, distinct_ptr, count_ptr, query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k, segment_sb, distinct_sb, count_sb,
    heads, kv_heads, n, m, d, scale, window, sink, segments,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head. out: (batch * heads, n, segments), zero before; distinct: (b or 1, tiles, N)."""
    pid = tl.program_id(0)
    block, b, kv, head = owner(pid, tl.cdiv(n, M), heads, kv_heads)
    row = b * heads + head
    i = block * M + tl.arange(0, M)
    inside = i < n
    c = tl.arange(0, BLOCK_D)
    q_base = q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    q = tl.load(q_base + i[:, None].to(tl.int64) * q_sn + c[None, :], mask=inside[:, None] & (c < d)[None, :], other=0.0)
    offset = m - n
    if ALIGNED:
        place = i + offset
    else:
        place = tl.load(query_pos_ptr + b * pos_sb_q + i, mask=inside, other=0)
    if DOCUMENTS:
        own_doc = tl.load(query_doc_ptr + b * doc_sb_q + i, mask=inside, other=-1)
    lse = log_sums(lse_ptr, row, n, i, inside)
    begin = 0
    stop = tl.cdiv(m, N)
    if ALIGNED and CAUSAL:
        stop = tl.minimum(stop, tl.cdiv(tl.maximum(block * M + M + offset, 0), N))
    if ALIGNED and WINDOWED:
        if sink == 0:
            begin = tl.maximum(block * M + offset - window + 1, 0) // N
    out = out_ptr + (row.to(tl.int64) * n + i) * segments
    for tile in range(begin, stop):
        j = tile * N + tl.arange(0, N)
        k = tl.load(k_base + j[None, :].to(tl.int64) * k_sn + c[:, None], mask=(j < m)[None, :] & (c < d)[:, None], other=0.0)
        s = base2(product(q, k, EXACT), scale, SOFTCAP)
        if ALIGNED:
            there = j
        else:
            there = tl.load(key_pos_ptr + b * pos_sb_k + j, mask=j < m, other=-1)
        away = place[:, None] - there[None, :]
        seen = visible((j < m)[None, :] & (there >= 0)[None, :], away, there[None, :], window, sink, CAUSAL, WINDOWED)
        if DOCUMENTS:
            doc = tl.load(key_doc_ptr + b * doc_sb_k + j, mask=j < m, other=-2)
            seen = seen & (own_doc[:, None] == doc[None, :])
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        segment = tl.load(segment_ptr + b * segment_sb + j, mask=j < m, other=-1)
        for u in range(tl.load(count_ptr + b * count_sb + tile)):
            which = tl.load(distinct_ptr + b * distinct_sb + tile * N + u)
            part = tl.sum(tl.where((segment == which)[None, :], p, 0.0), 1)
            before = tl.load(out + which, mask=inside, other=0.0)
            tl.store(out + which, before + part, mask=inside)
