"""The delta rule forward: a state that takes out part of what a key reads before it writes, with or without decay.

Within a chunk, with S the state before it, c running sums of the decay, and lower the strictly lower triangle of
erase_r (k_r . k_s) exp(c_r - c_s), what is written is

    V = X (write v) - W S,    X = (1 + lower)^-1,    W = X (erase exp(c) k)

and from there it is a plain state: out = exp(c) q S + inside V, S = exp(c_C) S + (exp(c_C - c) k)^T V. X, W, X (write v) and
`inside` are made of all chunks in parallel; a walk then goes over the chunks of a row with the state in registers. A row may
be cut into segments: what one does to the state is affine, S -> P S + R, and P is what a walk makes of the unit matrix.

Running sums are those of a chunk alone, in base 2. Scratch of tokens is (b * h, chunks * C, ...), zeros after the last token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import LOG2E, added, product


@triton.jit
def tokens(base, stride, start, n, column, width, C: tl.constexpr, BLOCK: tl.constexpr, WHOLE_N: tl.constexpr,
           WHOLE: tl.constexpr):  # fmt: skip
    """(C, BLOCK) from token `start` and column `column` on; zeros after the last token and right of `width`."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BLOCK)
    where = base + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :]
    if WHOLE_N and WHOLE:
        return tl.load(where)
    elif WHOLE_N:
        return tl.load(where, mask=(c < width)[None, :], other=0.0)
    elif WHOLE:
        return tl.load(where, mask=(start + r < n)[:, None], other=0.0)
    else:
        return tl.load(where, mask=(start + r < n)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def keep(base, stride, start, n, column, width, found, C: tl.constexpr, BLOCK: tl.constexpr, WHOLE_N: tl.constexpr,
         WHOLE: tl.constexpr):  # fmt: skip
    """Stores what `tokens` would load."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BLOCK)
    where = base + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :]
    found = found.to(base.dtype.element_ty)
    if WHOLE_N and WHOLE:
        tl.store(where, found)
    elif WHOLE_N:
        tl.store(where, found, mask=(c < width)[None, :])
    else:
        tl.store(where, found, mask=(start + r < n)[:, None] & (c < width)[None, :])


@triton.jit
def square(base, C: tl.constexpr):
    """Pointers to (C, C)."""
    r = tl.arange(0, C)
    return base + r[:, None] * C + r[None, :]


@triton.jit
def numbers(base, stride, start, n, C: tl.constexpr):
    """(C,) one number a token; zeros after the last one."""
    at = start + tl.arange(0, C)
    return tl.load(base + at.to(tl.int64) * stride, mask=at < n, other=0.0)


@triton.jit
def met(documents, start, n, C: tl.constexpr):
    """Documents of a chunk's tokens, of the token before it and of its last one."""
    own = tl.load(documents + tl.minimum(start + tl.arange(0, C), n - 1))
    before = tl.load(documents + tl.maximum(start - 1, 0))
    return own, tl.where(start > 0, before, 0), tl.load(documents + tl.minimum(start + C, n) - 1)


@triton.jit
def joined(x, low, level, C: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks of 2^(level + 1) on the diagonal of 1 + low, from those of 2^level; perhaps of many matrices."""
    r = tl.arange(0, C)
    below = ((r >> level)[:, None] == ((r >> level) ^ 1)[None, :]) & (r[:, None] > r[None, :])
    if len(low.shape) == 3:
        below = below[None, :, :]
    part = tl.dot(x, tl.where(below, low, 0.0), input_precision=PRECISION)
    return x - tl.dot(part, x, input_precision=PRECISION)


@triton.jit
def inverse(low, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + low)^-1 of a strictly lower triangle (C, C), C = 2^LEVELS, by substitution of blocks: up to 16, of all at once."""
    SIDE: tl.constexpr = 16
    BLOCKS: tl.constexpr = C // SIDE
    i = tl.arange(0, BLOCKS)
    r = tl.arange(0, SIDE)
    own = (i[:, None] == i[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(low, [BLOCKS, SIDE, BLOCKS, SIDE]), 0.0), 2)
    pairs = (r >> 1)[:, None] == (r >> 1)[None, :]
    unit = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    x = unit[None, :, :] - tl.where(pairs[None, :, :], blocks, 0.0)
    for level in tl.static_range(1, 4):
        x = joined(x, blocks, level, SIDE, "ieee")
    x = tl.reshape(tl.where(own, x[:, :, None, :], 0.0), [C, C])
    for level in tl.static_range(4, LEVELS):
        x = joined(x, low, level, C, PRECISION)
    return x


@triton.jit
def left_between(decay, stride, documents, start, n, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr):
    """What is left at later tokens (rows) of what others wrote (columns), (C, C); and from the start of the chunk on, (C,),
    to its end, (C,), and from one to the other."""
    r = tl.arange(0, C)
    seen = r[:, None] >= r[None, :]
    near = tl.full([C], 1.0, tl.float32)
    far = near
    left = 1.0
    if DOCUMENTS:
        own, before, last = met(documents, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
    if DECAY:
        g = numbers(decay, stride, start, n, C) * LOG2E
        c = tl.cumsum(g, 0)
        total = tl.sum(g, 0)
        between = tl.where(seen, tl.exp2(tl.minimum(c[:, None] - c[None, :], 0.0)), 0.0)
        near = tl.exp2(c)
        far = tl.exp2(tl.minimum(total - c, 0.0))
        left = tl.exp2(total)
    else:
        between = tl.where(seen, 1.0, 0.0)
    if DOCUMENTS:
        near = tl.where(own == before, near, 0.0)
        far = tl.where(own == last, far, 0.0)
        left = tl.where(before == last, left, 0.0)
    return between, near, far, left


@triton.jit
def solved(x, v, write, write_stride, u, start, n, dv, BLOCK: tl.constexpr, WRITE: tl.constexpr, C: tl.constexpr,
           WHOLE_N: tl.constexpr, WHOLE_DV: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, v_stride):  # fmt: skip
    """Stores x @ (write v) of a chunk."""
    if WRITE:
        x = x * numbers(write, write_stride, start, n, C)[None, :]
    x = x.to(TYPE)
    for column in range(0, dv, BLOCK):
        z = tokens(v, v_stride, start, n, column, dv, C, BLOCK, WHOLE_N, WHOLE_DV).to(TYPE)
        keep(u, dv, start, n, column, dv, product(x, z, EXACT), C, BLOCK, True, WHOLE_DV)


@triton.jit
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, write_ptr, erase_ptr, documents_ptr, x_ptr, w_ptr, u_ptr, mix_ptr, back_ptr, near_ptr,
    far_ptr, gone_ptr, left_ptr, q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh, k_sn: tl.constexpr, v_sb, v_sh, v_sn: tl.constexpr,
    g_sb, g_sh, g_sn, write_sb, write_sh, write_sn, erase_sb, erase_sh, erase_sn, documents_sb, heads, n, d: tl.constexpr,
    dv: tl.constexpr, chunks,
    BACK: tl.constexpr, KEPT: tl.constexpr, DECAY: tl.constexpr, WRITE: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr,
    TYPE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, with one decay a token or none: W, u = X (write v), and mix = `inside`, (b * h, chunks, C, C).

    BACK: mix is (inside X)^T instead, and back is X^T (exp(c_C - c) k). KEPT: X is stored for the backward pass, and loaded
    there. near, far: what is left of the state before the chunk at a token, and of a token after the chunk; gone: erase times
    near; left: what is left of the state, (b * h, chunks).
    """
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
    place = bh.to(tl.int64) * chunks * C
    between, near, far, left = left_between(
        decay_ptr + b * g_sb + head * g_sh, g_sn, documents_ptr + b * documents_sb, start, n, DECAY, DOCUMENTS, C
    )
    erase = numbers(erase_ptr + b * erase_sb + head * erase_sh, erase_sn, start, n, C)
    low = tl.zeros([C, C], tl.float32)
    inside = tl.zeros([C, C], tl.float32)
    for column in tl.range(0, d, BLOCK, num_stages=STAGES):
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D).to(TYPE)
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D).to(TYPE)
        inside = added(q, tl.trans(k), inside, EXACT)
        if not (BACK and KEPT):
            low = added(k, tl.trans(k), low, EXACT)
    matrix = (bh.to(tl.int64) * chunks + i) * C * C
    if BACK and KEPT:
        x = tl.load(square(x_ptr + matrix, C)).to(tl.float32)
    else:
        x = inverse(tl.where(r[:, None] > r[None, :], low * between * erase[:, None], 0.0), C, LEVELS, PRECISION)
        if KEPT:
            tl.store(square(x_ptr + matrix, C), x.to(TYPE))
    inside = (inside * between).to(TYPE)
    cell = square(mix_ptr + matrix, C)
    gone = erase * near
    at = place + start + r
    tl.store(gone_ptr + at, gone)
    if DECAY or DOCUMENTS:
        tl.store(near_ptr + at, near)
        tl.store(far_ptr + at, far)
        tl.store(left_ptr + bh.to(tl.int64) * chunks + i, left)
    if BACK:
        tl.store(cell, tl.trans(product(inside, x.to(TYPE), EXACT)).to(TYPE))
        turned = tl.trans((x * far[:, None]).to(TYPE))
    else:
        tl.store(cell, inside)
    reads = (x * gone[None, :]).to(TYPE)
    for column in range(0, d, BLOCK):
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N, WHOLE_D).to(TYPE)
        keep(w_ptr + place * d, d, start, n, column, d, product(reads, k, EXACT), C, BLOCK, True, WHOLE_D)
        if BACK:
            keep(back_ptr + place * d, d, start, n, column, d, product(turned, k, EXACT), C, BLOCK, True, WHOLE_D)
    solved(
        x, v_base, write_ptr + b * write_sb + head * write_sh, write_sn, u_ptr + place * dv, start, n, dv, BLOCK, WRITE, C,
        WHOLE_N, WHOLE_DV, TYPE, EXACT, v_sn,
    )  # fmt: skip


@triton.jit
def state_at(base, d, width, column, D: tl.constexpr, T: tl.constexpr):
    """Pointers to (D, T) of a state, from column `column` on, and which of them are inside."""
    r = tl.arange(0, D)
    c = column + tl.arange(0, T)
    return base + r[:, None] * width + c[None, :], (r < d)[:, None] & (c < width)[None, :]


@triton.jit
def walk_kernel(
    w_ptr, u_ptr, x_ptr, y_ptr, mix_ptr, near_ptr, far_ptr, left_ptr, first_ptr, out_ptr, values_ptr, states_ptr, last_ptr,
    units_ptr, x_sb, x_sh, x_sn: tl.constexpr, y_sb, y_sh, y_sn: tl.constexpr, out_sb, out_sh, out_sn: tl.constexpr, heads, n,
    d: tl.constexpr, dv: tl.constexpr, chunks, segments, each,
    KIND: tl.constexpr, FIRST: tl.constexpr, OUT: tl.constexpr, STATES: tl.constexpr, ADDED: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, T: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, TYPE: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: T columns of the state of `each` chunks of one head, from states first (b * h, segments, d, dv), if FIRST.

    KIND: 0, no decay; 1, near, far and left are one number a token; 2, x and y have them already, and left is (b * h, chunks,
    d). x: queries; y: keys. OUT: outputs and the last state. STATES: the state before each chunk and values, as they are
    written. ADDED: instead, what segments make of no state, in `states`, and, in tiles after these, of the unit matrix.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dv, T)
    walkers = tiles
    if ADDED:
        walkers += tl.cdiv(d, T)
    tile = pid % walkers
    segment = (pid // walkers) % segments
    bh = pid // (walkers * segments)
    head = (bh % heads).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    bh = bh.to(tl.int64)
    column = tile * T
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    width = dv
    r = tl.arange(0, C)
    at = tl.arange(0, D)
    slot = bh * segments + segment
    state = tl.zeros([D, T], tl.float32)
    if ADDED:
        unit = tile >= tiles
        if unit:
            column = (tile - tiles) * T
            width = 0
            state = tl.where(at[:, None] == (column + tl.arange(0, T))[None, :], 1.0, 0.0)
        elif segment == segments - 1:
            stop = begin  # nothing comes after it
    if FIRST:
        where, exists = state_at(first_ptr + slot * d * dv, d, dv, column, D, T)
        state = tl.load(where, mask=exists, other=0.0)
    x_base = x_ptr + b * x_sb + head * x_sh
    y_base = y_ptr + b * y_sb + head * y_sh
    out_base = out_ptr + b * out_sb + head * out_sh
    place = bh * chunks * C
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        i = begin + step
        start = i * C
        w = tokens(w_ptr + place * d, d, start, n, 0, d, C, D, True, WHOLE_D)
        u = tokens(u_ptr + place * dv, dv, start, n, column, width, C, T, True, WHOLE_T)
        y = tokens(y_base, y_sn, start, n, 0, d, C, D, WHOLE_N, WHOLE_D).to(TYPE)
        small = state.to(TYPE)
        values = u - product(w, small, EXACT)
        low = values.to(TYPE)
        if STATES:
            cell, present = state_at(states_ptr + (bh * chunks + i) * d * dv, d, dv, column, D, T)
            if WHOLE_D and WHOLE_T:
                tl.store(cell, small)
            else:
                tl.store(cell, small, mask=present)
            keep(values_ptr + place * dv, dv, start, n, column, dv, low, C, T, True, WHOLE_T)
        if KIND == 1:
            far = tl.load(far_ptr + place + start + r)
            state = added(tl.trans(y), (values * far[:, None]).to(TYPE), state * tl.load(left_ptr + bh * chunks + i), EXACT)
        elif KIND == 2:
            if WHOLE_D:
                left = tl.load(left_ptr + (bh * chunks + i) * d + at)
            else:
                left = tl.load(left_ptr + (bh * chunks + i) * d + at, mask=at < d, other=1.0)
            state = added(tl.trans(y), low, state * left[:, None], EXACT)
        else:
            state = added(tl.trans(y), low, state, EXACT)
        if OUT:
            x = tokens(x_base, x_sn, start, n, 0, d, C, D, WHOLE_N, WHOLE_D).to(TYPE)
            out = product(x, small, EXACT)
            if KIND == 1:
                out = out * tl.load(near_ptr + place + start + r)[:, None]
            inside = tl.load(square(mix_ptr + (bh * chunks + i) * C * C, C))
            keep(out_base, out_sn, start, n, column, dv, added(inside, low, out, EXACT), C, T, WHOLE_N, WHOLE_T)
    if OUT:
        if segment == segments - 1:
            where, exists = state_at(last_ptr + bh * d * dv, d, dv, column, D, T)
            tl.store(where, state, mask=exists)
    if ADDED:
        if unit:
            where, exists = state_at(units_ptr + slot * d * d, d, d, column, D, T)
        else:
            where, exists = state_at(states_ptr + slot * d * dv, d, dv, column, D, T)
        tl.store(where, state, mask=exists)


@triton.jit
def scan_kernel(
    units_ptr, added_ptr, first_ptr, states_ptr, d: tl.constexpr, dv: tl.constexpr, segments,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states that segments start from, of what they make of the unit matrix and what they add: S -> P S + R, from the row's
    end on P^T S + R.

    One program: T columns of one head. first: (b * h, d, dv).
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dv, T)
    column = (pid % tiles) * T
    bh = (pid // tiles).to(tl.int64)
    state = tl.zeros([D, T], tl.float32)
    if FIRST:
        where, exists = state_at(first_ptr + bh * d * dv, d, dv, column, D, T)
        state = tl.load(where, mask=exists, other=0.0)
    for step in range(segments):
        if REVERSE:
            slot = bh * segments + segments - 1 - step
        else:
            slot = bh * segments + step
        cell, inside = state_at(states_ptr + slot * d * dv, d, dv, column, D, T)
        tl.store(cell, state, mask=inside)
        cell, inside = state_at(added_ptr + slot * d * dv, d, dv, column, D, T)
        added = tl.load(cell, mask=inside, other=0.0)
        cell, inside = state_at(units_ptr + slot * d * d, d, d, 0, D, D)
        unit = tl.load(cell, mask=inside, other=0.0)
        if REVERSE:
            unit = tl.trans(unit)
        state = tl.dot(unit, state, added, input_precision=PRECISION)
