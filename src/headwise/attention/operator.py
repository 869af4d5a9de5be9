"""The one operator: declare a read, get it executed exactly, and be able to ask how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ShapeError
from ..types import Statistics
from .planner import Explanation, plan
from .read import Operands, Read, check_stages, rows_of
from .reduction import reduced
from .stage import Stage
from .statistic import NAMED, Statistic
from .sweeps import choose, sweep


def _prepare(
    q: Tensor, k: Tensor, v: Tensor | None, stages: Sequence[Stage], scale: float | None,
    query_positions: Tensor | None, key_positions: Tensor | None,
) -> tuple[Read, Operands]:  # fmt: skip
    x = Operands.of(q, k, v, query_positions, key_positions)
    read = Read.of(tuple(stages), q.shape[-1] ** -0.5 if scale is None else float(scale))
    check_stages(read, q.shape[1])
    return read, x


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *stages: Stage,
    statistics: None = None,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *stages: Stage,
    statistics: Sequence[str] | Mapping[str, Statistic],
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Statistics]: ...
def attend(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m dv"],
    *stages: Stage,
    statistics: Sequence[str] | Mapping[str, Statistic] | None = None,
    scale: float | None = None,
    query_positions: Int[Tensor, "... n"] | None = None,
    key_positions: Int[Tensor, "... m"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b hq n dv"] | tuple[Float[Tensor, "b hq n dv"], Statistics]:
    """Reads values by query-key similarity: softmax(scale * q k^T) v, changed by the given stages.

    Grouped heads when hk < hq (query head i reads key head i // (hq / hk)). Queries are the last n of the m keys'
    positions unless positions are given; a negative key position marks an empty slot that nobody reads. Nothing is
    causal unless a `Causal()` stage says so. A row that sees no key returns zeros.

    Args:
        stages: masks, biases, score edits, a normalizer, weight edits, output edits; see `headwise.attention.stage`.
        statistics: names such as entropy, or {name: Statistic}; then the result is (output, statistics), from one sweep
            where there is one that does both.
        scale: factor on q k^T; default d ** -0.5.
        backend: "sdpa", "kernel", "flex", "chunked" or "reference"; with statistics "kernel", "blocked", "folded", "chunked"
            or "reference". Default: the planner's choice, see `explain`.

    Raises: ShapeError if shapes do not fit; BackendError if the named backend cannot run the read.
    """
    read, x = _prepare(q, k, v, stages, scale, query_positions, key_positions)
    if statistics is None:
        return plan(read, x, backend).run()
    chosen = _named(statistics)
    out, found = sweep(read, x, list(chosen.values()), output=True, backend=backend)
    assert out is not None
    return out, Statistics(zip(chosen, found, strict=True))


def _named(want: Sequence[str] | Mapping[str, Statistic]) -> Mapping[str, Statistic]:
    if isinstance(want, Mapping):
        return want
    unknown = [name for name in want if name not in NAMED]
    if unknown:
        raise ShapeError(f"there is no statistic {unknown[0]!r}; there are: {', '.join(NAMED)}, or give {{name: Statistic}}")
    return {name: NAMED[name] for name in want}


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *stages: Stage,
    statistics: Sequence[str] | Mapping[str, Statistic] | None = None,
    scale: float | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """How `attend` with the same arguments would run: backend, folds, why not a faster one, expected cost."""
    read, x = _prepare(q, k, v, stages, scale, query_positions, key_positions)
    if statistics is None:
        return plan(read, x, backend).explanation
    chosen = _named(statistics)
    sweeps, refused = choose(read, x, list(chosen.values()), backend)
    base = plan(read, x, "reference" if backend == "reference" else None).explanation
    return replace(base, statistics=dict(zip(chosen, sweeps, strict=True)), refused={**base.refused, **refused})


def statistics(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b hk m d"],
    *stages: Stage,
    want: Sequence[str] | Mapping[str, Statistic],
    scale: float | None = None,
    query_positions: Int[Tensor, "... n"] | None = None,
    key_positions: Int[Tensor, "... m"] | None = None,
    mean: bool = False,
    counted: Tensor | None = None,
    backend: str | None = None,
) -> Statistics:
    """Statistics of the weights that `attend` would use, without ever holding them whole and without reading values.

    Args:
        want: names from log_sum_exp, max_weight, entropy, distance, distance_square, weight_square, key_mass; or
            {name: Statistic} for those with arguments (`headwise.attention.statistic`).
        mean: reduce on the fly: rows to their mean over batch and queries, (h, ...) in float64; columns to their sum over
            the batch, (h, m). Rows of wide statistics (many spans) are never all held.
        counted: (b or 1, n), which queries the mean is over; a log-sum-exp is averaged over rows that see a key.
        backend: "kernel", "blocked", "folded", "chunked" or "reference"; default: the planner's choice.

    Raises: ShapeError if shapes do not fit or a name is unknown; BackendError if the named backend cannot run the read.
    """
    chosen = _named(want)
    read, x = _prepare(q, k, None, stages, scale, query_positions, key_positions)
    if mean:
        found = reduced(read, x, list(chosen.values()), counted, backend)
    else:
        found = sweep(read, x, list(chosen.values()), backend=backend)[1]
    return Statistics(zip(chosen, found, strict=True))


def attention_weights(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b hk m d"],
    *stages: Stage,
    rows: slice = slice(None),
    scale: float | None = None,
    query_positions: Int[Tensor, "... n"] | None = None,
    key_positions: Int[Tensor, "... m"] | None = None,
) -> Float[Tensor, "b hq c m"]:
    """The weights themselves, of some rows: for looking at, in at least float32. Holds (b, hq, c, m)."""
    read, x = _prepare(q, k, None, stages, scale, query_positions, key_positions)
    start, stop, step = rows.indices(q.shape[2])
    if step != 1:
        raise ValueError("rows must be a slice of step 1")
    with torch.no_grad():
        return rows_of(read, x, start, stop, whole=True).weights
