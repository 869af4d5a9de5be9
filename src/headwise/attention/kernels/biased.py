"""Fused attention whose scores are edited: a softcap, distance slopes, a learned table over distances, and a sink logit.

One program: a block of queries of one head against the keys that their mask reaches. Scores are kept in base 2, so
`scale`, slopes and tables arrive multiplied by log2(e). The loop over tiles of keys runs twice: over tiles that need the
mask, and over those of which every query sees every key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LOG2E, base2, owner, product, visible

NEG = tl.constexpr(-1.0e30)  # stands for -inf where a difference of two of them must not be NaN
LOW = tl.constexpr(-1.0e29)  # far below any score, far above NEG: what a row that saw nothing yet subtracts
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def added(a, b, acc, EXACT: tl.constexpr):
    """acc + a @ b in float32; EXACT: of float32 operands without rounding them first."""
    if EXACT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def rows_of(base, stride, index, inside, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK) of a matrix; zeros right of its `width` and, if MASKED, in rows that are not `inside`."""
    c = tl.arange(0, BLOCK)
    where = base + index[:, None].to(tl.int64) * stride + c[None, :]
    if MASKED and WHOLE:
        return tl.load(where, mask=inside[:, None], other=0.0)
    elif MASKED:
        return tl.load(where, mask=inside[:, None] & (c < width)[None, :], other=0.0)
    elif WHOLE:
        return tl.load(where)
    else:
        return tl.load(where, mask=(c < width)[None, :], other=0.0)


@triton.jit
def distances(query, key, M: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr):
    """(least, most) distance between M queries from place `query` on and N keys from `key` on; zeros if they have no order."""
    if ALIGNED:
        return query - key - (N - 1), query - key + (M - 1)
    else:
        return 0, 0


@triton.jit
def far_off(slope, place, key):
    """slope * distance of queries from the first key of a tile: what `biased` leaves out where LINEAR, a number a row."""
    return slope * (place - key).to(tl.float32)


