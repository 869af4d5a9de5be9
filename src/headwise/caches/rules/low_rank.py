"""Keeps the parts of keys and values that lie in a few directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...card import Card
from ...errors import GeometryError
from ..rule import Codec, Parts

CARD = Card(
    paper="Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
    year=2024,
    room="cache",
    source=(
        "arXiv:2408.05646: directions from the singular vectors, without a mean taken off, of what heads have on calibration "
        "texts; those of keys serve the queries too. The paper folds them into the weights and takes keys before their rotary "
        "positions; here keys and values are projected as they come, positions included, which works on any model and with any "
        "rule of which tokens stay. Reads come back to full size; the read in low rank itself is left out"
    ),
    exempt={"near": "random directions, all that an example without a model has, are not those of the model's keys"},
)


@dataclass(frozen=True, eq=False)
class LowRank(Codec):
    """Coordinates in orthonormal directions, which each head has of its own.

    keys: (heads, d, rank). values: (heads, dv, rank of values). Heads of other ranks need a rule of their own; the recipe
    `low_rank` measures all of them.

    Raises: GeometryError if keys or values of another size come.
    """

    per_head: ClassVar[tuple[str, ...]] = ("keys", "values")
    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        for name, basis in (("keys", self.keys), ("values", self.values)):
            if basis.dim() != 3 or not 0 < basis.shape[2] <= basis.shape[1]:
                raise GeometryError(f"{name} is {tuple(basis.shape)}; give (heads, size, rank) directions, rank up to the size")

    def encode(self, k: Tensor, v: Tensor) -> Parts:
        """(b, heads, c, d) each -> (b, heads, c, rank)."""
        return {"k": _times(k, self.keys, "keys"), "v": _times(v, self.values, "values")}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The projections of what came on these directions."""
        return _times(parts["k"], self.keys.mT, "keys"), _times(parts["v"], self.values.mT, "values")


def _times(x: Tensor, basis: Tensor, name: str) -> Tensor:
    if x.shape[-1] != basis.shape[1] or len(basis) not in (1, x.shape[1]):
        raise GeometryError(f"directions of {name} are for {len(basis)} heads of size {basis.shape[1]}, not for {tuple(x.shape)}")
    return x @ basis.to(x.device, x.dtype)


def example(heads: int) -> LowRank:
    """Random directions, other ones for each head."""
    generator = torch.Generator().manual_seed(0)
    full = torch.linalg.qr(torch.randn(2, heads, 32, 32, generator=generator, dtype=torch.float64)).Q
    return LowRank(full[0, ..., :24], full[1, ..., :20])
