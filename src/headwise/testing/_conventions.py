"""What a mask means to a module, found out by trying: which forms there are, and which of them hides what it should."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor], Tensor]


def _added(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=torch.float64, device=visible.device).masked_fill(~visible, -torch.inf)


# from visible (b, n, m) bool to what the module takes; by name, the likeliest first
SQUARES: dict[str, Form] = {
    "bool (b, 1, n, m), True where a key is seen": lambda v: v[:, None],
    "added (b, 1, n, m), -inf where a key is hidden": lambda v: _added(v)[:, None],
    "bool (b, 1, n, m), True where a key is hidden": lambda v: ~v[:, None],
    "bool (b, n, m), True where a key is seen": lambda v: v,
    "added (b, n, m), -inf where a key is hidden": _added,
    "bool (b, n, m), True where a key is hidden": lambda v: ~v,
    "bool (n, m), True where a key is seen": lambda v: v[-1],
    "added (n, m), -inf where a key is hidden": lambda v: _added(v)[-1],
    "bool (n, m), True where a key is hidden": lambda v: ~v[-1],
}
# from real (b, m) bool
ROWS: dict[str, Form] = {
    "bool (b, m), True at tokens": lambda r: r,
    "integers (b, m), 1 at tokens": lambda r: r.long(),
    "bool (b, m), True at padding": lambda r: ~r,
    "bool (b, 1, 1, m), True at tokens": lambda r: r[:, None, None],
    "added (b, m), -inf at padding": _added,
}


def influence(run: Callable[[int | None], Tensor], n: int) -> Tensor | None:
    """(b, n, n): how much token j changes output i; run(j) is the output (b, n, ...) with token j changed. None if that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forms that the module does not like
            base = run(None)
            if base.shape[1] != n:
                return None
            changed = [(run(j) - base).flatten(2).abs().amax(-1) for j in range(n)]
    except Exception:  # anything may be wrong with a form that the module does not know
        return None
    return torch.stack(changed, -1)


def likeness(found: Tensor | None, wanted: Tensor) -> float:
    """How far what was found is what was wanted, off the diagonal, where a token changes its own query. -1 if nothing ran.

    At least 2 if it is just that; else less than 1.5.
    """
    if found is None:
        return -1.0
    found = found.nan_to_num(float("inf"))
    off = ~torch.eye(wanted.shape[-1], dtype=torch.bool).expand_as(wanted)
    match = ((found > 1e-12) == wanted)[off].double().mean()
    soft = found.clamp(max=1e6).log1p()
    top = soft[off].max().clamp(min=1e-30)
    seen, hidden = soft[off & wanted].mean() / top, soft[off & ~wanted].mean() / top
    return max(0.0, float((2.0 if match == 1.0 else min(float(match), 0.99)) + 0.5 * (seen - hidden)))
