"""Biases that are products of few features of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.stage import Bias, Block, Columns, Places
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="FlashBias: Fast Computation of Attention with Bias",
    year=2025,
    room="softmax",
    source="arXiv:2505.12044, sec. 3: softmax(q k^T / sqrt(d) + phi_q phi_k^T) = attention of [q | phi_q] and [k | phi_k]",
)


@dataclass(frozen=True, eq=False)
class LowRankBias(Bias):
    """Adds query . key of a few features: s_ij + query_i . key_j, which folds into columns of q and k and so costs r / d more.

    query: (b or 1, heads or 1, positions, r), from position `first` on. key: (b or 1, heads or 1, positions, r). In half
    precision give features of that dtype: wider ones would be rounded, and are then added as a bias instead.
    """

    query: Tensor
    key: Tensor
    first: int = 0

    def __post_init__(self) -> None:
        if self.query.dim() != 4 or self.key.dim() != 4 or self.query.shape[-1] != self.key.shape[-1]:
            shapes = f"{tuple(self.query.shape)} and {tuple(self.key.shape)}"
            raise ShapeError(f"features are {shapes}; they must be (batch or 1, heads or 1, tokens, rank) of the same rank")

    def select(self, heads: Sequence[int]) -> LowRankBias:
        """The same stage for a choice of its heads."""
        query, key = (part if part.shape[1] == 1 else part[:, list(heads)] for part in (self.query, self.key))
        return LowRankBias(query, key, self.first)

    def check_heads(self, heads: int) -> None:
        """Raises: ShapeError if features have another number of heads (one serves all)."""
        for name, part in (("query", self.query), ("key", self.key)):
            if part.shape[1] not in (1, heads):
                raise ShapeError(f"LowRankBias.{name} has {part.shape[1]} heads for {heads}; give one for each, or one")

    def bias(self, places: Places) -> Tensor:
        query, key = self.query.to(places.dtype), self.key.to(places.dtype)
        i, j = (places.i - self.first).clamp(min=0), places.j.clamp(min=0)
        if places.row.dim():
            return _at(query, i.flatten(1)) @ _at(key, j.flatten(1)).transpose(-1, -2)
        batch, head = places.batch, places.head
        own = batch * int(len(query) > 1), head * int(query.shape[1] > 1), i
        theirs = batch * int(len(key) > 1), head * int(key.shape[1] > 1), j
        total = query[(*own, 0)] * key[(*theirs, 0)]
        for r in range(1, query.shape[-1]):  # feature by feature: a compiled score holds no vectors
            total = total + query[(*own, r)] * key[(*theirs, r)]
        return total

    def columns(self, block: Block, causal: bool) -> Columns:
        own = _at(self.query, (block.query_position - self.first).clamp(min=0))
        return Columns(own, _at(self.key, block.key_position.clamp(min=0)), computed=False)


def _at(features: Tensor, positions: Tensor) -> Tensor:
    """Features (b or 1, h, positions, r) at some positions (b or 1, c): (b or 1, h, c, r)."""
    if len(positions) == 1:
        return features[:, :, positions[0]]
    index = positions[:, None, :, None].expand(-1, features.shape[1], -1, features.shape[-1])
    return features.expand(len(positions), -1, -1, -1).gather(2, index)


def oracle(stage: LowRankBias, score: float, head: int, i: int, j: int) -> float:
    """The score of a query at i for a key at j, after the stage."""
    own = stage.query[0, head if stage.query.shape[1] > 1 else 0]
    theirs = stage.key[0, head if stage.key.shape[1] > 1 else 0]
    return score + sum(a * b for a, b in zip(own[i].tolist(), theirs[j].tolist(), strict=True))


def examples(heads: int, size: int) -> list[LowRankBias]:
    """Settings that the conformance checks run."""
    return [LowRankBias(*_features(heads, 3)), LowRankBias(*_features(1, 1))]


def _features(heads: int, rank: int, n: int = 64, **options: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    query, key = torch.randn(2, 1, heads, n, rank, generator=generator, dtype=torch.float64, **options)
    return query, key


def neutral(heads: int, size: int) -> list[LowRankBias]:
    """Settings that change nothing."""
    return [LowRankBias(torch.zeros(1, heads, 64, 2), torch.ones(1, 1, 64, 2))]
