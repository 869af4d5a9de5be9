"""Who computes the chunk form: the kernels where they can, else PyTorch."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from torch import Tensor

from ..errors import BackendError
from .chunk import chunked
from .inputs import Inputs, inputs, wide

ORDER = ("kernel", "torch")


class Plan(NamedTuple):
    """The backend that runs, and why those before it do not."""

    backend: str
    refused: dict[str, str]


def plan(given: Inputs, backend: str = "auto", last: bool = True) -> Plan:
    """Which backend runs.

    Raises: BackendError if the one that was asked for can't, with what it says.
    """
    if backend not in ("auto", *ORDER):
        raise BackendError(f"there is no backend {backend!r} for recurrences; there are: auto, {', '.join(ORDER)}")
    refused: dict[str, str] = {}
    for name in ORDER if backend == "auto" else (backend,):
        why = _refusal(name, given, last)
        if name == "kernel" and backend == "auto" and not given.q.is_cuda:
            why = why or "Triton's interpreter runs only where it is asked for"
        if why is None:
            return Plan(name, refused)
        refused[name] = why
    raise BackendError(f"backend {backend!r} can't do this: {refused[backend]}")


def run(given: Inputs, size: int, backend: str, last: bool) -> tuple[Tensor, Tensor]:
    """The chunk form by the backend that is planned."""
    if plan(given, backend, last).backend == "kernel":
        from .kernels import run as on_gpu

        return on_gpu(given)
    return chunked(wide(given), size, last=last)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    write: Tensor | None = None,
    erase: Tensor | None = None,
    levels: Tensor | None = None,
    starts: Tensor | None = None,
    state: Tensor | None = None,
    count: Tensor | None = None,
    real: Tensor | None = None,
    backend: str = "auto",
    last: bool = True,
) -> Plan:
    """Which backend `recur` runs the chunk form with for these tensors, and why not another."""
    return plan(inputs(q, k, v, decay, write, erase, levels, starts, state, count, real), backend, last)


def _refusal(name: str, given: Inputs, last: bool) -> str | None:
    if name == "torch":
        return None
    try:
        importlib.import_module("triton")
    except ImportError:
        return "triton is not installed"
    from .kernels import refuses

    why = refuses(given)
    return "the last state of levels is made by PyTorch" if why is None and last and given.levels is not None else why
