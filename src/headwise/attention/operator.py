"""The one operator: declare a read, get it executed exactly, and be able to ask how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..types import Statistics
from .planner import Explanation, plan
from .read import Operands, Read, block_of, check_stages, scores, weigh
from .stage import Stage
from .statistic import Distance, Entropy, KeyMass, LogSumExp, MaxWeight, Statistic, gather

NAMED: dict[str, Statistic] = {
    "log_sum_exp": LogSumExp(),
    "max_weight": MaxWeight(),
    "entropy": Entropy(),
    "distance": Distance(),
    "key_mass": KeyMass(),
}


def _prepare(
    q: Tensor, k: Tensor, v: Tensor | None, stages: Sequence[Stage], scale: float | None,
    query_positions: Tensor | None, key_positions: Tensor | None,
) -> tuple[Read, Operands]:  # fmt: skip
    x = Operands.of(q, k, v, query_positions, key_positions)
    read = Read.of(tuple(stages), q.shape[-1] ** -0.5 if scale is None else float(scale))
    check_stages(read, q.shape[1])
    return read, x


def attend(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b hk m d"],
    v: Float[Tensor, "b hk m dv"],
    *stages: Stage,
    scale: float | None = None,
    query_positions: Int[Tensor, "... n"] | None = None,
    key_positions: Int[Tensor, "... m"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "b hq n dv"]:
    """Reads values by query-key similarity: softmax(scale * q k^T) v, changed by the given stages.

    Grouped heads when hk < hq (query head i reads key head i // (hq / hk)). Queries are the last n of the m keys'
    positions unless positions are given; a negative key position marks an empty slot that nobody reads. Nothing is
    causal unless a `Causal()` stage says so. A row that sees no key returns zeros.

    Args:
        stages: masks, biases, score edits, a normalizer, weight edits, output edits; see `headwise.attention.stage`.
        scale: factor on q k^T; default d ** -0.5.
        backend: "sdpa", "chunked" or "reference"; default: the planner's choice, see `explain`.

    Raises: ShapeError if shapes do not fit; BackendError if the named backend cannot run the read.
    """
    read, x = _prepare(q, k, v, stages, scale, query_positions, key_positions)
    return plan(read, x, backend).run(x)


def explain(
    q: Tensor, k: Tensor, v: Tensor, *stages: Stage, scale: float | None = None,
    query_positions: Tensor | None = None, key_positions: Tensor | None = None, backend: str | None = None,
) -> Explanation:  # fmt: skip
    """How `attend` with the same arguments would run: backend, folds, why not a faster one, expected cost."""
    read, x = _prepare(q, k, v, stages, scale, query_positions, key_positions)
    return plan(read, x, backend).explanation


def statistics(
    q: Float[Tensor, "b hq n d"],
    k: Float[Tensor, "b hk m d"],
    *stages: Stage,
    want: Sequence[str] | Mapping[str, Statistic],
    scale: float | None = None,
    query_positions: Int[Tensor, "... n"] | None = None,
    key_positions: Int[Tensor, "... m"] | None = None,
) -> Statistics:
    """Statistics of the weights that `attend` would use, without ever holding them whole.

    Args:
        want: names from log_sum_exp, max_weight, entropy, distance, key_mass, or {name: Statistic}.

    Raises: ShapeError if shapes do not fit or a name is unknown.
    """
    chosen = want if isinstance(want, Mapping) else {name: NAMED[name] for name in want}
    read, x = _prepare(q, k, None, stages, scale, query_positions, key_positions)
    return Statistics(zip(chosen, gather(read, x, list(chosen.values())), strict=True))


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
        block = block_of(x, start, stop, None)
        return weigh(read, scores(read, block), block)[0]
