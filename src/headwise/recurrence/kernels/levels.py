"""Log-linear attention over a state that decays by one factor a token, or none: each query weighs buckets of older tokens.

    out_t = sum over s <= t of levels_t[bits of (t xor s)] exp(c_t - c_s) (x_t . y_s) z_s,      c: running sums of the decay

Rows are cut into units, a power of two of chunks. Within a unit the pairs are multiplied out, a chunk with a chunk. What a unit
writes is a state, and the runs of units that queries read as one are nodes of a binary tree over them, each decayed to its
run's end: the node that ends with unit e has as many units as the least bit of e + 1 says, and takes the place of unit e's
state. So a query of unit i reads, for each bit that i has set, the node that ends where i with its lower bits cleared begins.

As in `scalar`, the roles of q, k, v and do tell what is computed: with REVERSE tokens read what later ones wrote, and the
gradient of their unit's state. Running sums are those of a unit, in base 2. No unit reads the last one: it has no node.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...attention.kernels.parts import added, product
from .scalar import head_of, keep, read, tokens


@triton.jit
def weight(levels, stride, start, n, level, count, C: tl.constexpr):
    """(C,) weights that queries from `start` on give one level; levels after the last have its weight."""
    t = start + tl.arange(0, C)
    return tl.load(levels + t.to(tl.int64) * stride + tl.minimum(level, count - 1), mask=t < n, other=0.0)


@triton.jit
def bits_of(number, BITS: tl.constexpr):
    """The number of bits of each number up to 2^BITS - 1."""
    found = (number > 0).to(tl.int32)
    for bit in tl.static_range(1, BITS):
        found += ((number >> bit) > 0).to(tl.int32)
    return found


@triton.jit
def between(sums, levels, stride, start, n, count, REVERSE: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr):
    """Of a chunk with itself, readers in rows: (C, C) what is left of what was written, weights, and levels."""
    r = tl.arange(0, C)
    apart = r[:, None] ^ r[None, :]
    level = tl.zeros([C, C], tl.int32)
    weights = tl.zeros([C, C], tl.float32)
    own = weight(levels, stride, start, n, 0, count, C)
    if REVERSE:
        seen = r[:, None] <= r[None, :]
        weights += own[None, :]
    else:
        seen = r[:, None] >= r[None, :]
        weights += own[:, None]
    for bit in tl.static_range(BITS):
        further = (apart >> bit) > 0
        level += further.to(tl.int32)
        own = weight(levels, stride, start, n, bit + 1, count, C)
        if REVERSE:
            weights = tl.where(further, own[None, :], weights)
        else:
            weights = tl.where(further, own[:, None], weights)
    left = tl.where(seen, 1.0, 0.0)
    if DECAY:
        c = tl.load(sums + r)
        gap = c[:, None] - c[None, :]
        if REVERSE:
            gap = -gap
        left = tl.where(seen, tl.exp2(tl.minimum(gap, 0.0)), 0.0)
    return left, weights, level


@triton.jit
def blocks_kernel(
    x_ptr, y_ptr, z_ptr, u_ptr, out_ptr, sums_ptr, levels_ptr, nodes_ptr, spans_ptr, of_levels_ptr, moments_ptr,
    x_sb, x_sh, x_sn, y_sb, y_sh, y_sn, z_sb, z_sh, z_sn, u_sb, u_sh, u_sn, out_sb, out_sh, out_sn,
    levels_sb, levels_sh, levels_sn, heads, n, d, dz, units, count, height,
    REVERSE: tl.constexpr, TURNED: tl.constexpr, DECAY: tl.constexpr, MOMENTS: tl.constexpr, WEIGHTS: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, UNIT_BITS: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: T columns of the outputs of one chunk, of C = 2^BITS tokens; a unit has CHUNKS = 2^UNIT_BITS of them.

    nodes: (b * heads, units - 1, d, dz); TURNED: (b * heads, units - 1, dz, d). height: bits of the last unit's number.
    MOMENTS: the products of each output with u, summed over these columns, as (tiles, b * heads, n). WEIGHTS, where T is all of
    dz and x, y, z, u are do, v, k, q: the levels' gradient, (b * heads, n, count), where it is not zero.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(dz, T)
    chunks = tl.cdiv(n, C)
    column = (pid % tiles) * T
    chunk = chunks - 1 - (pid // tiles) % chunks
    bh = pid // (tiles * chunks)
    unit = chunk // CHUNKS
    local = chunk % CHUNKS
    b = bh // heads
    head = bh % heads
    x_base = head_of(x_ptr, b, head, x_sb, x_sh, False)
    y_base = head_of(y_ptr, b, head, y_sb, y_sh, False)
    z_base = head_of(z_ptr, b, head, z_sb, z_sh, False)
    u_base = head_of(u_ptr, b, head, u_sb, u_sh, False)
    out_base = head_of(out_ptr, b, head, out_sb, out_sh, False)
    levels = levels_ptr + b.to(tl.int64) * levels_sb + head.to(tl.int64) * levels_sh
    sums = sums_ptr + (bh.to(tl.int64) * units + unit) * (CHUNKS * C)
    start = chunk * C
    r = tl.arange(0, C)
    t = start + r
    of_levels = of_levels_ptr + (bh.to(tl.int64) * n + t) * count
    x = tokens(x_base, b, head, x_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, False)
    y = tokens(y_base, b, head, y_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, False)
    z = tokens(z_base, b, head, z_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, False)
    if MOMENTS or WEIGHTS:
        u = tokens(u_base, b, head, u_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, False)
    c = tl.zeros([C], tl.float32)
    if DECAY:
        c = tl.load(sums + local * C + r)
    rest = tl.zeros([C], tl.float32)  # of the last level's gradient

    left, weights, level = between(sums + local * C, levels, levels_sn, start, n, count, REVERSE, DECAY, C, BITS)
    s = product(x, tl.trans(y), EXACT) * left
    if WEIGHTS:
        both = s * product(u, tl.trans(z), EXACT)
        for at in tl.static_range(BITS + 1):
            of_one = tl.sum(tl.where(level == at, both, 0.0), 1)
            rest += tl.where(at < count - 1, 0.0, of_one)
            tl.store(of_levels + at, of_one, mask=t < tl.where(at < count - 1, n, 0))
        # Loaded anew: one load for both products makes the compiler fail where the loop below has them too.
        z = tokens(z_base, b, head, z_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, False)
    out = product((s * weights).to(z.dtype), z, EXACT)

    if UNIT_BITS > 0:
        others = local
        if REVERSE:
            others = tl.minimum(CHUNKS, chunks - unit * CHUNKS) - local - 1
        found = tl.zeros([C], tl.float32)
        before = 0
        for step in tl.range(0, others, num_stages=STAGES):
            if REVERSE:
                other = local + 1 + step
            else:
                other = local - 1 - step
            there = (unit * CHUNKS + other) * C
            y_there = tokens(y_base, b, head, y_sn, there, n, d, 0, C, D, WHOLE_N, WHOLE_D, False)
            z_there = tokens(z_base, b, head, z_sn, there, n, dz, column, C, T, WHOLE_N, WHOLE_T, False)
            apart = BITS + bits_of(local ^ other, UNIT_BITS)
            pairs = product(x, tl.trans(y_there), EXACT)
            if DECAY:
                gap = c[:, None] - tl.load(sums + other * C + r)[None, :]
                if REVERSE:
                    gap = -gap
                pairs = pairs * tl.exp2(tl.minimum(gap, 0.0))
            if WEIGHTS:  # levels do not fall from one chunk to the next: what was stored is replaced by larger sums
                of_level = tl.sum(pairs * product(u, tl.trans(z_there), EXACT), 1)
                found = tl.where(apart == before, found + of_level, of_level)
                before = apart
                rest += tl.where(apart < count - 1, 0.0, of_level)
                tl.store(of_levels + apart, found, mask=t < tl.where(apart < count - 1, n, 0))
            if REVERSE:
                pairs = pairs * weight(levels, levels_sn, there, n, apart, count, C)[None, :]
            else:
                pairs = pairs * weight(levels, levels_sn, start, n, apart, count, C)[:, None]
            out = added(pairs.to(z.dtype), z_there, out, EXACT)

    rows = tl.arange(0, D)
    columns = column + tl.arange(0, T)
    slots = units - 1
    if REVERSE:
        if unit < slots:
            node = load_node(nodes_ptr + (bh.to(tl.int64) * slots + unit) * d * dz, rows, columns, d, dz, TURNED)
            met = read(x, node, EXACT)
            if DECAY:
                met = met * tl.exp2(tl.load(sums + CHUNKS * C - 1) - c)[:, None]
            out += met
    else:
        younger = 0.0  # decay of the nodes between the unit and this one
        for bit in range(height):
            if (unit >> bit) & 1 == 1:
                slot = bh.to(tl.int64) * slots + ((unit >> bit) << bit) - 1
                node = load_node(nodes_ptr + slot * d * dz, rows, columns, d, dz, TURNED)
                met = read(x, node, EXACT)
                if DECAY:
                    met = met * tl.exp2(c + younger)[:, None]
                    younger += tl.load(spans_ptr + slot)
                older = BITS + UNIT_BITS + 1 + bit
                if WEIGHTS:
                    of_node = tl.sum(met * u, 1)
                    rest += tl.where(older < count - 1, 0.0, of_node)
                    tl.store(of_levels + older, of_node, mask=t < tl.where(older < count - 1, n, 0))
                out += met * weight(levels, levels_sn, start, n, older, count, C)[:, None]
    keep(out_base, b, head, out_sn, start, n, dz, column, out, C, T, False)
    if WEIGHTS:
        tl.store(of_levels + count - 1, rest, mask=t < n)
    if MOMENTS:
        moments = moments_ptr + ((pid % tiles).to(tl.int64) * (tl.num_programs(0) // (tiles * chunks)) + bh) * n
        tl.store(moments + t, tl.sum(out * u, 1), mask=t < n)


@triton.jit
def load_node(node, rows, columns, d, dz, TURNED: tl.constexpr):
    """(D, T) of a node, from (d, dz), or from (dz, d) where TURNED."""
    if TURNED:
        inside = (columns < dz)[:, None] & (rows < d)[None, :]
        return tl.trans(tl.load(node + columns[:, None] * d + rows[None, :], mask=inside, other=0.0))
    else:
        inside = (rows < d)[:, None] & (columns < dz)[None, :]
        return tl.load(node + rows[:, None] * dz + columns[None, :], mask=inside, other=0.0)


@triton.jit
def sums_of(y_ptr, z_ptr, states_ptr, sums_ptr, levels_ptr, b, head, bh, slot, first, end, y_sb, y_sh, y_sn, z_sb, z_sh, z_sn,
            levels_sb, levels_sh, levels_sn, n, d, dz, units, count, column, level, GRADIENT: tl.constexpr, DECAY: tl.constexpr,
            C: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WHOLE_N: tl.constexpr,
            WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, EXACT: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """Sums y_t z_t^T over the tokens of units first..end: decayed to the unit's end, or, GRADIENT, from where the first begins."""
    y_base = head_of(y_ptr, b, head, y_sb, y_sh, False)
    z_base = head_of(z_ptr, b, head, z_sb, z_sh, False)
    levels = levels_ptr + b.to(tl.int64) * levels_sb + head.to(tl.int64) * levels_sh
    state = tl.zeros([D, T], tl.float32)
    gone = 0.0
    for chunk in tl.range(first * CHUNKS, tl.minimum(end * CHUNKS, tl.cdiv(n, C)), num_stages=STAGES):
        start = chunk * C
        y = tokens(y_base, b, head, y_sn, start, n, d, 0, C, D, WHOLE_N, WHOLE_D, False)
        z = tokens(z_base, b, head, z_sn, start, n, dz, column, C, T, WHOLE_N, WHOLE_T, False)
        factor = tl.full([C], 1.0, tl.float32)
        if DECAY:
            at = sums_ptr + bh.to(tl.int64) * units * (CHUNKS * C) + start
            c = tl.load(at + tl.arange(0, C))
            total = tl.load(sums_ptr + (bh.to(tl.int64) * units + chunk // CHUNKS + 1) * (CHUNKS * C) - 1)
            if GRADIENT:
                factor = tl.exp2(c + gone)
                gone += tl.where(chunk % CHUNKS == CHUNKS - 1, total, 0.0)
            else:
                factor = tl.exp2(total - c)
        if GRADIENT:
            factor = factor * weight(levels, levels_sn, start, n, level, count, C)
        if DECAY or GRADIENT:
            state = added(tl.trans(y), (z * factor[:, None]).to(z.dtype), state, EXACT)
        else:
            state = added(tl.trans(y), z, state, EXACT)
    rows = tl.arange(0, D)
    columns = column + tl.arange(0, T)
    where = states_ptr + (bh.to(tl.int64) * (units - 1) + slot) * d * dz + rows[:, None] * dz + columns[None, :]
    tl.store(where, state, mask=(rows < d)[:, None] & (columns < dz)[None, :])


@triton.jit
def leaves_kernel(
    y_ptr, z_ptr, states_ptr, sums_ptr, levels_ptr, y_sb, y_sh, y_sn, z_sb, z_sh, z_sn, levels_sb, levels_sh, levels_sn,
    heads, n, d, dz, units, count, height, GRADIENT: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
    CHUNKS: tl.constexpr, UNIT_BITS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WHOLE_N: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_T: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each unit but the last writes, (b * heads, units - 1, d, dz); GRADIENT, where y and z are q and do: what the readers
    of each node add to its gradient, larger nodes first."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(dz, T)
    slots = units - 1
    column = (pid % tiles) * T
    rank = (pid // tiles) % slots
    bh = pid // (tiles * slots)
    b = bh // heads
    head = bh % heads
    if GRADIENT:
        slot, bit = slot_of(rank, slots, height)
        sums_of(y_ptr, z_ptr, states_ptr, sums_ptr, levels_ptr, b, head, bh, slot, slot + 1,
                tl.minimum(slot + 1 + (1 << bit), units), y_sb, y_sh, y_sn, z_sb, z_sh, z_sn, levels_sb, levels_sh, levels_sn,
                n, d, dz, units, count, column, BITS + UNIT_BITS + 1 + bit, GRADIENT, DECAY, C, CHUNKS, D, T, WHOLE_N,
                WHOLE_D, WHOLE_T, EXACT, STAGES)  # fmt: skip
    else:
        sums_of(y_ptr, z_ptr, states_ptr, sums_ptr, levels_ptr, b, head, bh, rank, rank, rank + 1, y_sb, y_sh, y_sn,
                z_sb, z_sh, z_sn, levels_sb, levels_sh, levels_sn, n, d, dz, units, count, column, 0, GRADIENT, DECAY, C,
                CHUNKS, D, T, WHOLE_N, WHOLE_D, WHOLE_T, EXACT, STAGES)  # fmt: skip


@triton.jit
def slot_of(rank, slots, height):
    """The rank-th node by size, from the largest on: where it ends, and the bit that its size is."""
    slot = rank * 0
    found = rank * 0
    for step in range(height):
        bit = height - 1 - step
        here = (((slots >> bit) + 1) >> 1).to(tl.int32)  # nodes of this size: odd multiples of it up to `slots`
        taken = (rank >= 0) & (rank < here)
        slot = tl.where(taken, ((2 * rank + 1) << bit) - 1, slot)
        found = tl.where(taken, bit, found)
        rank = tl.where(rank < 0, rank, rank - here)
    return slot, found


@triton.jit
def eight(base, group, first, shift, slots, size, at, R: tl.constexpr):
    """The R-th state of a group of eight, as zeros where there is none."""
    slot = ((group * 8 + R + 1) << shift) - 1
    return tl.load(base + (first + slot) * size + at, mask=at < tl.where(slot < slots, size, 0), other=0.0)


@triton.jit
def put(base, group, first, shift, slots, size, at, state, R: tl.constexpr):
    """Stores it."""
    slot = ((group * 8 + R + 1) << shift) - 1
    tl.store(base + (first + slot) * size + at, state.to(base.dtype.element_ty), mask=at < tl.where(slot < slots, size, 0))


@triton.jit
def tree_kernel(
    states_ptr, nodes_ptr, runs_ptr, joined_ptr, spans_ptr, size, slots, groups, shift,
    DOWN: tl.constexpr, DECAY: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins eight runs of 2^shift units to one, or, DOWN, hands the gradients of nodes down to what they were joined from.

    One program: BLOCK numbers of the states of a group. states: in float32, in place. nodes: the same, rounded, with NODES.
    runs: (b * heads, slots) the decay of each run, in base 2; joined: of eight; spans: of each node.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    group = (pid // blocks) % groups
    first = (pid // (blocks * groups)).to(tl.int64) * slots
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    x0 = eight(states_ptr, group, first, shift, slots, size, at, 0)
    x1 = eight(states_ptr, group, first, shift, slots, size, at, 1)
    x2 = eight(states_ptr, group, first, shift, slots, size, at, 2)
    x3 = eight(states_ptr, group, first, shift, slots, size, at, 3)
    x4 = eight(states_ptr, group, first, shift, slots, size, at, 4)
    x5 = eight(states_ptr, group, first, shift, slots, size, at, 5)
    x6 = eight(states_ptr, group, first, shift, slots, size, at, 6)
    x7 = eight(states_ptr, group, first, shift, slots, size, at, 7)
    f1 = 1.0
    f3 = 1.0
    f5 = 1.0
    f7 = 1.0
    f23 = 1.0
    f67 = 1.0
    f47 = 1.0
    if DECAY:
        t0 = eight(runs_ptr, group, first, shift, slots, 1, 0, 0)
        t1 = eight(runs_ptr, group, first, shift, slots, 1, 0, 1)
        t2 = eight(runs_ptr, group, first, shift, slots, 1, 0, 2)
        t3 = eight(runs_ptr, group, first, shift, slots, 1, 0, 3)
        t4 = eight(runs_ptr, group, first, shift, slots, 1, 0, 4)
        t5 = eight(runs_ptr, group, first, shift, slots, 1, 0, 5)
        t6 = eight(runs_ptr, group, first, shift, slots, 1, 0, 6)
        t7 = eight(runs_ptr, group, first, shift, slots, 1, 0, 7)
        f1 = tl.exp2(t1)
        f3 = tl.exp2(t3)
        f5 = tl.exp2(t5)
        f7 = tl.exp2(t7)
        f23 = tl.exp2(t2 + t3)
        f67 = tl.exp2(t6 + t7)
        f47 = tl.exp2(t4 + t5 + t6 + t7)
        if not DOWN:
            if pid % blocks == 0:
                put(spans_ptr, group, first, shift, slots, 1, 0, t0, 0)
                put(spans_ptr, group, first, shift, slots, 1, 0, t0 + t1, 1)
                put(spans_ptr, group, first, shift, slots, 1, 0, t2, 2)
                put(spans_ptr, group, first, shift, slots, 1, 0, t0 + t1 + t2 + t3, 3)
                put(spans_ptr, group, first, shift, slots, 1, 0, t4, 4)
                put(spans_ptr, group, first, shift, slots, 1, 0, t4 + t5, 5)
                put(spans_ptr, group, first, shift, slots, 1, 0, t6, 6)
                total = t0 + t1 + t2 + t3 + t4 + t5 + t6 + t7
                put(spans_ptr, group, first, shift, slots, 1, 0, total, 7)
                put(joined_ptr, group, first, shift, slots, 1, 0, total, 7)
    if DOWN:
        x3 += f47 * x7
        x5 += f67 * x7
        x1 += f23 * x3
        x6 += f7 * x7
        x4 += f5 * x5
        x2 += f3 * x3
        x0 += f1 * x1
    else:
        x1 += f1 * x0
        x3 += f3 * x2
        x5 += f5 * x4
        x7 += f7 * x6
        x3 += f23 * x1
        x7 += f67 * x5
        x7 += f47 * x3
    put(states_ptr, group, first, shift, slots, size, at, x7, 7)
    if DOWN and not NODES:
        put(states_ptr, group, first, shift, slots, size, at, x0, 0)
        put(states_ptr, group, first, shift, slots, size, at, x1, 1)
        put(states_ptr, group, first, shift, slots, size, at, x2, 2)
        put(states_ptr, group, first, shift, slots, size, at, x3, 3)
        put(states_ptr, group, first, shift, slots, size, at, x4, 4)
        put(states_ptr, group, first, shift, slots, size, at, x5, 5)
        put(states_ptr, group, first, shift, slots, size, at, x6, 6)
    if NODES:
        put(nodes_ptr, group, first, shift, slots, size, at, x0, 0)
        put(nodes_ptr, group, first, shift, slots, size, at, x1, 1)
        put(nodes_ptr, group, first, shift, slots, size, at, x2, 2)
        put(nodes_ptr, group, first, shift, slots, size, at, x3, 3)
        put(nodes_ptr, group, first, shift, slots, size, at, x4, 4)
        put(nodes_ptr, group, first, shift, slots, size, at, x5, 5)
        put(nodes_ptr, group, first, shift, slots, size, at, x6, 6)
        put(nodes_ptr, group, first, shift, slots, size, at, x7, 7)
