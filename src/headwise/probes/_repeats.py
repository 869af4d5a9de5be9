"""Places in rows of repeated tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.call import Call
from ._material import Batch


def second_copy(batch: Batch, call: Call) -> tuple[Tensor, Tensor]:
    """(b, n) which queries stand in the second copy, and (b, n) the key of the same token in the first (-1 elsewhere)."""
    assert batch.periods is not None
    n = call.q.shape[2]
    place = torch.arange(n, device=call.q.device)[None]
    period = batch.periods.to(call.q.device)[:, None]
    inside = place >= n - period
    return inside, torch.where(inside, place - period, -1)
