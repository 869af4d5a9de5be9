"""Forward and backward of log-linear attention with one decay factor a token, or none, from no state, by the kernels of `levels`.

Kept for the backward pass beside q, k, v and levels: running sums of the decay, and the nodes, a state for each unit. Gradients
are the same bits every time: every sum has one owner and one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import Inputs
from ._host import alike, like, power, readable, unfit
from .scalar_launch import DECAY, SUMS

WIDEST = 128  # heads of 256 compiled, and read memory that is not theirs


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut: tokens of a chunk and of a unit, powers of two, columns of a program, warps, loads in flight."""

    chunk: int
    unit: int
    tile: int
    warps: int
    stages: int


# {kernel: {(largest head size, float32): cut}}; units are the same in all kernels. "queries" has whole heads where the gradient
# of levels is wanted.
LAUNCHES: dict[str, dict[tuple[int, bool], Cut]] = {
    "outputs": {
        (64, False): Cut(64, 256, 64, 4, 2), (128, False): Cut(64, 256, 128, 8, 2),
        (64, True): Cut(32, 128, 32, 4, 1), (128, True): Cut(32, 128, 32, 4, 1),
    },
    "queries": {
        (64, False): Cut(64, 256, 64, 4, 2), (128, False): Cut(64, 256, 128, 8, 2),
        (64, True): Cut(32, 128, 64, 4, 1), (128, True): Cut(16, 128, 128, 4, 1),
    },
    "keys": {
        (64, False): Cut(64, 256, 64, 4, 2), (128, False): Cut(64, 256, 128, 8, 2),
        (64, True): Cut(32, 128, 32, 4, 1), (128, True): Cut(32, 128, 32, 4, 1),
    },
    "values": {
        (64, False): Cut(64, 256, 64, 4, 2), (128, False): Cut(64, 256, 128, 8, 2),
        (64, True): Cut(32, 128, 32, 4, 1), (128, True): Cut(32, 128, 32, 4, 1),
    },
    "leaves": {
        (64, False): Cut(64, 256, 64, 4, 3), (128, False): Cut(64, 256, 128, 8, 3),
        (64, True): Cut(32, 128, 32, 4, 1), (128, True): Cut(32, 128, 32, 4, 1),
    },
}  # fmt: skip
TREE = 512  # numbers of a state that a program of the tree has at once


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    if given.levels is None:
        return "there are no levels"
    if given.erase is not None:
        return "levels with an erasing rule have no kernel"
    if given.decay is not None and given.decay.shape[-1] != 1:
        return "levels with a decay of each channel have no kernel"
    if given.state is not None or given.documents is not None or given.real is not None:
        return "levels from a state, with documents or with padding have no kernel"
    return unfit(given, WIDEST)


def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, levels: Tensor) -> Tensor:
    """Outputs (b, h, n, dv) like v, from no state.

    q, k: (b, h, n, d), v: (b, h, n, dv), of any strides but neighbours along heads. decay: (b, h, n) log factors up to 0.
    levels: (b, h, n, levels). Differentiable once.
    """
    if 0 in (*q.shape, v.shape[-1]):
        return torch.zeros_like(v)
    return _Levels.apply(*alike(q, k, v), decay, levels)  # type: ignore[no-untyped-call]


