"""Keeps keys and values in the host's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ...card import Card
from ..rule import PLAIN, Codec, Parts

CARD = Card(
    paper="FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
    year=2023,
    room="cache",
    source=(
        "arXiv:2303.06865, sec. 4: keys and values in CPU memory, brought to the GPU to be read, as codes if they are encoded. The "
        "paper's schedule over batches, its reads on the CPU and its disk are left out: each read waits for what it fetches. "
        "Which heads offload is the plan's choice, which is our own"
    ),
    exempt={"near": "what comes back from the host is what went there, bit for bit"},
)


@dataclass(frozen=True, eq=False)
class Offloaded(Codec):
    """As they are, or as `codec` keeps them, in the host's memory (page-locked beside a GPU); each read fetches all of a head.

    On a CPU nothing moves, but what would is counted apart: `LayerStore.host_bytes`.
    """

    offloads: ClassVar[bool] = True
    codec: Codec | None = None

    def encode(self, k: Tensor, v: Tensor) -> Parts:
        """What the codec makes of tokens (b, heads, c, d), on the host."""
        return {name: _on_host(part) for name, part in (self.codec or PLAIN).encode(k, v).items()}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the codec makes of parts that were fetched."""
        return (self.codec or PLAIN).decode(parts, dtype)

    def select(self, heads: Sequence[int]) -> Self:
        return self if self.codec is None else dataclasses.replace(self, codec=self.codec.select(heads))

    def check_heads(self, heads: int) -> None:
        (self.codec or PLAIN).check_heads(heads)


def _on_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)


def example(heads: int) -> Offloaded:
    """As they are."""
    return Offloaded()
