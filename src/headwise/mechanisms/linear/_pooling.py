"""Pooling of values by weights exp(k_s + w_ts), channel by channel: logs of sums of weights, and means, put together exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...recurrence import recur
from ._carried import LEAST
from ._prefix import running_softmax

BLOCK = 32  # rows of the quadratic form that are read together


class Pool(NamedTuple):
    """For each token and head: the log of the sum of weights, (b, n, h), `LEAST` if there are none, and the mean (b, n, h, g)."""

    z: Float[Tensor, "b n h"]
    mean: Float[Tensor, "b n h g"]

    def joined(self, other: Pool) -> Pool:
        """The pool of both."""
        z = torch.logaddexp(self.z, other.z)
        own, theirs = (self.z - z).exp()[..., None], (other.z - z).exp()[..., None]
        return Pool(z, own * self.mean + theirs * other.mean)


def running_pool(
    k: Float[Tensor, "b n h"],
    v: Float[Tensor, "b n h g"],
    real: Bool[Tensor, "b n"] | None,
    starts: Bool[Tensor, "b n"] | None = None,
    z: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Pool, Tensor, Tensor]:
    """Weights exp(k) of the tokens up to each. z, state: of those before; the new ones come back."""
    key, decay, total = running_softmax(k.transpose(1, 2)[..., None], real, starts, z)
    given = {"decay": decay, "starts": starts, "state": state, "real": real}
    out, state = recur(torch.ones_like(key), key, v.transpose(1, 2), **given, chunk=16)  # type: ignore[arg-type]
    return Pool(total[..., 0].transpose(1, 2), out.transpose(1, 2)), total[:, :, -1:].clone(), state


def whole_pool(k: Float[Tensor, "b n h"], v: Float[Tensor, "b n h g"], real: Bool[Tensor, "b n"] | None) -> Pool:
    """Weights exp(k) of all tokens, for each of them."""
    if real is not None:
        k, v = k.where(real[..., None], LEAST), v.where(real[..., None, None], 0.0)
    z = k.logsumexp(1, keepdim=True)
    mean = ((k - z).exp()[..., None] * v).sum(1, keepdim=True)
    return Pool(z.expand_as(k), mean.expand_as(v))


def near_pool(
    k: Float[Tensor, "b rows h"],
    v: Float[Tensor, "b rows h g"],
    real: Bool[Tensor, "b rows"],
    w: Float[Tensor, "b n h near"],
) -> Pool:
    """Weights exp(k + w) of `near` tokens each: those of token t are rows t, t + 1, ..."""
    near = w.shape[-1]
    logits = (k.unfold(1, near, 1) + w).where(real.unfold(1, near, 1)[:, :, None], LEAST)
    values = v.where(real[..., None, None], 0.0).unfold(1, near, 1)
    z = logits.logsumexp(-1)
    return Pool(z, ((logits - z[..., None]).exp()[..., None, :] * values).sum(-1))


def biased_pool(
    k: Float[Tensor, "b m h"],
    v: Float[Tensor, "b m h g"],
    real: Bool[Tensor, "b m"],
    u: Float[Tensor, "b n r"],
    keys: Float[Tensor, "b m r"],
    causal: bool,
) -> Pool:
    """Weights exp(k_s + u_t . keys_s) of all tokens, or of those up to each; tokens are the last n of m. Memory is linear."""
    n, m = u.shape[1], k.shape[1]
    k, v = k.where(real[..., None], LEAST), v.where(real[..., None, None], 0.0)
    pools = []
    for first in range(0, n, BLOCK):
        rows = u[:, first : first + BLOCK]
        begin = m - n + first
        if not causal:
            pools.append(_by_product(k, v, real, rows @ keys.mT))
            continue
        end = begin + rows.shape[1]
        own = _by_pairs(k[:, begin:end], v[:, begin:end], rows @ keys[:, begin:end].mT)
        if begin:
            own = own.joined(_by_product(k[:, :begin], v[:, :begin], real[:, :begin], rows @ keys[:, :begin].mT))
        pools.append(own)
    return Pool(torch.cat([p.z for p in pools], 1), torch.cat([p.mean for p in pools], 1))


def _by_pairs(k: Tensor, v: Tensor, w: Float[Tensor, "b c c"]) -> Pool:
    """Each of a few tokens, of those up to it: all pairs by themselves, so that no later key scales an earlier row's."""
    shown = torch.ones(w.shape[1:], dtype=torch.bool, device=w.device).tril()
    logits = (k[:, None] + w[..., None]).where(shown[..., None], LEAST)
    z = logits.logsumexp(2)
    return Pool(z, torch.einsum("bijh,bjhg->bihg", (logits - z[:, :, None]).exp(), v))


def _by_product(k: Tensor, v: Tensor, real: Tensor, w: Float[Tensor, "b c m"]) -> Pool:
    """exp(w) @ exp(k), both with their largest taken out: rows and keys that all see each other."""
    w = w.where(real[:, None], LEAST)
    top, most = k.detach().amax(1, keepdim=True), w.detach().amax(2, keepdim=True)
    weight, share = (w - most).exp(), (k - top).exp() * real[..., None]
    total = weight @ share
    nothing = total == 0
    safe = total.masked_fill(nothing, 1.0)
    mean = (weight @ (share[..., None] * v).flatten(2)).unflatten(-1, v.shape[2:]) / safe[..., None]
    return Pool((safe.log() + top + most).masked_fill(nothing, LEAST), mean)
