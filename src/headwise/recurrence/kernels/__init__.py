"""The chunk form in Triton: which family of kernels runs what."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..inputs import NOTHING, Inputs

SHORT = 16  # fewer tokens than this are not worth a launch


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    if not given.q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "the kernels need an NVIDIA GPU"
    if given.q.is_cuda and torch.cuda.get_device_capability(given.q.device)[0] < 8:
        return "the kernels are for GPUs of compute capability 8.0 and newer"
    tensors = (given.q, given.k, given.v)
    if any(t.dtype == torch.float64 for t in tensors) or (given.decay is not None and given.decay.dtype == torch.float64):
        return "the kernels compute in float32, and float64 was given"
    if given.k.shape[2] < SHORT:
        return f"{given.k.shape[2]} tokens are too few for a launch"
    why: str | None = _family(given).refuses(given)
    return why


def run(given: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state."""
    decay: Any = None if given.decay is None else given.decay.float().clamp(min=NOTHING)
    if decay is not None and decay.shape[-1] == 1:
        decay = decay[..., 0]
    family = _family(given)
    q, k, state, documents = given.q, given.k, given.state, given.documents
    if given.erase is not None:
        write, erase = (None if t is None else t.float() for t in (given.write, given.erase))
        found: tuple[Tensor, Tensor] = family.run(q, k, given.v, decay, write, erase, state, documents)
        return found
    v = given.v if given.write is None else given.values.to(given.v.dtype)
    if given.levels is not None:
        return family.run(q, k, v, decay, given.levels.float()), given.first  # the last state is not wanted
    found = family.run(q, k, v, decay, state, documents)
    return found


def _family(given: Inputs) -> ModuleType:
    if given.erase is not None and given.levels is None:
        name = "delta"
    elif given.levels is not None:
        name = "levels"
    else:
        name = "channels" if given.decay is not None and given.decay.shape[-1] > 1 else "scalar"
    return importlib.import_module(f"{__name__}.{name}_launch")
