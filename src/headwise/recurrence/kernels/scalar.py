"""A state that every token decays by one factor (or none) and adds to: one walk over a row's chunks, whatever is computed.

    out_t = sum over s <= t of exp(c_t - c_s) (x_t . y_s) z_s + exp(c_t) x_t S,      c: running sums of the decay

with x, y, z = q, k, v gives outputs, with x, y, z = do, v, k and the transposed state the gradient of q. With s >= t and
exp(c_s - c_t), from the row's end on, v, do, q give the gradient of k and k, q, do that of v. The state stays in
registers. A row may be cut into segments that are walked at the same time, each from a state that was made before.

Running sums are those of a chunk alone, in base 2. Documents: pairs of tokens meet in the same one, and a state is that of
the document that holds the token before it (in a walk from the end: the token after).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import LOG2E, added, product


@triton.jit
def read(x, state, EXACT: tl.constexpr):
    """x @ state, which is float32: rounded as x is, but of float16 to tfloat32, which has its digits and float32's range."""
    if EXACT:
        return tl.dot(x, state, input_precision="ieee")
    elif x.dtype == tl.float16:
        return tl.dot(x.to(tl.float32), state, input_precision="tf32")
    else:
        return tl.dot(x, state.to(x.dtype))


@triton.jit
def head_of(source, b, head, sb, sh, TMA: tl.constexpr):
    """Where a head's tokens begin; of a descriptor, itself."""
    if TMA:
        return source
    else:
        return source + b.to(tl.int64) * sb + head.to(tl.int64) * sh


@triton.jit
def tokens(source, b, head, stride, start, n, width, column, C: tl.constexpr, BLOCK: tl.constexpr, WHOLE_N: tl.constexpr,
           WHOLE: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """(C, BLOCK) from token `start` and column `column` on; zeros after the last token and right of `width`."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BLOCK)
    if TMA:
        return tl.reshape(source.load([b, head, start, column]), [C, BLOCK])
    elif WHOLE_N and WHOLE:
        return tl.load(source + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :])
    else:
        inside = tl.full([C, BLOCK], True, tl.int1)
        if not WHOLE_N:
            inside = inside & (start + r < n)[:, None]
        if not WHOLE:
            inside = inside & (c < width)[None, :]
        return tl.load(source + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def keep(source, b, head, stride, start, n, width, column, found, C: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Stores what `tokens` would load."""
    if TMA:
        source.store([b, head, start, column], tl.reshape(found.to(source.dtype), [1, 1, C, BLOCK]))
    else:
        r = tl.arange(0, C)
        c = column + tl.arange(0, BLOCK)
        where = source + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :]
        tl.store(where, found.to(source.dtype.element_ty), mask=(start + r < n)[:, None] & (c < width)[None, :])


@triton.jit
def ends(documents, start, n, C: tl.constexpr):
    """Documents of the token before a chunk and of its last one."""
    before = tl.load(documents + tl.maximum(start - 1, 0))
    return tl.where(start > 0, before, 0), tl.load(documents + tl.minimum(start + C, n) - 1)


@triton.jit
def factors(sums, documents, start, n, REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr):
    """(C,) by which a chunk's tokens read the state before it, (C,) by which they enter the next one, and what is left of it."""
    near = tl.full([C], 1.0, tl.float32)
    far = near
    left = 1.0
    if DECAY:
        c = tl.load(sums + start + tl.arange(0, C))
        total = tl.load(sums + start + C - 1)
        near = tl.exp2(c)
        far = tl.exp2(total - c)
        left = tl.exp2(total)
    if DOCUMENTS:
        own = tl.load(documents + tl.minimum(start + tl.arange(0, C), n - 1))
        before, last = ends(documents, start, n, C)
        near = tl.where(own == before, near, 0.0)
        far = tl.where(own == last, far, 0.0)
        left = tl.where(before == last, left, 0.0)
    if REVERSE:
        return far, near, left
    else:
        return near, far, left


@triton.jit
def between(sums, documents, start, n, REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr):
    """(C, C) what is left, at the tokens that read (rows), of what tokens of the chunk wrote (columns)."""
    r = tl.arange(0, C)
    if REVERSE:
        seen = r[:, None] <= r[None, :]
    else:
        seen = r[:, None] >= r[None, :]
    if DOCUMENTS:
        own = tl.load(documents + tl.minimum(start + r, n - 1))
        seen = seen & (own[:, None] == own[None, :])
    if DECAY:
        c = tl.load(sums + start + r)
        gap = c[:, None] - c[None, :]
        if REVERSE:
            gap = -gap
        return tl.where(seen, tl.exp2(tl.minimum(gap, 0.0)), 0.0)
    else:
        return tl.where(seen, 1.0, 0.0)


