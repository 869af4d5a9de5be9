"""Fused attention with sparse weights, entmax of alpha 1.5 or 2: p = [(alpha - 1) s - tau]_+ ^ (1 / (alpha - 1)).

A program owns a block of queries. It sweeps over its keys for the rows' maxima, again for each of Newton's steps to their
thresholds tau, and once more for the output, and computes scores anew each time: what is kept is numbers of rows. A tile
of keys that holds no weight is left out from then on, and in the backward pass: `live` says which tiles still may hold some,
and from it lists of tiles are made. Here x = [(top - best) * scale - tau]_+ in units of (alpha - 1) s, with `top` the
product q . k and `best` the row's largest; so tau lies in [-1, 0] and what is small stays exact.
Source: arXiv:1905.05702, sec. 3 for the weights and their Jacobian; thresholds by Newton's steps in place of sorting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .biased import added, rows_of
from .parts import owner, product, visible

NEG = tl.constexpr(-1.0e30)  # stands for -inf where a difference of two of them must not be NaN
LOW = tl.constexpr(-1.0e29)  # below any product, above NEG
CHUNK = tl.constexpr(256)  # of `live` that is read at once


@triton.jit
def _listed(list_ptr, live_ptr, stride, count, low, low_step, first, first_step, m, window, sink, FRESH: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Writes which of `count` tiles of M queries and N keys are live: those that need no mask, then the others.

    Tile g begins at place low + g * low_step of the queries and first + g * first_step of the keys. FRESH: all that the mask
    reaches are live. Returns how many need no mask, and how many there are.
    """
    tl.debug_barrier()  # what others wrote to `live` must be there, and they be done with the old list
    found = tl.zeros([], tl.int32)
    wholes = tl.zeros([], tl.int32)
    for masked in tl.static_range(2):
        for start in range(0, count, CHUNK):
            g = start + tl.arange(0, CHUNK)
            i = low + g * low_step
            j = first + g * first_step
            whole = (j + N <= m) & (i + M <= m)
            if FRESH:
                take = (g < count) & (j < m)
            else:
                take = tl.load(live_ptr + g.to(tl.int64) * stride, mask=g < count, other=0) != 0
            if CAUSAL:
                whole = whole & (j + N - 1 <= i)
                take = take & (j <= i + M - 1)
            if WINDOWED:
                whole = whole & (i + M - 1 - j < window) & (j + N - 1 - i < window)
                take = take & (((i - (j + N - 1) < window) & (j - (i + M - 1) < window)) | (j < sink))
            if masked:
                take = take & (whole == 0)
            else:
                take = take & whole
            ones = take.to(tl.int32)
            tl.store(list_ptr + found + tl.cumsum(ones, 0) - 1, g.to(list_ptr.dtype.element_ty), mask=take)
            found += tl.sum(ones, 0)
        if masked == 0:
            wholes = found
    tl.debug_barrier()
    return wholes, found


@triton.jit
def _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
              M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EXACT: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """(M, N) products of queries with a tile of keys, NEG where hidden; and the keys."""
    j = tile * N + tl.arange(0, N)
    k = rows_of(k_base, k_sn, j, j < m, d, BLOCK_D, WHOLE_D, MASKED)
    s = product(q, tl.trans(k), EXACT)
    if MASKED:
        seen = tl.broadcast_to((j < m)[None, :], [M, N])
        s = tl.where(visible(seen, place[:, None] - j[None, :], j[None, :], window, sink, CAUSAL, WINDOWED), s, NEG)
    return s, k


@triton.jit
def _gap(s, top, tau, scale):
    """x from products, and from their row's largest and threshold, which are shaped to broadcast to them."""
    return tl.maximum((s - top) * scale - tau, 0.0)


@triton.jit
def _advance(tau, total, slope, SQUARE: tl.constexpr):
    """Newton's step for |x| = 1, the 2-norm of a row's x for alpha 1.5, the 1-norm for 2. It never passes the root.

    total: sum of p. slope: sum of x for alpha 1.5, count of positive x for 2.
    """
    if SQUARE:
        norm = tl.sqrt(total)
        step = (norm - 1.0) * norm
    else:
        step = total - 1.0
    return tau + tl.where(total > 1.0, step / tl.maximum(slope, 1.0), 0.0)  # slope is at least 1 where total is


@triton.jit
def _sums(total, slope, live_ptr, tile, x, SQUARE: tl.constexpr):
    """Adds a tile to sums of rows, and says whether it is live."""
    if SQUARE:
        part = tl.sum(x, 1)
        total += tl.sum(x * x, 1)
        slope += part
    else:
        part = tl.sum(x, 1)
        total += part
        slope += tl.sum((x > 0.0).to(tl.float32), 1)
    tl.store(live_ptr + tile, (tl.max(part, 0) > 0.0).to(tl.int8))
    return total, slope