@triton.jit
def biased(s, place, there, key, low, high, slope, table_ptr, reach, SLOPES: tl.constexpr, TABLE: tl.constexpr,
           LINEAR: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Scores plus biases. place, there: positions of queries and keys, shaped to be subtracted from each other.

    key: the tile's first. low, high: the tile's `distances`. LINEAR: later keys are hidden, so that -slope * distance is
    slope * (there - key), small numbers that differ by key alone, less `far_off`, which rows subtract with their maximum.
    """
    if LINEAR:
        s += slope * (there - key).to(tl.float32)
    elif SLOPES:  # positions as floats: exact below 2^24, and cheaper than converting every distance
        s -= slope * tl.abs(place.to(tl.float32) - there.to(tl.float32))
    if TABLE and not ALIGNED:
        s += tl.load(table_ptr + tl.minimum(tl.maximum(place - there, -reach), reach) + reach)
    elif TABLE:
        # The branch also keeps the compiler from fetching the look-ups ahead through shared memory, an entry at a time.
        if (low >= reach) | (high <= -reach):
            s += tl.load(table_ptr + tl.where(low >= reach, 2 * reach, 0))
        elif (low >= -reach) & (high <= reach):
            s += tl.load(table_ptr + reach + (place - there))
        else:
            s += tl.load(table_ptr + tl.minimum(tl.maximum(place - there, -reach), reach) + reach)
    return s


@triton.jit
def shown(inside, place, there, own, doc, window, sink, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Which pairs the mask shows, of keys that are `inside`; own, doc: documents of queries and keys. All broadcast to the tile."""
    seen = visible(inside, place - there, there, window, sink, CAUSAL, WINDOWED)
    if DOCUMENTS:
        seen = seen & (own == doc)
    return seen


@triton.jit
def key_spans(low, high, m, window, sink, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr,
              DOCUMENTS: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Tiles of keys that queries at places low..high reach: (head, begin, edge, end, stop).

    Tiles 0..head and begin..stop hold visible pairs; of them only edge..end are visible as a whole.
    """
    tiles = tl.cdiv(m, N)
    head = 0
    begin = 0
    stop = tiles
    if ALIGNED and CAUSAL:
        stop = tl.minimum(tiles, tl.cdiv(tl.maximum(high + 1, 0), N))
    if ALIGNED and WINDOWED:
        head = tl.minimum(tl.cdiv(sink, N), stop)
        if not CAUSAL:
            stop = tl.minimum(tiles, tl.cdiv(tl.maximum(high + window, 0), N))
        stop = tl.maximum(stop, head)
        begin = tl.minimum(tl.maximum(tl.maximum(low - window + 1, 0) // N, head), stop)
    edge = stop
    end = stop
    if ALIGNED and not DOCUMENTS:
        edge = begin
        end = m // N
        if CAUSAL:
            end = tl.minimum(end, tl.maximum(low + 1, 0) // N)
        if WINDOWED:
            edge = tl.minimum(tl.maximum(tl.maximum(high - window + N, 0) // N, begin), stop)
            if not CAUSAL:
                end = tl.minimum(end, tl.maximum(low + window, 0) // N)
        end = tl.minimum(tl.maximum(end, edge), stop)
    return head, begin, edge, end, stop


@triton.jit
def masked_tile(g, head, begin, edge, end):
    """The g-th tile of those that need the mask: 0..head, begin..edge and end..stop."""
    tile = tl.where(g >= head, begin + g - head, g)
    first = head + edge - begin
    return tl.where(g >= first, end + g - first, tile)


@triton.jit
def _step(
    acc, top, total, q, first, place, own, tile, k_base, v_base, k_sn, v_sn, key_pos_ptr, key_doc_ptr, slope, table_ptr, reach,
    m, d, dv, scale, window, sink,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over one more tile of keys."""
    j = tile * N + tl.arange(0, N)
    inside = j < m
    there = j
    if not ALIGNED:
        there = tl.load(key_pos_ptr + j, mask=inside, other=-1)
        inside = there >= 0  # empty slots may hold anything: read them as zeros
    k = rows_of(k_base, k_sn, j, inside, d, BLOCK_D, WHOLE_D, MASKED)
    s = base2(product(q, tl.trans(k), EXACT), scale, SOFTCAP)
    low, high = distances(first, tile * N, M, N, ALIGNED)
    LINEAR: tl.constexpr = SLOPES and CAUSAL and ALIGNED
    s = biased(s, place[:, None], there[None, :], tile * N, low, high, slope, table_ptr, reach, SLOPES, TABLE, LINEAR, ALIGNED)
    if MASKED:
        doc = there
        if DOCUMENTS:
            doc = tl.load(key_doc_ptr + j, mask=j < m, other=-2)
        seen = shown(inside[None, :], place[:, None], there[None, :], own[:, None], doc[None, :], window, sink,
                     CAUSAL, WINDOWED, DOCUMENTS)  # fmt: skip
        s = tl.where(seen, s, NEG)
    if LINEAR:
        far = far_off(slope, place, tile * N)
        peak = tl.maximum(top, tl.max(s, 1) - far)
        p = tl.exp2(s - (tl.maximum(peak, LOW) + far)[:, None])
    else:
        peak = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - tl.maximum(peak, LOW)[:, None])  # hidden ones: 2^(NEG - LOW) = 0, also where nothing was seen yet
    alpha = tl.exp2(top - peak)
    total = total * alpha + tl.sum(p, 1)
    v = rows_of(v_base, v_sn, j, inside, dv, BLOCK_DV, WHOLE_DV, MASKED)
    acc = added(p.to(v.dtype), v, acc * alpha[:, None], EXACT)
    return acc, peak, total


@triton.jit
def biased_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr, slope_ptr, table_ptr,
    logit_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k, table_sh,
    heads, kv_heads, n, m, d, dv, scale, window, sink, reach,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, TABLE: tl.constexpr, LOGIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_DV: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head. Writes their outputs and log-sum-exps (natural)."""
    blocks = tl.cdiv(n, M)
    block, b, kv, head = owner(tl.program_id(0), blocks, heads, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block  # long rows first
    row = b * heads + head
    i = block * M + tl.arange(0, M)
    inside = i < n
    q = rows_of(q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, q_sn, i, inside, d, BLOCK_D, WHOLE_D, True)
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    v_base = v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh
    key_pos_ptr += b * pos_sb_k
    key_doc_ptr += b * doc_sb_k
    table_ptr += head * table_sh
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
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    top = tl.full([M], NEG, tl.float32)
    total = tl.zeros([M], tl.float32)
    for tile in tl.range(edge, end, num_stages=STAGES):
        acc, top, total = _step(
            acc, top, total, q, low, place, own, tile, k_base, v_base, k_sn, v_sn, key_pos_ptr, key_doc_ptr, slope, table_ptr,
            reach, m, d, dv, scale, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE,
            M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, False,
        )  # fmt: skip
    for g in tl.range(0, head_tiles + edge - begin + stop - end, num_stages=STAGES):
        acc, top, total = _step(
            acc, top, total, q, low, place, own, masked_tile(g, head_tiles, begin, edge, end), k_base, v_base, k_sn, v_sn,
            key_pos_ptr, key_doc_ptr, slope, table_ptr,
            reach, m, d, dv, scale, window, sink, CAUSAL, WINDOWED, ALIGNED, DOCUMENTS, SOFTCAP, SLOPES, TABLE,
            M, N, BLOCK_D, BLOCK_DV, WHOLE_D, WHOLE_DV, EXACT, True,
        )  # fmt: skip

    some = total > 0.0
    if LOGIT:  # one more key, with a value of zero; a row that sees no key does not see this one either
        extra = tl.load(logit_ptr + head) * LOG2E
        peak = tl.maximum(top, extra)
        shrink = tl.exp2(top - peak)
        whole = total * shrink + tl.exp2(extra - peak)
        inverse = tl.where(some, shrink / whole, 0.0)
        lse = (tl.log2(whole) + peak) * LN2
    else:
        whole = tl.where(some, total, 1.0)
        inverse = tl.where(some, 1.0 / whole, 0.0)
        lse = (tl.log2(whole) + top) * LN2
    tl.store(lse_ptr + row.to(tl.int64) * n + i, tl.where(some, lse, float("-inf")), mask=inside)
    c = tl.arange(0, BLOCK_DV)
    out = out_ptr + (row.to(tl.int64) * n + i[:, None]) * dv + c[None, :]
    tl.store(out, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (c < dv)[None, :])
