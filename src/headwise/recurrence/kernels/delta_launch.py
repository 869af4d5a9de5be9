"""Forward and backward of the delta rule, with no decay, one a token or one of each channel, by the kernels of `delta`.

Kept for the backward pass: what was given, inverses, and of rows that were cut the state that each segment started from, and
what it makes of the unit matrix; the rest that was prepared of chunks is made again. Gradients are the same bits every time:
every sum has one owner and one order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import Inputs
from ._host import Cut, Segments, alike, like, nothing_to_do, power, readable, unfit

WIDEST = 256
CUTTABLE = 128  # of larger heads, rows are not cut into segments: the scan has whole matrices in shared memory
CHUNK = {False: 64, True: 32}  # tokens of a chunk, powers of two from 16 on; True: for products of float32
# {kernel: {(largest head size, products of float32): cut}}. "channels" and "channel ...": decays of each channel, "fast ..." of
# chunks in which they are not slow. Why most of these have two warps is in `channels_launch`; "channels" was tested with four.
LAUNCHES: dict[str, dict[tuple[int, bool], Cut]] = {
    "chunks": {(256, False): Cut(32, 0, 4, 1), (256, True): Cut(32, 0, 4, 1)},
    "channels": {(128, False): Cut(32, 0, 4, 1), (256, False): Cut(32, 0, 2, 1), (256, True): Cut(32, 0, 4, 1)},
    "fast channels": {(256, False): Cut(32, 0, 2, 1), (256, True): Cut(32, 0, 4, 1)},
    "channel ends": {(256, False): Cut(32, 0, 2, 1), (256, True): Cut(32, 0, 4, 1)},
    "outputs": {
        (64, False): Cut(0, 64, 4, 3), (128, False): Cut(0, 64, 4, 2), (256, False): Cut(0, 32, 4, 1),
        (128, True): Cut(0, 16, 8, 1, 255), (256, True): Cut(0, 16, 16, 1, 128),
    },
    "states": {
        (64, False): Cut(0, 64, 4, 3), (128, False): Cut(0, 64, 4, 3), (256, False): Cut(0, 32, 4, 2),
        (128, True): Cut(0, 32, 8, 1), (256, True): Cut(0, 16, 16, 1, 128),
    },
    "back": {
        (64, False): Cut(0, 64, 4, 3), (128, False): Cut(0, 64, 4, 2), (256, False): Cut(0, 32, 4, 1),
        (128, True): Cut(0, 32, 8, 1), (256, True): Cut(0, 16, 16, 1, 128),
    },
    "scan": {(128, False): Cut(0, 32, 8, 1), (128, True): Cut(0, 16, 16, 1, 128)},
    "gradients": {
        (64, False): Cut(64, 0, 4, 1), (128, False): Cut(64, 0, 8, 1), (256, False): Cut(32, 0, 8, 1),
        (128, True): Cut(32, 0, 8, 1), (256, True): Cut(16, 0, 8, 1),
    },
    "channel gradients": {(128, False): Cut(32, 32, 2, 1), (256, False): Cut(16, 64, 2, 1), (256, True): Cut(16, 64, 8, 1)},
    "fast channel gradients": {(256, False): Cut(16, 64, 2, 1), (256, True): Cut(16, 64, 8, 1)},
}  # fmt: skip
SEGMENTS = Segments(enough=96, programs=132, shortest=1024)
# Whether inverses are kept for the backward pass, if decays are not of each channel: (b * h, n, chunk), half of what keys take if
# heads are 128. Of decays of each channel they are, and scores.
KEEP = True
PRECISION = "tf32x3"  # of products in inverses and scans, where tensors are not float32


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    if given.erase is None or given.levels is not None:
        return "these kernels erase, and have no levels"
    if given.decay is not None and given.decay.shape[-1] not in (1, given.q.shape[-1]):
        return "the decay is neither one of each token nor one of each channel"
    return unfit(given, WIDEST)


def run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, write: Tensor | None, erase: Tensor, state: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (b, h, n, dv) like v, and the last state, (b, h, d, dv) float32.

    q, k: (b, h, n, d), v: (b, h, n, dv), of any strides but neighbours along heads. decay: log factors up to 0, (b, h, n) or
    (b, h, n, d). write, erase: (b, h, n). documents: (b, n), how many began at or before each token. Differentiable once in
    all but those.
    """
    nothing = nothing_to_do(q, v, state)
    if nothing is not None:
        return nothing
    q, k, v = alike(q, k, v)
    return _Delta.apply(q, k, v, decay, write, erase, state, documents)  # type: ignore[no-untyped-call]


