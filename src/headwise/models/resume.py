"""Running a model again from one of its layers on: the layers below return what they returned before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Stack


class Replay:
    """Remembers what every block of a stack returned for some rows, and can make blocks return it for copies of them.

    Copies are whole: rows 0..b-1, then rows 0..b-1 again, and so on.
    """

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        self.blocks = [model.get_submodule(site.block) for site in stack.sites]
        self.outputs: list[Any] = [None] * len(self.blocks)
        self.rows = 0

    @contextmanager
    def recording(self, rows: int) -> Iterator[None]:
        """Notes what the blocks return in a forward pass over `rows` rows."""
        self.rows = rows
        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):

                def note(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
                    self.outputs[index] = _map(output, lambda t: t.detach())

                undo.callback(block.register_forward_hook(note).remove)
            yield

    @contextmanager
    def skipping(self, below: int, copies: int) -> Iterator[None]:
        """Within the block, layers 0..below-1 are not computed: they return `copies` copies of what they returned before."""
        with ExitStack() as undo:
            for block, output in zip(self.blocks[:below], self.outputs[:below], strict=True):
                again = _map(output, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() and len(t) == self.rows else t)
                own = vars(block).get("forward")
                block.forward = lambda *args, again=again, **kwargs: again  # type: ignore[method-assign]
                if own is None:
                    undo.callback(delattr, block, "forward")
                else:
                    undo.callback(setattr, block, "forward", own)
            yield


def _map(value: Any, change: Any) -> Any:
    """Changes every tensor in a tensor, tuple, list or dict."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)({key: _map(item, change) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        return type(value)(_map(item, change) for item in value)
    return value


def copies_of(ids: Tensor, copies: int) -> Tensor:
    """(b, n) -> (copies * b, n), whole copies one after another."""
    return torch.cat([ids] * copies)