@triton.jit
def state_at(base, row_stride, column_stride, d, dz, column, D: tl.constexpr, T: tl.constexpr):
    """Pointers to (D, T) of a state, from column `column` on, and which of them are inside."""
    r = tl.arange(0, D)
    c = column + tl.arange(0, T)
    inside = (r < d)[:, None] & (c < dz)[None, :]
    return base + r[:, None] * row_stride + c[None, :] * column_stride, inside


@triton.jit
def sums_kernel(decay_ptr, sums_ptr, sb, sh, sn, heads, n, chunks, C: tl.constexpr, ROWS: tl.constexpr):
    """Running sums of the decay in base 2, from anew in every chunk; a program has ROWS chunks. Stays level after the end."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(chunks, ROWS)
    bh = pid // blocks
    chunk = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    at = chunk[:, None] * C + tl.arange(0, C)[None, :]
    base = decay_ptr + (bh // heads).to(tl.int64) * sb + (bh % heads).to(tl.int64) * sh
    g = tl.load(base + at.to(tl.int64) * sn, mask=at < n, other=0.0) * LOG2E
    tl.store(sums_ptr + bh.to(tl.int64) * chunks * C + at, tl.cumsum(g, 1), mask=(chunk < chunks)[:, None])


@triton.jit
def walk_kernel(
    x_ptr, y_ptr, z_ptr, w_ptr, out_ptr, sums_ptr, documents_ptr, first_ptr, last_ptr, moments_ptr,
    x_sb, x_sh, x_sn, y_sb, y_sh, y_sn, z_sb, z_sh, z_sn, w_sb, w_sh, w_sn, out_sb, out_sh, out_sn,
    documents_sb, row_stride, column_stride, heads, n, d, dz, chunks, segments, each,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    MOMENTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr,
    WHOLE_T: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: T columns of the outputs of `each` chunks of one head.

    FIRST: segments start from states (b * heads, segments, d, dz), which may be transposed. LAST: the row's last state is
    wanted. MOMENTS: so are the products of each output with w, summed over these columns, as (tiles, b * heads, n).
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dz, T)
    column = (pid % tiles) * T
    segment = (pid // tiles) % segments
    bh = pid // (tiles * segments)
    b = bh // heads
    head = bh % heads
    x_base = head_of(x_ptr, b, head, x_sb, x_sh, TMA)
    y_base = head_of(y_ptr, b, head, y_sb, y_sh, TMA)
    z_base = head_of(z_ptr, b, head, z_sb, z_sh, TMA)
    w_base = head_of(w_ptr, b, head, w_sb, w_sh, TMA)
    out_base = head_of(out_ptr, b, head, out_sb, out_sh, TMA)
    sums = sums_ptr + bh.to(tl.int64) * chunks * C
    documents = documents_ptr + b.to(tl.int64) * documents_sb
    moments = moments_ptr + ((pid % tiles).to(tl.int64) * (tl.num_programs(0) // (tiles * segments)) + bh) * n
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    if FIRST:
        where, inside = state_at(
            first_ptr + (bh.to(tl.int64) * segments + segment) * d * dz, row_stride, column_stride, d, dz, column, D, T
        )
        state = tl.load(where, mask=inside, other=0.0)
    else:
        state = tl.zeros([D, T], tl.float32)
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        if REVERSE:
            start = (stop - 1 - step) * C
        else:
            start = (begin + step) * C
        x = tokens(x_base, b, head, x_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, TMA)
        y = tokens(y_base, b, head, y_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, TMA)
        z = tokens(z_base, b, head, z_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, TMA)
        s = product(x, tl.trans(y), EXACT) * between(sums, documents, start, n, REVERSE, DECAY, DOCUMENTS, C)
        out = read(x, state, EXACT)
        if DECAY or DOCUMENTS:
            of_read, of_write, left = factors(sums, documents, start, n, REVERSE, DECAY, DOCUMENTS, C)
            out = out * of_read[:, None]
            state = added(tl.trans(y), (z * of_write[:, None]).to(z.dtype), state * left, EXACT)
        else:
            state = added(tl.trans(y), z, state, EXACT)
        out = added(s.to(z.dtype), z, out, EXACT)
        keep(out_base, b, head, out_sn, start, n, dz, column, out, C, T, TMA)
        if MOMENTS:
            w = tokens(w_base, b, head, w_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, TMA)
            r = start + tl.arange(0, C)
            tl.store(moments + r, tl.sum(out * w, 1), mask=r < n)
    if LAST:
        if REVERSE:
            ending = segment == 0
        else:
            ending = segment == segments - 1
        if ending:
            where, inside = state_at(last_ptr + bh.to(tl.int64) * d * dz, row_stride, column_stride, d, dz, column, D, T)
            tl.store(where, state, mask=inside)


@triton.jit
def pair_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, sums_ptr, documents_ptr, first_ptr, last_ptr, moments_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, do_sb, do_sh, do_sn, dk_sb, dk_sh, dk_sn, dv_sb, dv_sh, dv_sn,
    documents_sb, heads, n, d, dv, chunks, segments, each,
    DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, MOMENTS: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_DV: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both walks from the row's end in one: the gradients of k and v of `each` chunks of one head, whole heads at once."""
    pid = tl.program_id(0)
    segment = pid % segments
    bh = pid // segments
    b = bh // heads
    head = bh % heads
    q_base = head_of(q_ptr, b, head, q_sb, q_sh, TMA)
    k_base = head_of(k_ptr, b, head, k_sb, k_sh, TMA)
    v_base = head_of(v_ptr, b, head, v_sb, v_sh, TMA)
    do_base = head_of(do_ptr, b, head, do_sb, do_sh, TMA)
    dk_base = head_of(dk_ptr, b, head, dk_sb, dk_sh, TMA)
    dv_base = head_of(dv_ptr, b, head, dv_sb, dv_sh, TMA)
    sums = sums_ptr + bh.to(tl.int64) * chunks * C
    documents = documents_ptr + b.to(tl.int64) * documents_sb
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    if FIRST:
        where, inside = state_at(first_ptr + (bh.to(tl.int64) * segments + segment) * d * dv, dv, 1, d, dv, 0, D, DV)
        state = tl.load(where, mask=inside, other=0.0)
    else:
        state = tl.zeros([D, DV], tl.float32)
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        start = (stop - 1 - step) * C
        q = tokens(q_base, b, head, q_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, TMA)
        k = tokens(k_base, b, head, k_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, TMA)
        v = tokens(v_base, b, head, v_sn, start, n, dv, 0, C, DV, WHOLE_N, WHOLE_DV, TMA)
        do = tokens(do_base, b, head, do_sn, start, n, dv, 0, C, DV, WHOLE_N, WHOLE_DV, TMA)
        decay = between(sums, documents, start, n, True, DECAY, DOCUMENTS, C)
        of_read, of_write, left = factors(sums, documents, start, n, True, DECAY, DOCUMENTS, C)
        s = product(k, tl.trans(q), EXACT) * decay
        of_v = read(k, state, EXACT)
        if DECAY or DOCUMENTS:
            of_v = of_v * of_read[:, None]
        of_v = added(s.to(do.dtype), do, of_v, EXACT)
        keep(dv_base, b, head, dv_sn, start, n, dv, 0, of_v, C, DV, TMA)
        s = product(v, tl.trans(do), EXACT) * decay
        of_k = read(v, tl.trans(state), EXACT)
        if DECAY or DOCUMENTS:
            of_k = of_k * of_read[:, None]
        of_k = added(s.to(q.dtype), q, of_k, EXACT)
        keep(dk_base, b, head, dk_sn, start, n, d, 0, of_k, C, D, TMA)
        if DECAY or DOCUMENTS:
            state = added(tl.trans(q), (do * of_write[:, None]).to(do.dtype), state * left, EXACT)
        else:
            state = added(tl.trans(q), do, state, EXACT)
        if MOMENTS:
            r = start + tl.arange(0, C)
            tl.store(moments_ptr + bh.to(tl.int64) * n + r, tl.sum(of_k * k, 1), mask=r < n)
    if LAST:
        if segment == 0:
            where, inside = state_at(last_ptr + bh.to(tl.int64) * d * dv, dv, 1, d, dv, 0, D, DV)
            tl.store(where, state, mask=inside)


