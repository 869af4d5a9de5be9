"""The recurrence as it is written: a token at a time. Decoding runs it; every other form is measured by it."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs
from .parts import merged


def recurrent(given: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state."""
    values, state, outs = given.values, given.first, []
    if given.levels is not None:
        return _of_levels(given, values, state)
    for t in range(given.k.shape[2]):
        k, value = given.k[:, :, t], values[:, :, t]
        if given.documents is not None:
            state = state.masked_fill(_starts(given, t)[:, None, None, None], 0.0)
        if given.decay is not None:
            state = state * given.decay[:, :, t].exp()[..., None]
        if given.erase is not None:
            value = value - given.erase[:, :, t, None] * _read(state, k)
        state = state + k[..., None] * value[..., None, :]
        outs.append(_read(state, given.q[:, :, t]))
    return torch.stack(outs, 2) if outs else values, state


def _of_levels(given: Inputs, values: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
    """The same with a state for each bucket of tokens: every one decays and is erased, and the new token has one of its own."""
    assert given.levels is not None
    outs, places = [], given.places
    for t in range(given.k.shape[2]):
        q, k, weights = given.q[:, :, t], given.k[:, :, t], given.levels[:, :, t]
        if given.documents is not None:
            buckets = buckets.masked_fill(_starts(given, t)[:, None, None, None, None], 0.0)
        if given.decay is not None:
            buckets = buckets * given.decay[:, :, t].exp()[:, :, None, :, None]
        if given.erase is not None:
            gone = given.erase[:, :, t, None, None] * _read(buckets, k[:, :, None])
            buckets = buckets - k[:, :, None, :, None] * gone[..., None, :]
        new = k[..., None] * values[:, :, t][..., None, :]
        older = (weights[..., 1:, None] * _read(buckets, q[:, :, None])).sum(2)
        outs.append(weights[..., :1] * _read(new, q) + older)
        joined = merged(buckets, new, places[:, t] + 1)
        buckets = joined if given.real is None else joined.where(given.real[:, t, None, None, None, None], buckets)
    return torch.stack(outs, 2) if outs else values, buckets


def _starts(given: Inputs, t: int) -> Tensor:
    assert given.documents is not None
    before = given.documents[:, t - 1] if t else torch.zeros_like(given.documents[:, 0])
    return given.documents[:, t] > before


def _read(state: Tensor, key: Tensor) -> Tensor:
    """state^T key: (..., d, dv) and (..., d) -> (..., dv)."""
    return (key[..., None, :] @ state)[..., 0, :]
