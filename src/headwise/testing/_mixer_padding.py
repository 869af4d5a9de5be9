"""Measures behind the checks for attentions that are about padding and rows that see nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..stages.causal import Causal
from ._check import require
from ._mixer_measures import N, able, apart, first_position, heads_tensors, run, tokens, tolerance, way
from .adapters import Runner

PADS = (0, 7, 13)  # padding of each row of a batch


def _padded(runner: Runner, left: bool, fill: float, causal: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens with padding, what is real, and what each row gives alone without padding."""
    x = tokens(runner, len(PADS), seed=9)
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    for row, pad in enumerate(PADS):
        real[row, slice(0, pad) if left else slice(N - pad, N)] = False
    alone = [run(runner, x[row][real[row]][None], causal=causal)[0] for row in range(len(PADS))]
    noise = fill * (1 + torch.randn(x.shape, generator=torch.Generator().manual_seed(10), dtype=x.dtype))
    return torch.where(real[..., None], x, noise), real, alone  # no constant: a norm over channels would take that out


def require_padding_kept_out(runner: Runner, left: bool) -> None:
    """Padding changes nothing at real tokens, whatever it holds; on the left, nor in cached decode after it."""
    able(runner, "padding")
    side = "left" if left else "right"
    allowed = 10 * tolerance(runner)
    for causal in runner.modes:
        for fill in (0.7, 1e4):
            x, real, alone = _padded(runner, left, fill, causal)
            out = run(runner, x, causal=causal, real=real)
            _require_same(runner, out, real, alone, allowed, f"{side} padding of {fill:g} changes the output ({way(causal)})")
        if runner.takes_nan:
            _require_poison_kept_out(runner, left, causal, allowed)
    if left and "decode" not in runner.cannot and "causal" not in runner.cannot:
        x, real, alone = _padded(runner, left, 0.7, True)
        with torch.no_grad():
            out = runner.decode(x, [20, 1, 1, 1, 12, 1, 4], real=real)
        _require_same(runner, out, real, alone, allowed, "left padding changes the output of cached decode")


def _require_poison_kept_out(runner: Runner, left: bool, causal: bool, allowed: float) -> None:
    """Keys and values of empty slots may hold anything, NaN included."""
    q, k, v = heads_tensors(10, N, N)
    pad = PADS[1]
    empty = torch.zeros(N, dtype=torch.bool)
    empty[slice(0, pad) if left else slice(N - pad, N)] = True
    places = torch.where(empty, -1, (~empty).cumsum(0) - 1).expand(2, -1)
    stages = (Causal(),) if causal else ()
    with torch.no_grad():
        alone = runner.kernel(*(t[:, :, ~empty] for t in (q, k, v)), *stages)
        k, v = (t.masked_fill(empty[:, None], torch.nan) for t in (k, v))
        out = runner.kernel(q, k, v, *stages, query_positions=places, key_positions=places)[:, :, ~empty]
    by = apart(out, alone)
    size = "to NaN" if by == torch.inf else f"by {by:.2g}"
    require(by <= allowed, f"{runner.about}: NaN in keys and values of empty slots changes the output {size} ({way(causal)})")
    _require_poison_kept_from_gradients(runner, (q, k, v), places, stages, empty)


def _require_poison_kept_from_gradients(
    runner: Runner, tensors: tuple[Tensor, ...], places: Tensor, stages: tuple[Causal, ...], empty: Tensor
) -> None:
    q, k, v = (t.detach().requires_grad_() for t in tensors)
    out = runner.kernel(q, k, v, *stages, query_positions=places, key_positions=places)[:, :, ~empty]
    trained = [p for p in runner.kernel.parameters() if p.requires_grad] if isinstance(runner.kernel, torch.nn.Module) else []
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, *trained], allow_unused=True)
    clean = all(g is None or bool(g[:, :, ~empty].isfinite().all()) for g in grads[:3])
    clean = clean and all(g is None or bool(g.isfinite().all()) for g in grads[3:])
    require(clean, f"{runner.about}: NaN in keys and values of empty slots reaches gradients")


def _require_same(runner: Runner, out: Tensor, real: Tensor, alone: list[Tensor], allowed: float, what: str) -> None:
    for row, wanted in enumerate(alone):
        got = out[row][real[row]]
        by = apart(got, wanted)
        wrong = first_position(got[None], wanted[None], allowed)
        size = "to NaN" if by == torch.inf else f"by {by:.2g}"
        require(wrong is None, f"{runner.about}: {what} {size}, first at real token {wrong} of a row with {PADS[row]} of padding")


def require_masked_rows_clean(runner: Runner) -> None:
    """Rows that see nothing give no NaN, forward or backward, and reach no other row."""
    able(runner, "padding")
    for causal in runner.modes:
        x = tokens(runner, 3, 12).requires_grad_()
        real = torch.ones(3, 12, dtype=torch.bool)
        real[0, :4] = False  # with a causal mask, these see nothing
        real[1] = False
        with torch.no_grad():
            alone = runner.run(x[2:], causal=causal)
        out = runner.run(x, causal=causal, real=real)
        for row, what in ((0, "a row that sees nothing"), (1, "a row of padding only")):
            require(not bool(out[row].isnan().any()), f"{runner.about}: NaN in {what} ({way(causal)})")
        require(apart(out[2:].detach(), alone) <= 10 * tolerance(runner), f"{runner.about}: a row of padding changes another row")
        trained = [p for p in runner.module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.sum(), [x, *trained], allow_unused=True)
        bad = any(g is not None and bool(g.isnan().any()) for g in grads)
        require(not bad, f"{runner.about}: NaN gradient from a row that sees nothing ({way(causal)})")
