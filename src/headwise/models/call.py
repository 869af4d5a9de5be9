"""One call of a model's attention: what came in, how each group of heads reads, and statistics of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import attend, attention_weights
from ..attention import statistics as attend_statistics
from ..attention.stage import Bias, Block, Mask, Stage
from ..attention.statistic import Statistic
from ..errors import UnsupportedModelError
from ..stages.causal import Causal
from ..stages.sink_logit import SinkLogit
from ..stages.softcap import Softcap
from ..types import Statistics
from .layout import Site

# Arguments by which a model tells its kernel to read chosen keys only.
SELECTING = ("indices", "block_indices", "topk_indices")


@dataclass(frozen=True, eq=False)
class DenseMask(Mask):
    """A mask that the model brings: booleans (b or 1, h or 1, n, m)."""

    table: Tensor

    def visible(self, block: Block) -> Tensor:
        return self.table[:, :, block.query_index][..., block.key_index]

    def select(self, heads: Any) -> DenseMask:
        return self if self.table.shape[1] == 1 else DenseMask(self.table[:, list(heads)])


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """A bias that the model brings: (b or 1, h or 1, n, m)."""

    table: Tensor

    def bias(self, block: Block) -> Tensor:
        return self.table[:, :, block.query_index][..., block.key_index]

    def select(self, heads: Any) -> DenseBias:
        return self if self.table.shape[1] == 1 else DenseBias(self.table[:, list(heads)])


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


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one attention module, seen after the fact.

    q: (b, h, n, d), k and v: (b, kv, m, d), with rotary positions applied. readings: how each group of heads read.
    valid: (b, n) which queries are real tokens, or None if all are.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    readings: tuple[Reading, ...]
    valid: Tensor | None

    def statistics(self, want: Mapping[str, Statistic]) -> Statistics:
        """Statistics of every head, {name: (b, h, ...)}, without n x n weights."""
        if len(self.readings) == 1:
            return self._of(self.readings[0], want)
        parts = [(reading.heads, self._of(reading, want)) for reading in self.readings]
        order = torch.tensor([head for heads, _ in parts for head in heads]).argsort()
        return Statistics({name: torch.cat([part[name] for _, part in parts], dim=1)[:, order] for name in want})

    @staticmethod
    def _of(reading: Reading, want: Mapping[str, Statistic]) -> Statistics:
        return attend_statistics(
            reading.q, reading.k, *reading.stages, want=want, scale=reading.scale,
            query_positions=reading.query_positions, key_positions=reading.key_positions,
        )  # fmt: skip

    def weights(self, rows: slice = slice(None)) -> Tensor:
        """(b, h, c, m): the weights of some rows of every head; needs that all heads see the same keys."""
        parts = [
            attention_weights(
                reading.q, reading.k, *reading.stages, rows=rows, scale=reading.scale,
                query_positions=reading.query_positions, key_positions=reading.key_positions,
            )
            for reading in self.readings
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
            raise UnsupportedModelError(f"{name} chooses keys by {argument}=, which cannot be read head by head yet; use the model without it")
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
