"""What the kernels share: which queries a program has, products, capped scores, and the mask."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def owner(pid, blocks, heads, kv_heads):
    """(block, batch row, key/value head, head): heads of a group next to each other, since they read the same keys."""
    group = heads // kv_heads
    bkv = pid // (group * blocks)
    kv = bkv % kv_heads
    return (pid // group) % blocks, bkv // kv_heads, kv, kv * group + pid % group


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """a @ b in float32; EXACT: of float32 operands without rounding them first."""
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def added(a, b, acc, EXACT: tl.constexpr):
    """acc + a @ b."""
    if EXACT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def base2(s, scale, SOFTCAP: tl.constexpr):
    """Products -> scores in base 2. scale: times log2(e). cap * tanh(s / cap), with tanh x = 1 - 2 / (1 + e^(2 x))."""
    if SOFTCAP > 0.0:
        x = s * (scale / SOFTCAP)  # in base 2 already: e^(2 x) = 2^(2 x)
        return SOFTCAP * LOG2E * (1.0 - 2.0 / (1.0 + tl.exp2(2.0 * x)))
    else:
        return s * scale


@triton.jit
def log_sums(lse_ptr, row, n, i, inside):
    """(M,) log-sum-exps of some queries in base 2; one that sees nothing, or is not there, gets a weight of zero by it."""
    lse = tl.load(lse_ptr + row.to(tl.int64) * n + i, mask=inside, other=float("inf")) * LOG2E
    return tl.where(lse < -1.0e30, 1.0e30, lse)


@triton.jit
def visible(seen, away, there, window, sink, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """`seen`, and not later, and in the window or a sink. away: place of the query less that of the key, `there`."""
    if CAUSAL:
        seen = seen & (away >= 0)
    if WINDOWED:
        seen = seen & ((tl.abs(away) < window) | (there < sink))
    return seen
