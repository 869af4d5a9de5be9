"""Language modelling, a byte at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...card import Card
from ...errors import InputError
from ...zoo import heldout_text
from ._problem import Batch, Problem, Tally, integers, need

CARD = Card(
    paper="Character-Level Language Modeling with Deeper Self-Attention",
    year=2018,
    room="bench",
    source="arXiv:1808.04444, bits for each byte of windows at random places; here of a small text whose last part is held out",
)
HELD_OUT = 0.1  # the share of a text, its end, that is never trained on


@dataclass(frozen=True)
class ByteText(Problem):
    """The next byte of a text, judged on its last tenth, which is never trained on.

    Chance is what single bytes give that are as frequent as in the training part; nobody knows the ceiling. The embedded text
    is small (about 100 kB to train on), so that models soon know it by heart; give a larger one to compare models of a size.

    Args:
        length: bytes of a window. text: a file; the embedded held-out text without one. goal: bits for each byte from which on
            it counts as learned.
    """

    length: int = 128
    text: str | None = None
    goal: float = 3.0
    metric = "bits_per_byte"
    higher = False
    ceiling = None

    def __post_init__(self) -> None:
        need(self.length >= 2, f"windows of {self.length} bytes; give 2 at least")
        train, held = _parts(self.text)
        shortest = min(len(train), len(held)) - 1
        need(
            self.length <= shortest,
            f"windows of {self.length} bytes in parts of {shortest}; give a longer text or a smaller length",
        )

    @property
    def vocabulary(self) -> int:
        """All bytes."""
        return 256

    @property
    def context(self) -> int:
        """See `Problem.context`."""
        return self.length

    @property
    def chance(self) -> float:
        """See `Problem.chance`."""
        train, held = (part.bincount(minlength=256).double() for part in _parts(self.text))
        share = (train + 1) / (train + 1).sum()
        return float(-(held / held.sum() * share.log2()).sum())

    @property
    def solved(self) -> float:
        """See `Problem.solved`."""
        return self.goal

    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.batch`."""
        return self._windows(0, rows, generator, device)

    def heldout(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """See `Problem.heldout`."""
        return self._windows(1, rows, generator, device)

    def _windows(self, part: int, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        text = _on(self.text, part, str(device))
        start = integers(generator, device, 0, len(text) - self.length - 1, rows, 1)
        window = text[start + torch.arange(self.length + 1, device=device)]
        return Batch(window[:, :-1], window[:, 1:])

    def metrics(self, tally: Tally) -> dict[str, float]:
        """bits_per_byte, and the share of bytes that were the likeliest."""
        return {"bits_per_byte": tally.nats / tally.asked / math.log(2), "accuracy": tally.right / tally.asked}


@cache
def _parts(file: str | None) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out."""
    try:
        read = heldout_text().encode() if file is None else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); give a text file") from error
    need(len(read) >= 100, f"{file} has {len(read)} bytes; give a text of 100 at least")
    whole = torch.frombuffer(bytearray(read), dtype=torch.uint8).long()
    train = len(whole) - math.ceil(len(whole) * HELD_OUT)
    return whole[:train], whole[train:]


@cache
def _on(file: str | None, part: int, device: str) -> Tensor:
    return _parts(file)[part].to(device)
