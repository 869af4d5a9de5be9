"""Measures of token-mixing matrices and of activation maps: the rank of far parts, and how well foreground stands out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import InputError, ShapeError


def block_ranks(matrix: Float[Tensor, "... n n"], chunk: int, tolerance: float = 1e-10) -> Int[Tensor, "... blocks blocks"]:
    """The rank of each block of chunk x chunk numbers, those on the diagonal too.

    tolerance: singular values below this part of a block's largest one count as zero. Computed in float64; matrices in float32 are
    only exact to about 1e-6.

    Raises: ShapeError if n is no multiple of the chunk.
    """
    n = matrix.shape[-1]
    if matrix.shape[-2] != n or chunk < 1 or n % chunk:
        raise ShapeError(f"a matrix of {tuple(matrix.shape)} is not made of blocks of {chunk} x {chunk}")
    blocks = matrix.double().unflatten(-1, (-1, chunk)).unflatten(-3, (-1, chunk)).transpose(-3, -2)
    ranks: Tensor = torch.linalg.matrix_rank(blocks, atol=0.0, rtol=tolerance)
    return ranks


def off_diagonal_rank(matrix: Float[Tensor, "... n n"], chunk: int, tolerance: float = 1e-10) -> Tensor:
    """(...): the highest rank of a block beside the diagonal: how much one piece of a text can tell another.

    Bounded by the size of a state, or by the features of linear attention; by the chunk for softmax attention. The whole matrix
    tells them apart no more than that: a causal one with no zero on its diagonal has full rank, whatever it is made of.
    """
    ranks = block_ranks(matrix, chunk, tolerance)
    own = torch.eye(ranks.shape[-1], dtype=torch.bool, device=ranks.device)
    return ranks.masked_fill(own, 0).amax((-2, -1))


def foreground_auc(activation_map: Float[Tensor, "... rows columns"], mask: Bool[Tensor, "... rows columns"]) -> Tensor:
    """(...): the area under the ROC curve of a map, scaled to 0 ... 1, as a score of which pixels are foreground.

    It is how often a pixel of the foreground has more than one of the background, ties counting half: 1 for the mask itself, about
    0.5 for noise, the same for every rising function of the map. In float64.

    Raises: ShapeError if the two do not fit together. InputError for a mask without foreground or without background.
    """
    if activation_map.shape != mask.shape or mask.dim() < 2:
        raise ShapeError(f"a map of {tuple(activation_map.shape)} and a mask of {tuple(mask.shape)}; both are (..., rows, columns)")
    found, front = activation_map.double().flatten(-2), mask.bool().flatten(-2)
    fronts = front.sum(-1)
    if bool(((fronts == 0) | (fronts == front.shape[-1])).any()):
        raise InputError("a mask has no foreground, or no background: there is nothing to tell apart")
    low, high = found.amin(-1, keepdim=True), found.amax(-1, keepdim=True)
    scaled = (found - low) / torch.where(high > low, high - low, 1.0)
    ordered = scaled.sort(-1).values
    below, to = (torch.searchsorted(ordered, scaled, right=right) for right in (False, True))
    ranks = (below + to + 1).double() / 2  # of equal pixels, their mean rank
    above = (ranks * front).sum(-1) - fronts * (fronts + 1) / 2
    return above / (fronts * (front.shape[-1] - fronts))
