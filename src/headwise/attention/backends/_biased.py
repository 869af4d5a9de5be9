"""Fused attention with edited scores, forward and backward: what PyTorch's fused attention cannot do, in our Triton kernels.

Gradients are the same bits every time: every sum has one owner and one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import BackendError, ShapeError
from ._launch import Launch, fitting, power, readable, sixteens

LOG2E = 1.4426950408889634
PARTIAL_BYTES = 256 * 2**20  # at most, of the diagonals that a table's gradient is summed from


@dataclass(frozen=True)
class Terms:
    """What is done to the scores of a read, in the order in which it is done: cap, then biases, then the mask.

    i, j: positions of query and key. Tensors of shape (heads,) may also have one entry that all heads share.
    """

    scale: float
    causal: bool = False
    window: int | None = None  # a key is visible if |i - j| < window or j < sink; no window: everywhere
    sink: int = 0
    query_documents: Tensor | None = None  # (b or 1, n) integers; a key is visible if it is of the same document
    key_documents: Tensor | None = None  # (b or 1, m)
    softcap: float | None = None  # s <- softcap * tanh(s / softcap)
    slopes: Tensor | None = None  # (heads,): s <- s - slope * |i - j|
    table: Tensor | None = None  # (heads or 1, 2 R + 1): s <- s + table[head, clamp(i - j, -R, R) + R]
    logit: Tensor | None = None  # (heads,): one extra key with this score and a value of zero


# {kernel: {(largest head size, float32): launch}}. "forward, more": what reads places, documents or a table keeps more in
# shared memory. "table" is "queries" where a table wants its gradient: there m == n.
LAUNCHES: dict[str, dict[tuple[int, bool], Launch]] = {
    "forward": {
        (64, False): Launch(64, 128, 4, 3), (128, False): Launch(128, 128, 8, 3), (256, False): Launch(128, 64, 8, 2),
        (64, True): Launch(64, 32, 8, 1), (128, True): Launch(32, 16, 4, 1), (256, True): Launch(16, 16, 4, 1),
    },
    "forward, more": {
        (64, False): Launch(64, 128, 4, 3), (128, False): Launch(128, 64, 8, 3), (256, False): Launch(128, 64, 8, 2),
        (64, True): Launch(64, 32, 8, 1), (128, True): Launch(32, 16, 4, 1), (256, True): Launch(16, 16, 4, 1),
    },
    "keys": {
        (64, False): Launch(64, 64, 4, 3), (128, False): Launch(32, 64, 4, 3), (256, False): Launch(32, 64, 8, 2),
        (64, True): Launch(32, 32, 4, 1), (128, True): Launch(16, 32, 4, 1), (256, True): Launch(16, 32, 8, 1),
    },
    "queries": {
        (64, False): Launch(64, 64, 4, 2), (128, False): Launch(128, 64, 8, 3), (256, False): Launch(128, 32, 8, 2),
        (128, True): Launch(32, 32, 4, 1), (256, True): Launch(32, 16, 4, 1),
    },
    "table": {
        (64, False): Launch(64, 64, 4, 1), (128, False): Launch(64, 64, 4, 2), (256, False): Launch(64, 64, 8, 1),
        (64, True): Launch(32, 32, 4, 1), (128, True): Launch(32, 32, 8, 1), (256, True): Launch(16, 16, 8, 1),
    },
}  # fmt: skip


def launch(kernel: str, d: int, exact: bool) -> Launch:
    """How a kernel is cut for heads of size d; exact: for float32."""
    return fitting(LAUNCHES[kernel], d, exact)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, query_positions: Tensor | None = None, key_positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output (b, heads, n, dv) like q, natural log-sum-exp (b, heads, n) float32: -inf where a row sees nothing).

    q: (b, heads, n, d). k: (b, kv_heads, m, d). v: (b, kv_heads, m, dv). Queries are the last n of the m keys, unless integer
    positions (b or 1, n) and (b or 1, m) say otherwise; a key of negative position is an empty slot. A row that sees no key
    gives zeros. Differentiable in q, k, v, slopes, table and logit; not through the log-sum-exp.
    """
    _check(q, k, v, terms, query_positions, key_positions)
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):  # nobody reads, or there is nothing to read
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    places = None
    if query_positions is not None or key_positions is not None:
        n, m = q.shape[2], k.shape[2]
        queries = torch.arange(m - n, m)[None] if query_positions is None else query_positions
        places = _integers(queries, q), _integers(torch.arange(m)[None] if key_positions is None else key_positions, q)
    if places is not None and terms.table is not None and terms.table.requires_grad and torch.is_grad_enabled():
        raise ShapeError("the gradient of a table needs queries and keys in order: leave the positions out, or detach the table")
    dv = v.shape[3]
    if q.dtype != torch.float32:
        q, k, v = (sixteens(t) for t in (q, k, v))
    out, lse = _Biased.apply(q, k, v, terms.slopes, terms.table, terms.logit, terms, places)  # type: ignore[no-untyped-call]
    return out[..., :dv], lse


