"""The selective state space recurrence of Mamba, for many tokens at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SEGMENT = 64  # tokens whose states are held at a time


def selective_scan(
    step: Float[Tensor, "b n e"],
    u: Float[Tensor, "b n e"],
    decay: Float[Tensor, "e s"],
    write: Float[Tensor, "b n s"],
    read: Float[Tensor, "b n s"],
    state: Float[Tensor, "b e s"],
) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b e s"]]:
    """y_t = state_t . read_t and the last state, where state_t = exp(step_t decay) state_{t-1} + step_t u_t write_t.

    Exact for any decay < 0: only factors of at most one are multiplied. A step of zero leaves the state as it is. The states
    of `SEGMENT` tokens are held at a time; for gradients they are computed again.
    """
    outs = []
    train = torch.is_grad_enabled() and u.shape[1] > SEGMENT
    for part in zip(*(t.split(SEGMENT, 1) for t in (step, u, write, read)), strict=True):
        if train:
            y, state = checkpoint(_segment, decay, state, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _segment(decay, state, *part)
        outs.append(y)
    return torch.cat(outs, 1), state


def _segment(decay: Tensor, state: Tensor, step: Tensor, u: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.exp(step[..., None] * decay)  # (b, n, e, s)
    added = (step * u)[..., None] * write[:, :, None, :]
    states: Tensor = _Recurrence.apply(kept, added, state)  # type: ignore[no-untyped-call]
    return (states @ read[..., None])[..., 0], states[:, -1].clone()


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t along dimension 1, from h_0 = first."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, first: Tensor) -> Tensor:
        h = _run(a, x, first)
        ctx.save_for_backward(a, h, first)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same recurrence backwards: g_t = grad_t + a_{t+1} g_{t+1} is the gradient of x_t."""
        a, h, first = ctx.saved_tensors
        n = a.shape[1]
        later = -torch.arange(n, device=a.device) % n  # 0, n - 1, ..., 1: the factors read from the end, the first of no effect
        g = _run(a[:, later], grad.flip(1), torch.zeros_like(first)).flip(1)
        of_a = torch.empty_like(a)
        torch.mul(g[:, 0], first, out=of_a[:, 0])
        torch.mul(g[:, 1:], h[:, :-1], out=of_a[:, 1:])
        return of_a, g, a[:, 0] * g[:, 0]


def _run(a: Tensor, x: Tensor, first: Tensor) -> Tensor:
    """All h_t: sqrt(n) pieces go through their tokens side by side, and then each takes in what the one before it ends with."""
    n = x.shape[1]
    size = math.isqrt(n - 1) + 1
    pieces = -(-n // size)
    rest = pieces * size - n
    if rest:
        a, x = (torch.cat([t, t.new_zeros(len(t), rest, *t.shape[2:])], 1) for t in (a, x))
    a, h = a.unflatten(1, (pieces, size)), x.unflatten(1, (pieces, size)).clone()
    through = a.clone()  # how much is left of what came before the piece
    for t in range(1, size):
        h[:, :, t].addcmul_(a[:, :, t], h[:, :, t - 1])
        through[:, :, t].mul_(through[:, :, t - 1])
    carried = first
    for piece in range(pieces):
        h[:, piece].addcmul_(through[:, piece], carried[:, None])
        carried = h[:, piece, -1]
    return h.flatten(1, 2)[:, :n]
