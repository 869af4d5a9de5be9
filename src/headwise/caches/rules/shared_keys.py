"""Heads read distant tokens by the keys of an earlier layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...card import Card
from ...errors import PlanError
from ..rule import Codec
from ..sharing import NEAR_KEYS, VALUES, Sharing

CARD = Card(
    paper="Compressing KV Cache for Long-Context LLM Inference with Inter-Layer Attention Similarity",
    year=2024,
    room="cache",
    source=(
        "arXiv:2412.02252, from its abstract, reviews and a digest: first and last tokens by a layer's own keys, all others by "
        "those of the first layer of its block, own values, one softmax over both. The gate that leaves distant tokens out where "
        "near ones have most of the weight is `skip`; what it would save is not saved here. `recent` counts the token being read. "
        "Further training, which the paper does, is left to the user"
    ),
    status="rule and probe; no further training",
)


@dataclass(frozen=True, eq=False)
class SharedKeys(Sharing):
    """Own keys for the first `sink` and last `recent` tokens, which alone are kept; keys of layer `layer` for those between.

    skip: near tokens that have more than this share of a query's weight are all that it reads; None or 1 never skips.
    """

    masked: ClassVar[bool] = False
    sink: int = 16
    recent: int = 4080
    skip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink < 0 or self.recent < 1 or not (self.skip is None or 0 <= self.skip <= 1):
            raise PlanError(
                f"sink {self.sink}, recent {self.recent} and skip {self.skip} do not go; give sink from 0, recent from 1 on, and "
                "for skip a share, or None"
            )

    @property
    def segments(self) -> tuple[Codec, ...]:
        return (VALUES, NEAR_KEYS)


FIRST_LAYER = 4  # of those that the conformance checks give the rule to


def example(heads: int) -> SharedKeys:
    """Keys of the layer before, and few near tokens."""
    return SharedKeys(FIRST_LAYER - 1, sink=4, recent=24)
