"""Tokens count from the beginning of what is held, not of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...card import Card
from ..rule import Plain

CARD = Card(
    paper="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    room="cache",
    source=(
        "arXiv:2309.17453, sec. 3.2, and the authors' code: keys are turned by their place in the cache. Recent tokens keep their "
        "distances by that, so that all it does is to move the sinks up behind the window, by as many places as tokens were "
        "evicted; here they are turned so when they are read, and keys stay held as they came. The same in prompts, query by query"
    ),
    exempt={
        "bytes": "it frees nothing; the mask beside it does",
        "near": "without a mask nothing is evicted, so that nothing moves",
    },
)


@dataclass(frozen=True, eq=False)
class Renumbered(Plain):
    """For heads with a mask of sinks and a window: positions skip what has been evicted between them.

    Without such a mask nothing is evicted, and nothing changes. For models with rotary positions; in layers without any, tokens
    have no positions to change.
    """

    turns: ClassVar[bool] = True
    alone: ClassVar[bool] = True


def example(heads: int) -> Renumbered:
    """There are no settings."""
    return Renumbered()
