"""Forward and backward of a state with a decay of each channel of keys, by the kernels of `channels`.

Kept for the backward pass: q, k, v, the decay, and the state that each segment of a row started from; what was prepared of
each chunk is made again, unless KEEP. Gradients are the same bits every time: every sum has one owner and one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import Inputs
from ._host import Cut, Segments, alike, like, nothing_to_do, power, readable, unfit

WIDEST = 256
CHUNK = {False: 64, True: 32}  # tokens of a chunk; True: for products of float32
# {kernel: {(largest head size, products of float32): cut}}; "fast ...": of chunks whose decay is not slow; tile, of gradients:
# columns of values that are multiplied at once.
#
# Two warps are no matter of speed: of four, Hopper makes a group that multiplies at once, and Triton from 3.4 up to 3.7.1 compiles
# that wrongly where operands are what other products left, transposed or not: wrong values, and reads of foreign memory
# (triton-lang/triton#11366). Whoever gives these kernels more warps has to run the tests on such a card.
LAUNCHES: dict[str, dict[tuple[int, bool], Cut]] = {
    "chunks": {(256, False): Cut(32, 0, 2, 1), (256, True): Cut(32, 0, 4, 1)},
    "fast chunks": {(256, False): Cut(32, 0, 2, 1), (256, True): Cut(32, 0, 4, 1)},
    "outputs": {
        (64, False): Cut(0, 64, 4, 3), (128, False): Cut(0, 64, 4, 3), (256, False): Cut(0, 32, 4, 2),
        (128, True): Cut(0, 32, 8, 1, 255), (256, True): Cut(0, 16, 8, 1, 255),
    },
    "values": {
        (64, False): Cut(0, 64, 4, 3), (128, False): Cut(0, 64, 4, 3), (256, False): Cut(0, 32, 4, 2),
        (128, True): Cut(0, 32, 8, 1, 255), (256, True): Cut(0, 16, 8, 1, 255),
    },
    "states": {(256, False): Cut(64, 64, 4, 3), (256, True): Cut(32, 32, 4, 1)},
    "gradients": {(256, False): Cut(32, 64, 2, 1), (256, True): Cut(16, 64, 4, 1)},
    "fast gradients": {(256, False): Cut(32, 64, 2, 1), (256, True): Cut(16, 64, 4, 1)},
}  # fmt: skip
SEGMENTS = Segments(enough=96, programs=264, shortest=512)
SCAN = 1024  # numbers of a state that a program of the scan over segments has
KEEP = False  # whether what was prepared of chunks is kept for the backward pass: half as much again as q, k, v and the decay


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    if given.erase is not None or given.levels is not None:
        return "these kernels only decay and add"
    if given.decay is None or given.decay.shape[-1] != given.q.shape[-1]:
        return "the decay is not one of each channel"
    return unfit(given, WIDEST)


def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) like v, and the last state, (b, h, d, dv) float32.

    q, k: (b, h, n, d), v: (b, h, n, dv), of any strides but neighbours along heads. decay: (b, h, n, d) log factors up to 0.
    documents: (b, n), how many began at or before each token. Differentiable once in all but those.
    """
    nothing = nothing_to_do(q, v, state)
    if nothing is not None:
        return nothing
    q, k, v = alike(q, k, v)
    return _Channels.apply(q, k, v, decay, state, documents)  # type: ignore[no-untyped-call]


class Chunks(NamedTuple):
    """What is prepared of every chunk; see `chunk_kernel`."""

    inside: Tensor
    reads: Tensor
    writes: Tensor
    left: Tensor
    sums: Tensor


