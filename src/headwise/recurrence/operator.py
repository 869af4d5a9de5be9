"""The operator of state mechanisms: what `attend` is for softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import ShapeError
from . import backends
from .inputs import inputs, wide
from .parallel import implied, parallel
from .recurrent import recurrent

FORMS = ("chunk", "parallel", "recurrent")
SIZE = 64


class Read(NamedTuple):
    """What was read, (b, h, n, dv), and the state after the last token, (b, h, d, dv), in float32 at least."""

    out: Tensor
    state: Tensor


def recur(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    v: Float[Tensor, "b hk n dv"],
    *,
    decay: Tensor | None = None,
    write: Float[Tensor, "b h n"] | None = None,
    erase: Float[Tensor, "b h n"] | None = None,
    levels: Float[Tensor, "b h n levels"] | None = None,
    starts: Bool[Tensor, "b n"] | None = None,
    state: Tensor | None = None,
    count: Tensor | None = None,
    real: Bool[Tensor, "b n"] | None = None,
    form: str = "chunk",
    chunk: int = SIZE,
    backend: str = "auto",
    last: bool = True,
) -> Read:
    """Reads a state that every token decays, erases from and writes into:

        S_t = diag(exp(decay_t)) S_(t-1)
        S_t = S_t + k_t (write_t v_t - erase_t S_t^T k_t)^T
        out_t = S_t^T q_t

    No softmax, no scale, no normaliser: those are the mechanism's. Computed in float32 at least.

    Args:
        decay: log factors up to 0, (b, h, n) one a head or (b, h, n, d) one for each channel of keys; None for none.
        write: how strongly a token writes, 1 for None. erase: how much of what its key reads it takes out first: the delta rule,
            with `write` as much; None for none.
        levels: log-linear attention: weights by which each query reads its buckets of tokens of age 1, 1, 2, 4, ...; the last one
            holds all that is older. The state is then (b, h, levels - 1, d, dv).
        starts: True at the first token of each document packed into a row; the state is cleared there.
        state: from earlier tokens, as it came back. count: (b,) how many those were, which levels need.
        real: False at padding, which writes, erases and decays nothing; what is read there means nothing.
        form: "chunk", "parallel" (quadratic) or "recurrent" (a token at a time): the same numbers up to rounding. chunk: tokens
            between which the quadratic form is used.
        backend: "auto", "torch" or "kernel"; see `headwise.recurrence.explain`. last: False if the state is not wanted.

    Raises: ShapeError if tensors do not fit together. BackendError for a backend that can't do this.
    """
    if form not in FORMS:
        raise ShapeError(f"form {form!r} must be one of {', '.join(FORMS)}")
    if chunk < 1:
        raise ShapeError(f"chunk {chunk} must be 1 or more")
    given = inputs(q, k, v, decay, write, erase, levels, starts, state, count, real)
    if form == "chunk" and q.shape[2] > 1:
        out, final = backends.run(given, chunk, backend, last)
    else:
        given = wide(given)
        out, final = parallel(given) if form == "parallel" else recurrent(given)
    return Read(out.to(v.dtype), final)


def weights(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b hk n d"],
    *,
    decay: Tensor | None = None,
    write: Float[Tensor, "b h n"] | None = None,
    erase: Float[Tensor, "b h n"] | None = None,
    levels: Float[Tensor, "b h n levels"] | None = None,
    starts: Bool[Tensor, "b n"] | None = None,
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n n"]:
    """The weights that `recur`, from no state, gives every value in every output: linear heads seen as softmax heads are.

    They may be negative, and rows need not sum to one.
    """
    empty = k[..., :0]
    return implied(wide(inputs(q, k, empty, decay, write, erase, levels, starts, None, None, real))).to(q.dtype)


def starts_of(cu_seqlens: Tensor, device: torch.device | None = None) -> Bool[Tensor, "1 n"]:
    """Where documents begin in one packed row, from their cumulated lengths 0, n1, n1 + n2, ..., as other libraries take them."""
    if cu_seqlens.dim() != 1 or int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ShapeError("cu_seqlens are cumulated lengths: 0, then rising")
    starts = torch.zeros(1, int(cu_seqlens[-1]), dtype=torch.bool, device=device)
    begins = cu_seqlens[:-1][cu_seqlens.diff() > 0]
    starts[0, begins.to(starts.device)] = True
    return starts
