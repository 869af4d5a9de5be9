"""Softmax attention by way of a few vectors: they read the tokens, and the tokens read them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...attention import attend
from ...attention.stage import Stage


def read_through(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m dv"],
    between: Float[Tensor, "b h a d"],
    first: Stage | None = None,
    second: Stage | None = None,
    *,
    real: Bool[Tensor, "b m"] | None = None,
    scales: tuple[float | None, float | None] = (None, None),
) -> Float[Tensor, "b h n dv"]:
    """softmax(q a^T) softmax(a k^T) v, with a the vectors between.

    first, second: biases of the two reads, of k and then of a. real: False at padding. scales: of both, default d ** -0.5.
    """
    m, number = k.shape[2], between.shape[2]
    at, own = torch.arange(m, device=q.device), torch.arange(number, device=q.device)
    keys = at if real is None else torch.where(real, at, -1)
    stages = [[] if stage is None else [stage] for stage in (first, second)]
    gathered = attend(between, k, v, *stages[0], scale=scales[0], query_positions=own, key_positions=keys)
    queries = torch.arange(q.shape[2], device=q.device)
    return attend(q, between, gathered, *stages[1], scale=scales[1], query_positions=queries, key_positions=own)
