"""A state whose rows, the channels of keys, decay each by a factor of its own at every token, and that adds to itself.

    out_t = sum over s <= t of (sum over channels of q_t exp(c_t - c_s) k_s) v_s + (q_t exp(c_t)) S,   c: sums of the decay

Chunks are prepared in parallel: the products in brackets within a chunk, queries as they read the state before it, keys as
they enter the state after it. A walk over the chunks of a row then only multiplies: out = inside z + x S, S = left S + y^T z.
From the row's end on, with keys for queries and gradients of outputs for values, the same walk makes the gradients of values
and of states. Those of queries, keys and decay are again made in parallel, from the states before and after each chunk.

Running sums are those of a chunk alone, in base 2. No factor overflows: where decay is slow, queries and keys meet in the middle
of the chunk, and otherwise as in `scored`. That is two launches of a kernel, MEETS or not, each of which leaves to the other
what is not its own, so that what is common is not compiled with what is rare. Documents are in what is prepared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import LOG2E, added, product

NOTHING = tl.constexpr(-60.0)  # exp of it is 1e-26: a decay below that leaves nothing
SLOW = tl.constexpr(40.0)  # powers of two from the middle of a chunk up to which queries and keys meet there


@triton.jit
def tokens(base, stride: tl.constexpr, start, n, column, width: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
           WHOLE_N: tl.constexpr):  # fmt: skip
    """(C, BLOCK) from token `start` and column `column` on; zeros after the last token and right of `width`."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BLOCK)
    where = base + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :]
    if WHOLE_N and width % BLOCK == 0:
        return tl.load(where)
    elif WHOLE_N:
        return tl.load(where, mask=(c < width)[None, :], other=0.0)
    elif width % BLOCK == 0:
        return tl.load(where, mask=(start + r < n)[:, None], other=0.0)
    else:
        return tl.load(where, mask=(start + r < n)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def keep(base, stride: tl.constexpr, start, n, column, width: tl.constexpr, found, C: tl.constexpr, BLOCK: tl.constexpr,
         WHOLE_N: tl.constexpr):  # fmt: skip
    """Stores what `tokens` would load."""
    r = tl.arange(0, C)
    c = column + tl.arange(0, BLOCK)
    where = base + start.to(tl.int64) * stride + r[:, None] * stride + c[None, :]
    found = found.to(base.dtype.element_ty)
    if WHOLE_N and width % BLOCK == 0:
        tl.store(where, found)
    else:
        tl.store(where, found, mask=(start + r < n)[:, None] & (c < width)[None, :])


@triton.jit
def met(documents, start, n, C: tl.constexpr):
    """Documents of a chunk's tokens, of the token before it and of its last one."""
    own = tl.load(documents + tl.minimum(start + tl.arange(0, C), n - 1))
    before = tl.load(documents + tl.maximum(start - 1, 0))
    return own, tl.where(start > 0, before, 0), tl.load(documents + tl.minimum(start + C, n) - 1)


@triton.jit
def pieces(x, EXACT: tl.constexpr):
    """x as a sum of two, 16 binary digits that tensor cores take; EXACT: itself."""
    if EXACT:
        return x, x
    else:
        much = x.to(tl.bfloat16)
        return much, (x - much).to(tl.bfloat16)


@triton.jit
def summed(which, much, little, EXACT: tl.constexpr):
    """`which` (C, C), of -1, 0 and 1, @ what `pieces` made."""
    if EXACT:
        return tl.dot(which.to(tl.float32), much, input_precision="ieee")
    else:
        return tl.dot(which.to(tl.bfloat16), little, tl.dot(which.to(tl.bfloat16), much))


@triton.jit
def log_decay(base, stride: tl.constexpr, start, n, column, d: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
              WHOLE_N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """A chunk's decay in base 2 in `pieces`, and its sums over tokens (BLOCK,)."""
    g = tl.maximum(tokens(base, stride, start, n, column, d, C, BLOCK, WHOLE_N), NOTHING) * LOG2E
    much, little = pieces(g, EXACT)
    if not EXACT:
        g = much.to(tl.float32) + little
    return much, little, tl.sum(g, 0)


@triton.jit
def slow(sums, column, d: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the decay of these channels over a chunk lets queries and keys meet in its middle."""
    at = column + tl.arange(0, BLOCK)
    return tl.max(-tl.load(sums + at, mask=at < d, other=0.0), 0) < 2 * SLOW


@triton.jit
def to_middle(base, stride: tl.constexpr, start, n, column, d: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
              WHOLE_N: tl.constexpr):  # fmt: skip
    """Sums of the decay from the middle of a chunk on, as far as that is slow, and over all of it (BLOCK,)."""
    g = tl.maximum(tokens(base, stride, start, n, column, d, C, BLOCK, WHOLE_N), NOTHING) * LOG2E
    total = tl.sum(g, 0)
    near = tl.cumsum(g, 0) - 0.5 * total[None, :]
    return tl.minimum(tl.maximum(near, -SLOW), SLOW), total


@triton.jit
def upto(much, little, C: tl.constexpr, EXACT: tl.constexpr):
    """Sums of the decay up to each token."""
    r = tl.arange(0, C)
    return summed(tl.where(r[:, None] >= r[None, :], 1.0, 0.0), much, little, EXACT)


@triton.jit
def beyond(much, little, C: tl.constexpr, EXACT: tl.constexpr):
    """Sums of the decay after each token."""
    r = tl.arange(0, C)
    return summed(tl.where(r[:, None] < r[None, :], 1.0, 0.0), much, little, EXACT)


@triton.jit
def halves(much, little, level, C: tl.constexpr, EXACT: tl.constexpr):
    """Of pairs of neighbouring stretches of 2^level tokens: which tokens are in the second, and which pairs in both; what is
    left between each token and the border, (C, BLOCK)."""
    r = tl.arange(0, C)
    second = ((r >> level) & 1)[:, None] == 1
    apart = (r >> level)[:, None] ^ (r >> level)[None, :]
    between = (apart == 0) & (second == (r[:, None] >= r[None, :]))
    return second, apart == 1, tl.exp2(summed(tl.where(between, 1.0, 0.0), much, little, EXACT))


@triton.jit
def scored(q, k, much, little, C: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """(C, C) q_r . k_s, each channel times what is left of it from s to r, for s <= r; what is above the diagonal means nothing.

    Neighbouring stretches of tokens meet at the border between them, where both factors are at most one, from halves of the
    chunk down to single tokens. C = 2^LEVELS.
    """
    r = tl.arange(0, C)
    s = tl.zeros([C, C], tl.float32)
    for level in range(LEVELS):
        second, apart, left = halves(much, little, level, C, EXACT)
        x = (tl.where(second, q, k) * left).to(TYPE)
        s = tl.where(apart, product(x, tl.trans(x), EXACT), s)
    return tl.where(r[:, None] == r[None, :], tl.sum(q.to(tl.float32) * k, 1)[:, None], s)


@triton.jit
def pulled(q, k, much, little, pairs, of_q, of_k, C: tl.constexpr, LEVELS: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """Gradients (C, BLOCK) of q and k plus what comes of those of what they score; these are `pairs`, below the diagonal."""
    r = tl.arange(0, C)
    both = tl.where(r[:, None] >= r[None, :], pairs, tl.trans(pairs))
    for level in range(LEVELS):
        of_q, of_k = _pulled_apart(q, k, much, little, both, of_q, of_k, level, C, TYPE, EXACT)
    own = tl.sum(tl.where(r[:, None] == r[None, :], pairs, 0.0).to(tl.float32), 1)[:, None]
    of_q += own * k
    of_k += own * q
    return of_q, of_k


@triton.jit
def _pulled_apart(q, k, much, little, both, of_q, of_k, level, C: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """What stretches of 2^level tokens add: one product has gradients of queries in the second and of keys in the first ones."""
    second, apart, left = halves(much, little, level, C, EXACT)
    found = left * product(tl.where(apart, both, 0.0).to(TYPE), (tl.where(second, q, k) * left).to(TYPE), EXACT)
    return of_q + tl.where(second, found, 0.0), of_k + tl.where(second, 0.0, found)


@triton.jit
def chunk_kernel(
    q_ptr, k_ptr, decay_ptr, documents_ptr, inside_ptr, reads_ptr, writes_ptr, left_ptr, sums_ptr, q_sb, q_sh, q_sn: tl.constexpr,
    k_sb, k_sh, k_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr, documents_sb, heads, n, d: tl.constexpr, chunks,
    MEETS: tl.constexpr, DOCUMENTS: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, WHOLE_N: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Prepares one chunk of one head: scores inside it (b * h, chunks, C, C); queries that read the state before it and keys
    that enter the state after it, (b * h, chunks, C, d); what is left of one in the other, and sums of the decay, (b * h,
    chunks, d). MEETS: of all chunks, and sums; without: again, of those whose decay is not slow."""
    pid = tl.program_id(0)
    sums = sums_ptr + pid.to(tl.int64) * d
    if not MEETS:
        if slow(sums, 0, d, D):
            return
    bh = pid // chunks
    start = (pid % chunks) * C
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    r = tl.arange(0, C)
    q_base = q_ptr + b * q_sb + head * q_sh
    k_base = k_ptr + b * k_sb + head * k_sh
    decay_base = decay_ptr + b * g_sb + head * g_sh
    place = pid.to(tl.int64) * C
    seen = r[:, None] >= r[None, :]
    if DOCUMENTS:
        own, before, last = met(documents_ptr + b * documents_sb, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
    inside = tl.zeros([C, C], tl.float32)
    for column in tl.range(0, d, BLOCK, num_stages=STAGES):
        q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N)
        k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N)
        at = column + tl.arange(0, BLOCK)
        if MEETS:
            near, total = to_middle(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N)
            half = tl.exp2(0.5 * total)[None, :]
            x = q * tl.exp2(near)
            y = k * tl.exp2(-near)
            inside = added(x.to(TYPE), tl.trans(y.to(TYPE)), inside, EXACT)
            reads = (x * half).to(TYPE)
            writes = (y * half).to(TYPE)
            tl.store(sums + at, total, mask=at < d)
        else:
            much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
            inside += scored(q, k, much, little, C, LEVELS, TYPE, EXACT)
            reads = (q * tl.exp2(upto(much, little, C, EXACT))).to(TYPE)
            writes = (k * tl.exp2(beyond(much, little, C, EXACT))).to(TYPE)
        left = tl.exp2(total)
        if DOCUMENTS:
            reads = tl.where((own == before)[:, None], reads, 0.0)
            writes = tl.where((own == last)[:, None], writes, 0.0)
            left = tl.where(before == last, left, 0.0)
        keep(reads_ptr, d, pid * C, pid * C + C, column, d, reads, C, BLOCK, True)
        keep(writes_ptr, d, pid * C, pid * C + C, column, d, writes, C, BLOCK, True)
        tl.store(left_ptr + pid.to(tl.int64) * d + at, left, mask=at < d)
    inside = tl.where(seen, inside, 0.0)
    tl.store(inside_ptr + place * C + r[:, None] * C + r[None, :], inside.to(TYPE))


@triton.jit
def walk_kernel(
    x_ptr, y_ptr, inside_ptr, z_ptr, out_ptr, left_ptr, first_ptr, last_ptr, states_ptr, remains_ptr, z_sb, z_sh,
    z_sn: tl.constexpr, out_sb, out_sh, out_sn: tl.constexpr, heads, n, d: tl.constexpr, dz: tl.constexpr, chunks, segments, each,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, OUT: tl.constexpr, LAST: tl.constexpr, STATES: tl.constexpr,
    ADDED: tl.constexpr, C: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WHOLE_N: tl.constexpr, TYPE: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: D rows and T columns of the state of `each` chunks of one head. OUT: and of the outputs, if D is all rows.

    x, y: (b * h, chunks, C, d) what reads the state and what enters it. FIRST: segments start from states (b * h, segments, d,
    dz). LAST: the row's last state is wanted. STATES: so is the one before each chunk, (b * h, chunks, d, dz). ADDED: instead,
    what each segment adds to the state, where the state after it belongs, and what it leaves, (b * h, segments, d); not of the
    last segment that is walked.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dz, T)
    walked = segments - 1 if ADDED else segments
    column = (pid % tiles) * T
    pid = pid // tiles
    blocks = tl.cdiv(d, D)
    row = (pid % blocks) * D
    pid = pid // blocks
    segment = pid % walked
    bh = pid // walked
    if ADDED and REVERSE:
        segment += 1
    begin = segment * each
    stop = tl.minimum(begin + each, chunks)
    z_base = z_ptr + (bh // heads).to(tl.int64) * z_sb + (bh % heads).to(tl.int64) * z_sh
    out_base = out_ptr + (bh // heads).to(tl.int64) * out_sb + (bh % heads).to(tl.int64) * out_sh
    r = tl.arange(0, C)
    at = row + tl.arange(0, D)
    there = column + tl.arange(0, T)
    cell = at[:, None] * dz + there[None, :]
    exists = (at < d)[:, None] & (there < dz)[None, :]
    if FIRST:
        slot = bh.to(tl.int64) * segments + segment
        state = tl.load(first_ptr + slot * d * dz + cell, mask=exists, other=0.0)
    else:
        state = tl.zeros([D, T], tl.float32)
    remains = tl.full([D], 1.0, tl.float32)
    for step in tl.range(0, stop - begin, num_stages=STAGES):
        if REVERSE:
            i = stop - 1 - step
        else:
            i = begin + step
        chunk = bh.to(tl.int64) * chunks + i
        z = tokens(z_base, z_sn, i * C, n, column, dz, C, T, WHOLE_N).to(TYPE)
        if d % D == 0:
            y = tl.load(y_ptr + chunk * C * d + r[:, None] * d + at[None, :])
            left = tl.load(left_ptr + chunk * d + at)
        else:
            y = tl.load(y_ptr + chunk * C * d + r[:, None] * d + at[None, :], mask=(at < d)[None, :], other=0.0)
            left = tl.load(left_ptr + chunk * d + at, mask=at < d, other=1.0)
        if STATES:
            if d % D == 0 and dz % T == 0:
                tl.store(states_ptr + chunk * d * dz + cell, state.to(TYPE))
            else:
                tl.store(states_ptr + chunk * d * dz + cell, state.to(TYPE), mask=exists)
        if OUT:
            if d % D == 0:
                x = tl.load(x_ptr + chunk * C * d + r[:, None] * d + at[None, :])
            else:
                x = tl.load(x_ptr + chunk * C * d + r[:, None] * d + at[None, :], mask=(at < d)[None, :], other=0.0)
            inside = tl.load(inside_ptr + chunk * C * C + r[:, None] * C + r[None, :])
            if REVERSE:
                inside = tl.trans(inside)
            out = added(inside, z, product(x, state.to(TYPE), EXACT), EXACT)
            keep(out_base, out_sn, i * C, n, column, dz, out, C, T, WHOLE_N)
        state = added(tl.trans(y), z, state * left[:, None], EXACT)
        if ADDED:
            remains = remains * left
    if ADDED:
        slot = bh.to(tl.int64) * segments + segment
        if REVERSE:
            tl.store(first_ptr + (slot - 1) * d * dz + cell, state, mask=exists)
        else:
            tl.store(first_ptr + (slot + 1) * d * dz + cell, state, mask=exists)
        if column == 0:
            tl.store(remains_ptr + slot * d + at, remains, mask=at < d)
    if LAST:
        if REVERSE:
            ending = segment == 0
        else:
            ending = segment == segments - 1
        if ending:
            tl.store(last_ptr + bh.to(tl.int64) * d * dz + cell, state, mask=exists)


@triton.jit
def scan_kernel(
    states_ptr, remains_ptr, first_ptr, d, dz, segments, REVERSE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """From what segments add to the states they start from, in place; a program has BLOCK numbers of a head's state."""
    size = d * dz
    blocks = tl.cdiv(size, BLOCK)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.zeros([BLOCK], tl.float32)
    if FIRST:
        state = tl.load(first_ptr + bh * size + at, mask=inside, other=0.0)
    for step in range(segments):
        if REVERSE:
            slot = bh * segments + segments - 1 - step
            before = slot + 1
        else:
            slot = bh * segments + step
            before = slot - 1
        if step > 0:
            left = tl.load(remains_ptr + before * d + at // dz, mask=inside, other=0.0)
            state = state * left + tl.load(states_ptr + slot * size + at, mask=inside, other=0.0)
        tl.store(states_ptr + slot * size + at, state, mask=inside)


@triton.jit
def gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, documents_ptr, sums_ptr, states_ptr, changes_ptr, dq_ptr, dk_ptr, dg_ptr,
    q_sb, q_sh, q_sn: tl.constexpr, k_sb, k_sh, k_sn: tl.constexpr, v_sb, v_sh, v_sn: tl.constexpr,
    do_sb, do_sh, do_sn: tl.constexpr, g_sb, g_sh, g_sn: tl.constexpr, dq_sb, dq_sh, dq_sn: tl.constexpr,
    dk_sb, dk_sh, dk_sn: tl.constexpr, dg_sb, dg_sh, dg_sn: tl.constexpr, documents_sb, heads, n, d: tl.constexpr,
    dv: tl.constexpr, chunks,
    MEETS: tl.constexpr, DOCUMENTS: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, WHOLE_N: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK channels of one chunk's queries and keys and, DECAY, of its decay; MEETS: if that is slow, else if not.

    states: those before each chunk; changes: gradients of those after it, (b * h, chunks, d, dv). What a token's decay
    changes is what is read from it on of what was written before it: q . dq less k . dk of the tokens from it on, up to the
    chunk's end, and the product there of the state and its gradient.
    """
    blocks = tl.cdiv(d, BLOCK)
    column = (tl.program_id(0) % blocks) * BLOCK
    pid = tl.program_id(0) // blocks
    if slow(sums_ptr + pid.to(tl.int64) * d, column, d, BLOCK) != MEETS:
        return
    bh = pid // chunks
    start = (pid % chunks) * C
    b = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    r = tl.arange(0, C)
    documents = documents_ptr + b * documents_sb
    q_base = q_ptr + b * q_sb + head * q_sh
    k_base = k_ptr + b * k_sb + head * k_sh
    decay_base = decay_ptr + b * g_sb + head * g_sh
    seen = r[:, None] >= r[None, :]
    later = r[:, None] <= r[None, :]
    if DOCUMENTS:
        own, before, last = met(documents, start, n, C)
        seen = seen & (own[:, None] == own[None, :])
        later = later & (own[:, None] == own[None, :])
    at = column + tl.arange(0, BLOCK)
    pairs = tl.zeros([C, C], tl.float32)
    of_q = tl.zeros([C, BLOCK], tl.float32)
    of_k = tl.zeros([C, BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, dv, PART, num_stages=STAGES):
        v = tokens(v_ptr + b * v_sb + head * v_sh, v_sn, start, n, part, dv, C, PART, WHOLE_N).to(TYPE)
        do = tokens(do_ptr + b * do_sb + head * do_sh, do_sn, start, n, part, dv, C, PART, WHOLE_N).to(TYPE)
        there = part + tl.arange(0, PART)
        cell = pid.to(tl.int64) * d * dv + at[:, None] * dv + there[None, :]
        if d % BLOCK == 0 and dv % PART == 0:
            state = tl.load(states_ptr + cell)
            change = tl.load(changes_ptr + cell)
        else:
            exists = (at < d)[:, None] & (there < dv)[None, :]
            state = tl.load(states_ptr + cell, mask=exists, other=0.0)
            change = tl.load(changes_ptr + cell, mask=exists, other=0.0)
        pairs = added(do, tl.trans(v), pairs, EXACT)
        of_q = added(do, tl.trans(state), of_q, EXACT)
        of_k = added(v, tl.trans(change), of_k, EXACT)
        kept += tl.sum(state.to(tl.float32) * change, 1)
    pairs = tl.where(seen, pairs, 0.0).to(TYPE)
    q = tokens(q_base, q_sn, start, n, column, d, C, BLOCK, WHOLE_N)
    k = tokens(k_base, k_sn, start, n, column, d, C, BLOCK, WHOLE_N)
    much, little, total = log_decay(decay_base, g_sn, start, n, column, d, C, BLOCK, WHOLE_N, EXACT)
    kept *= tl.exp2(total)
    if DOCUMENTS:
        kept = tl.where(before == last, kept, 0.0)
    if DOCUMENTS:
        of_q = tl.where((own == before)[:, None], of_q, 0.0)
        of_k = tl.where((own == last)[:, None], of_k, 0.0)
    if MEETS:
        near = upto(much, little, C, EXACT) - 0.5 * total[None, :]
        half = tl.exp2(0.5 * total)[None, :]
        far = tl.exp2(-near)
        near = tl.exp2(near)
        of_k *= half
        crossed = tl.sum(of_k * (k * far), 0)
        of_q = near * added(pairs, (k * far).to(TYPE), of_q * half, EXACT)
        of_k = far * added(tl.trans(pairs), (q * near).to(TYPE), of_k, EXACT)
    else:
        of_q *= tl.exp2(upto(much, little, C, EXACT))
        of_k *= tl.exp2(beyond(much, little, C, EXACT))
        crossed = tl.sum(of_k * k, 0)
        of_q, of_k = pulled(q, k, much, little, pairs, of_q, of_k, C, LEVELS, TYPE, EXACT)
    keep(dq_ptr + b * dq_sb + head * dq_sh, dq_sn, start, n, column, d, of_q, C, BLOCK, WHOLE_N)
    keep(dk_ptr + b * dk_sb + head * dk_sh, dk_sn, start, n, column, d, of_k, C, BLOCK, WHOLE_N)
    if DECAY:
        crossed += kept
        much, little = pieces(q * of_q - k * of_k, EXACT)
        of_decay = summed(tl.where(later, 1.0, 0.0), much, little, EXACT)
        if DOCUMENTS:
            first = tl.load(documents + tl.maximum(tl.minimum(start + r, n - 1) - 1, 0))
            begins = own != tl.where(start + r > 0, first, 0)  # nothing was there to decay
            of_decay += tl.where((own == last)[:, None], crossed[None, :], 0.0)
            of_decay = tl.where(begins[:, None], 0.0, of_decay)
        else:
            of_decay += crossed[None, :]
        keep(dg_ptr + b * dg_sb + head * dg_sh, dg_sn, start, n, column, d, of_decay, C, BLOCK, WHOLE_N)
