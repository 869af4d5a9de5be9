"""Triton kernels for NVIDIA GPUs; with TRITON_INTERPRET=1 they run, slowly, on the CPU. Only this folder imports triton."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def missing() -> str | None:
    """Why no Triton kernel can run in this process; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'headwise[triton]')"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no NVIDIA GPU here"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
