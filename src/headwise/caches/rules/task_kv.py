"""Heads that say something else than most keep everything, the others the tokens that they gather from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...card import Card
from ...errors import PlanError
from ..rule import Budget, Evict, Seen

CARD = Card(
    paper="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    year=2025,
    room="cache",
    source=(
        "arXiv:2501.15113, sec. III-V; there is no code. A head's semantic vector: the values of its `top` tokens by the mean "
        "weights of the last `window` queries, weighted by those and not renormalised; the centre is the mean over the heads of a "
        "layer. Heads farthest from it, and the nearest, keep everything; their number falls linearly with the layer. Not said, "
        "and so chosen here: distances are Euclidean; the number is rounded half up; the nearest head counts in it, and is chosen "
        "if there are two or more; grouped heads are decided together, by the mean of their weights; pooling averages over tokens "
        "that there are and serves only the choice of tokens in the middle; a budget too small for the heads that keep everything "
        "leaves the others their sinks and recent tokens; the choice is made at the first prompt and stays. Values depend on the "
        "basis that a model happens to have them in; distances behind the output projection would not, and are not offered"
    ),
)


@dataclass(frozen=True, eq=False)
class TaskKv(Evict):
    """After a prompt, keeps all tokens of some heads, chosen row by row; of the others sinks, recent tokens and some between.

    budget: see `Evict`; a mean over the layer's heads, of which heads that keep everything take more. sinks, recent: tokens
    that all heads keep. window: queries whose weights count. top: tokens that make a semantic vector. kernel: odd width of
    the pooling, 1 for none. share: of heads that keep everything in the first layer; fewest: their number in the last.
    """

    budget: Budget
    sinks: int = 16
    recent: int = 256
    window: int = 32
    top: int = 256
    kernel: int = 7
    share: float = 0.3
    fewest: int = 1

    def check_heads(self, heads: int) -> None:
        super().check_heads(heads)
        if not 0 <= self.share <= 1 or self.fewest < 0:
            raise PlanError(f"share={self.share} must be from 0 to 1 and fewest={self.fewest} 0 or more")

    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m); inf everywhere for heads that keep everything."""
        weights = seen.by_group(seen.weights(self.window).mean(2)).mean(2)
        pooled, there = (F.avg_pool1d(x, self.kernel, 1, self.kernel // 2) for x in (weights, seen.there.to(weights.dtype)))
        middle = pooled / there.clamp(min=0.5 / self.kernel)
        kept = (seen.position < self.sinks) | (seen.age < self.recent) | self.whole(seen, weights)[..., None]
        return middle.masked_fill(kept, torch.inf)

    def counts(self, seen: Seen, scores: Tensor) -> Tensor:
        held = seen.there.sum(-1)
        whole = scores.isinf().all(-1)
        left = self.tokens(seen).sum(-1) - (held * whole).sum(-1)
        each = left.div((~whole).sum(-1).clamp(min=1), rounding_mode="floor").clamp(min=self.sinks + self.recent)
        return torch.where(whole, held, each[:, None])

    def whole(self, seen: Seen, weights: Tensor) -> Tensor:
        """(b, kv): which heads keep everything; weights: (b, kv, m)."""
        distance = distances(weights, seen.v, self.top)
        heads = distance.shape[1]
        number = self.number(heads, seen.layer, seen.layers)
        rank = distance.sort(stable=True, descending=True, dim=1).indices.argsort(1)
        chosen = (rank < number - 1) | (rank == heads - 1) if number > 1 else rank < number
        complete = seen.there.sum(-1) == seen.real[:, None]
        return torch.where(complete.all(1, keepdim=True), chosen, complete)

    def number(self, heads: int, layer: int, layers: int) -> int:
        """How many heads of a layer keep everything."""
        first, last = heads * self.share, min(self.fewest, heads)
        return math.floor(first - (first - last) / max(layers - 1, 1) * layer + 0.5)


def distances(weights: Tensor, v: Tensor, top: int) -> Tensor:
    """(b, kv): how far each head's semantic vector is from their mean. weights: (b, kv, m). v: (b, kv, m, d)."""
    best, tokens = weights.topk(min(top, weights.shape[-1]), -1)
    values = v.gather(2, tokens[..., None].expand(*tokens.shape, v.shape[-1])).to(weights.dtype)
    vectors = (best[:, :, None] @ values)[:, :, 0]
    return (vectors - vectors.mean(1, keepdim=True)).norm(dim=-1)


def example(heads: int) -> TaskKv:
    """A third of the heads whole, at a budget that leaves the others some tokens between."""
    return TaskKv(0.5, sinks=2, recent=16, window=16, top=64, kernel=5, share=0.4)


def whole(heads: int) -> TaskKv:
    """All heads keep everything."""
    return TaskKv(64, share=1.0, fewest=heads)
