"""The quadratic form: the matrix by which outputs are mixtures of values, as softmax attention's weights are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from .inputs import Inputs
from .parts import decayed, level_of, level_weights


def implied(given: Inputs) -> Float[Tensor, "b h n n"]:
    """The weights that every value has in every output, from an empty state."""
    shown = _shown(given)
    total = None if given.decay is None else given.decay.cumsum(2)
    weights = decayed(given.q, given.k, total, shown)
    if given.erase is not None:
        lower = given.erase[..., None] * decayed(given.k, given.k, total, shown).tril(-1)
        weights = torch.linalg.solve_triangular(lower, weights, upper=False, left=False, unitriangular=True)
    if given.levels is not None:
        places = given.places[:, None]
        weights = weights * level_weights(given.levels, places, places)
    return weights if given.write is None else weights * given.write[:, :, None]


def parallel(given: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state.

    Raises: ShapeError if levels start from a state; their other forms can.
    """
    if given.levels is not None:
        if given.state is not None:
            raise ShapeError("the parallel form of levels starts from no state; use form='recurrent' or 'chunk'")
        return implied(given) @ given.v, _last_buckets(given)
    shown = _shown(given)
    total = None if given.decay is None else given.decay.cumsum(2)
    values, first = given.values, given.first
    reads, writes = given.q, given.k
    if total is not None:
        reads, writes = reads * total.exp(), writes * total.exp()
    if given.documents is not None:
        ours = (given.documents == 0)[:, None, :, None]
        reads, writes = reads * ours, writes * ours
    if given.erase is not None:
        right = values - given.erase[..., None] * (writes @ first)
        values = _solved(given.erase, decayed(given.k, given.k, total, shown), right)
    out = decayed(given.q, given.k, total, shown) @ values + reads @ first
    return out, _kept(given, total).mT @ values + _carried(given, total) * first


def _shown(given: Inputs) -> Tensor:
    n = given.k.shape[2]
    shown = torch.ones(n, n, dtype=torch.bool, device=given.k.device).tril()
    if given.documents is not None:
        shown = shown & (given.documents[:, None, :, None] == given.documents[:, None, None, :])
    return shown


def _solved(erase: Tensor, overlap: Tensor, right: Tensor) -> Tensor:
    """x with x_i + erase_i sum_(j < i) overlap_ij x_j = right_i: what is written, less what was read of earlier writes."""
    return torch.linalg.solve_triangular(erase[..., None] * overlap.tril(-1), right, upper=False, unitriangular=True)


def _kept(given: Inputs, total: Tensor | None) -> Tensor:
    """Keys as they count in the last state."""
    keys = given.k if total is None else given.k * (total[:, :, -1:] - total).exp()
    return keys if given.documents is None else keys * (given.documents == given.documents[:, -1:])[:, None, :, None]


def _carried(given: Inputs, total: Tensor | None) -> Tensor:
    """What is left of the first state in the last, (b, h, d or 1, 1)."""
    left = given.k.new_ones(1, 1, 1, 1) if total is None else total[:, :, -1:].mT.exp()
    return left if given.documents is None else left * (given.documents[:, -1] == 0)[:, None, None, None]


def _last_buckets(given: Inputs) -> Tensor:
    """Each bucket's state after the last token: the recurrence is linear in what is written, so each is that of its tokens."""
    assert given.levels is not None
    places, levels = given.places, given.levels.shape[-1]
    total = None if given.decay is None else given.decay.cumsum(2)
    keys = _kept(given, total)
    overlap = None if given.erase is None else decayed(given.k, given.k, total, _shown(given))
    end = places[:, -1:] + (1 if given.real is None else given.real.any(1, keepdim=True).long())
    level = level_of(end, places, levels)
    buckets = []
    for at in range(1, levels):
        values = given.values * (level == at)[:, None, :, None]
        if given.erase is not None and overlap is not None:
            values = _solved(given.erase, overlap, values)
        buckets.append(keys.mT @ values)
    return torch.stack(buckets, 2)