class Chunks(NamedTuple):
    """What is prepared of every chunk; see `chunk_kernel`. reads, keys, erasers: of decays of each channel, the queries and keys
    as they read the state before the chunk (erasers: for the backward pass), and keys as they enter the state after it."""

    w: Tensor
    u: Tensor
    mix: Tensor
    back: Tensor
    near: Tensor
    far: Tensor
    gone: Tensor
    left: Tensor
    reads: Tensor
    keys: Tensor
    erasers: Tensor
    sums: Tensor


class Call:
    """What all kernels of one recurrence are told."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, write: Tensor | None, erase: Tensor,
        documents: Tensor | None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.nothing = q.new_empty(1, dtype=torch.float32)
        self.by_channel = decay is not None and decay.dim() == 4
        self.decay = None if decay is None else readable(decay.float()) if self.by_channel else decay.detach().float()
        self.write = None if write is None else write.detach().float()
        self.erase = erase.detach().float()
        self.documents = None if documents is None else documents.to(torch.int32).contiguous()
        self.b, self.h, self.n, self.d = q.shape
        self.dv = v.shape[-1]
        self.rows = self.b * self.h
        self.exact = self.q.dtype == torch.float32
        self.wide = self.q.dtype != torch.bfloat16  # float16 in products of tfloat32, which has its digits and float32's range
        self.kind = 2 if self.by_channel else 0 if decay is None and documents is None else 1
        self.chunk = CHUNK[self.wide]
        self.chunks = -(-self.n // self.chunk)
        programs = self.rows * -(-self.dv // self.tile("outputs"))
        segments = 1
        if programs < SEGMENTS.enough and max(self.d, self.dv) <= CUTTABLE:
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
    def precision(self) -> str:
        """Of products that are not of tokens."""
        return "ieee" if self.exact else PRECISION

    @property
    def numbers(self) -> dict[str, Any]:
        """How kernels compute."""
        import triton.language as tl

        return {
            "TYPE": tl.float32 if self.wide else tl.bfloat16, "EXACT": self.exact, "C": self.chunk,
            "WHOLE_N": self.n % self.chunk == 0,
        }  # fmt: skip

    def of_chunk(self, kernel: str) -> dict[str, Any]:
        """What kernels of one chunk are compiled for."""
        cut = self.cut(kernel)
        block = min(cut.block, power(max(self.d, self.dv)))
        return {
            "WRITE": self.write is not None, "DOCUMENTS": self.documents is not None, "BLOCK": block,
            "WHOLE_D": self.d % block == 0, "WHOLE_DV": self.dv % block == 0, **cut.options, **self.numbers,
        }  # fmt: skip

    def given(self, tensor: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """A tensor and its strides of batch, heads and tokens, or nothing."""
        return (self.nothing, (0, 0, 0)) if tensor is None else (tensor, tensor.stride()[:3])

    @property
    def of_documents(self) -> tuple[Tensor, int]:
        """Documents or nothing, and their stride from row to row."""
        return (self.nothing.to(torch.int32), 0) if self.documents is None else (self.documents, self.documents.stride(0))

    def scratch(self, *shape: int, wide: bool = False) -> Tensor:
        """Empty, (b, h, chunks, ...), of the type of products, or float32."""
        dtype = torch.float32 if self.wide or wide else torch.bfloat16
        return self.nothing.new_empty(self.b, self.h, self.chunks, *shape, dtype=dtype)

    def by_token(self, width: int) -> Tensor:
        """Empty, (b, h, chunks * C, width), of the type of products."""
        return self.scratch(self.chunk, width).flatten(2, 3)

    def prepared(self, back: bool, inverses: Tensor | None, inside: Tensor | None = None, sums: Tensor | None = None) -> Chunks:
        """What each chunk does, whatever state it starts from; for the backward pass, what that needs. inverses: to fill, or from
        the forward pass; None if they are not kept. inside and sums: from the forward pass, of decays of each channel."""
        from .delta import chunk_kernel

        w, u, mix = self.by_token(self.d), self.by_token(self.dv), self.scratch(self.chunk, self.chunk)
        of_back = self.by_token(self.d) if back else self.nothing
        documents, stride = self.of_documents
        (decay, of_decay), (write, of_write), (erase, of_erase) = map(self.given, (self.decay, self.write, self.erase))
        given = (self.q, self.k, self.v, decay, write, erase, documents, self.nothing if inverses is None else inverses)
        strides = (*(s for t in given[:3] for s in t.stride()[:3]), *of_decay, *of_write, *of_erase, stride)
        if self.by_channel:
            from ._delta_channels import channel_chunk_kernel

            reads, keys = self.by_token(self.d), self.by_token(self.d)
            erasers = self.by_token(self.d) if back else self.nothing
            left = self.scratch(self.d, wide=True)
            sums = self.scratch(self.d, wide=True) if sums is None else sums
            made = (w, u, mix, of_back, reads, keys, erasers, left, sums, self.nothing if inside is None else inside)
            for meets, kernel in ((True, "channel ends"),) if back else ((True, "channels"), (False, "fast channels")):
                channel_chunk_kernel[(self.rows * self.chunks,)](
                    *given, *made, *strides, self.h, self.n, self.d, self.dv, self.chunks, MEETS=meets, BACK=back,
                    KEPT=inverses is not None, LEVELS=self.chunk.bit_length() - 1, D=power(self.d), PRECISION=self.precision,
                    STAGES=self.cut(kernel).stages, **self.of_chunk(kernel),
                )  # fmt: skip
            nothing = (self.nothing,) * 3
            return Chunks(w, u, mix, of_back, *nothing, left, reads, keys, erasers, sums)
        near, far, gone = (self.scratch(self.chunk, wide=True) for _ in range(3))
        left = self.scratch(wide=True)
        chunk_kernel[(self.rows * self.chunks,)](
            *given, w, u, mix, of_back, near, far, gone, left, *strides, self.h, self.n, self.d, self.dv, self.chunks, BACK=back,
            KEPT=inverses is not None, DECAY=self.decay is not None, LEVELS=self.chunk.bit_length() - 1, PRECISION=self.precision,
            STAGES=self.cut("chunks").stages, **self.of_chunk("chunks"),
        )  # fmt: skip
        return Chunks(w, u, mix, of_back, near, far, gone, left, self.q, self.k, self.k, self.nothing)

    def of_walk(self, kernel: str, first: Tensor | None) -> dict[str, Any]:
        """What walks are compiled for."""
        cut, wide, tile = self.cut(kernel), power(self.d), self.tile(kernel)
        return {
            "KIND": self.kind, "FIRST": first is not None, "D": wide, "T": tile, "WHOLE_D": wide == self.d,
            "WHOLE_T": self.dv % tile == 0, "STAGES": cut.stages, **cut.options, **self.numbers,
        }  # fmt: skip

    def walk(
        self, kernel: str, chunks: Chunks, first: Tensor | None, *, out: Tensor | None = None, last: Tensor | None = None,
        values: Tensor | None = None, states: Tensor | None = None, units: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fills out and last, or values and states, or, of segments, states and units."""
        from .delta import walk_kernel

        constants, added, nothing = self.of_walk(kernel, first), units is not None, self.nothing
        walkers = -(-self.dv // constants["T"]) + (-(-self.d // constants["T"]) if added else 0)
        constants["WHOLE_T"] &= not added
        of_out, strides = self.given(out)
        walk_kernel[(self.rows * self.segments * walkers,)](
            chunks.w, chunks.u, chunks.reads, chunks.keys, chunks.mix, chunks.near, chunks.far, chunks.left,
            nothing if first is None else first, of_out, nothing if values is None else values,
            nothing if states is None else states, nothing if last is None else last, nothing if units is None else units,
            *chunks.reads.stride()[:3], *chunks.keys.stride()[:3], *strides, self.h, self.n, self.d, self.dv, self.chunks,
            self.segments, self.each, OUT=out is not None, STATES=values is not None, ADDED=added, **constants,
        )  # fmt: skip

    def walk_back(
        self, chunks: Chunks, of_out: Tensor, first: Tensor | None, states: Tensor, values: Tensor | None = None,
        last: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fills values and states, and last if it is wanted; without values states, of segments."""
        from .delta_backward import back_kernel

        constants, nothing = self.of_walk("back", first), self.nothing
        back_kernel[(self.rows * self.segments * -(-self.dv // constants["T"]),)](
            chunks.back, chunks.mix, chunks.reads, chunks.erasers, of_out, chunks.near, chunks.gone, chunks.left,
            nothing if first is None else first, nothing if values is None else values, states, nothing if last is None else last,
            *chunks.reads.stride()[:3], *chunks.erasers.stride()[:3], *of_out.stride()[:3], self.h, self.n, self.d, self.dv,
            self.chunks, self.segments, self.each, LAST=last is not None, ADDED=values is None, **constants,
        )  # fmt: skip

    def scan(self, units: Tensor, added: Tensor, first: Tensor | None, reverse: bool = False) -> Tensor:
        """The states that segments start from, of what they make of the unit matrix and what they add."""
        from .delta import scan_kernel

        states = torch.empty_like(added)
        tile = self.tile("scan")
        scan_kernel[(self.rows * -(-self.dv // tile),)](
            units, added, self.nothing if first is None else first, states, self.d, self.dv, self.segments, REVERSE=reverse,
            FIRST=first is not None, D=power(self.d), T=tile, PRECISION=self.precision,
            **self.cut("scan").options,
        )  # fmt: skip
        return states

    def ends(self) -> Tensor:
        """Empty, (b * h, segments, d, dv)."""
        return self.nothing.new_empty(self.rows, self.segments, self.d, self.dv)

    def firsts(self, chunks: Chunks, first: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The states that segments start from, None for zeros, and what segments make of the unit matrix."""
        if self.segments == 1:
            return first, None
        added, units = self.ends(), self.nothing.new_empty(self.rows, self.segments, self.d, self.d)
        self.walk("states", chunks, None, states=added, units=units)
        return self.scan(units, added, first), units

    def gradients(
        self, of_out: Tensor, values: Tensor, of_values: Tensor, states: Tensor, changes: Tensor, chunks: Chunks
    ) -> tuple[Tensor | None, ...]:
        """Of q, k, v, decay, write and erase."""
        from .delta_backward import gradient_kernel

        by_token = [self.nothing.new_empty(self.b, self.h, self.n) for _ in range(3)]
        made = [like(self.q), like(self.k), like(self.v)]
        documents, stride = self.of_documents
        (decay, of_decay), (write, of_write), (erase, of_erase) = map(self.given, (self.decay, self.write, self.erase))
        given = (self.q, self.k, self.v, of_out)
        strides = (*(s for t in given for s in t.stride()[:3]), *of_decay, *of_write, *of_erase)
        strides += tuple(s for t in made for s in t.stride()[:3])
        sizes = (stride, self.h, self.n, self.d, self.dv, self.chunks)
        whole = {"DV": power(self.dv), "WHOLE_DV": power(self.dv) == self.dv}
        tensors = (*given, decay, write, erase, documents, values, of_values, states, changes)
        if self.by_channel:
            from ._delta_channels import channel_gradient_kernel

            by_channel = like(decay)
            for meets, kernel in ((True, "channel gradients"), (False, "fast channel gradients")):
                part = self.tile(kernel)
                channel_gradient_kernel[(self.rows * self.chunks,)](
                    *tensors, chunks.sums, *made, by_channel, *by_token[1:], *strides, *by_channel.stride()[:3], *sizes,
                    MEETS=meets, LEVELS=self.chunk.bit_length() - 1, D=power(self.d), PART=part,
                    WHOLE_PART=self.dv % part == 0, STAGES=self.cut(kernel).stages, **self.of_chunk(kernel) | whole,
                )  # fmt: skip
            return *made, by_channel, *by_token[1:]
        gradient_kernel[(self.rows * self.chunks,)](
            *tensors, chunks.near, chunks.far, chunks.left, *made, *by_token, *strides, *sizes,
            DECAY=self.decay is not None, STAGES=self.cut("gradients").stages, **self.of_chunk("gradients") | whole,
        )  # fmt: skip
        return *made, *by_token


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, write: Tensor | None, erase: Tensor,
        state: Tensor | None, documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.made = [None if t is None else t.dtype for t in (q, k, v, decay, write, erase, state)]
        ctx.set_materialize_grads(False)
        call = Call(q, k, v, decay, write, erase, documents)
        keep = any(ctx.needs_input_grad) and (KEEP or call.by_channel)
        inverses = call.scratch(call.chunk, call.chunk) if keep else None
        chunks = call.prepared(False, inverses)
        firsts, units = call.firsts(chunks, None if state is None else state.detach().float().contiguous())
        out = like(call.v)
        last = call.nothing.new_empty(call.b, call.h, call.d, call.dv)
        call.walk("outputs", chunks, firsts, out=out, last=last)
        kept = (chunks.mix, chunks.sums) if call.by_channel else ()
        ctx.save_for_backward(q, k, v, decay, write, erase, documents, firsts, units, inverses, *kept)
        return out.to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_last: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, decay, write, erase, documents, firsts, units, inverses, *kept = ctx.saved_tensors
        call = Call(q, k, v, decay, write, erase, documents)
        chunks = call.prepared(True, inverses, *kept)
        of_out = torch.zeros_like(call.v) if of_out is None else readable(of_out.to(v.dtype))
        later = None if of_last is None else of_last.float().contiguous()
        values, states = call.by_token(call.dv), call.scratch(call.d, call.dv)
        call.walk("states", chunks, firsts, values=values, states=states)
        if units is not None:
            added = call.ends()
            call.walk_back(chunks, of_out, None, added)
            later = call.scan(units, added, later, reverse=True)
        of_values, changes = call.by_token(call.dv), call.scratch(call.d, call.dv)
        of_state = call.nothing.new_empty(call.b, call.h, call.d, call.dv) if ctx.needs_input_grad[6] else None
        call.walk_back(chunks, of_out, later, changes, of_values, of_state)
        grads = (*call.gradients(of_out, values, of_values, states, changes, chunks), of_state)
        wanted = zip(grads, ctx.made, ctx.needs_input_grad, strict=False)
        return *(t.to(dtype) if needed and t is not None else None for t, dtype, needed in wanted), None
