"""Spans of a text that attend among themselves, and which of them a query needs.

After "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention Pattern" (2024,
arXiv:2412.04757), of which the full text was not at hand: the score of a span, non-maximum suppression and gaps as spans are
known from accounts of it. Its threshold, and which vectors stand for a span, are not; they are arguments here, and the
defaults are our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError

Span = tuple[int, int]  # [start, stop)


def span_scores(weights: Tensor, threshold: float) -> Tensor:
    """(n, n): entry (x, y) is the sum of weights_ij - threshold over x <= j <= i <= y; -inf where y < x.

    weights: (n, n), row i the weights of query i; of heads together, their sum, with a threshold as many times as large.

    Raises: ShapeError if the weights are not square.
    """
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1]:
        raise ShapeError(f"spans need the weights of n queries on the same n keys, (n, n); got {tuple(weights.shape)}")
    n = len(weights)
    below = (weights - threshold).double().tril()
    total = below.new_zeros(n + 1, n + 1)  # [i, j]: the sum of all rows before i and columns before j
    total[1:, 1:] = below.cumsum(0).cumsum(1)
    ends = total.diagonal()
    scores = ends[None, 1:] - total[:-1, 1:] - total[1:, :-1].T + ends[:-1, None]
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril(-1), -torch.inf)


def find_spans(weights: Tensor, threshold: float, longest: int | None = None, overlap: float = 0.0) -> list[Span]:
    """Spans of a text, sorted: those of best positive score that do not overlap better ones, and what lies between them.

    longest: tokens of a span at most. overlap: how much of two spans' union may be common to both; above 0, spans may share
    tokens.
    """
    scores = span_scores(weights, threshold)
    n = len(scores)
    if longest is not None:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(longest), -torch.inf)
    start, stop = (scores > 0).nonzero(as_tuple=True)
    order = scores[start, stop].sort(stable=True, descending=True).indices
    kept: list[Span] = []
    for first, last in zip(start[order].tolist(), stop[order].tolist(), strict=True):
        if all(_overlap((first, last + 1), other) <= overlap for other in kept):
            kept.append((first, last + 1))
    kept.sort()
    covered = 0
    spans = list(kept)
    for first, end in [*kept, (n, n)]:
        if first > covered:
            spans.append((covered, first))
        covered = max(covered, end)
    return sorted(spans)


def _overlap(a: Span, b: Span) -> float:
    """Tokens in both, as a share of those in either."""
    both = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / (a[1] - a[0] + b[1] - b[0] - both)


def span_vectors(keys: Tensor, spans: Sequence[Span]) -> Tensor:
    """(spans, d): the mean key of each, of keys (n, d)."""
    return torch.stack([keys[start:stop].mean(0) for start, stop in spans])


def retrieve(query: Tensor, vectors: Tensor, spans: Sequence[Span], budget: int) -> list[Span]:
    """The spans that agree best with a query (d,), sorted: best first, each that still fits in `budget` tokens."""
    chosen, left = [], budget
    for place in (vectors @ query).sort(stable=True, descending=True).indices.tolist():
        start, stop = spans[place]
        if stop - start <= left:
            chosen.append((start, stop))
            left -= stop - start
    return sorted(chosen)