@triton.jit
def states_kernel(
    y_ptr, z_ptr, states_ptr, left_ptr, sums_ptr, documents_ptr, y_sb, y_sh, y_sn, z_sb, z_sh, z_sn,
    documents_sb, heads, n, d, dz, chunks, segments, each,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, put where the state after it belongs, and what it leaves, (b * heads, segments).

    Not of the last segment that is walked, after which nothing comes.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dz, T)
    column = (pid % tiles) * T
    segment = (pid // tiles) % (segments - 1)
    bh = pid // (tiles * (segments - 1))
    if REVERSE:
        segment += 1
    b = bh // heads
    head = bh % heads
    y_base = head_of(y_ptr, b, head, y_sb, y_sh, TMA)
    z_base = head_of(z_ptr, b, head, z_sb, z_sh, TMA)
    sums = sums_ptr + bh.to(tl.int64) * chunks * C
    documents = documents_ptr + b.to(tl.int64) * documents_sb
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    state = tl.zeros([D, T], tl.float32)
    remains = 1.0
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        if REVERSE:
            start = (stop - 1 - step) * C
        else:
            start = (begin + step) * C
        y = tokens(y_base, b, head, y_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, TMA)
        z = tokens(z_base, b, head, z_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, TMA)
        if DECAY or DOCUMENTS:
            _, of_write, left = factors(sums, documents, start, n, REVERSE, DECAY, DOCUMENTS, C)
            state = added(tl.trans(y), (z * of_write[:, None]).to(z.dtype), state * left, EXACT)
            remains = remains * left
        else:
            state = added(tl.trans(y), z, state, EXACT)
    row = bh.to(tl.int64) * segments + segment
    if REVERSE:
        slot = row - 1
    else:
        slot = row + 1
    where, inside = state_at(states_ptr + slot * d * dz, dz, 1, d, dz, column, D, T)
    tl.store(where, state, mask=inside)
    if column == 0:
        tl.store(left_ptr + row, remains)


@triton.jit
def scan_kernel(
    states_ptr, left_ptr, first_ptr, others_ptr, other_last_ptr, anchors_ptr, size, segments,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, ANCHORS: tl.constexpr, OTHER_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what segments add to the states they start from, in place; a program has BLOCK numbers of a head's state.

    FIRST: the state of the first one that is walked. ANCHORS, of gradients of states: their products with the states, summed
    over these numbers, (b * heads, segments, blocks); after the last segment only with OTHER_LAST.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    bh = (pid // blocks).to(tl.int64)
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        state = tl.load(first_ptr + bh * size + at, mask=inside, other=0.0)
    for step in range(segments):
        if REVERSE:
            segment = segments - 1 - step
        else:
            segment = step
        slot = bh * segments + segment
        if step > 0:
            added = tl.load(states_ptr + slot * size + at, mask=inside, other=0.0)
            if REVERSE:
                state = state * tl.load(left_ptr + slot + 1) + added
            else:
                state = state * tl.load(left_ptr + slot - 1) + added
        tl.store(states_ptr + slot * size + at, state, mask=inside)
        if ANCHORS:
            met = tl.zeros([BLOCK], tl.float32)
            if segment < segments - 1:
                met = tl.load(others_ptr + (slot + 1) * size + at, mask=inside, other=0.0)
            elif OTHER_LAST:
                met = tl.load(other_last_ptr + bh * size + at, mask=inside, other=0.0)
            tl.store(anchors_ptr + slot * blocks + pid % blocks, tl.sum(met * state, 0))


@triton.jit
def _then(a0, x0, a1, x1):
    return a0 * a1, a1 * x0 + x1


@triton.jit
def decay_kernel(
    reads_ptr, writes_ptr, anchors_ptr, documents_ptr, out_ptr, documents_sb, heads, n, rows, length, segments, of_reads,
    of_writes, of_anchors, DOCUMENTS: tl.constexpr, ANCHORS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The decay's gradient: q . dq - k . dk of all tokens from this one to the end of its document.

    One program: a segment of a head, from its end on; what comes after it is its anchor. reads: (of_reads, rows, n) parts of
    q . dq; writes: of k . dk; anchors: (rows, segments, of_anchors) parts, of which PARTS hold all.
    """
    pid = tl.program_id(0)
    segment = pid % segments
    row = pid // segments
    documents = documents_ptr + (row // heads).to(tl.int64) * documents_sb
    begin = segment * length
    stop = tl.minimum(begin + length, n)
    after = 0.0
    if ANCHORS:
        at = tl.arange(0, PARTS)
        after = tl.sum(tl.load(anchors_ptr + pid.to(tl.int64) * of_anchors + at, mask=at < of_anchors, other=0.0), 0)
    for step in range(tl.cdiv(stop - begin, BLOCK)):
        start = begin + (tl.cdiv(stop - begin, BLOCK) - 1 - step) * BLOCK
        t = start + tl.arange(0, BLOCK)
        inside = t < stop
        there = row.to(tl.int64) * n + t
        change = tl.zeros([BLOCK], tl.float32)
        here = there
        for _ in range(of_reads):
            change += tl.load(reads_ptr + here, mask=inside, other=0.0)
            here += rows * n
        here = there
        for _ in range(of_writes):
            change -= tl.load(writes_ptr + here, mask=inside, other=0.0)
            here += rows * n
        if DOCUMENTS:
            own = tl.load(documents + tl.minimum(t, n - 1))
            follows = (tl.load(documents + tl.minimum(t + 1, n - 1)) == own) | (t >= stop)
            stays, found = tl.associative_scan((tl.where(follows, 1.0, 0.0), change), 0, _then, reverse=True)
            found = found + stays * after
        else:
            found = tl.cumsum(change, 0, reverse=True) + after
        tl.store(out_ptr + there, found, mask=inside)
        after = tl.sum(tl.where(t == start, found, 0.0), 0)
