"""The kinds of stage that a read is made of, and what a stage sees.

A read goes through its stages in this order:
    scores = scale * q k^T -> Score and Bias stages, as given -> Mask stages -> Normalizer -> Weights stages -> @ v -> Output stages
A stage is a frozen dataclass; fields named in `per_head` are tensors with one entry for each query head in dimension 0.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ShapeError

FAR = 1 << 60
Interval = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A rectangle of the score matrix: `c` of the queries against `m` of the keys.

    query: (b, h, c, d). key: (b, h, m, d), grouped heads already repeated. query_index (c,) and key_index (m,): rows and
    columns of the whole matrix. query_position (b or 1, c) and key_position (b or 1, m): places in the sequence; a
    negative key position marks an empty slot.
    """

    query: Tensor
    key: Tensor
    query_index: Tensor
    key_index: Tensor
    query_position: Tensor
    key_position: Tensor

    @staticmethod
    def of_places(query_index: Tensor, key_index: Tensor, query_position: Tensor, key_position: Tensor) -> Block:
        """A rectangle of which only the places matter: enough to ask a mask, or a statistic of weights."""
        nothing = torch.empty(0, device=query_position.device)
        return Block(nothing, nothing, query_index, key_index, query_position, key_position)

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: the queries' dtype, but at least float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    def distance(self) -> Tensor:
        """(b or 1, 1, c, m): query position minus key position."""
        return (self.query_position[:, :, None] - self.key_position[:, None, :])[:, None]


@dataclass(frozen=True, eq=False)
class Pattern:
    """A mask in the form that kernels know: places, and documents.

    A query reads a key if it is not later (causal), and less than `window` places away or one of the first `sink` (no
    window: everywhere), and of the same document: ids (positions,) or (b, positions).
    """

    causal: bool = False
    window: int | None = None
    sink: int = 0
    documents: Tensor | None = None

    def both(self, other: Pattern) -> Pattern | None:
        """What both show; None where that has no such form."""
        if self.documents is not None and other.documents is not None:
            return None
        narrow, wide = sorted((self, other), key=lambda p: FAR if p.window is None else p.window)
        if wide.window is not None and narrow.window != wide.window and narrow.sink != wide.sink:
            return None
        window = narrow.window
        sink = narrow.sink if wide.window is None or narrow.sink == wide.sink else min(narrow.sink, wide.sink)
        documents = self.documents if other.documents is None else other.documents
        return Pattern(self.causal or other.causal, window, sink, documents)

    def either(self, other: Pattern) -> Pattern | None:
        """What one of them shows; None where that has no such form."""
        if self.causal or other.causal or self.documents is not None or other.documents is not None:
            return None
        if self.window is None or other.window is None:
            return Pattern()
        return Pattern(window=max(self.window, other.window), sink=max(self.sink, other.sink))


def documents_at(ids: Tensor, places: Tensor) -> Tensor:
    """(b or 1, c): the documents at some positions (b or 1, c); those of empty slots mean nothing."""
    ids = torch.atleast_2d(ids).to(places.device)
    rows = max(len(ids), len(places))
    return ids.expand(rows, -1).gather(1, places.clamp(min=0).expand(rows, -1))


class Stage(ABC):  # noqa: B024 - what a stage must do is up to its kind
    """One step of a read."""

    per_head: ClassVar[tuple[str, ...]] = ()

    def select(self, heads: Sequence[int]) -> Self:
        """The same stage for a choice of its heads: per-head fields are indexed, all else is kept."""
        if not self.per_head:
            return self
        changes = {}
        for name in self.per_head:
            value = getattr(self, name)
            if value is not None and value.dim() > 0 and value.shape[0] != 1:
                changes[name] = value[torch.as_tensor(list(heads), device=value.device)]
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def check_heads(self, heads: int) -> None:
        """Raises: ShapeError if a per-head field has another number of entries than `heads` (one entry serves all)."""
        for name in self.per_head:
            value = getattr(self, name)
            if value is not None and value.dim() > 0 and value.shape[0] not in (1, heads):
                raise ShapeError(
                    f"{type(self).__name__}.{name} has {value.shape[0]} entries for {heads} heads; give one for each head, or one"
                )


class Score(Stage):
    """Changes scores elementwise."""

    @abstractmethod
    def score(self, scores: Tensor, block: Block) -> Tensor:
        """(b, h, c, m) -> the same shape."""

    def softcap(self) -> float | None:
        """If this is cap * tanh(score / cap), that cap; None otherwise."""
        return None