def _check(q: Tensor, k: Tensor, v: Tensor, terms: Terms, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
    b, heads, n, d = q.shape
    m = k.shape[2]
    if k.shape[0] != b or k.shape[3] != d or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise ShapeError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BackendError(f"the kernel knows bfloat16, float16 and float32, the same of all; got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(d, v.shape[3]) > 256:
        raise ShapeError(f"heads of size {max(d, v.shape[3])} are larger than 256")
    if (terms.query_documents is None) != (terms.key_documents is None):
        raise ShapeError("documents are needed of both queries and keys")
    per_place = {"query_positions": (query_positions, n), "key_positions": (key_positions, m),
                 "query_documents": (terms.query_documents, n), "key_documents": (terms.key_documents, m)}  # fmt: skip
    for name, (tensor, size) in per_place.items():
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[0] not in (1, b) or tensor.shape[1] != size):
            raise ShapeError(f"{name} are {tuple(tensor.shape)}, expected ({b} or 1, {size})")
    for name, tensor in {"slopes": terms.slopes, "logit": terms.logit}.items():
        if tensor is not None and tuple(tensor.shape) not in ((1,), (heads,)):
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected ({heads},) or (1,)")
    if (table := terms.table) is not None and (table.dim() != 2 or table.shape[0] not in (1, heads) or table.shape[1] % 2 == 0):
        raise ShapeError(f"table is {tuple(table.shape)}, expected ({heads} or 1, an odd number of distances)")


def _integers(tensor: Tensor, q: Tensor) -> Tensor:
    return tensor.detach().to(q.device, torch.int32).contiguous()


class _Call:
    """A read as the kernels take it: terms in base 2, integers as int32, and what the kernels are compiled for."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, terms: Terms, places: tuple[Tensor, Tensor] | None) -> None:
        self.terms = terms
        self.dtype = q.dtype
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.b, self.heads, self.n, self.d = q.shape
        self.kv_heads, self.m, self.dv = k.shape[1], k.shape[2], v.shape[3]
        self.exact = self.q.dtype == torch.float32
        self.nothing = self.q.new_zeros(1, dtype=torch.int32)
        self.places = places or (self.nothing, self.nothing)
        self.documents = (self.nothing, self.nothing)
        if terms.query_documents is not None and terms.key_documents is not None:
            self.documents = _integers(terms.query_documents, q), _integers(terms.key_documents, q)
        self.slopes = self.table = self.logit = self.q.new_zeros(1, dtype=torch.float32)
        self.reach = self.table_stride = 0
        if terms.slopes is not None:
            self.slopes = (self._floats(terms.slopes) * LOG2E).expand(self.heads).contiguous()
        if terms.logit is not None:
            self.logit = self._floats(terms.logit).expand(self.heads).contiguous()
        if terms.table is not None:
            self.table = (self._floats(terms.table) * LOG2E).contiguous()
            self.reach = terms.table.shape[1] // 2
            self.table_stride = terms.table.shape[1] if terms.table.shape[0] > 1 else 0
        self.constants: dict[str, Any] = {
            "CAUSAL": terms.causal, "WINDOWED": terms.window is not None, "ALIGNED": places is None,
            "DOCUMENTS": terms.query_documents is not None, "SOFTCAP": float(terms.softcap or 0.0),
            "SLOPES": terms.slopes is not None, "TABLE": terms.table is not None,
            "BLOCK_D": power(self.d), "BLOCK_DV": power(self.dv), "WHOLE_D": power(self.d) == self.d,
            "WHOLE_DV": power(self.dv) == self.dv, "EXACT": self.exact,
        }  # fmt: skip

    def _floats(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.q.device, torch.float32)

    def cut(self, kernel: str) -> tuple[Launch, dict[str, Any]]:
        """How a kernel is cut, and that as its arguments."""
        made = launch(kernel, max(self.d, self.dv), self.exact)
        return made, {"M": made.m, "N": made.n, "STAGES": made.stages, "num_warps": made.warps}

    @property
    def integers(self) -> tuple[Tensor, ...]:
        """Positions and documents, of queries and keys."""
        return *self.places, *self.documents

    @property
    def integer_strides(self) -> list[int]:
        """From one batch row of those to the next."""
        return [0 if len(tensor) == 1 else tensor.stride(0) for tensor in self.integers]

    @property
    def strides(self) -> list[int]:
        """Of queries, keys and values: batch, head, token."""
        return [stride for tensor in (self.q, self.k, self.v) for stride in tensor.stride()[:3]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Query heads, key/value heads, queries, keys, head sizes."""
        return self.heads, self.kv_heads, self.n, self.m, self.d, self.dv

    @property
    def reaches(self) -> tuple[int, int, int]:
        """Of the window, the sinks and the table."""
        return self.terms.window or 0, self.terms.sink, self.reach

    def forward(self) -> tuple[Tensor, Tensor]:
        """(output, log-sum-exp)."""
        from ..kernels.biased import biased_kernel

        out = self.q.new_empty(self.b, self.heads, self.n, self.dv)
        lse = self.q.new_empty(self.b, self.heads, self.n, dtype=torch.float32)
        more = not self.constants["ALIGNED"] or self.constants["DOCUMENTS"] or self.constants["TABLE"]
        cut, arguments = self.cut("forward, more" if more else "forward")
        biased_kernel[(-(-self.n // cut.m) * self.b * self.heads,)](
            self.q, self.k, self.v, out, lse, *self.integers, self.slopes, self.table, self.logit,
            *self.strides, *self.integer_strides, self.table_stride, *self.sizes, self.terms.scale * LOG2E, *self.reaches,
            **self.constants, LOGIT=self.terms.logit is not None, **arguments,
        )  # fmt: skip
        return out, lse

    def delta(self, out: Tensor, grad: Tensor) -> Tensor:
        """(b, heads, n): outputs times their gradients, summed."""
        from ..kernels.biased_backward import delta_kernel

        delta = torch.empty(self.b, self.heads, self.n, dtype=torch.float32, device=out.device)
        rows = 64 if self.dv <= 128 else 32
        delta_kernel[(-(-self.n // rows) * self.b * self.heads,)](
            out, grad, delta, *grad.stride()[:3], self.heads, self.n, self.dv, M=rows, BLOCK_DV=power(self.dv), num_warps=4
        )
        return delta

    def key_gradients(self, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Those of keys and values."""
        from ..kernels.biased_backward import keys_kernel

        dk = self.k.new_empty(self.b, self.kv_heads, self.m, self.d)
        dv = self.v.new_empty(self.b, self.kv_heads, self.m, self.dv)
        cut, arguments = self.cut("keys")
        keys_kernel[(-(-self.m // cut.n) * self.b * self.kv_heads,)](
            self.q, self.k, self.v, grad, lse, delta, dk, dv, *self.integers, self.slopes, self.table,
            *self.strides, *grad.stride()[:3], *self.integer_strides, self.table_stride,
            *self.sizes, self.terms.scale * LOG2E, self.terms.scale, *self.reaches, **self.constants, **arguments,
        )  # fmt: skip
        return dk, dv

    def query_gradients(
        self, grad: Tensor, lse: Tensor, delta: Tensor, of_slopes: bool, of_table: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of queries; of slopes (b, heads); of the table (b, heads, distances)."""
        from ..kernels.biased_backward import queries_kernel, sum_kernel

        dq = self.q.new_empty(self.b, self.heads, self.n, self.d)
        cut, arguments = self.cut("table" if of_table else "queries")
        blocks, rows = -(-self.n // cut.m), self.b * self.heads
        sums = torch.empty(3, rows, blocks, dtype=torch.float32, device=dq.device)
        first, segments = self._segments(cut.n) if of_table else (0, 0)
        width = segments * cut.n
        diagonals = torch.zeros(rows, width, dtype=torch.float32, device=dq.device)
        # As many rows at once as the buffer may hold; where it holds not even one, as many blocks of one row.
        rows_at_once = max(1, min(rows, PARTIAL_BYTES // max(1, 4 * width * blocks)))
        blocks_at_once = blocks if rows_at_once > 1 else max(1, min(blocks, PARTIAL_BYTES // max(1, 4 * width)))
        for row in range(0, rows, rows_at_once):
            of_rows = min(rows_at_once, rows - row)
            for block in range(0, blocks, blocks_at_once):
                count = min(blocks_at_once, blocks - block)
                parts = torch.zeros(of_rows, count, width, dtype=torch.float32, device=dq.device)
                queries_kernel[(of_rows * count,)](
                    self.q, self.k, self.v, grad, lse, delta, dq, sums, parts, *self.integers, self.slopes, self.table,
                    *self.strides, *grad.stride()[:3], *self.integer_strides, self.table_stride,
                    rows * blocks, *self.sizes, self.terms.scale * LOG2E, self.terms.scale, *self.reaches,
                    row, block, count, first, segments,
                    **self.constants, SLOPES_GRAD=of_slopes, TABLE_GRAD=of_table, **arguments,
                )  # fmt: skip
                if width:
                    sum_kernel[(-(-width // 256) * of_rows,)](parts, diagonals[row:], count, width, BLOCK=256, num_warps=4)
        slopes = sums[0].sum(-1).view(self.b, self.heads) if of_slopes else None
        if not of_table:
            return dq, slopes, None
        table = self._folded(diagonals, first * cut.n + self.m - self.n - cut.n + 1)
        table[:, -1] += sums[1].sum(-1)
        table[:, 0] += sums[2].sum(-1)
        return dq, slopes, table.view(self.b, self.heads, -1)

    def _segments(self, size: int) -> tuple[int, int]:
        """The first of the segments of diagonals that tiles within the table's reach have, and how many there are."""
        offset, window = self.m - self.n, self.terms.window
        low, high = (0 if self.terms.causal else 1 - self.n), self.m - 1  # distances that are visible
        if window is not None and not self.terms.sink:
            low, high = max(low, 1 - window), min(high, window - 1)
        low, high = max(low, 1 - self.reach), min(high, self.reach - 1)
        # Tiles whose base, offset + e * size, is less than a tile away from those distances: each has segments e and e + 1.
        first, last = -((size - 1 + offset - low) // size), (high + size - 1 - offset) // size
        return first, max(1, last - first + 2)

    def _folded(self, diagonals: Tensor, start: int) -> Tensor:
        """(rows, distances): sums of diagonals of distances start, start + 1, ..., those beyond reach in the end entries."""
        reach, width = self.reach, diagonals.shape[1]
        table = diagonals.new_zeros(len(diagonals), 2 * reach + 1)
        below = min(max(-reach + 1 - start, 0), width)
        above = max(min(reach - start, width), below)
        table[:, 0] += diagonals[:, :below].sum(1)
        table[:, start + below + reach : start + above + reach] += diagonals[:, below:above]
        table[:, -1] += diagonals[:, above:].sum(1)
        return table


class _Biased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, table: Tensor | None, logit: Tensor | None,
        terms: Terms, places: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = _Call(q, k, v, terms, places).forward()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.terms, ctx.places = terms, places
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        q, k, v, out, lse = ctx.saved_tensors
        terms: Terms = ctx.terms
        of_q, of_k, of_v, of_slopes, of_table, of_logit = ctx.needs_input_grad[:6]
        call = _Call(q, k, v, terms, ctx.places)
        grad = readable(grad.to(call.q.dtype))
        delta = call.delta(out, grad)
        dq = dk = dv = slopes = table = logit = None
        if of_k or of_v:
            dk, dv = (tensor.to(q.dtype) for tensor in call.key_gradients(grad, lse, delta))
        if of_q or of_slopes or of_table:
            dq, slopes, table = call.query_gradients(grad, lse, delta, of_slopes, of_table)
            dq = dq.to(q.dtype)
        if terms.logit is not None and of_logit:
            weight = torch.where(lse.isinf(), 0.0, (call.logit[:, None] - lse).exp())
            logit = _shared(-(weight * delta).sum(-1), terms.logit)
        if slopes is not None and terms.slopes is not None:
            slopes = _shared(slopes, terms.slopes)
        if table is not None and terms.table is not None:
            table = _shared(table, terms.table)
        return dq, dk, dv, slopes, table, logit, None, None


def _shared(gradients: Tensor, of: Tensor) -> Tensor:
    """(b, heads, ...) summed to the shape and type of what batch rows, and perhaps heads, share."""
    total = gradients.sum(0)
    return (total if of.shape[0] == total.shape[0] else total.sum(0, keepdim=True)).to(of.device, of.dtype)
