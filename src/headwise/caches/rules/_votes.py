"""Votes of the last queries of a prompt for the tokens before them, pooled along the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PlanError
from ..rule import Seen

POOLINGS = ("max", "mean")


def check(name: str, window: int, kernel: int, pooling: str) -> None:
    """Raises: PlanError for settings with which there is nothing to count or to pool."""
    if window < 1:
        raise PlanError(f"{name} has a window of {window} queries; give 1 or more, for they are the ones that vote")
    if kernel < 1 or kernel % 2 == 0:
        raise PlanError(f"{name} has a pooling kernel of {kernel}; give an odd number, 1 for no pooling")
    if pooling not in POOLINGS:
        raise PlanError(f"{name} has the pooling {pooling!r}; give one of {', '.join(POOLINGS)}")


def votes(seen: Seen, window: int, kernel: int, pooling: str, *, together: bool = False) -> Tensor:
    """(b, kv, m): weight that tokens before the window get from the last `window` queries, pooled; 0 in the window.

    What lies beyond the ends counts as 0 in the pooling, so that the mean at the first token has only half a kernel's weight,
    as the papers' code has it. Neighbours are those held: evicted tokens leave no gap.

    Args:
        together: take the mean over the query heads of a key/value head before pooling, not after it.
    """
    given = seen.by_group(seen.weights(window).sum(2)).masked_fill((seen.age < window)[:, :, None], 0.0)
    if together:
        given = given.mean(2, keepdim=True)
    pool = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return pool(given.flatten(0, 1), kernel, 1, kernel // 2).unflatten(0, given.shape[:2]).mean(2)


def newest(seen: Seen, window: int, tokens: Tensor) -> Tensor:
    """(b, kv, m): the window's tokens; only its last ones where the budget `tokens` (b, kv) is smaller than the window."""
    return seen.age < tokens.clamp(max=window)[..., None]


def ranked(scores: Tensor, among: Tensor) -> Tensor:
    """(b, kv, m): the scores of those `among` which one may choose, in descending order, then -inf."""
    return scores.masked_fill(~among, -torch.inf).sort(-1, descending=True).values