@triton.jit
def _spread(x, SQUARE: tl.constexpr):
    """u = p^(2 - alpha) of x: what the Jacobian, diag(u) - u u^T / sum(u), is made of."""
    if SQUARE:
        return x
    else:
        return (x > 0.0).to(tl.float32)


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, top_ptr, tau_ptr, live_ptr, list_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, heads, kv_heads, n, m, d, dv, scale, window, sink,
    SQUARE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr, STARTS: tl.constexpr, PASSES: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of M queries of one head, with what the backward pass needs of their rows.

    scale: times alpha - 1, above 0: hidden keys, at NEG, then have x = 0. live: (b * heads, blocks, tiles) int8, zeros
    before. lists: the same shape, scratch.
    """
    blocks = tl.cdiv(n, M)
    tiles = tl.cdiv(m, N)
    block, b, kv, head = owner(tl.program_id(0), blocks, heads, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block  # long rows first
    row = (b * heads + head).to(tl.int64)
    live_ptr += (row * blocks + block) * tiles
    list_ptr += (row * blocks + block) * tiles
    i = block * M + tl.arange(0, M)
    inside = i < n
    low = block * M + m - n
    place = i + m - n
    q = rows_of(q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, q_sn, i, inside, d, BLOCK_D, WHOLE_D, True)
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    v_base = v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh

    # The largest product of each row, and of each row and column of tiles: N keys whose own threshold is a good start.
    wholes, found = _listed(list_ptr, live_ptr, 1, tiles, low, 0, 0, N, m, window, sink, True, CAUSAL, WINDOWED, M, N)
    best = tl.full([M, N], NEG, tl.float32)
    top = tl.where(inside, NEG, -NEG)  # a row that is not there finds every key far below its best
    for masked in tl.static_range(1, -1, -1):  # the near keys first: where they are large, far tiles are out at once
        for g in tl.range(wholes if masked else 0, found if masked else wholes, num_stages=STAGES):
            tile = tl.load(list_ptr + g).to(tl.int32)
            s = _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL, WINDOWED, M, N, BLOCK_D, WHOLE_D, EXACT,
                             masked == 1)[0]  # fmt: skip
            best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)
            here = tl.max(s, 1)
            top = tl.maximum(top, here)
            tl.store(live_ptr + tile, (tl.max((here - top) * scale, 0) > -1.0).to(tl.int8))
    top = tl.where(top > LOW, top, 0.0)
    wrong = tl.max((best != best).to(tl.int32), 1)  # a score is no number: neither shall the output be one
    tau = tl.full([M], -1.0, tl.float32)
    for _ in range(STARTS):
        x = _gap(best, top[:, None], tau[:, None], scale)
        if SQUARE:
            tau = _advance(tau, tl.sum(x * x, 1), tl.sum(x, 1), SQUARE)
        else:
            tau = _advance(tau, tl.sum(x, 1), tl.sum((x > 0.0).to(tl.float32), 1), SQUARE)

    done = 0
    excess = TOLERANCE + 1.0
    while (excess > TOLERANCE) & (done < PASSES):
        wholes, found = _listed(list_ptr, live_ptr, 1, tiles, low, 0, 0, N, m, window, sink, False, CAUSAL, WINDOWED, M, N)
        total = tl.zeros([M], tl.float32)
        slope = tl.zeros([M], tl.float32)
        for masked in tl.static_range(2):
            for g in tl.range(wholes if masked else 0, found if masked else wholes, num_stages=STAGES):
                tile = tl.load(list_ptr + g).to(tl.int32)
                s = _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL, WINDOWED, M, N, BLOCK_D, WHOLE_D,
                                 EXACT, masked == 1)[0]  # fmt: skip
                x = _gap(s, top[:, None], tau[:, None], scale)
                total, slope = _sums(total, slope, live_ptr, tile, x, SQUARE)
        tau = _advance(tau, total, slope, SQUARE)
        excess = tl.max(total, 0) - 1.0
        done += 1

    wholes, found = _listed(list_ptr, live_ptr, 1, tiles, low, 0, 0, N, m, window, sink, False, CAUSAL, WINDOWED, M, N)
    total = tl.zeros([M], tl.float32)
    slope = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    for masked in tl.static_range(2):
        for g in tl.range(wholes if masked else 0, found if masked else wholes, num_stages=STAGES):
            tile = tl.load(list_ptr + g).to(tl.int32)
            s = _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL, WINDOWED, M, N, BLOCK_D, WHOLE_D, EXACT,
                             masked == 1)[0]  # fmt: skip
            x = _gap(s, top[:, None], tau[:, None], scale)
            total, slope = _sums(total, slope, live_ptr, tile, x, SQUARE)
            j = tile * N + tl.arange(0, N)
            v = rows_of(v_base, v_sn, j, j < m, dv, BLOCK_DV, WHOLE_DV, masked == 1)
            acc = added((x * x if SQUARE else x).to(v.dtype), v, acc, EXACT)
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)  # mends what is left of the last step
    inverse = tl.where(wrong > 0, float("nan"), inverse)
    c = tl.arange(0, BLOCK_DV)
    where = row * n + i
    out = out_ptr + where[:, None] * dv + c[None, :]
    tl.store(out, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (c < dv)[None, :])
    tl.store(top_ptr + where, top, mask=inside)
    tl.store(tau_ptr + where, tau, mask=inside)


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, top_ptr, tau_ptr, delta_ptr, live_ptr, list_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, do_sb, do_sh, do_sn,
    heads, kv_heads, n, m, d, dv, scale, factor, window, sink,
    SQUARE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: delta, then the gradients of M queries of one head. ds = u (dp - delta), delta = sum(u dp) / sum(u).

    scale: times alpha - 1. factor: not. M, N: as in the forward pass, whose `live` is read.
    """
    blocks = tl.cdiv(n, M)
    tiles = tl.cdiv(m, N)
    block, b, kv, head = owner(tl.program_id(0), blocks, heads, kv_heads)
    if CAUSAL:
        block = blocks - 1 - block
    row = (b * heads + head).to(tl.int64)
    live_ptr += (row * blocks + block) * tiles
    list_ptr += (row * blocks + block) * tiles
    i = block * M + tl.arange(0, M)
    inside = i < n
    low = block * M + m - n
    place = i + m - n
    where = row * n + i
    top = tl.load(top_ptr + where, mask=inside, other=-NEG)
    tau = tl.load(tau_ptr + where, mask=inside, other=0.0)
    q = rows_of(q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, q_sn, i, inside, d, BLOCK_D, WHOLE_D, True)
    do = rows_of(do_ptr + b.to(tl.int64) * do_sb + head.to(tl.int64) * do_sh, do_sn, i, inside, dv, BLOCK_DV, WHOLE_DV, True)
    k_base = k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh
    v_base = v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh
    wholes, found = _listed(list_ptr, live_ptr, 1, tiles, low, 0, 0, N, m, window, sink, False, CAUSAL, WINDOWED, M, N)

    sum_u = tl.zeros([M], tl.float32)
    sum_udp = tl.zeros([M], tl.float32)
    for masked in tl.static_range(2):
        for g in tl.range(wholes if masked else 0, found if masked else wholes, num_stages=STAGES):
            tile = tl.load(list_ptr + g).to(tl.int32)
            s = _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL, WINDOWED, M, N, BLOCK_D, WHOLE_D, EXACT,
                             masked == 1)[0]  # fmt: skip
            u = _spread(_gap(s, top[:, None], tau[:, None], scale), SQUARE)
            j = tile * N + tl.arange(0, N)
            v = rows_of(v_base, v_sn, j, j < m, dv, BLOCK_DV, WHOLE_DV, masked == 1)
            sum_u += tl.sum(u, 1)
            sum_udp += tl.sum(u * product(do, tl.trans(v), EXACT), 1)
    delta = sum_udp / tl.where(sum_u > 0.0, sum_u, 1.0)
    tl.store(delta_ptr + where, delta, mask=inside)

    acc = tl.zeros([M, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        for g in tl.range(wholes if masked else 0, found if masked else wholes, num_stages=STAGES):
            tile = tl.load(list_ptr + g).to(tl.int32)
            s, k = _products(q, k_base, k_sn, tile, place, m, d, window, sink, CAUSAL, WINDOWED, M, N, BLOCK_D, WHOLE_D, EXACT,
                             masked == 1)  # fmt: skip
            u = _spread(_gap(s, top[:, None], tau[:, None], scale), SQUARE)
            j = tile * N + tl.arange(0, N)
            v = rows_of(v_base, v_sn, j, j < m, dv, BLOCK_DV, WHOLE_DV, masked == 1)
            ds = u * (product(do, tl.trans(v), EXACT) - delta[:, None])
            acc = added(ds.to(k.dtype), k, acc, EXACT)
    c = tl.arange(0, BLOCK_D)
    dq = dq_ptr + where[:, None] * d + c[None, :]
    tl.store(dq, (acc * factor).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (c < d)[None, :])


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, top_ptr, tau_ptr, delta_ptr, live_ptr, list_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, do_sb, do_sh, do_sn,
    heads, kv_heads, n, m, d, dv, scale, factor, window, sink,
    SQUARE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of N keys and values, from all queries of all heads of their group, in a fixed order.

    ROWS, N: queries and keys of a tile of the forward pass, whose `live` is read. M: queries taken at once, a part of ROWS.
    lists: (b * kv_heads, tiles, blocks), scratch.
    """
    blocks = tl.cdiv(n, ROWS)
    tiles = tl.cdiv(m, N)
    group = heads // kv_heads
    tile, b, kv, _ = owner(tl.program_id(0), tiles, kv_heads, kv_heads)
    out_row = (b * kv_heads + kv).to(tl.int64)
    list_ptr += (out_row * tiles + tile) * blocks
    j = tile * N + tl.arange(0, N)
    there = j < m
    k = rows_of(k_ptr + b.to(tl.int64) * k_sb + kv.to(tl.int64) * k_sh, k_sn, j, there, d, BLOCK_D, WHOLE_D, True)
    v = rows_of(v_ptr + b.to(tl.int64) * v_sb + kv.to(tl.int64) * v_sh, v_sn, j, there, dv, BLOCK_DV, WHOLE_DV, True)
    of_k = tl.zeros([N, BLOCK_D], tl.float32)
    of_v = tl.zeros([N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv * group + member
        row = (b * heads + head).to(tl.int64)
        q_base = q_ptr + b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
        do_base = do_ptr + b.to(tl.int64) * do_sb + head.to(tl.int64) * do_sh
        live = live_ptr + row * blocks * tiles + tile
        wholes, found = _listed(list_ptr, live, tiles, blocks, m - n, ROWS, tile * N, 0, m, window, sink, False, CAUSAL,
                                WINDOWED, ROWS, N)  # fmt: skip
        PARTS: tl.constexpr = ROWS // M
        for masked in tl.static_range(2):
            for g in tl.range(PARTS * wholes if masked else 0, PARTS * found if masked else PARTS * wholes, num_stages=STAGES):
                block = tl.load(list_ptr + g // PARTS).to(tl.int32)
                i = block * ROWS + (g % PARTS) * M + tl.arange(0, M)
                inside = i < n
                where = row * n + i
                q = rows_of(q_base, q_sn, i, inside, d, BLOCK_D, WHOLE_D, masked == 1)
                do = rows_of(do_base, do_sn, i, inside, dv, BLOCK_DV, WHOLE_DV, masked == 1)
                if masked:
                    top = tl.load(top_ptr + where, mask=inside, other=0.0)  # with zeros for q: x = 0
                    tau = tl.load(tau_ptr + where, mask=inside, other=0.0)
                    delta = tl.load(delta_ptr + where, mask=inside, other=0.0)
                else:
                    top = tl.load(top_ptr + where)
                    tau = tl.load(tau_ptr + where)
                    delta = tl.load(delta_ptr + where)
                s = product(k, tl.trans(q), EXACT)
                if masked:
                    seen = tl.broadcast_to(there[:, None], [N, M])
                    away = (i + m - n)[None, :] - j[:, None]
                    s = tl.where(visible(seen, away, j[:, None], window, sink, CAUSAL, WINDOWED), s, NEG)
                if EXACT:
                    x = _gap(s, top[None, :], tau[None, :], scale)
                else:  # one number of a row instead of two: registers are short here
                    x = _gap(s, 0.0, (top * scale + tau)[None, :], scale)
                of_v = added((x * x if SQUARE else x).to(do.dtype), do, of_v, EXACT)
                ds = _spread(x, SQUARE) * (product(v, tl.trans(do), EXACT) - delta[None, :])
                of_k = added(ds.to(q.dtype), q, of_k, EXACT)
    where = out_row * m + j
    c = tl.arange(0, BLOCK_D)
    dk = dk_ptr + where[:, None] * d + c[None, :]
    tl.store(dk, (of_k * factor).to(dk_ptr.dtype.element_ty), mask=there[:, None] & (c < d)[None, :])
    c = tl.arange(0, BLOCK_DV)
    dv_out = dv_ptr + where[:, None] * dv + c[None, :]
    tl.store(dv_out, of_v.to(dv_ptr.dtype.element_ty), mask=there[:, None] & (c < dv)[None, :])
