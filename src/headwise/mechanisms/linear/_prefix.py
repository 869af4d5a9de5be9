"""Softmax over positions, channel by channel: over those up to each token, as a decay and a key of a state, or over all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._states import Pass, StateCache

NEVER = -1e30  # the logit of what is not there: finite, so that differences of two are
LEAST = -60.0  # exp of it is 1e-26: nothing is left


class LogCache(StateCache):
    """A state, and the log of the sum of all exponentials up to now, (b, h, 1, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.z: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), self.z)


class Shares(NamedTuple):
    """exp(k_t - z_t), each token's share in its own prefix (b, h, n, d), and z_(t-1) - z_t, by which those before it shrink.

    The decay is (b, h, n) for a single channel, None where all positions are read.
    """

    weight: Float[Tensor, "b h n d"]
    decay: Tensor | None


def prefix_softmax(logits: Float[Tensor, "b h n d"], now: Pass) -> Shares:
    """Softmax over the positions up to each token of a causal pass, else over all of them; within documents.

    A state that decays so and takes in weight_t v_t is the mean of values by softmax, for each channel. The cache of the pass
    must be a `LogCache`; its z goes on.
    """
    if now.causal:
        cache = now.cache
        assert isinstance(cache, LogCache)
        shares, z = running_softmax(logits, now.real, now.starts, cache.z)
        cache.z = z[:, :, -1:].clone()
        return shares
    logits = _masked(logits, now.real)
    z = logits.logsumexp(2, keepdim=True) if now.ids is None else _of_documents(logits, now.ids)
    return Shares((logits - z).exp(), None)


def running_softmax(
    logits: Float[Tensor, "b h n d"], real: Bool[Tensor, "b n"] | None, starts: Bool[Tensor, "b n"] | None, before: Tensor | None
) -> tuple[Shares, Float[Tensor, "b h n d"]]:
    """The same, causal, of tensors: and z itself. before: z of the last token before these, (b, h, 1, d)."""
    logits = _masked(logits, real)
    rows = torch.cat([torch.full_like(logits[:, :, :1], NEVER) if before is None else before, logits], 2)
    if starts is None:
        z = rows.logcumsumexp(2)
    else:
        parts = starts.long().cumsum(1)
        z = _running(rows, torch.cat([torch.zeros_like(parts[:, :1]), parts], 1))
    past, z = z[:, :, :-1], z[:, :, 1:]
    decay = (past - z).clamp(LEAST, 0.0).masked_fill(past < NEVER / 2, 0.0)  # there is nothing yet that could decay
    return Shares((logits - z).exp(), decay[..., 0] if decay.shape[-1] == 1 else decay), z


def _masked(logits: Tensor, real: Bool[Tensor, "b n"] | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if real is None else logits.where(real[:, None, :, None], NEVER)


def _running(rows: Float[Tensor, "b h n d"], parts: Int[Tensor, "b n"]) -> Tensor:
    """Logs of running sums of exponentials, anew in each part: sums of 1, 2, 4, ... rows."""
    step, z = 1, rows
    while step < rows.shape[2]:
        same: Bool[Tensor, "b n"] = parts[:, step:] == parts[:, :-step]
        more = torch.logaddexp(z[:, :, step:], z[:, :, :-step].where(same[:, None, :, None], NEVER))
        z, step = torch.cat([z[:, :, :step], more], 2), 2 * step
    return z


def _of_documents(logits: Float[Tensor, "b h n d"], ids: Int[Tensor, "b n"]) -> Tensor:
    """The log of the sum over each token's document."""
    n = ids.shape[1]
    ends = torch.cat([ids.diff(dim=1) != 0, torch.ones_like(ids[:, :1], dtype=torch.bool)], 1)
    at = torch.arange(n, device=ids.device)
    last = torch.where(ends, at, n).flip(1).cummin(1).values.flip(1)
    return _running(logits, ids).gather(2, last[:, None, :, None].expand_as(logits))
