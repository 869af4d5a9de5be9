"""Fused attention with sparse weights, forward and backward, in our Triton kernels.

What is kept for the backward pass beside q, k and v: two numbers of each row, and a byte for each tile of pairs that says
whether it holds any weight. Gradients are the same bits every time: every sum has one owner and one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import ShapeError
from ._launch import Launch, fitting, power, readable, sixteens

STARTS = 8  # Newton's steps within a program's N best keys, before the first over all
PASSES = 40  # sweeps over the keys for thresholds, at most; two to six are what it takes
# Of a row's sum above 1, before its last step: 1.5 closes in quadratically. What is left of it is divided away.
TOLERANCE = {1.5: 2e-5, 2.0: 2e-6}
WIDEST = 128  # head size


# {kernel: {(largest head size, float32): launch}}. "queries" has the tiles of "forward", which says which of them hold weight;
# "keys" has its keys, and a part of its queries.
LAUNCHES: dict[str, dict[tuple[int, bool], Launch]] = {
    "forward": {(64, False): Launch(128, 64, 8, 3, 128), (128, False): Launch(128, 64, 8, 2), (128, True): Launch(32, 16, 4, 1)},
    "queries": {(64, False): Launch(128, 64, 8, 2, 128), (128, False): Launch(128, 64, 8, 2), (128, True): Launch(32, 16, 4, 1)},
    "keys": {(64, False): Launch(64, 64, 4, 2), (128, False): Launch(64, 64, 8, 2), (128, True): Launch(32, 16, 4, 1)},
}


def launch(kernel: str, d: int, exact: bool) -> Launch:
    """How a kernel is cut for heads of size d; exact: for float32."""
    return fitting(LAUNCHES[kernel], d, exact)


def entmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: float, scale: float, causal: bool = False, window: int | None = None, sink: int = 0
) -> Tensor:
    """Output (b, heads, n, dv) of entmax(scale * q k^T) v, exact and differentiable once, in O(n) memory.

    q: (b, heads, n, d). k: (b, kv_heads, m, d). v: (b, kv_heads, m, dv). Queries are the last n of the m keys. A key is
    visible if it is not later (causal) and less than `window` places away or one of the first `sink`. A row that sees no key
    gives zeros. Heads of up to 128 numbers.

    Raises: ShapeError for an alpha that is neither 1.5 nor 2, or tensors that do not fit together.
    """
    heads, d = q.shape[1], q.shape[3]
    if alpha not in TOLERANCE:
        raise ShapeError(f"alpha is {alpha:g}; this kernel knows 1.5 and 2")
    if k.shape[0] != q.shape[0] or k.shape[3] != d or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise ShapeError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit together")
    if max(d, v.shape[3]) > WIDEST:
        raise ShapeError(f"heads of size {max(d, v.shape[3])} are larger than {WIDEST}")
    if scale < 0:  # the largest product must be that of the largest score
        q, scale = -q, -scale
    dv = v.shape[3]
    q, k, v = (sixteens(t) for t in (q, k, v))
    out: Tensor = _Entmax.apply(q, k, v, _Setting(alpha, float(scale), causal, window, sink))  # type: ignore[no-untyped-call]
    return out[..., :dv]


@dataclass(frozen=True)
class _Setting:
    alpha: float
    scale: float
    causal: bool
    window: int | None
    sink: int

    def numbers(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
        """Heads, key/value heads, queries, keys, sizes of keys and of values."""
        return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]

    @property
    def unit(self) -> float:
        """From products to (alpha - 1) s; never quite 0, so that hidden keys stay below the others."""
        return max(self.scale * (self.alpha - 1.0), 1e-20)

    def constants(self, q: Tensor, v: Tensor, cut: Launch) -> dict[str, Any]:
        """What kernels are compiled for."""
        d, dv = q.shape[3], v.shape[3]
        return {
            "SQUARE": self.alpha == 1.5, "CAUSAL": self.causal, "WINDOWED": self.window is not None, "M": cut.m, "N": cut.n,
            "BLOCK_D": power(d), "BLOCK_DV": power(dv), "WHOLE_D": power(d) == d, "WHOLE_DV": power(dv) == dv,
            "EXACT": q.dtype == torch.float32, "STAGES": cut.stages, **cut.options,
        }  # fmt: skip


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, setting: _Setting) -> Tensor:
        ctx.setting, ctx.made = setting, (q.dtype, k.dtype, v.dtype)
        q, k, v = readable(q), readable(k), readable(v)
        out, top, tau, live = _rows(q, k, v, setting)
        ctx.save_for_backward(q, k, v, top, tau, live)
        return out.to(ctx.made[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from ..kernels.entmax import keys_kernel, queries_kernel

        q, k, v, top, tau, live = ctx.saved_tensors
        setting: _Setting = ctx.setting
        of_out = readable(of_out)
        (b, heads, _, d), (kv_heads, m, dv) = q.shape, v.shape[1:]
        exact = q.dtype == torch.float32
        of_q, of_k, of_v = (t.new_zeros(t.shape) for t in (q, k, v))  # in order, whatever the order of q, k and v
        if not of_out.numel() or not m:
            return of_q, of_k, of_v, None
        delta = torch.empty_like(top)
        rows, (blocks, tiles) = launch("forward", max(d, dv), exact), live.shape[1:]
        lists = _lists(live, b * max(heads, kv_heads) * blocks * tiles)
        shape = (
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_out.stride()[:3], *setting.numbers(q, k, v),
            setting.unit, setting.scale, setting.window or 0, setting.sink,
        )  # fmt: skip
        cut = launch("queries", max(d, dv), exact)
        queries_kernel[(b * heads * blocks,)](
            q, k, v, of_out, of_q, top, tau, delta, live, lists, *shape, **setting.constants(q, v, cut)
        )
        cut = launch("keys", max(d, dv), exact)
        keys_kernel[(b * kv_heads * tiles,)](
            q, k, v, of_out, of_k, of_v, top, tau, delta, live, lists, *shape,
            ROWS=rows.m, **setting.constants(q, v, cut),
        )  # fmt: skip
        return (*(grad.to(dtype) for grad, dtype in zip((of_q, of_k, of_v), ctx.made, strict=True)), None)


def _rows(q: Tensor, k: Tensor, v: Tensor, setting: _Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, largest products (b, heads, n), thresholds (b, heads, n), and which tiles hold weight (b * heads, blocks, tiles)."""
    from ..kernels.entmax import rows_kernel

    b, heads, n, d = q.shape
    m, dv = k.shape[2], v.shape[3]
    cut = launch("forward", max(d, dv), q.dtype == torch.float32)
    blocks, tiles = -(-n // cut.m), -(-m // cut.n)
    out = q.new_zeros(b, heads, n, dv) if m == 0 else q.new_empty(b, heads, n, dv)
    top, tau = q.new_empty(2, b, heads, n, dtype=torch.float32)
    live = torch.zeros(b * heads, blocks, tiles, dtype=torch.int8, device=q.device)
    if out.numel() and m:
        rows_kernel[(b * heads * blocks,)](
            q, k, v, out, top, tau, live, _lists(live, live.numel()),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *setting.numbers(q, k, v),
            setting.unit, setting.window or 0, setting.sink,
            **setting.constants(q, v, cut), STARTS=STARTS, PASSES=PASSES, TOLERANCE=TOLERANCE[setting.alpha],
        )  # fmt: skip
    return out, top, tau, live


def _lists(live: Tensor, count: int) -> Tensor:
    """Scratch for numbers of tiles."""
    small = max(live.shape[1:]) < 2**15
    return torch.empty(max(count, 1), dtype=torch.int16 if small else torch.int32, device=live.device)
