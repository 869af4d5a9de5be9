"""Forward and backward of a state with one decay factor a token, or none, by the walks of `scalar`.

Kept for the backward pass beside q, k and v: running sums of the decay, a number a token, and the state that each segment
started from. Gradients are the same bits every time: every sum has one owner and one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import Inputs
from ._host import alike, like, nothing_to_do, power, readable, unfit

WIDEST = 128  # heads of 256 compiled, and read memory that is not theirs


@dataclass(frozen=True)
class Cut:
    """How a walk is cut: tokens of a chunk, columns of a program, warps, loads in flight."""

    chunk: int
    tile: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Segments:
    """How rows are cut: into segments until there are so many programs, of so many tokens at least and at most."""

    programs: int = 264
    shortest: int = 512
    longest: int = 8192


# {walk: {(largest head size, float32): cut}}. "both" has no tile: it has whole heads. Where it has no cut, "keys" and "values"
# walk one after the other.
LAUNCHES: dict[str, dict[tuple[int, bool], Cut]] = {
    "outputs": {
        (64, False): Cut(64, 64, 4, 2), (128, False): Cut(64, 64, 4, 2),
        (64, True): Cut(32, 32, 4, 1), (128, True): Cut(32, 32, 4, 1),
    },
    "queries": {
        (64, False): Cut(64, 64, 4, 2), (128, False): Cut(64, 64, 4, 2),
        (64, True): Cut(32, 32, 4, 1), (128, True): Cut(32, 32, 4, 1),
    },
    "keys": {
        (64, False): Cut(64, 64, 4, 2), (128, False): Cut(64, 64, 4, 2),
        (64, True): Cut(32, 32, 4, 1), (128, True): Cut(32, 32, 4, 1),
    },
    "values": {
        (64, False): Cut(64, 64, 4, 2), (128, False): Cut(64, 64, 4, 2),
        (64, True): Cut(32, 32, 4, 1), (128, True): Cut(32, 32, 4, 1),
    },
    "both": {(64, False): Cut(64, 0, 4, 2), (128, False): Cut(64, 0, 8, 2)},
    "states": {
        (64, False): Cut(64, 64, 4, 3), (128, False): Cut(64, 128, 8, 3),
        (64, True): Cut(32, 32, 4, 1), (128, True): Cut(32, 32, 4, 1),
    },
}  # fmt: skip
SEGMENTS = Segments()
TMA_FROM = (
    32768  # tokens of a row from which they are loaded by descriptors: making those takes the host longer than it saves in less
)
SUMS, SCAN, DECAY = 32, 1024, 2048  # chunks, numbers of a state and tokens that a program of the small kernels takes at once


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    if given.erase is not None or given.levels is not None:
        return "these kernels only decay and add"
    if given.decay is not None and given.decay.shape[-1] != 1:
        return "the decay is one of each channel"
    return unfit(given, WIDEST)


def run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) like v, and the last state, (b, h, d, dv) float32.

    q, k: (b, h, n, d), v: (b, h, n, dv), of any strides but neighbours along heads. decay: (b, h, n) log factors up to 0.
    documents: (b, n), how many began at or before each token. Differentiable once in all but those.
    """
    nothing = nothing_to_do(q, v, state)
    if nothing is not None:
        return nothing
    q, k, v = alike(q, k, v)
    return _Scalar.apply(q, k, v, decay, state, documents)  # type: ignore[no-untyped-call]


