"""Row statistics of attention in one sweep over the keys: online softmax whose accumulators are statistics.

Scores are kept in the base-2 domain: z = scale * log2(e) * (q . k) - m, p = 2^z, with m the running maximum. Sums run in
`CLASSES` columns a row instead of one: with 8, each thread of the tensor cores' layout adds only what it holds itself, and
the row's columns meet once, at the end, instead of once a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LOG2E, base2, owner, product, visible

# Slots of the output, (slot, batch * heads, queries) float32. The order is that of `SLOTS` in the sweep that calls this.
NEG = tl.constexpr(-1.0e30)  # stands for -inf where a difference of two of them must not be NaN
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _scores(q, k_ptr, k_stride, tile, m, d, scale, SOFTCAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
            WHOLE_D: tl.constexpr, WHOLE_N: tl.constexpr, CLASSES: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """(M, N / CLASSES, CLASSES) scores of a tile of keys, before `scale`, which is in base 2."""
    j = tile * N + tl.arange(0, N)
    c = tl.arange(0, BLOCK_D)
    where = k_ptr + j[None, :].to(tl.int64) * k_stride + c[:, None]
    if WHOLE_N and WHOLE_D:
        k = tl.load(where)
    elif WHOLE_D:
        k = tl.load(where, mask=(j < m)[None, :], other=0.0)
    else:
        k = tl.load(where, mask=(j < m)[None, :] & (c < d)[:, None], other=0.0)
    s = tl.reshape(product(q, k, EXACT), [M, N // CLASSES, CLASSES])
    if SOFTCAP > 0.0:
        s = base2(s, scale, SOFTCAP) / scale  # who calls multiplies by it, in one step with what follows
    return s


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, query_pos_ptr, key_pos_ptr, query_doc_ptr, key_doc_ptr, logit_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, slot_stride, pos_sb_q, pos_sb_k, doc_sb_q, doc_sb_k,
    heads, kv_heads, n, m, d, dv, scale, window, sink, first, recent, near,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIGNED: tl.constexpr, DOCUMENTS: tl.constexpr, LOGIT: tl.constexpr,
    SOFTCAP: tl.constexpr, OUTPUT: tl.constexpr,
    MAXIMUM: tl.constexpr, ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, DISTANCE2: tl.constexpr, SQUARE: tl.constexpr,
    FIRST: tl.constexpr, RECENT: tl.constexpr, LOCAL: tl.constexpr, NEAR: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, CLASSES: tl.constexpr,
    EXACT: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head against their keys (or a share of them, with SPLITS).

    With SPLITS the raw sums are stored, to be merged by who calls. OUTPUT needs CLASSES = 1: one maximum a row.
    """
    C: tl.constexpr = CLASSES
    G: tl.constexpr = N // CLASSES
    PART: tl.constexpr = N // HALVES
    pid = tl.program_id(0)
    blocks = tl.cdiv(n, M)
    block, b, kv, head = owner(pid, blocks, heads, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block  # long rows first
    row = b * heads + head
    r0 = block * M
    i = r0 + tl.arange(0, M)
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

    top = tl.full([M, C], NEG, tl.float32)  # running maximum
    total = tl.zeros([M, C], tl.float32)
    mean_z = tl.zeros([M, C], tl.float32)
    dist = tl.zeros([M, C], tl.float32)
    dist2 = tl.zeros([M, C], tl.float32)
    square = tl.zeros([M, C], tl.float32)
    on_first = tl.zeros([M, C], tl.float32)
    on_recent = tl.zeros([M, C], tl.float32)
    on_local = tl.zeros([M, C], tl.float32)
    near_dist = tl.zeros([M, C], tl.float32)
    if OUTPUT:
        cv = tl.arange(0, BLOCK_DV)
        acc = tl.zeros([M, BLOCK_DV], tl.float32)
        v_base = v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh

    # ---- which tiles: `general` ones need masks or the statistics of near places, `plain` ones need neither -----------
    # where all keys are in order:
    # head | begin..edge | (plain) | recent_low..recent_high | (plain) | near_begin..near_stop | (plain) | right_stop..stop
    tiles = tl.cdiv(m, N)
    low = r0 + offset  # places of this block's queries, where aligned
    high = low + M - 1
    head_tiles = tiles
    begin = 0
    edge = 0
    recent_low = 0
    recent_high = 0
    near_begin = 0
    near_stop = 0
    right_stop = 0
    stop = 0
    if ALIGNED and not DOCUMENTS:
        reach = 1
        if NEAR:
            reach = tl.maximum(reach, near)
        right_reach = reach
        if RECENT or LOCAL:
            right_reach = tl.maximum(reach, recent)
        head_tiles = 0
        if WINDOWED:
            head_tiles = tl.cdiv(sink, N)
        if FIRST or LOCAL:
            head_tiles = tl.maximum(head_tiles, tl.cdiv(first, N))
        stop = tiles
        if CAUSAL:
            stop = tl.minimum(tiles, tl.cdiv(tl.maximum(high + 1, 0), N))
        head_tiles = tl.minimum(head_tiles, stop)
        if WINDOWED:
            begin = tl.maximum(low - window + 1, 0) // N
            edge = tl.maximum(high - window + N, 0) // N
            if not CAUSAL:
                stop = tl.minimum(tiles, tl.cdiv(tl.maximum(high + window, 0), N))
                stop = tl.maximum(stop, head_tiles)  # sinks may lie beyond the window
        begin = tl.minimum(tl.maximum(begin, head_tiles), stop)
        near_begin = tl.maximum(low + 1 - reach, 0) // N
        near_begin = tl.minimum(near_begin, tl.minimum(stop, m // N))
        near_begin = tl.maximum(near_begin, begin)
        edge = tl.minimum(tl.maximum(edge, begin), near_begin)
        recent_low = near_begin
        recent_high = near_begin
        if RECENT or LOCAL:
            recent_low = tl.minimum(tl.maximum(tl.maximum(low + 1 - recent, 0) // N, edge), near_begin)
            recent_high = tl.minimum(tl.maximum(tl.maximum(high - recent + N, 0) // N, recent_low), near_begin)
        if CAUSAL:
            near_stop = stop
            right_stop = stop
        else:
            near_stop = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(high + right_reach, 0), N), near_begin), stop)
            right_stop = tl.minimum(stop, m // N)
            if WINDOWED:
                right_stop = tl.minimum(right_stop, tl.maximum(low + window, 0) // N)
            right_stop = tl.maximum(right_stop, near_stop)
    count_edge = head_tiles + edge - begin
    count_recent = count_edge + recent_high - recent_low
    count_near = count_recent + near_stop - near_begin
    general = count_near + stop - right_stop
    far_left = recent_low - edge
    far_plain = far_left + right_stop - near_stop
    plain = far_plain + near_begin - recent_high
    g_from = 0
    g_to = general
    p_from = 0
    p_to = plain
    if SPLITS > 1:
        split = tl.program_id(1)
        share = tl.cdiv(general + plain, SPLITS)
        lo = split * share
        hi = tl.minimum(lo + share, general + plain)
        g_from = tl.minimum(lo, general)
        g_to = tl.minimum(hi, general)
        p_from = tl.maximum(lo - general, 0)
        p_to = tl.maximum(hi - general, 0)

    cls = tl.arange(0, C)[None, :].to(tl.float32)
    steps = tl.arange(0, G)[None, :, None].to(tl.float32) * C  # key's place in its tile, but for its class
    middle = tl.minimum(tl.maximum(far_plain, p_from), p_to)
    for phase in tl.static_range(2 if RECENT or LOCAL else 1):
        # first the tiles that are nobody's recent keys, then those that are everybody's; each with sums of its own
        if phase == 1 and not OUTPUT:
            far_top, far_total, far_z, far_dist = top, total, mean_z, dist
            far_dist2, far_square, far_near = dist2, square, near_dist
            top = tl.full([M, C], NEG, tl.float32)
            total = tl.zeros([M, C], tl.float32)
            mean_z = tl.zeros([M, C], tl.float32)
            dist = tl.zeros([M, C], tl.float32)
            dist2 = tl.zeros([M, C], tl.float32)
            square = tl.zeros([M, C], tl.float32)
            near_dist = tl.zeros([M, C], tl.float32)
        loop_from = p_from
        loop_to = p_to
        if phase == 1:
            loop_from = middle
        elif RECENT or LOCAL:
            loop_to = middle
        for g in tl.range(loop_from, loop_to, num_stages=STAGES):
            if phase == 0:
                tile = edge + g
                if not CAUSAL:
                    tile = tl.where(g >= far_left, near_stop + g - far_left, tile)
            else:
                tile = recent_high + g - far_plain
            s = _scores(q, k_base, k_sn, tile, m, d, scale, SOFTCAP, M, N, BLOCK_D, WHOLE_D, True, C, EXACT)
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            fall = top - new_top
            alpha = tl.exp2(fall)
            top = new_top
            z = s * scale - top[:, None, :]
            p = tl.exp2(z)
            sums = tl.sum(p, 1)
            if ENTROPY:
                mean_z = alpha * (mean_z + fall * total) + tl.sum(p * z, 1)
            total = total * alpha + sums
            start = (place - tile * N)[:, None].to(tl.float32) - cls  # distance to this class's first key of the tile
            if DISTANCE:
                moment = sums * start - tl.sum(p * steps, 1)
                if not CAUSAL:
                    moment = tl.where(tile * N > low, -moment, moment)
                dist = dist * alpha + moment
            if DISTANCE2:
                moment2 = sums * start * start - 2.0 * start * tl.sum(p * steps, 1) + tl.sum(p * (steps * steps), 1)
                dist2 = dist2 * alpha + moment2
            if SQUARE:
                square = square * alpha * alpha + tl.sum(p * p, 1)
            if NEAR:
                near_dist = near_dist * alpha + near * sums
            if phase == 1 and OUTPUT:  # the output keeps one maximum throughout
                on_recent = on_recent * alpha + sums
                on_local = on_local * alpha + sums
            if OUTPUT:
                j = tile * N + tl.arange(0, N)
                v = tl.load(v_base + j[:, None].to(tl.int64) * v_sn + cv[None, :], mask=(cv < dv)[None, :], other=0.0)
                acc = acc * tl.reshape(alpha, [M, 1])
                if EXACT:
                    acc = tl.dot(tl.reshape(p, [M, N]).to(v.dtype), v, acc, input_precision="ieee")
                else:
                    acc = tl.dot(tl.reshape(p, [M, N]).to(v.dtype), v, acc)

        if phase == 1 and not OUTPUT:
            new_top = tl.maximum(top, far_top)
            fall, far_fall = top - new_top, far_top - new_top
            alpha, beta = tl.exp2(fall), tl.exp2(far_fall)
            top = new_top
            mean_z = alpha * (mean_z + fall * total) + beta * (far_z + far_fall * far_total)
            on_recent = total * alpha
            on_local = total * alpha
            total = on_recent + far_total * beta
            dist = dist * alpha + far_dist * beta
            dist2 = dist2 * alpha + far_dist2 * beta
            square = square * alpha * alpha + far_square * beta * beta
            near_dist = near_dist * alpha + far_near * beta

    for half in tl.range(g_from * HALVES, g_to * HALVES, num_stages=2):
        g = half // HALVES
        tile = g
        if ALIGNED and not DOCUMENTS:
            tile = tl.where(g >= head_tiles, begin + g - head_tiles, tile)
            tile = tl.where(g >= count_edge, recent_low + g - count_edge, tile)
            tile = tl.where(g >= count_recent, near_begin + g - count_recent, tile)
            tile = tl.where(g >= count_near, right_stop + g - count_near, tile)
        tile = tile * HALVES + half % HALVES
        s = _scores(q, k_base, k_sn, tile, m, d, scale, SOFTCAP, M, PART, BLOCK_D, WHOLE_D, False, C, EXACT)
        j = tile * PART + tl.arange(0, PART)
        if ALIGNED:
            there = j
        else:
            there = tl.load(key_pos_ptr + b * pos_sb_k + j, mask=j < m, other=-1)
        j3 = tl.reshape(j, [1, PART // C, C])
        there = tl.reshape(there, [1, PART // C, C])
        far = place[:, None, None] - there
        seen = tl.broadcast_to(j3 < m, [M, PART // C, C])
        if not ALIGNED:
            seen = seen & (there >= 0)
        seen = visible(seen, far, there, window, sink, CAUSAL, WINDOWED)
        away = tl.abs(far)
        if DOCUMENTS:
            doc = tl.load(key_doc_ptr + b * doc_sb_k + j, mask=j < m, other=-2)
            seen = seen & (own_doc[:, None, None] == tl.reshape(doc, [1, PART // C, C]))
        s = tl.where(seen, s, NEG)
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        fall = top - new_top
        alpha = tl.exp2(fall)
        top = new_top
        z = tl.where(seen, s * scale - top[:, None, :], 0.0)
        p = tl.where(seen, tl.exp2(z), 0.0)
        if ENTROPY:
            mean_z = alpha * (mean_z + fall * total) + tl.sum(p * z, 1)
        total = total * alpha + tl.sum(p, 1)
        away_f = away.to(tl.float32)
        if DISTANCE:
            dist = dist * alpha + tl.sum(p * away_f, 1)
        if DISTANCE2:
            dist2 = dist2 * alpha + tl.sum(p * away_f * away_f, 1)
        if SQUARE:
            square = square * alpha * alpha + tl.sum(p * p, 1)
        if FIRST:
            on_first = on_first * alpha + tl.sum(tl.where((there >= 0) & (there < first), p, 0.0), 1)
        if RECENT:
            on_recent = on_recent * alpha + tl.sum(tl.where(away < recent, p, 0.0), 1)
        if LOCAL:
            on_local = on_local * alpha + tl.sum(tl.where((away < recent) | ((there >= 0) & (there < first)), p, 0.0), 1)
        if NEAR:
            near_dist = near_dist * alpha + tl.sum(p * tl.minimum(away_f, near * 1.0), 1)
        if OUTPUT:
            there_v = (j < m)[:, None] & (cv < dv)[None, :]
            v = tl.load(v_base + j[:, None].to(tl.int64) * v_sn + cv[None, :], mask=there_v, other=0.0)
            acc = acc * tl.reshape(alpha, [M, 1])
            if EXACT:
                acc = tl.dot(tl.reshape(p, [M, PART]).to(v.dtype), v, acc, input_precision="ieee")
            else:
                acc = tl.dot(tl.reshape(p, [M, PART]).to(v.dtype), v, acc)

    # ---- the classes of each row meet ----------------------------------------------------------------------------------
    row_top = tl.max(top, 1)
    fall = tl.maximum(top - row_top[:, None], NEG)
    alpha = tl.exp2(fall)
    mean_z = alpha * (mean_z + fall * total)
    total = total * alpha
    dist = dist * alpha
    dist2 = dist2 * alpha
    square = square * alpha * alpha
    on_first = on_first * alpha
    on_recent = on_recent * alpha
    on_local = on_local * alpha
    near_dist = near_dist * alpha
    where = stats_ptr + row.to(tl.int64) * n + i
    if SPLITS > 1:
        where += tl.program_id(1).to(tl.int64) * 10 * slot_stride
        tl.store(where, row_top, mask=inside)
        tl.store(where + slot_stride, tl.sum(total, 1), mask=inside)
        tl.store(where + 2 * slot_stride, tl.sum(mean_z, 1), mask=inside)
        tl.store(where + 3 * slot_stride, tl.sum(dist, 1), mask=inside)
        tl.store(where + 4 * slot_stride, tl.sum(dist2, 1), mask=inside)
        tl.store(where + 5 * slot_stride, tl.sum(square, 1), mask=inside)
        tl.store(where + 6 * slot_stride, tl.sum(on_first, 1), mask=inside)
        tl.store(where + 7 * slot_stride, tl.sum(on_recent, 1), mask=inside)
        tl.store(where + 8 * slot_stride, tl.sum(on_local, 1), mask=inside)
        tl.store(where + 9 * slot_stride, tl.sum(near_dist, 1), mask=inside)
    else:
        mass = tl.sum(total, 1)
        some = mass > 0.0
        if LOGIT:
            extra = tl.load(logit_ptr + head).to(tl.float32) * LOG2E
            peak = tl.maximum(row_top, extra)
            shrink = tl.exp2(row_top - peak)
            whole = mass * shrink + tl.exp2(extra - peak)
            inverse = tl.where(some, shrink / whole, 0.0)
            log_total = tl.log2(whole) + peak
        else:
            inverse = tl.where(some, 1.0 / tl.where(some, mass, 1.0), 0.0)
            log_total = tl.log2(tl.where(some, mass, 1.0)) + row_top
        tl.store(where, tl.where(some, log_total * LN2, float("-inf")), mask=inside)
        if MAXIMUM:
            tl.store(where + slot_stride, tl.where(some, tl.exp2(row_top - log_total), 0.0), mask=inside)
        if ENTROPY:
            entropy = (mass * (log_total - row_top) - tl.sum(mean_z, 1)) * inverse
            tl.store(where + 2 * slot_stride, tl.where(some, tl.maximum(entropy, 0.0) * LN2, 0.0), mask=inside)
        if DISTANCE:
            tl.store(where + 3 * slot_stride, tl.sum(dist, 1) * inverse, mask=inside)
        if DISTANCE2:
            tl.store(where + 4 * slot_stride, tl.sum(dist2, 1) * inverse, mask=inside)
        if SQUARE:
            tl.store(where + 5 * slot_stride, tl.sum(square, 1) * inverse * inverse, mask=inside)
        if FIRST:
            tl.store(where + 6 * slot_stride, tl.sum(on_first, 1) * inverse, mask=inside)
        if RECENT:
            tl.store(where + 7 * slot_stride, tl.sum(on_recent, 1) * inverse, mask=inside)
        if LOCAL:
            tl.store(where + 8 * slot_stride, tl.sum(on_local, 1) * inverse, mask=inside)
        if NEAR:
            tl.store(where + 9 * slot_stride, tl.sum(near_dist, 1) * inverse, mask=inside)
        if OUTPUT:
            out = out_ptr + (row.to(tl.int64) * n + i[:, None]) * dv + cv[None, :]
            tl.store(out, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (cv < dv)[None, :])
