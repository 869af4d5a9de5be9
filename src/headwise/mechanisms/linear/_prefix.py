"""Softmax over positions, channel by channel: over those up to each token, as a decay and a key of a state, or over all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._states import Pass, Reading
from ._carried import LEAST, running, scan

FASTEST = -60.0  # exp of it is 1e-26: nothing is left


class Prefix(NamedTuple):
    """exp(k_t - z_t), each token's share in its own prefix (b, h, n, c), z_(t-1) - z_t, by which those before it shrink, and z.

    The decay is (b, h, n) for a single channel, None where all positions are read.
    """

    key: Float[Tensor, "b h n c"]
    decay: Tensor | None
    z: Float[Tensor, "b h n c"]


def prefix_softmax(k: Float[Tensor, "b h n c"], now: Pass) -> Prefix:
    """Softmax over the positions up to each token of a causal pass, else over all of them; within documents, exact at any size.

    z is the log of the sum of exp(k) so far, and goes on in the cache. A state that decays so and takes in key_t v_t is the mean
    of values by softmax, for each channel.
    """
    k = _masked(k, now.real)
    z = running("log sum", k, now)
    return _shares(k, z) if now.causal else Prefix((k - z).exp(), None, z)


def running_softmax(
    k: Float[Tensor, "b h n c"], real: Bool[Tensor, "b n"] | None, starts: Bool[Tensor, "b n"] | None, before: Tensor | None
) -> Prefix:
    """The same, causal, of tensors. before: z of the last token before these, (b, h, 1, c)."""
    k = _masked(k, real)
    return _shares(k, scan(torch.cat([torch.full_like(k[:, :, :1], LEAST) if before is None else before, k], 2), starts, False))


def exp_reading(q: Float[Tensor, "b h n c"], k: Float[Tensor, "b h n c"], v: Tensor, now: Pass) -> Reading:
    """Of attention whose weights are sums over c of exp(q_c + k_c), divided by their sum: no normaliser is needed.

    Each channel reads by a softmax over tokens, and channels count as softmax(q + z).
    """
    key, decay, z = prefix_softmax(k, now)
    return Reading((q.to(z.dtype) + z).softmax(-1), key, v, decay)


def _masked(k: Tensor, real: Bool[Tensor, "b n"] | None) -> Tensor:
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    return k if real is None else k.where(real[:, None, :, None], LEAST)


def _shares(k: Tensor, z: Float[Tensor, "b h n1 c"]) -> Prefix:
    """z: before the first token, and at each."""
    past, z = z[:, :, :-1], z[:, :, 1:]
    decay = (past - z).clamp(FASTEST, 0.0).masked_fill(past < LEAST / 2, 0.0)  # there is nothing yet that could decay
    return Prefix((k - z).exp(), decay[..., 0] if decay.shape[-1] == 1 else decay, z)
