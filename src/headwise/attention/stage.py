"""The kinds of stage that a read is made of, and what a stage sees.

A read goes through its stages in this order:
    scores = scale * q k^T -> Score and Bias stages, as given -> Mask stages -> Normalizer -> Weights stages -> @ v -> Output stages
A stage is a frozen dataclass; fields named in `per_head` are tensors with one entry for each query head in dimension 0.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ShapeError


@dataclass(frozen=True)
class Places:
    """Where scores stand. Each is an index tensor, and together they broadcast to (b, h, c, m); or all are single numbers.

    batch, head: which row of the batch, which query head. row, column: of the score matrix. i, j: the positions of the
    query and of the key in the sequence; a negative j marks an empty slot. dtype: what scores are computed in.
    A stage that is written with these alone runs on every backend, also where it is compiled into a kernel.
    """

    batch: Tensor
    head: Tensor
    row: Tensor
    column: Tensor
    i: Tensor
    j: Tensor
    dtype: torch.dtype

    def distance(self) -> Tensor:
        """Query position minus key position."""
        return self.i - self.j

    def of_head(self, value: Tensor) -> Tensor:
        """A per-head tensor (heads or 1, ...) at each place's head."""
        value = value.to(self.head.device)
        return value[0] if len(value) == 1 else value[self.head]

    def of_table(self, table: Tensor) -> Tensor:
        """A table (b or 1, h or 1, n, m) at each place."""
        if self.row.dim():
            return table[:, :, self.row.flatten()][..., self.column.flatten()]
        b, h = table.shape[:2]
        return table[self.batch * int(b > 1), self.head * int(h > 1), self.row, self.column]


@dataclass(frozen=True)
class Block:
    """A rectangle of the score matrix: `c` of the queries against `m` of the keys.

    query: (b, h, c, d). key: (b, h, m, d), grouped heads already repeated. query_index (c,) and key_index (m,): rows and
    columns of the whole matrix. query_position (b or 1, c) and key_position (b or 1, m): places in the sequence; a
    negative key position marks an empty slot. visible: what the mask shows, broadcasting to (b, h, c, m), once it was asked.
    """

    query: Tensor
    key: Tensor
    query_index: Tensor
    key_index: Tensor
    query_position: Tensor
    key_position: Tensor
    visible: Tensor | None = None

    @staticmethod
    def of_places(
        query_index: Tensor, key_index: Tensor, query_position: Tensor, key_position: Tensor, batch: int = 1, heads: int = 1
    ) -> Block:
        """A rectangle of which only the places matter: enough to ask a mask, or a statistic of weights."""
        nothing = torch.empty(batch, heads, 0, 0, device=query_position.device)
        return Block(nothing, nothing, query_index, key_index, query_position, key_position)

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in: the queries' dtype, but at least float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @cached_property
    def places(self) -> Places:
        """Where its scores stand."""
        device = self.query_position.device
        b, h = self.query.shape[:2]
        return Places(
            torch.arange(b, device=device)[:, None, None, None],
            torch.arange(h, device=device)[:, None, None],
            self.query_index.to(device)[:, None],
            self.key_index.to(device),
            self.query_position[:, None, :, None],
            self.key_position[:, None, None, :],
            self.dtype,
        )

    def distance(self) -> Tensor:
        """(b or 1, 1, c, m): query position minus key position."""
        return self.places.distance()


@dataclass(frozen=True)
class Columns:
    """A bias that is a product of few columns: bias_ij = query_i . key_j, up to a constant in each row.

    query: (b or 1, h or 1, n, r). key: (b or 1, h or 1, m, r). computed: whether the columns were computed from positions or
    settings, and so may be rounded; data that the user gives are what they are, as q and k are.
    """

    query: Tensor
    key: Tensor
    computed: bool = True


class Stage(ABC):  # noqa: B024 - what a stage must do is up to its kind
    """One step of a read."""

    per_head: ClassVar[tuple[str, ...]] = ()

    def given(self) -> torch.dtype | None:
        """If this is a table of all pairs that is there already, its dtype; None otherwise."""
        return None

    def select(self, heads: Sequence[int]) -> Self:
        """The same stage for a choice of its heads: per-head fields are indexed, all else is kept."""
        if not self.per_head:
            return self
        changes = {}
        for name in self.per_head:
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != 1:
                changes[name] = value[torch.as_tensor(list(heads), device=value.device)]
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def check_heads(self, heads: int) -> None:
        """Raises: ShapeError if a per-head field has another number of entries than `heads` (one entry serves all)."""
        for name in self.per_head:
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] not in (1, heads):
                raise ShapeError(
                    f"{type(self).__name__}.{name} has {value.shape[0]} entries for {heads} heads; give one for each head, or one"
                )


class Score(Stage):
    """Changes scores one by one."""

    @abstractmethod
    def score(self, scores: Tensor, places: Places) -> Tensor:
        """Scores at some places -> the same shape."""

    def softcap(self) -> float | None:
        """If this is cap * tanh(score / cap), that cap; None otherwise."""
        return None

    def factor(self) -> Tensor | None:
        """If this multiplies a head's scores by a number, those numbers (heads,) or (1,); None otherwise."""
        return None


class Bias(Stage):
    """Adds to scores; a kind of its own because fused kernels take it as an additive mask."""

    @abstractmethod
    def bias(self, places: Places) -> Tensor:
        """What is added at some places; broadcasts to (b, h, c, m)."""

    def columns(self, block: Block, causal: bool) -> Columns | None:
        """The same bias as a product of few columns, where it is one. causal: later keys are hidden anyway."""
        return None

    def distance_slopes(self) -> Tensor | None:
        """If this is -slope |i - j|, the slopes (heads,) or (1,); None otherwise."""
        return None

    def relative_table(self) -> Tensor | None:
        """If this is table[head, clamp(i - j, -R, R) + R], that table (heads or 1, 2 R + 1); None otherwise."""
        return None


class RowScore(Stage):
    """Changes scores knowing the whole row, its keys, and `past_rows` rows before it.

    adjacent: whether it needs neighbouring keys next to each other.
    """

    adjacent: ClassVar[bool] = False

    @property
    def past_rows(self) -> int:
        """How many rows before its own a row's scores depend on."""
        return 0

    @abstractmethod
    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        """(b, h, c, m) scores before masking -> the same shape. What the mask will show is `block.visible`."""


class Normalizer(Stage):
    """Turns masked scores into weights. At most one in a read; softmax without one."""

    @abstractmethod
    def normalize(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(b, h, c, m) scores, -inf where masked -> weights of the same shape, and their log-normalizer (b, h, c)."""

    def extra_logit(self) -> Tensor | None:
        """(h,) or (1,): if this is softmax with one more logit in its denominator, that logit; None otherwise."""
        return None

    def entmax_alpha(self) -> float | None:
        """If this is entmax, its alpha (2: sparsemax); None otherwise."""
        return None


class Weights(Stage):
    """Changes weights after normalisation. past_rows, adjacent: as of a RowScore."""

    adjacent: ClassVar[bool] = False

    @property
    def past_rows(self) -> int:
        """How many rows before its own a row's weights depend on."""
        return 0

    @abstractmethod
    def edit(self, weights: Tensor, block: Block) -> Tensor:
        """(b, h, c, m) -> the same shape. What the mask shows is `block.visible`."""

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
