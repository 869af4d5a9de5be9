"""Ways to gather statistics of a read. Each module has `refuses(read, x, statistic)`, why it cannot, and `run(...)`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ...errors import BackendError, ShapeError
from ..planner import plan
from ..read import Operands, Read, apply_outputs
from ..statistic import Statistic
from . import blocked, chunked, folded, kernel

SWEEPS: dict[str, ModuleType] = {"kernel": kernel, "blocked": blocked, "folded": folded, "chunked": chunked}


def choose(
    read: Read, x: Operands, statistics: Sequence[Statistic], backend: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """Which sweep gathers each statistic, and why those before it in turn do not.

    Where gradients are wanted: folded, chunked. Else kernel on a GPU, blocked on a CPU, chunked for what they cannot do.

    Raises: BackendError if the named one does not exist, or cannot do one of them.
    """
    if backend is not None and backend not in (*SWEEPS, "reference"):
        raise BackendError(f"there is no statistics backend {backend!r}; there are: {', '.join(SWEEPS)}, reference")
    if backend in ("reference", "chunked"):
        return ["chunked"] * len(statistics), {}
    tensors = [t for t in (x.q, x.k, x.v) if t is not None]
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    turn = ["folded"] if graded else ["kernel"] if x.q.device.type == "cuda" else ["blocked"] if x.q.device.type == "cpu" else []
    if graded and backend in ("kernel", "blocked"):
        raise BackendError(f"the {backend} statistics give no gradients; use folded or chunked, or torch.no_grad()")
    chosen, refused = [], {}
    for statistic in statistics:
        mine = "chunked"
        for name in turn if backend is None else [backend]:
            reason = SWEEPS[name].refuses(read, x, statistic)
            if reason is None:
                mine = name
                break
            refused[name] = reason
            if backend is not None:
                raise BackendError(f"backend {backend!r} cannot give {type(statistic).__name__}: {reason}")
        chosen.append(mine)
    return chosen, refused


def sweep(
    read: Read, x: Operands, statistics: Sequence[Statistic], output: bool = False, backend: str | None = None
) -> tuple[Tensor | None, list[Tensor]]:
    """Every statistic, and the output (b, h, n, dv) if asked for, in as few sweeps as can be."""
    if not x.q.shape[2]:
        raise ShapeError("there are no queries, so there is nothing to gather statistics of")
    for statistic in statistics:
        statistic.check(x)
    chosen, _ = choose(read, x, statistics, backend)
    results: list[Tensor | None] = [None] * len(statistics)
    out: Tensor | None = None
    for name in dict.fromkeys(chosen):
        mine = [i for i, used in enumerate(chosen) if used == name]
        whole = backend == "reference"
        run = partial(chunked.run, rows=x.q.shape[2]) if whole else SWEEPS[name].run
        with_output = output and out is None and (name != "chunked" or whole)
        made, found = run(read, x, [statistics[i] for i in mine], with_output)
        out = apply_outputs(read, made, x) if made is not None else out
        for i, value in zip(mine, found, strict=True):
            results[i] = value
    if output and out is None:
        out = plan(read, x).run()
    return out, [value for value in results if value is not None]


__all__ = ["SWEEPS", "choose", "sweep"]
