"""Pieces that the forms share: products of queries and keys with the decay between them, and buckets of tokens by their age."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 16  # tokens between which factors of each channel are made pair by pair
SLOW = 40.0  # decay within a stretch of tokens up to which exp of it and of its inverse are well inside float32


def decayed(
    q: Float[Tensor, "... n d"], k: Float[Tensor, "... n d"], total: Tensor | None, seen: Bool[Tensor, "... n n"]
) -> Float[Tensor, "... n n"]:
    """q_i exp(total_i - total_j) k_j where it is seen, else 0. total: running sums of the decay, (..., n, 1) or (..., n, d).

    Only differences up to zero enter exp, so nothing overflows however fast the decay. What is seen must be j <= i.
    """
    if total is None:
        return (q @ k.mT).masked_fill(~seen, 0.0)
    if total.shape[-1] == 1:
        gap = (total - total.mT).masked_fill(~seen, 0.0)
        return (q @ k.mT).masked_fill(~seen, 0.0) * gap.exp()
    return _by_channel(q, k, total).masked_fill(~seen, 0.0)


def _by_channel(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The same with a decay for each channel, for j <= i; what stands above the diagonal is finite and means nothing.

    Where the decay is slow enough it is taken apart around its middle, else halves meet at the token before the second one.
    """
    n = q.shape[-2]
    most, least = total.detach().amax(-2, keepdim=True), total.detach().amin(-2, keepdim=True)
    if q.device.type == "cpu" and float((most - least).max()) < SLOW:
        middle = (most + least) / 2
        return (q * (total - middle).exp()) @ (k * (middle - total).exp()).mT
    if n <= BLOCK:
        shown = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()[..., None]
        gap = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~shown, 0.0)
        return (gap.exp() * q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    half = -(-n // (2 * BLOCK)) * BLOCK
    (q0, q1), (k0, k1), (c0, c1) = (t.split([half, n - half], -2) for t in (q, k, total))
    border = c0[..., -1:, :]  # factors on both sides of it are at most one
    below = (q1 * (c1 - border).exp()) @ (k0 * (border - c0).exp()).mT
    first, second = _by_channel(q0, k0, c0), _by_channel(q1, k1, c1)
    return torch.cat([torch.cat([first, torch.zeros_like(below.mT)], -1), torch.cat([below, second], -1)], -2)


def level_of(i: Int[Tensor, ...], j: Int[Tensor, ...], levels: int) -> Int[Tensor, ...]:
    """The bucket of token j for a query at token i: 0 for itself, else the number of bits of i XOR j; the last holds the rest."""
    apart = i ^ j
    found = torch.zeros_like(apart)
    for bit in range(levels - 1):
        found += (apart >> bit) > 0
    return found


def level_weights(
    levels: Float[Tensor, "... n levels"], i: Int[Tensor, "... n"], j: Int[Tensor, "... m"]
) -> Float[Tensor, "... n m"]:
    """Each query's weight of the bucket that each token is in for it."""
    at = level_of(i[..., :, None], j[..., None, :], levels.shape[-1])
    return levels.gather(-1, at.expand(*levels.shape[:-1], at.shape[-1]))


def merged(buckets: Float[Tensor, "b h levels d dv"], new: Float[Tensor, "b h d dv"], count: Tensor) -> Tensor:
    """Buckets after one more, the `count`-th of (b,): the bits of the count, joined as bits carry; the last never moves."""
    bits = torch.arange(buckets.shape[2], device=buckets.device)
    least = ((count[:, None] >> bits) & 1) | (bits == bits[-1:])
    at = least.long().argmax(1, keepdim=True)
    joined, here = ((bits < at)[:, None, :, None, None], (bits == at)[:, None, :, None, None])
    total = new + buckets.masked_fill(~joined, 0.0).sum(2)
    return torch.where(here, buckets + total[:, :, None], buckets.masked_fill(joined, 0.0))
