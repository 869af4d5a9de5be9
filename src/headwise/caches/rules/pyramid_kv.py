"""Keeps what the last queries of a prompt look at, more of it in the first layers and less in the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...card import Card
from ...errors import PlanError
from ..rule import Seen
from .snap_kv import SnapKv

CARD = Card(
    paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    year=2024,
    room="cache",
    source=(
        "arXiv:2406.02069, sec. 4, and the authors' code: SnapKV's votes; budgets behind the window fall along a line from the "
        "first layer to the last, which gets 1/beta of the mean; prompts shorter than twice the mean get the mean in every "
        "layer; no layer gets more than there is, what it cannot use goes to the last layers. Defaults 32, 7 and max are those "
        "of SnapKV's experiments (the code's class: 64, 5, mean). The code rounds the step between layers down, with which all "
        "layers together keep more than their budget; here each layer is rounded by itself, the last layers as the first ones "
        "mirrored, so that the total is exact. The mean over the query heads of a key/value head is our own"
    ),
)


@dataclass(frozen=True, eq=False)
class PyramidKv(SnapKv):
    """After a prompt, keeps its window and the tokens it looks at, in numbers that fall from the first layer to the last.

    budget: mean over the model's layers, see `Evict`; it is met by the layers together, if the rule is given to all of them.
    window, kernel, pooling: as of `SnapKv`. beta: what the last layer keeps beside the window is 1/beta of the mean.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise PlanError(f"PyramidKv has a beta of {self.beta}; give 1 (the same budget in all layers) or more")

    def counts(self, seen: Seen, scores: Tensor) -> Tensor:
        """(b, kv)."""
        tokens, there = self.tokens(seen), seen.there.sum(-1)
        mean = (tokens - self.window).clamp(min=0)
        first = torch.minimum(2 * mean - mean // self.beta, (there - self.window).clamp(min=0))
        fall, steps = 2 * (first - mean), max(seen.layers - 1, 1)
        layer = min(seen.layer, steps - seen.layer)  # counted from the nearer end
        down = (2 * layer * fall + steps) // (2 * steps)  # rounded
        own = first - down if seen.layer <= steps - seen.layer else first - fall + down
        if seen.layers == 1:
            own = mean
        slopes = (there >= tokens) & (there >= 2 * mean)
        return torch.where(slopes, tokens - mean + own, tokens)


def example(heads: int) -> PyramidKv:
    """Other budgets for other heads."""
    return PyramidKv(torch.tensor([40, 56, 72, 90]).repeat_interleave(2).repeat(heads // 8), window=16, kernel=5, beta=4)


def whole(heads: int) -> PyramidKv:
    """Room for everything."""
    return PyramidKv(1.0)
