"""The chunk form in Triton."""

from __future__ import annotations

from torch import Tensor

from ..inputs import Inputs


def refuses(given: Inputs) -> str | None:
    """Why these kernels can't run it; None if they can."""
    return "not there yet"


def run(given: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, dv) and the last state."""
    raise NotImplementedError
