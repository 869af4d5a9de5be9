"""The chunk form in Triton: which family of kernels runs what."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import NOTHING, Inputs
from ._host import power

WIDEST = 128
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
    if max(given.q.shape[-1], given.v.shape[-1]) > WIDEST:
        return f"heads of {max(given.q.shape[-1], given.v.shape[-1])} channels are larger than {WIDEST}, the most that was tested"
    if given.k.shape[2] < SHORT:
        return f"{given.k.shape[2]} tokens are too few for a launch"
    why: str | None = _family(given).refuses(given)
    return why


def run(given: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state."""
    decay: Any = None if given.decay is None else given.decay.float().clamp(min=NOTHING)
    if decay is not None and decay.shape[-1] == 1:
        decay = decay[..., 0]
    family, documents = _family(given), given.documents
    d, dv = given.q.shape[-1], given.v.shape[-1]
    wide, tall = power(d) - d, power(dv) - dv  # heads of other sizes are made larger by zeros
    v = given.v if given.write is None or given.erase is not None else given.values.to(given.v.dtype)
    q, k, v = _filled(given.q, wide), _filled(given.k, wide), _filled(v, tall)
    state = None if given.state is None else _filled(given.state.float(), tall, wide)
    if decay is not None and decay.dim() == 4:
        decay = _filled(decay, wide)
    if given.levels is not None:
        out: Tensor = family.run(q, k, v, decay, given.levels.float())
        return out[..., :dv], given.first  # the last state is not wanted
    if given.erase is not None:
        write, erase = (None if t is None else t.float() for t in (given.write, given.erase))
        out, last = family.run(q, k, v, decay, write, erase, state, documents)
    else:
        out, last = family.run(q, k, v, decay, state, documents)
    return out[..., :dv], last[..., :d, :dv]


def _filled(tensor: Tensor, columns: int, rows: int = 0) -> Tensor:
    return F.pad(tensor, (0, columns, 0, rows)) if columns or rows else tensor


def _family(given: Inputs) -> ModuleType:
    if given.erase is not None and given.levels is None:
        name = "delta"
    elif given.levels is not None:
        name = "levels"
    else:
        name = "channels" if given.decay is not None and given.decay.shape[-1] > 1 else "scalar"
    return importlib.import_module(f"{__name__}.{name}_launch")
