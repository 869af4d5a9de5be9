"""Contextual position encoding: positions that count what matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Block, RowScore, Stage
from ...card import Card
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Contextual Position Encoding: Learning to Count What's Important",
    year=2024,
    room="softmax",
    source=(
        "arXiv:2405.18719, sec. 4, and the authors' code: gates sigmoid(q k^T / sqrt(d)), positions are their sums from the key to "
        "the query, both included, clamped; q . e[position] interpolates between two learned vectors, which all heads share. The "
        "code divides that by sqrt(d) with the score unless told not to, the paper's listing does not: `divided`"
    ),
)


@dataclass(frozen=True, eq=False)
class ContextualPositions(RowScore):
    """Adds q_i . e[p_ij], p_ij the sum of gates of the keys from j to i. embedding: (positions, d)."""

    embedding: Tensor
    divided: bool = True

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        assert block.visible is not None
        gates = torch.where(block.visible, torch.sigmoid(scores), 0.0)
        last = self.embedding.shape[0] - 1
        place = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=last)
        at = block.query.to(scores.dtype) @ self.embedding.to(scores).T  # (b, h, c, positions): q_i . e[whole position]
        if self.divided:
            at = at * block.query.shape[-1] ** -0.5
        below = place.detach().floor()
        low, share = below.long(), place - below
        return scores + at.gather(-1, low) * (1 - share) + at.gather(-1, (low + 1).clamp(max=last)) * share


class Cope(Mechanism):
    """Gives each query positions of its own: a key stands as far away as the gates between it and the query sum to.

    Args:
        head_dim: of queries and keys. positions: how many are told apart, 0 included; farther ones share the last.
        divided: whether q . e is divided by sqrt(d), as the authors' code does.
    """

    positional = True

    def __init__(self, head_dim: int, positions: int, *, divided: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(positions, head_dim))
        self.divided = divided

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        counting = ContextualPositions(self.embedding, self.divided)
        return attend(q, k, v, *stages, counting, **places)


def oracle(mechanism: Cope, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a query at a time."""
    h, n, d = q.shape
    group, last = h // k.shape[0], mechanism.embedding.shape[0] - 1
    out = []
    for head in range(h):
        for i in range(n):
            seen = visible[i].nonzero().flatten().tolist()
            counted, scores = torch.zeros((), dtype=q.dtype), {}
            for j in reversed(seen):
                s = q[head, i] @ k[head // group, j] / d**0.5
                counted = counted + 1 / (1 + torch.exp(-s))
                p = counted if counted < last else torch.tensor(float(last), dtype=q.dtype)
                whole = int(p)
                z = q[head, i] @ mechanism.embedding[whole] * (whole + 1 - p)
                if whole < last:
                    z = z + q[head, i] @ mechanism.embedding[whole + 1] * (p - whole)
                scores[j] = s + z / (d**0.5 if mechanism.divided else 1)
            weights = torch.softmax(torch.stack([scores[j] for j in seen]), 0)
            out.append(weights @ v[head // group, seen])
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[Cope]:
    """Settings that the conformance checks run."""
    return [_filled(size, 5), _filled(size, 40, divided=False)]


def _filled(size: int, positions: int, *, divided: bool = True) -> Cope:
    made = Cope(size, positions, divided=divided)
    nn.init.normal_(made.embedding, generator=torch.Generator().manual_seed(positions))
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Cope:
    """With 64 positions."""
    return Cope(size, **{"positions": 64, **options})


def neutral(heads: int, size: int) -> list[Cope]:
    """Settings that are plain attention: at the start of training embeddings are zero."""
    return [Cope(size, 9)]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    cope = _filled(8, 12).double()
    block_out = attend(q * 0, k, v, Causal())
    yield "queries of zero have gates of 1/2 and no preference", largest(cope(q * 0, k, v, Causal()) - block_out)
    # gates of one: all scores far above zero, the same for every key, so that only the positions choose
    same_key = torch.ones_like(k) * 50
    up = q.abs() + 1
    got = cope(up, same_key, v, Causal())
    i, j = torch.arange(9)[:, None], torch.arange(9)
    z = (up @ cope.embedding.T / 8**0.5).gather(-1, (i - j + 1).clamp(0, 11).expand(1, 2, 9, 9))
    weights = z.masked_fill(j > i, -torch.inf).softmax(-1)
    yield "gates of one are relative positions i - j + 1", largest(got - weights @ v)
    shut = cope(up, -same_key, v, Causal())
    yield "gates of zero are one position, which is none", largest(shut - attend(up, -same_key, v, Causal()))