def described(tensor: Tensor, rows: int, columns: int) -> Any:
    """(b, h, n, d) as the tensor memory accelerator takes it, in blocks of some tokens and columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [stride if size > 1 else tensor.shape[-1] for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def describable(*tensors: Tensor) -> bool:
    """Whether all of these can be `described`: 16 bytes from row to row, and from where they begin."""

    def whole(tensor: Tensor) -> bool:
        sizes = [tensor.shape[-1], *(stride for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1)]
        return tensor.data_ptr() % 16 == 0 and all(size > 0 and size * tensor.element_size() % 16 == 0 for size in sizes)

    return all(whole(tensor) for tensor in tensors)


class Call:
    """What all kernels of one recurrence are told."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor | None, documents: Tensor | None) -> None:
        self.b, self.h, self.n, self.d = q.shape
        self.dv = v.shape[-1]
        self.rows = self.b * self.h
        self.exact = q.dtype == torch.float32
        self.nothing = q.new_empty(1, dtype=torch.float32)
        self.decay = None if decay is None else decay.detach().float()
        self.documents = None if documents is None else documents.to(torch.int32).contiguous()
        self.sums: dict[int, Tensor] = {}
        unit = max(cuts[size].chunk for cuts in LAUNCHES.values() if (size := self._size(cuts)) is not None)
        programs = self.rows * -(-self.dv // min(self.cut("outputs").tile, power(self.dv)))
        count = min(-(-SEGMENTS.programs // programs), self.n // SEGMENTS.shortest)
        count = max(count, -(-self.n // SEGMENTS.longest), 1)
        self.length = -(-self.n // (count * unit)) * unit
        self.segments = -(-self.n // self.length)

    def _size(self, cuts: dict[tuple[int, bool], Cut]) -> tuple[int, bool] | None:
        return next((found for found in cuts if found[1] == self.exact and max(self.d, self.dv) <= found[0]), None)

    def cut(self, walk: str) -> Cut:
        """How a walk is cut."""
        size = self._size(LAUNCHES[walk])
        assert size is not None
        return LAUNCHES[walk][size]

    @property
    def fused(self) -> bool:
        """Whether gradients of keys and values are made in one walk."""
        return self._size(LAUNCHES["both"]) is not None

    @cached_property
    def documents_or_nothing(self) -> tuple[Tensor, int]:
        """Documents, and their stride from row to row."""
        return (self.nothing.to(torch.int32), 0) if self.documents is None else (self.documents, self.documents.stride(0))

    def running(self, chunk: int) -> Tensor:
        """Running sums of the decay, (b * h, chunks, chunk)."""
        from .scalar import sums_kernel

        if self.decay is None:
            return self.nothing
        if chunk not in self.sums:
            chunks = -(-self.n // chunk)
            self.sums[chunk] = self.nothing.new_empty(self.rows, chunks, chunk)
            sums_kernel[(self.rows * -(-chunks // SUMS),)](
                self.decay, self.sums[chunk], *self.decay.stride(), self.h, self.n, chunks, C=chunk, ROWS=SUMS, num_warps=4
            )
        return self.sums[chunk]

    def constants(self, cut: Cut, d: int, dz: int) -> dict[str, Any]:
        """What walks are compiled for."""
        tile = min(cut.tile or WIDEST, power(dz))
        return {
            "DECAY": self.decay is not None, "DOCUMENTS": self.documents is not None, "C": cut.chunk, "D": power(d), "T": tile,
            "WHOLE_N": self.n % cut.chunk == 0, "WHOLE_D": power(d) == d, "WHOLE_T": dz % tile == 0, "EXACT": self.exact,
            "STAGES": cut.stages, "num_warps": cut.warps,
        }  # fmt: skip

    def sources(self, cut: Cut, *tensors: tuple[Tensor, int]) -> tuple[list[Any], list[int], bool]:
        """Tensors as kernels take them, with columns of a block: themselves and strides, or descriptors; and whether those."""
        if self.n >= TMA_FROM and describable(*(tensor for tensor, _ in tensors)):
            return [described(tensor, cut.chunk, columns) for tensor, columns in tensors], [0] * (3 * len(tensors)), True
        return [tensor for tensor, _ in tensors], [stride for tensor, _ in tensors for stride in tensor.stride()[:3]], False

    def walk(
        self, name: str, x: Tensor, y: Tensor, z: Tensor, out: Tensor, first: Tensor | None, last: Tensor | None = None,
        w: Tensor | None = None, *, reverse: bool = False, turned: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Fills `out`, and `last` if it is wanted; the products of outputs with w, (tiles, b * h, n), if it is given.

        first: states of segments; turned: they are (b * h, segments, dz, d).
        """
        from .scalar import walk_kernel

        cut, d, dz = self.cut(name), x.shape[-1], z.shape[-1]
        constants = self.constants(cut, d, dz)
        wide, tile = constants["D"], constants["T"]
        tiles = -(-dz // tile)
        sources, strides, tma = self.sources(cut, (x, wide), (y, wide), (z, tile), (z if w is None else w, tile), (out, tile))
        moments = None if w is None else self.nothing.new_empty(tiles, self.rows, self.n)
        documents, documents_stride = self.documents_or_nothing
        walk_kernel[(self.rows * self.segments * tiles,)](
            *sources, self.running(cut.chunk), documents, self.nothing if first is None else first,
            self.nothing if last is None else last, self.nothing if moments is None else moments, *strides, documents_stride,
            *((1, d) if turned else (dz, 1)), self.h, self.n, d, dz, -(-self.n // cut.chunk), self.segments,
            self.length // cut.chunk, REVERSE=reverse, FIRST=first is not None, LAST=last is not None,
            MOMENTS=w is not None, TMA=tma, **constants,
        )  # fmt: skip
        return moments

    def pair(
        self, q: Tensor, k: Tensor, v: Tensor, of_out: Tensor, of_k: Tensor, of_v: Tensor, first: Tensor | None,
        last: Tensor | None, moments: bool,
    ) -> Tensor | None:  # fmt: skip
        """Fills gradients of keys and values, and of the first state if it is wanted; returns k . dk, (1, b * h, n)."""
        from .scalar import pair_kernel

        cut = self.cut("both")
        constants = self.constants(cut, self.d, self.dv)
        del constants["T"], constants["WHOLE_T"]
        wide, tall = constants["D"], power(self.dv)
        sources, strides, tma = self.sources(cut, (q, wide), (k, wide), (v, tall), (of_out, tall), (of_k, wide), (of_v, tall))
        found = self.nothing.new_empty(1, self.rows, self.n) if moments else None
        documents, documents_stride = self.documents_or_nothing
        pair_kernel[(self.rows * self.segments,)](
            *sources, self.running(cut.chunk), documents, self.nothing if first is None else first,
            self.nothing if last is None else last, self.nothing if found is None else found, *strides, documents_stride,
            self.h, self.n, self.d, self.dv, -(-self.n // cut.chunk), self.segments, self.length // cut.chunk,
            FIRST=first is not None, LAST=last is not None, MOMENTS=moments, DV=tall, WHOLE_DV=tall == self.dv,
            TMA=tma, **constants,
        )  # fmt: skip
        return found

    def firsts(
        self, y: Tensor, z: Tensor, first: Tensor | None, *, reverse: bool = False, others: Tensor | None = None,
        other_last: Tensor | None = None, anchored: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The states that segments start from, (b * h, segments, d, dv), None for zeros; with `anchored` their anchors.

        others, other_last: for those, what the states are gradients of: (b * h, segments, d, dv), and after the last segment.
        """
        from .scalar import scan_kernel, states_kernel

        if self.segments == 1 and (first is None or not anchored):
            return first, None
        size = self.d * self.dv
        states, left = self.nothing.new_empty(self.rows, self.segments, self.d, self.dv), self.nothing
        if self.segments > 1:
            cut = self.cut("states")
            constants = self.constants(cut, self.d, self.dv)
            left = self.nothing.new_empty(self.rows, self.segments)
            sources, strides, tma = self.sources(cut, (y, constants["D"]), (z, constants["T"]))
            documents, documents_stride = self.documents_or_nothing
            states_kernel[(self.rows * (self.segments - 1) * -(-self.dv // constants["T"]),)](
                *sources, states, left, self.running(cut.chunk), documents, *strides, documents_stride,
                self.h, self.n, self.d, self.dv, -(-self.n // cut.chunk), self.segments, self.length // cut.chunk,
                REVERSE=reverse, TMA=tma, **constants,
            )  # fmt: skip
        blocks = -(-size // SCAN)
        anchors = self.nothing.new_empty(self.rows, self.segments, blocks) if anchored else None
        scan_kernel[(self.rows * blocks,)](
            states, left, self.nothing if first is None else first, self.nothing if others is None else others,
            self.nothing if other_last is None else other_last, self.nothing if anchors is None else anchors, size, self.segments,
            REVERSE=reverse, FIRST=first is not None, ANCHORS=anchored, OTHER_LAST=other_last is not None, BLOCK=SCAN, num_warps=4,
        )  # fmt: skip
        return states, anchors

    def decay_gradient(self, reads: Tensor, writes: Tensor, anchors: Tensor | None) -> Tensor:
        """Of the decay, (b, h, n), from parts of q . dq and k . dk and anchors at the ends of segments."""
        from .scalar import decay_kernel

        found = self.nothing.new_empty(self.b, self.h, self.n)
        of_anchors = 1 if anchors is None else anchors.shape[-1]
        documents, documents_stride = self.documents_or_nothing
        decay_kernel[(self.rows * self.segments,)](
            reads, writes, self.nothing if anchors is None else anchors, documents, found, documents_stride, self.h, self.n,
            self.rows, self.length, self.segments, len(reads), len(writes), of_anchors, DOCUMENTS=self.documents is not None,
            ANCHORS=anchors is not None, PARTS=power(of_anchors), BLOCK=min(DECAY, power(self.length)), num_warps=4,
        )  # fmt: skip
        return found


class _Scalar(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.made = [None if t is None else t.dtype for t in (q, k, v, decay, state)]
        ctx.set_materialize_grads(False)
        q, k, v = readable(q), readable(k), readable(v)
        call = Call(q, v, decay, documents)
        first = None if state is None else state.detach().float().contiguous()
        firsts, _ = call.firsts(k, v, first)
        out = like(v)
        last = q.new_empty(call.b, call.h, call.d, call.dv, dtype=torch.float32)
        call.walk("outputs", q, k, v, out, firsts, last)
        ctx.call, ctx.has_state = call, state is not None
        ctx.save_for_backward(q, k, v, firsts, last if ctx.needs_input_grad[3] else None)
        return out.to(ctx.made[2]), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_last: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, firsts, last = ctx.saved_tensors
        call: Call = ctx.call
        of_q, of_k, of_v = like(q), like(k), like(v)
        of_read = torch.zeros_like(v) if of_out is None else readable(of_out.to(v.dtype))
        of_last = None if of_last is None else of_last.float().contiguous()
        of_state = None
        if ctx.has_state and ctx.needs_input_grad[4]:
            of_state = q.new_empty(call.b, call.h, call.d, call.dv, dtype=torch.float32)
        wanted = call.decay is not None and ctx.needs_input_grad[3]
        reads = call.walk("queries", of_read, v, k, of_q, firsts, None, q if wanted else None, turned=True)
        later, anchors = call.firsts(q, of_read, of_last, reverse=True, others=firsts, other_last=last, anchored=wanted)
        if call.fused:
            writes = call.pair(q, k, v, of_read, of_k, of_v, later, of_state, wanted)
        else:
            writes = call.walk("keys", v, of_read, q, of_k, later, None, k if wanted else None, reverse=True, turned=True)
            call.walk("values", k, q, of_read, of_v, later, of_state, reverse=True)
        of_decay = call.decay_gradient(reads, writes, anchors) if reads is not None and writes is not None else None
        grads = (of_q, of_k, of_v, of_decay, of_state)
        return *(None if t is None else t.to(dtype) for t, dtype in zip(grads, ctx.made, strict=True)), None
