"""Attention in pieces of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from ...attention import attend
from ...attention.backends import chunked
from ...attention.read import Operands, Read, check_stages
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Self-attention Does Not Need O(n^2) Memory",
    year=2021,
    room="softmax",
    source=(
        "arXiv:2112.05682, sec. 3-4: chunks of queries and of keys, merged by their maxima and sums, chunks computed again in the "
        "backward pass. The paper's code counts keys twice when chunks do not divide them; here the last chunk is shorter"
    ),
)


class MemoryEfficient(Mechanism):
    """Exact softmax attention that holds query_chunk x key_chunk scores at a time, forward and backward.

    The planner does the same of itself where no fused kernel can run a read; here the chunks are yours.
    """

    def __init__(self, query_chunk: int = 1024, key_chunk: int = 4096) -> None:
        super().__init__()
        if query_chunk < 1 or key_chunk < 1:
            raise ShapeError(f"chunks of {query_chunk} queries and {key_chunk} keys hold nothing; both must be at least 1")
        self.query_chunk, self.key_chunk = query_chunk, key_chunk

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`.

        Raises: ShapeError for stages that need whole rows of scores.
        """
        x = Operands.of(q, k, v, **places)
        read = Read.of(stages, q.shape[-1] ** -0.5)
        check_stages(read, q.shape[1])
        if not chunked.splits(read):
            raise ShapeError("rows can only be read in pieces by a softmax whose scores know nothing of each other; use attend")
        return chunked.run(read, x, self.query_chunk, self.key_chunk)


def oracle(mechanism: MemoryEfficient, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), key by key with a running maximum and sums."""
    h, n, d = q.shape
    group = h // k.shape[0]
    out = []
    for head in range(h):
        for i in range(n):
            top, total, read = torch.tensor(-torch.inf, dtype=q.dtype), torch.zeros((), dtype=q.dtype), torch.zeros_like(v[0, 0])
            for j in visible[i].nonzero().flatten().tolist():
                s = q[head, i] @ k[head // group, j] / d**0.5
                higher = torch.maximum(top, s.detach())
                total = total * torch.exp(top - higher) + torch.exp(s - higher)
                read = read * torch.exp(top - higher) + torch.exp(s - higher) * v[head // group, j]
                top = higher
            out.append(read / total)
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[MemoryEfficient]:
    """Settings that the conformance checks run."""
    return [MemoryEfficient(17, 9), MemoryEfficient()]


def sized(heads: int, size: int, tokens: int, **options: Any) -> MemoryEfficient:
    """The paper's chunks."""
    return MemoryEfficient(**options)


def neutral(heads: int, size: int) -> list[MemoryEfficient]:
    """Settings that are plain attention: all."""
    return [MemoryEfficient(3, 4)]


def identities() -> Iterator[tuple[str, float]]:
    """What the algorithm promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 23, 8, generator=generator, dtype=torch.float64)
    for chunks in ((1, 1), (4, 7), (23, 5), (6, 23), (100, 100)):
        difference = MemoryEfficient(*chunks)(q, k, v, Causal()) - attend(q, k, v, Causal())
        yield f"chunks of {chunks[0]} queries and {chunks[1]} keys change nothing", largest(difference)
    large = MemoryEfficient(4, 7)(1e4 * q, k, v)
    yield "scores of tens of thousands do not overflow", largest(large - attend(1e4 * q, k, v))