class Bias(Stage):
    """Adds to scores; a kind of its own because fused kernels take it as an additive mask."""

    @abstractmethod
    def bias(self, block: Block) -> Tensor:
        """A tensor that broadcasts to (b, h, c, m)."""


class Mask(Stage):
    """Says which keys a query may read. Masks combine with & (both), | (either) and ~ (not)."""

    @abstractmethod
    def visible(self, block: Block) -> Tensor:
        """Booleans that broadcast to (b, h, c, m)."""

    def reach(self, low: int, high: int) -> list[Interval]:
        """Key positions that queries at positions low..high-1 could read: sorted, disjoint [start, stop); may hold more."""
        return [(0, FAR)]

    def pattern(self) -> Pattern | None:
        """The same mask in the form that kernels know; None if it has none."""
        return None

    def __and__(self, other: Mask) -> Mask:
        return And((self, other))

    def __or__(self, other: Mask) -> Mask:
        return Or((self, other))

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True)
class And(Mask):
    """Visible where all parts are."""

    parts: tuple[Mask, ...]

    def visible(self, block: Block) -> Tensor:
        return reduce(torch.logical_and, (part.visible(block) for part in self.parts))

    def reach(self, low: int, high: int) -> list[Interval]:
        return reduce(_intersect, (part.reach(low, high) for part in self.parts))

    def pattern(self) -> Pattern | None:
        return _patterns(self.parts, Pattern.both)

    def select(self, heads: Sequence[int]) -> And:
        return And(tuple(part.select(heads) for part in self.parts))

    def __str__(self) -> str:
        return " & ".join(_inside(part) for part in self.parts)


@dataclass(frozen=True)
class Or(Mask):
    """Visible where any part is."""

    parts: tuple[Mask, ...]

    def visible(self, block: Block) -> Tensor:
        return reduce(torch.logical_or, (part.visible(block) for part in self.parts))

    def reach(self, low: int, high: int) -> list[Interval]:
        return _merge([interval for part in self.parts for interval in part.reach(low, high)])

    def pattern(self) -> Pattern | None:
        return _patterns(self.parts, Pattern.either)

    def select(self, heads: Sequence[int]) -> Or:
        return Or(tuple(part.select(heads) for part in self.parts))

    def __str__(self) -> str:
        return " | ".join(_inside(part) for part in self.parts)


@dataclass(frozen=True)
class Not(Mask):
    """Visible where its part is not. Empty key slots stay invisible: they are no keys at all."""

    part: Mask

    def visible(self, block: Block) -> Tensor:
        return ~self.part.visible(block)

    def select(self, heads: Sequence[int]) -> Not:
        return Not(self.part.select(heads))

    def __str__(self) -> str:
        return f"~{_inside(self.part)}"


def _patterns(parts: Sequence[Mask], join: Callable[[Pattern, Pattern], Pattern | None]) -> Pattern | None:
    joined = parts[0].pattern()
    for part in parts[1:]:
        other = part.pattern()
        joined = None if joined is None or other is None else join(joined, other)
    return joined


def _inside(mask: Mask) -> str:
    return f"({mask})" if isinstance(mask, And | Or) else str(mask)


class Normalizer(Stage):
    """Turns masked scores into weights. At most one in a read; softmax without one."""

    @abstractmethod
    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(b, h, c, m) scores, -inf where masked -> weights of the same shape, and their log-normalizer (b, h, c)."""

    def extra_logit(self) -> Tensor | None:
        """(h,) or (1,): if this is softmax with one more logit in its denominator, that logit; None otherwise."""
        return None


class Weights(Stage):
    """Changes weights after normalisation."""

    @abstractmethod
    def edit(self, weights: Tensor, block: Block) -> Tensor:
        """(b, h, c, m) -> the same shape."""

    def fold(self) -> Output | None:
        """The same edit as an output stage, where one exists: then fused kernels can run the read."""
        return None


class Output(Stage):
    """Changes what a head returns."""

    @abstractmethod
    def output(self, out: Tensor, own_value: Tensor | None) -> Tensor:
        """(b, h, n, d) -> the same shape. own_value: (b, h, n, d), each query's own value, where queries are the last keys."""


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-normalizer; a row with every key masked gives zeros and -inf, never NaN."""
    log_normalizer = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - log_normalizer.masked_fill(log_normalizer.isinf(), 0.0)[..., None])
    return weights, log_normalizer


def _intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    return [(max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) < min(b, d)]


def _merge(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        elif start < stop:
            merged.append((start, stop))
    return merged