class Call:
    """What all kernels of one recurrence are told."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor | None, levels: Tensor) -> None:
        from .scalar import sums_kernel

        self.b, self.h, self.n, self.d = q.shape
        self.dv = v.shape[-1]
        self.rows = self.b * self.h
        self.exact = q.dtype == torch.float32
        self.kept = q.dtype if q.dtype == torch.bfloat16 else torch.float32  # of nodes: float16 has too small a range
        self.nothing = q.new_empty(1, dtype=torch.float32)
        self.count = levels.shape[-1]
        self.unit = self.cut("outputs").unit
        self.units = -(-self.n // self.unit)
        self.slots = self.units - 1
        self.decaying = decay is not None
        self.sums = self.nothing
        self.runs: list[Tensor] = [self.nothing]
        self.spans = self.nothing
        if decay is not None:
            decay = decay.detach().float()
            self.sums = self.nothing.new_empty(self.rows, self.units, self.unit)
            most = power(SUMS * 64 // self.unit)
            sums_kernel[(self.rows * -(-self.units // most),)](
                decay, self.sums, *decay.stride(), self.h, self.n, self.units, C=self.unit, ROWS=most, num_warps=4
            )
            self.runs = [self.sums[:, : self.slots, -1].contiguous()]
            self.spans = torch.empty_like(self.runs[0])

    def cut(self, kernel: str) -> Cut:
        """How a kernel is cut."""
        size = max(self.d, self.dv)
        return next(cut for (widest, exact), cut in LAUNCHES[kernel].items() if exact == self.exact and size <= widest)

    def constants(self, cut: Cut, d: int, dz: int) -> dict[str, Any]:
        """What kernels are compiled for."""
        tile, chunks = min(cut.tile, power(dz)), self.unit // cut.chunk
        return {
            "DECAY": self.decaying, "C": cut.chunk, "BITS": cut.chunk.bit_length() - 1, "CHUNKS": chunks,
            "UNIT_BITS": chunks.bit_length() - 1, "D": power(d), "T": tile, "WHOLE_N": self.n % cut.chunk == 0,
            "WHOLE_D": power(d) == d, "WHOLE_T": dz % tile == 0, "EXACT": self.exact, "STAGES": cut.stages, "num_warps": cut.warps,
        }  # fmt: skip

    @property
    def height(self) -> int:
        """Bits of the last unit's number."""
        return self.slots.bit_length()

    def blocks(
        self, name: str, x: Tensor, y: Tensor, z: Tensor, out: Tensor, levels: Tensor, nodes: Tensor, u: Tensor | None = None, *,
        of_levels: Tensor | None = None, reverse: bool = False, turned: bool = False, moments: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Fills `out`, and `of_levels` if it is wanted; the products of outputs with u, (tiles, b * h, n), if they are."""
        from .levels import blocks_kernel

        cut, d, dz = self.cut(name), x.shape[-1], z.shape[-1]
        constants = self.constants(cut, d, dz)
        if of_levels is not None and constants["T"] < dz:
            constants |= {"T": power(dz), "WHOLE_T": power(dz) == dz}
        tiles = -(-dz // constants["T"])
        found = self.nothing.new_empty(tiles, self.rows, self.n) if moments else None
        u = z if u is None else u
        blocks_kernel[(self.rows * -(-self.n // cut.chunk) * tiles,)](
            x, y, z, u, out, self.sums, levels, nodes, self.spans, self.nothing if of_levels is None else of_levels,
            self.nothing if found is None else found, *_strides(x, y, z, u, out, levels), self.h, self.n, d, dz, self.units,
            self.count, self.height, REVERSE=reverse, TURNED=turned, MOMENTS=moments, WEIGHTS=of_levels is not None,
            **constants,
        )  # fmt: skip
        return found

    def leaves(self, y: Tensor, z: Tensor, levels: Tensor, *, gradient: bool = False) -> Tensor:
        """What each unit writes, or what readers of each node add to its gradient: (b * h, units - 1, d, dv) in float32."""
        from .levels import leaves_kernel

        states = self.nothing.new_empty(self.rows, self.slots, self.d, self.dv)
        if not self.slots:
            return states
        cut = self.cut("leaves")
        constants = self.constants(cut, self.d, self.dv)
        leaves_kernel[(self.rows * self.slots * -(-self.dv // constants["T"]),)](
            y, z, states, self.sums, levels, *_strides(y, z, levels), self.h, self.n, self.d, self.dv, self.units,
            self.count, self.height, GRADIENT=gradient, **constants,
        )  # fmt: skip
        return states

    def tree(self, states: Tensor, *, down: bool = False) -> Tensor:
        """From what units write to nodes, or, down, from what nodes' readers add to the gradients of what units write."""
        from .levels import tree_kernel

        nodes = states if self.kept == torch.float32 else torch.empty_like(states, dtype=self.kept)
        size = self.d * self.dv
        shifts = [shift for shift in range(0, 64, 3) if shift == 0 or self.slots >= 2 << shift] if self.slots else []
        for stage, shift in reversed(list(enumerate(shifts))) if down else enumerate(shifts):
            groups = -(-self.slots // (8 << shift))
            if self.decaying and not down:
                self.runs.append(torch.empty_like(self.runs[0]))
            runs, joined = (self.runs[stage], self.runs[stage + 1]) if self.decaying else (self.nothing, self.nothing)
            tree_kernel[(self.rows * groups * -(-size // TREE),)](
                states, nodes, runs, joined, self.spans, size, self.slots, groups, shift,
                DOWN=down, DECAY=self.decaying, NODES=not down or shift == 0, BLOCK=TREE, num_warps=4,
            )  # fmt: skip
        return nodes

    def decay_gradient(self, reads: Tensor, writes: Tensor) -> Tensor:
        """Of the decay, (b, h, n), from parts of q . dq and k . dk."""
        from .scalar import decay_kernel

        found = self.nothing.new_empty(self.b, self.h, self.n)
        decay_kernel[(self.rows,)](
            reads, writes, self.nothing, self.nothing, found, 0, self.h, self.n, self.rows, self.n, 1, len(reads), len(writes), 1,
            DOCUMENTS=False, ANCHORS=False, PARTS=16, BLOCK=min(DECAY, power(self.n)), num_warps=4,
        )  # fmt: skip
        return found


def _strides(*tensors: Tensor) -> list[int]:
    """From row to row, head to head and token to token, of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, levels: Tensor) -> Tensor:
        ctx.made = [None if t is None else t.dtype for t in (q, k, v, decay, levels)]
        q, k, v, levels = readable(q), readable(k), readable(v), readable(levels.float())
        call = Call(q, v, decay, levels)
        nodes = call.tree(call.leaves(k, v, levels))
        out = like(v)
        call.blocks("outputs", q, k, v, out, levels, nodes)
        ctx.call = call
        ctx.save_for_backward(q, k, v, levels, nodes)
        return out.to(ctx.made[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, levels, nodes = ctx.saved_tensors
        call: Call = ctx.call
        of_q, of_k, of_v = like(q), like(k), like(v)
        of_out = readable(of_out.to(v.dtype))
        decaying = call.decaying and ctx.needs_input_grad[3]
        of_levels = torch.zeros_like(levels, memory_format=torch.contiguous_format) if ctx.needs_input_grad[4] else None
        reads = call.blocks("queries", of_out, v, k, of_q, levels, nodes, q, of_levels=of_levels, turned=True, moments=decaying)
        grads = call.tree(call.leaves(q, of_out, levels, gradient=True), down=True)
        writes = call.blocks("keys", v, of_out, q, of_k, levels, grads, k, reverse=True, turned=True, moments=decaying)
        call.blocks("values", k, q, of_out, of_v, levels, grads, reverse=True)
        of_decay = call.decay_gradient(reads, writes) if reads is not None and writes is not None else None
        found = (of_q, of_k, of_v, of_decay, of_levels)
        return tuple(None if t is None else t.to(dtype) for t, dtype in zip(found, ctx.made, strict=True))