class Call:
    """What all kernels of one recurrence are told."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, documents: Tensor | None) -> None:
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.decay = readable(decay.float())
        self.b, self.h, self.n, self.d = q.shape
        self.dv = v.shape[-1]
        self.rows = self.b * self.h
        self.exact = self.q.dtype == torch.float32
        self.wide = self.q.dtype != torch.bfloat16  # float16 in products of tfloat32, which has its digits and float32's range
        self.nothing = q.new_empty(1, dtype=torch.float32)
        self.documents = None if documents is None else documents.to(torch.int32).contiguous()
        self.chunk = CHUNK[self.wide]
        self.chunks = -(-self.n // self.chunk)
        programs = self.rows * -(-self.dv // self.tile("outputs"))
        segments = 1
        if programs < SEGMENTS.enough:
            segments = SEGMENTS.of(programs, self.n)
        self.each = -(-self.chunks // segments)  # chunks of a segment
        self.segments = -(-self.chunks // self.each)

    def cut(self, kernel: str) -> Cut:
        """How a kernel is cut."""
        size = max(self.d, self.dv)
        return next(cut for (widest, wide), cut in LAUNCHES[kernel].items() if wide == self.wide and size <= widest)

    def tile(self, kernel: str) -> int:
        """Columns of values of a program."""
        return min(self.cut(kernel).tile, power(self.dv))

    @property
    def numbers(self) -> dict[str, Any]:
        """How kernels compute."""
        import triton.language as tl

        return {"TYPE": tl.float32 if self.wide else tl.bfloat16, "EXACT": self.exact, "WHOLE_N": self.n % self.chunk == 0}

    def by_channel(self, kernel: str) -> dict[str, Any]:
        """What kernels of one chunk are compiled for."""
        cut = self.cut(kernel)
        block = min(cut.block, power(self.d))
        return {
            "DOCUMENTS": self.documents is not None, "C": self.chunk, "LEVELS": self.chunk.bit_length() - 1, "BLOCK": block,
            "STAGES": cut.stages, **cut.options, **self.numbers,
        }  # fmt: skip

    @property
    def of_documents(self) -> tuple[Tensor, int]:
        """Documents or nothing, and their stride from row to row."""
        return (self.nothing.to(torch.int32), 0) if self.documents is None else (self.documents, self.documents.stride(0))

    def scratch(self, *shape: int) -> Tensor:
        """Empty, of the type of products: (b * h, chunks, ...)."""
        dtype = torch.float32 if self.wide else torch.bfloat16
        return self.nothing.new_empty(self.rows, self.chunks, *shape, dtype=dtype)

    def prepared(self) -> Chunks:
        """What each chunk does, whatever state it starts from."""
        from .channels import chunk_kernel

        found = Chunks(
            self.scratch(self.chunk, self.chunk), self.scratch(self.chunk, self.d), self.scratch(self.chunk, self.d),
            self.nothing.new_empty(self.rows, self.chunks, self.d), self.nothing.new_empty(self.rows, self.chunks, self.d),
        )  # fmt: skip
        documents, stride = self.of_documents
        for meets, kernel in ((True, "chunks"), (False, "fast chunks")):
            chunk_kernel[(self.rows * self.chunks,)](
                self.q, self.k, self.decay, documents, *found, *self.q.stride()[:3], *self.k.stride()[:3],
                *self.decay.stride()[:3], stride, self.h, self.n, self.d, self.chunks, MEETS=meets, D=power(self.d),
                **self.by_channel(kernel),
            )  # fmt: skip
        return found

    def walk(
        self, kernel: str, x: Tensor, y: Tensor, z: Tensor, chunks: Chunks, *, reverse: bool = False, first: Tensor | None = None,
        out: Tensor | None = None, last: Tensor | None = None, states: Tensor | None = None, added: Tensor | None = None,
        remains: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fills what is given of out, last, states, and added with remains."""
        from .channels import walk_kernel

        cut, tile = self.cut(kernel), self.tile(kernel)
        block = min(cut.block, power(self.d)) if cut.block else power(self.d)
        walked = self.segments if added is None else self.segments - 1
        nothing, of_out = self.nothing, z if out is None else out
        walk_kernel[(self.rows * walked * -(-self.d // block) * -(-self.dv // tile),)](
            x, y, chunks.inside, z, of_out, chunks.left, added if added is not None else nothing if first is None else first,
            nothing if last is None else last, nothing if states is None else states, nothing if remains is None else remains,
            *z.stride()[:3], *of_out.stride()[:3], self.h, self.n, self.d, self.dv, self.chunks, self.segments, self.each,
            REVERSE=reverse, FIRST=first is not None, OUT=out is not None, LAST=last is not None, STATES=states is not None,
            ADDED=added is not None, C=self.chunk, D=block, T=tile, STAGES=cut.stages, **cut.options, **self.numbers,
        )  # fmt: skip

    def firsts(self, y: Tensor, z: Tensor, chunks: Chunks, first: Tensor | None, reverse: bool = False) -> Tensor | None:
        """The states that segments start from, (b * h, segments, d, dv); None for zeros."""
        from .channels import scan_kernel

        if self.segments == 1:
            return first
        states = self.nothing.new_empty(self.rows, self.segments, self.d, self.dv)
        remains = self.nothing.new_empty(self.rows, self.segments, self.d)
        self.walk("states", y, y, z, chunks, reverse=reverse, added=states, remains=remains)
        scan_kernel[(self.rows * -(-self.d * self.dv // SCAN),)](
            states, remains, self.nothing if first is None else first, self.d, self.dv, self.segments, REVERSE=reverse,
            FIRST=first is not None, BLOCK=SCAN, num_warps=4,
        )  # fmt: skip
        return states

    def gradients(
        self, of_out: Tensor, sums: Tensor, states: Tensor, changes: Tensor, decay: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of q, k and, if it is wanted, the decay."""
        from .channels import gradient_kernel

        of_q, of_k = like(self.q), like(self.k)
        of_decay = like(self.decay) if decay else None
        given = (self.q, self.k, self.v, of_out, self.decay)
        made = (of_q, of_k, self.decay if of_decay is None else of_decay)
        documents, stride = self.of_documents
        for meets, kernel in ((True, "gradients"), (False, "fast gradients")):
            constants = self.by_channel(kernel)
            gradient_kernel[(self.rows * self.chunks * -(-self.d // constants["BLOCK"]),)](
                *given, documents, sums, states, changes, *made, *(stride for t in (*given, *made) for stride in t.stride()[:3]),
                stride, self.h, self.n, self.d, self.dv, self.chunks, MEETS=meets, DECAY=decay, PART=self.tile(kernel), **constants,
            )  # fmt: skip
        return of_q, of_k, of_decay


class _Channels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.made = [None if t is None else t.dtype for t in (q, k, v, decay, state)]
        ctx.set_materialize_grads(False)
        call = Call(q, k, v, decay, documents)
        chunks = call.prepared()
        firsts = call.firsts(chunks.writes, call.v, chunks, None if state is None else state.detach().float().contiguous())
        out = like(call.v)
        last = call.nothing.new_empty(call.b, call.h, call.d, call.dv)
        call.walk("outputs", chunks.reads, chunks.writes, call.v, chunks, first=firsts, out=out, last=last)
        ctx.kept = KEEP
        ctx.save_for_backward(q, k, v, decay, documents, firsts, *(chunks if KEEP else ()))
        return out.to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_last: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, decay, documents, firsts, *kept = ctx.saved_tensors
        call = Call(q, k, v, decay, documents)
        chunks = Chunks(*kept) if ctx.kept else call.prepared()
        of_out = torch.zeros_like(call.v) if of_out is None else readable(of_out.to(v.dtype))
        of_last = None if of_last is None else of_last.float().contiguous()
        states, changes = call.scratch(call.d, call.dv), call.scratch(call.d, call.dv)
        call.walk("states", chunks.writes, chunks.writes, call.v, chunks, first=firsts, states=states)
        later = call.firsts(chunks.reads, of_out, chunks, of_last, reverse=True)
        of_v = like(call.v)
        of_state = call.nothing.new_empty(call.b, call.h, call.d, call.dv) if ctx.needs_input_grad[4] else None
        call.walk(
            "values",
            chunks.writes,
            chunks.reads,
            of_out,
            chunks,
            reverse=True,
            first=later,
            out=of_v,
            last=of_state,
            states=changes,
        )
        of_q, of_k, of_decay = call.gradients(of_out, chunks.sums, states, changes, ctx.needs_input_grad[3])
        grads = (of_q, of_k, of_v, of_decay, of_state)
        return *(None if t is None else t.to(dtype) for t, dtype in zip(grads, ctx.made, strict=True)), None
