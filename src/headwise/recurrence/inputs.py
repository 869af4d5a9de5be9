"""What a recurrence is given, checked and brought into one shape for all of its forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ShapeError

NOTHING = -60.0  # exp of it is 1e-26: a decay below that leaves nothing


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one recurrence, every head with keys of its own, in float32 at least.

    decay: log factors, (b, h, n, 1) or (b, h, n, d). write, erase: (b, h, n). levels: (b, h, n, levels). documents: (b, n), the
    number of documents that began at or before each token. state: (b, h, d, dv), with levels (b, h, levels - 1, d, dv).
    count: (b,) tokens read before, which only levels need. real: (b, n), with levels: False at tokens that are not there.
    """

    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n dv"]
    decay: Tensor | None = None
    write: Float[Tensor, "b h n"] | None = None
    erase: Float[Tensor, "b h n"] | None = None
    levels: Float[Tensor, "b h n levels"] | None = None
    documents: Int[Tensor, "b n"] | None = None
    state: Tensor | None = None
    count: Tensor | None = None
    real: Bool[Tensor, "b n"] | None = None

    @property
    def values(self) -> Float[Tensor, "b h n dv"]:
        """What is written: values times the strength of writing."""
        return self.v if self.write is None else self.write[..., None] * self.v

    @property
    def first(self) -> Tensor:
        """The state before the first token; zeros if none is given."""
        if self.state is not None:
            return self.state
        b, h, _, d = self.k.shape
        levels = () if self.levels is None else (self.levels.shape[-1] - 1,)
        return self.k.new_zeros(b, h, *levels, d, self.v.shape[-1])

    @property
    def places(self) -> Int[Tensor, "b n"]:
        """How many tokens of its document come before each token."""
        b, n = self.k.shape[0], self.k.shape[2]
        at = torch.arange(n, device=self.k.device).expand(b, n)
        if self.real is not None:
            at = (self.real.long().cumsum(1) - 1).clamp(min=0)
        before = torch.zeros(b, 1, dtype=torch.long, device=at.device) if self.count is None else self.count[:, None]
        if self.documents is None:
            return at + before
        starts = torch.diff(self.documents, dim=1, prepend=torch.zeros_like(self.documents[:, :1])) > 0
        last = torch.where(starts, at, -1).cummax(1).values
        return torch.where(last < 0, at + before, at - last)

    def part(self, first: int, end: int, state: Tensor | None, count: Tensor | None = None) -> Inputs:
        """Some of the tokens, from another state."""
        names = ("q", "k", "v", "decay", "write", "erase", "levels")
        cut = {name: None if getattr(self, name) is None else getattr(self, name)[:, :, first:end] for name in names}
        documents = self.documents
        if documents is not None:
            documents = documents[:, first:end] - (documents[:, first - 1 : first] if first else 0)
        return replace(self, **cut, documents=documents, state=state, count=count)

    def padded(self, multiple: int) -> Inputs:
        """With empty tokens at the end, which read, write and forget nothing, up to a multiple of so many."""
        rest = -self.k.shape[2] % multiple
        if not rest:
            return self

        def longer(t: Tensor | None) -> Tensor | None:
            return None if t is None else torch.cat([t, t.new_zeros(*t.shape[:2], rest, *t.shape[3:])], 2)

        documents = self.documents
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, rest)], 1)
        names = ("q", "k", "v", "decay", "write", "erase", "levels")
        return replace(self, documents=documents, **{name: longer(getattr(self, name)) for name in names})


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    write: Tensor | None,
    erase: Tensor | None,
    levels: Tensor | None,
    starts: Bool[Tensor, "b n"] | None,
    state: Tensor | None,
    count: Tensor | None,
    real: Bool[Tensor, "b n"] | None = None,
) -> Inputs:
    """The tensors in one shape; nothing is cast.

    Raises: ShapeError if they do not fit together.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(f"q, k and v are (batch, heads, tokens, size); got {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    b, h, n, d = q.shape
    if k.shape[0] != b or k.shape[2:] != (n, d) or v.shape[:3] != k.shape[:3] or h % k.shape[1]:
        raise ShapeError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    group = h // k.shape[1]

    def own(name: str, t: Tensor | None, *sizes: tuple[int, ...]) -> Tensor | None:
        if t is None:
            return None
        if t.shape[0] != b or t.shape[1] not in (h, k.shape[1]) or tuple(t.shape[2:]) not in sizes:
            wanted = " or ".join(f"(..., {', '.join(map(str, size))})" for size in sizes)
            raise ShapeError(f"{name} is {tuple(t.shape)}; for q {tuple(q.shape)} it is (batch, heads, ...) with {wanted}")
        return t if t.shape[1] == h else t.repeat_interleave(group, 1)

    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    decay = own("decay", decay, (n,), (n, d))
    decay = decay[..., None] if decay is not None and decay.dim() == 3 else decay
    levels = levels if levels is None else own("levels", levels, (n, levels.shape[-1]))
    shape = (b, h, d, v.shape[-1]) if levels is None else (b, h, levels.shape[-1] - 1, d, v.shape[-1])
    if state is not None and state.shape != shape:
        raise ShapeError(f"state is {tuple(state.shape)}, the recurrence's is {shape}")
    for name, mask in (("starts", starts), ("real", real)):
        if mask is not None and mask.shape != (b, n):
            raise ShapeError(f"{name} is {tuple(mask.shape)}, the tokens are (batch, tokens) = {(b, n)}")
    if levels is not None and state is not None and count is None:
        raise ShapeError("a state of levels needs `count`, the tokens that were read before")
    documents = None if starts is None else starts.long().cumsum(1)
    write, erase = own("write", write, (n,)), own("erase", erase, (n,))
    if real is None:
        return Inputs(q, k, v, decay, write, erase, levels, documents, state, count)
    real = real.bool()
    there = real[:, None, :, None]
    k, v = k.where(there, 0.0), v.where(there, 0.0)  # what is not there writes, forgets and erases nothing
    decay = None if decay is None else decay.where(there, 0.0)
    erase = None if erase is None else erase.where(there[..., 0], 0.0)
    return Inputs(q, k, v, decay, write, erase, levels, documents, state, count, None if levels is None else real)


def wide(given: Inputs) -> Inputs:
    """In float32 at least, as the forms compute."""
    names = ("q", "k", "v", "decay", "write", "erase", "levels", "state")
    tensors = {name: getattr(given, name) for name in names}
    present = [t.dtype for t in tensors.values() if t is not None]
    dtype = torch.float32
    for each in present:
        dtype = torch.promote_types(dtype, each)
    cast = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    if cast["decay"] is not None:  # or a running sum would lose what comes after a very fast one
        cast["decay"] = cast["decay"].clamp(min=NOTHING)
    return replace(given, **cast)
