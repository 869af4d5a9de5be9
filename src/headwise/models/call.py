"""One call of a model's attention: what came in, how each group of heads reads, and statistics of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attend, attention_weights
from ..attention import statistics as attend_statistics
from ..attention.stage import Stage
from ..attention.statistic import Statistic
from ..errors import UnsupportedModelError
from ..stages.causal import Causal
from ..stages.sink_logit import SinkLogit
from ..stages.softcap import Softcap
from ..types import Statistics
from .layout import Site
from .masks import DenseBias, DenseMask, Found, recognise

# Arguments by which a model tells its kernel to read chosen keys only.
SELECTING = ("indices", "block_indices", "topk_indices")


@dataclass(frozen=True, eq=False)
class Reading:
    """How some heads of a call read: their tensors, positions and stages, ready for `attend`.

    heads: which query heads. q: (b, len(heads), n, d). k, v: (b, kv, m, d). positions are None where queries are the
    last n of keys 0..m-1.
    """

    heads: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    stages: tuple[Stage, ...]
    scale: float
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None

    def run(self, backend: str | None = None) -> Tensor:
        """(b, len(heads), n, dv)."""
        return attend(
            self.q, self.k, self.v, *self.stages, scale=self.scale, backend=backend,
            query_positions=self.query_positions, key_positions=self.key_positions,
        )  # fmt: skip

    def joined(self) -> Reading:
        """The same as one read of one tensor of keys, as statistics see it."""
        return self

    def simplified(self, known: Found) -> Reading:
        """The same reading with a table of the model's said in stages and positions, where that can be: fast sweeps know those."""
        tables = [stage for stage in self.stages if isinstance(stage, DenseMask)]
        if len(tables) != 1 or tables[0].table.shape[1] != 1:
            return self
        n, m = self.q.shape[2], self.k.shape[2]
        queries = torch.arange(m - n, m, device=self.q.device) if self.query_positions is None else self.query_positions
        keys = torch.arange(m, device=self.q.device) if self.key_positions is None else self.key_positions
        queries, keys = torch.atleast_2d(queries), torch.atleast_2d(keys)
        found = recognise(tables[0].table[:, 0], queries, keys, self.key_positions is None, known)
        if found is None:
            return self
        stages = (*(stage for stage in self.stages if not isinstance(stage, DenseMask)), *found.stages)
        if bool(found.there.all()):
            return replace(self, stages=stages)
        return replace(self, stages=stages, query_positions=queries, key_positions=torch.where(found.there, keys, -1))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one attention module, seen after the fact.

    q: (b, h, n, d), k and v: (b, kv, m, d), with rotary positions applied. readings: how each group of heads read.
    valid: (b, n) which queries are real tokens, or None if all are. known: what is known of this forward pass's masks.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    readings: tuple[Reading, ...]
    valid: Tensor | None
    known: Found = field(default_factory=dict)

    def statistics(self, want: Mapping[str, Statistic], *, mean: bool = False) -> Statistics:
        """Statistics of every head without n x n weights: {name: (b, h, ...)}.

        mean: reduced on the fly over batch and real queries, (h, ...); columns are summed over the batch, (h, m).
        """
        parts = [(reading.heads, self._of(reading, want, mean)) for reading in self.readings]
        if len(parts) == 1:
            return parts[0][1]
        dim = 0 if mean else 1
        order = torch.tensor([head for heads, _ in parts for head in heads], device=self.q.device).argsort()
        return Statistics({name: torch.cat([part[name] for _, part in parts], dim=dim).index_select(dim, order) for name in want})

    def _of(self, reading: Reading, want: Mapping[str, Statistic], mean: bool) -> Statistics:
        reading = reading.joined().simplified(self.known)
        return attend_statistics(
            reading.q, reading.k, *reading.stages, want=want, scale=reading.scale, mean=mean, counted=self.valid if mean else None,
            query_positions=reading.query_positions, key_positions=reading.key_positions,
        )  # fmt: skip

    def weights(self, rows: slice = slice(None)) -> Tensor:
        """(b, h, c, m): the weights of some rows of every head; needs that all heads see the same keys."""
        parts = [
            attention_weights(
                reading.q, reading.k, *reading.stages, rows=rows, scale=reading.scale,
                query_positions=reading.query_positions, key_positions=reading.key_positions,
            )
            for reading in (own.joined() for own in self.readings)
        ]  # fmt: skip
        order = torch.tensor([head for reading in self.readings for head in reading.heads]).argsort()
        return torch.cat(parts, dim=1)[:, order]


def model_stages(
    query: Tensor, total: int, mask: Tensor | None, causal: bool, extras: Mapping[str, Any], name: str
) -> tuple[tuple[Stage, ...], Tensor | None]:
    """What the model itself asks of the read, as stages; and its boolean mask apart, (b or 1, h or 1, n, total) or None.

    Raises: UnsupportedModelError for an argument that changes the read in a way headwise does not know.
    """
    stages: list[Stage] = []
    for argument in SELECTING:
        if extras.get(argument) is not None:
            raise UnsupportedModelError(
                f"{name} chooses keys by {argument}=, which cannot be read head by head yet; use the model without it"
            )
    if extras.get("position_bias") is not None:
        stages.append(DenseBias(extras["position_bias"]))
    if extras.get("softcap") is not None:
        stages.append(Softcap(float(extras["softcap"])))
    sinks = extras.get("s_aux", extras.get("sinks"))
    if sinks is not None:
        stages.append(SinkLogit(sinks.reshape(-1)))
    visible = None
    if mask is not None:
        mask = mask[..., :total]
        if mask.dtype == torch.bool:
            visible = mask
        else:  # additive: its lowest numbers mean "hidden", the rest is a bias
            visible = mask > torch.finfo(mask.dtype).min / 2
            stages.append(DenseBias(mask.masked_fill(~visible, 0.0)))
    elif causal and query.shape[2] > 1:
        stages.append(Causal())
    return tuple(stages), visible
