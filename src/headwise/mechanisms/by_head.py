"""Several mechanisms in one layer, each for some of its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import nn

from ..attention import attend
from ..attention.stage import Stage
from ..errors import ShapeError
from ._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values


class ByHead(Mechanism):
    """Runs each mechanism on heads of its own, the first ones first; None is plain attention.

    Args:
        parts: (mechanism, number of query heads). A key/value head must not be shared by heads of different parts. A stack
            rotates their queries and keys only if none of them tells places apart itself.
    """

    def __init__(self, parts: Sequence[tuple[Mechanism | None, int]]) -> None:
        super().__init__()
        self.counts = [count for _, count in parts]
        self.mechanisms = nn.ModuleDict({str(i): part for i, (part, _) in enumerate(parts) if part is not None})
        present = [part for part, _ in parts if part is not None]
        self.past_queries = max((part.past_queries for part in present), default=0)
        self.positional = any(part.positional for part in present)
        self.cannot = {name: why for part in present for name, why in part.cannot.items()}

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        if sum(self.counts) != q.shape[1]:
            raise ShapeError(f"mechanisms for {self.counts} heads, and queries have {q.shape[1]} heads")
        group, first, outs = q.shape[1] // k.shape[1], 0, []
        for index, count in enumerate(self.counts):
            if first % group or count % group:
                raise ShapeError(f"heads {first} to {first + count} do not have key/value heads of their own: groups of {group}")
            own, kv = slice(first, first + count), slice(first // group, (first + count) // group)
            mine = [stage.select(list(range(first, first + count))) for stage in stages]
            read: Callable[..., Outputs] = dict(self.mechanisms.items()).get(str(index), attend)
            outs.append(read(q[:, own], k[:, kv], v[:, kv], *mine, **places))
            first += count
        return torch.cat(outs, 1)
