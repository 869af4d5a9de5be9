"""Pieces that the forms share: products of queries and keys with the decay between them, and buckets of tokens by their age."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 4  # tokens between which factors of each channel are made pair by pair


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
    """The same with a decay for each channel, for j <= i; 0 above the diagonal.

    Pair by pair in blocks of a few tokens. Two neighbouring blocks meet at the last token of the first one, where both factors
    are at most one, and are one block from then on.
    """
    n, size = q.shape[-2], BLOCK
    while size < n:
        size *= 2
    q, k = (F.pad(t, (0, 0, 0, size - n)) for t in (q, k))
    total = torch.cat([total, total[..., -1:, :].expand(*total.shape[:-2], size - n, -1)], -2)

    def cut(t: Tensor, *sizes: int) -> Tensor:
        return t.unflatten(-2, (-1, *sizes))

    q1, k1, c1 = (cut(t, BLOCK) for t in (q, k, total))
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)[..., None]
    gap = (c1[..., :, None, :] - c1[..., None, :, :]).masked_fill(later, 0.0).exp()
    blocks = torch.einsum("...id,...jd,...ijd->...ij", q1, k1, gap).tril()
    width = BLOCK
    while width < size:
        (_, q1), (k0, _), (c0, c1) = (cut(t, 2, width).unbind(-3) for t in (q, k, total))
        border = c0[..., -1:, :]
        below = (q1 * (c1 - border).exp()) @ (k0 * (border - c0).exp()).mT
        first, second = cut(blocks.flatten(-3, -2), 2, width).unbind(-3)
        blocks = torch.cat([torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)], -2)
        width *= 2
    return blocks[..., 0, :n, :n]


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
