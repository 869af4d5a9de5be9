"""Mixing a head's weights with the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.stage import Block, Output, Weights
from ..card import Card
from ..errors import ShapeError

CARD = Card(
    paper="Fine-Grained Perturbation Guidance via Attention Head Selection",
    year=2025,
    room="diffusion",
    source="arXiv:2506.10978, SoftPAG: linear interpolation of attention maps toward the identity",
)


@dataclass(frozen=True)
class OwnValueMix(Output):
    """What IdentityMix does, on the output: (1 - strength) * out + strength * the query's own value."""

    strength: float

    def output(self, out: Tensor, own_value: Tensor | None) -> Tensor:
        if own_value is None:
            raise ShapeError("mixing with the identity needs queries that are the last keys; these have no value of their own")
        return (1 - self.strength) * out + self.strength * own_value


@dataclass(frozen=True)
class IdentityMix(Weights):
    """Mixes weights with the identity: (1 - strength) A + strength I. Folds into the output, so it costs nothing."""

    strength: float

    def edit(self, weights: Tensor, block: Block) -> Tensor:
        own = (block.distance() == 0).to(weights.dtype)
        return (1 - self.strength) * weights + self.strength * own

    def fold(self) -> OwnValueMix:
        return OwnValueMix(self.strength)


def oracle(stage: IdentityMix, weights: list[float], i: int) -> list[float]:
    """The weights of one row, of a query at key index i."""
    return [(1 - stage.strength) * w + (stage.strength if j == i else 0.0) for j, w in enumerate(weights)]


def examples(heads: int, size: int) -> list[IdentityMix]:
    """Settings that the conformance checks run."""
    return [IdentityMix(0.4), IdentityMix(1.0)]


def neutral(heads: int, size: int) -> list[IdentityMix]:
    """Settings that change nothing."""
    return [IdentityMix(0.0)]
