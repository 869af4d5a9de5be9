"""How what layers make is carried through the depth of a stack."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..mechanisms._mixer import Tokens


class Stream(ABC):
    """What one forward pass carries from layer to layer: each reads its input from it and adds its output to it."""

    out: Tokens

    @abstractmethod
    def read(self, layer: int) -> Tokens:
        """The input of the layer-th mixer or feed-forward layer, before its norm. They are counted together, from 0."""

    @abstractmethod
    def add(self, out: Tokens) -> None:
        """Takes what the layer made that read last."""


class Residual(nn.Module, ABC):
    """Makes a stream for each forward pass, and holds its parameters."""

    @abstractmethod
    def forward(self, x: Tokens) -> Stream:
        """The stream of a pass that starts from embeddings x."""


class Sum(Residual):
    """The usual sum of all that was made."""

    def forward(self, x: Tokens) -> Stream:
        """See `Residual.forward`."""
        return _Sum(x)


class _Sum(Stream):
    def __init__(self, x: Tensor) -> None:
        self.out = x

    def read(self, layer: int) -> Tensor:
        return self.out

    def add(self, out: Tensor) -> None:
        self.out = self.out + out
