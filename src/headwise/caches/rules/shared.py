"""Heads read the keys and values of an earlier layer, and keep none of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ...card import Card
from ..rule import Codec
from ..sharing import Sharing

CARD = Card(
    paper="KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.18517 and the authors' code: a layer reads what an earlier one does, the newest token included, by its own "
        "queries. Own keys and values are still computed, as in the code, and dropped. Sharing by key/value head, and with what "
        "the other layer has evicted or encoded, is our own; heads share in a forward pass without a cache as well"
    ),
)


@dataclass(frozen=True, eq=False)
class Shared(Sharing):
    """Reads, at every token, what the same key/value heads of layer `layer` read; if those share too, what they are given."""

    @property
    def segments(self) -> tuple[Codec, ...]:
        return ()


FIRST_LAYER = 6  # of those that the conformance checks give the rule to


def example(heads: int) -> Shared:
    """What the layer before has."""
    return Shared(FIRST_LAYER - 1)
