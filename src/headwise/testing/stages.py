"""Checks for stages. A stage's module gives `examples(heads, size)`, an `oracle`, and, if some setting does nothing, `neutral`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import attend
from ..attention.folds import fold
from ..attention.mask import Mask
from ..attention.planner import BACKENDS
from ..attention.read import Operands, Read
from ..attention.stage import Bias, Normalizer, Output, Score, Stage, Weights
from ..stages.causal import Causal
from ._check import Item, require

B, H, N, D = 2, 4, 9, 6


def _tensors(
    seed: int = 0, n: int = N, m: int = N, kv: int = H, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, n, D), (B, kv, m, D), (B, kv, m, D))
    q, k, v = (scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def _examples(item: Item) -> Iterator[Stage]:
    make = getattr(item.module, "examples", None)
    require(make is not None, "its module has no examples(heads, size), so nothing can be checked")
    examples = list(make(H, D))  # type: ignore[misc]
    require(bool(examples) and all(isinstance(e, Stage) for e in examples), "examples(heads, size) must return stages")
    return iter(examples)


def _read(
    stage: Stage,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    return attend(q, k, v, Causal(), stage, backend=backend, query_positions=query_positions, key_positions=key_positions)


def _gradients(of: Tensor, to: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients, zero where a stage makes the result independent of a tensor."""
    return torch.autograd.grad(of, to, allow_unused=True, materialize_grads=True)


def oracle_attention(stage: Stage, oracle: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with one stage, token by token in plain numbers, from the stage's own formula."""
    b, h, n, d = q.shape
    m = k.shape[2]
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for x in range(b):
        for head in range(h):
            for i in range(n):
                place = m - n + i
                scores = [float(q[x, head, i] @ k[x, head, j]) / math.sqrt(d) for j in range(m)]
                if isinstance(stage, Score | Bias):
                    scores = [oracle(stage, s, head, place, j) for j, s in enumerate(scores)]
                seen = [j <= place and (not isinstance(stage, Mask) or oracle(stage, place, j)) for j in range(m)]
                scores = [s if ok else -math.inf for s, ok in zip(scores, seen, strict=True)]
                if isinstance(stage, Normalizer):
                    weights = oracle(stage, scores, head)
                else:
                    top = max(scores)
                    parts = [math.exp(s - top) if top > -math.inf else 0.0 for s in scores]
                    weights = [p / sum(parts) if sum(parts) else 0.0 for p in parts]
                if isinstance(stage, Weights):
                    weights = oracle(stage, weights, place)
                row = [sum(w * float(v[x, head, j, c]) for j, w in enumerate(weights)) for c in range(v.shape[-1])]
                if isinstance(stage, Output):
                    row = oracle(stage, row, head)
                out[x, head, i] = torch.tensor(row, dtype=torch.float64)
    return out


def check_oracle(item: Item) -> None:
    """Values equal the formula computed token by token."""
    oracle = getattr(item.module, "oracle", None)
    require(oracle is not None, "its module has no oracle, and no other check can catch a wrong formula")
    for stage in _examples(item):
        for n in (N, 3):
            q, k, v = _tensors(n=n)
            error = float((_read(stage, q, k, v, backend="reference") - oracle_attention(stage, oracle, q, k, v)).abs().max())
            require(error < 1e-12, f"{stage}: differs from its oracle by {error:.2g}")


def check_gradients(item: Item) -> None:
    """Analytic gradients equal numeric ones."""
    for stage in _examples(item):
        q, k, v = (t[:1, :, :4].clone().requires_grad_() for t in _tensors())
        try:
            good = torch.autograd.gradcheck(lambda *x, s=stage: _read(s, *x, backend="reference"), (q, k, v))
        except RuntimeError as error:
            require(False, f"{stage}: wrong gradient: {str(error).splitlines()[0]}")
        require(bool(good), f"{stage}: wrong gradient")


def check_backends(item: Item) -> None:
    """Every backend that accepts it gives the reference's values and gradients; those that know no float64, in float32."""
    for stage in _examples(item):
        for name in BACKENDS:
            if name != "reference" and (exact := _dtype_of(name, stage)) is not None:
                _compare(stage, name, exact, 1e-10 if exact == torch.float64 else 2e-4)


def _dtype_of(name: str, stage: Stage) -> torch.dtype | None:
    """The most exact dtype in which a backend runs a causal read with the stage; None if it does not."""
    for dtype in (torch.float64, torch.float32):
        folded = fold(Read.of((Causal(), stage), D**-0.5), Operands.of(*(t.requires_grad_() for t in _tensors(dtype=dtype))))
        if BACKENDS[name].refuses(folded.read, folded.x) is None:
            return dtype
    return None


def _compare(stage: Stage, name: str, dtype: torch.dtype, allowed: float) -> None:
    """Values and gradients of a backend against those of the reference in float64."""
    results = []
    for backend, kind in (("reference", torch.float64), (name, dtype)):
        inputs = tuple(t.requires_grad_() for t in _tensors(dtype=kind))
        out = _read(stage, *inputs, backend=backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(kind)
        results.append([out.detach(), *_gradients((out * weight).sum(), inputs)])
    expected, got = results
    for what, mine, wanted in zip(("output", "gradient of q", "gradient of k", "gradient of v"), got, expected, strict=True):
        error = float((mine - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        require(error < allowed, f"{stage}: {name}'s {what} differs from the reference by {error:.2g}")


def check_causality(item: Item) -> None:
    """Changing the future changes nothing before it, bit for bit."""
    for stage in _examples(item):
        for backend in (None, "chunked"):
            q, k, v = _tensors()
            before = _read(stage, q, k, v, backend=backend)
            k2, v2 = k.clone(), v.clone()
            k2[:, :, 5:] += 1.0
            v2[:, :, 5:] -= 1.0
            after = _read(stage, q, k2, v2, backend=backend)
            changed = (before[:, :, :5] != after[:, :, :5]).any(-1).flatten(0, 1).any(0).nonzero().flatten().tolist()
            require(not changed, f"{stage}: leaks the future at position {changed[0] if changed else ''}")


def check_decode(item: Item) -> None:
    """Token by token, and in chunks, equals all at once."""
    for stage in _examples(item):
        q, k, v = _tensors()
        whole = _read(stage, q, k, v)
        for size in (1, 4):
            parts = [_read(stage, q[:, :, i : i + size], k[:, :, : i + size], v[:, :, : i + size]) for i in range(0, N, size)]
            difference = (torch.cat(parts, 2) - whole).abs().amax((0, 1, 3))
            wrong = (difference > 1e-12).nonzero().flatten().tolist()
            require(
                not wrong, f"{stage}: decoding {size} at a time differs from the full pass from token {wrong[0] if wrong else ''}"
            )


def check_batch(item: Item) -> None:
    """Rows of a batch do not meet."""
    for stage in _examples(item):
        q, k, v = _tensors()
        alone = _read(stage, q[1:], k[1:], v[1:])
        error = float((_read(stage, q, k, v)[1:] - alone).abs().max())
        require(error < 1e-12, f"{stage}: a row's output depends on the other rows of its batch, by {error:.2g}")


def check_groups(item: Item) -> None:
    """Grouped heads equal repeated ones."""
    for stage in _examples(item):
        q, k, v = _tensors(kv=2)
        repeated = _read(stage, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        error = float((_read(stage, q, k, v) - repeated).abs().max())
        require(error < 1e-12, f"{stage}: grouped heads differ from repeated ones by {error:.2g}")


def check_heads(item: Item) -> None:
    """`select` gives the same stage for some of its heads."""
    for stage in _examples(item):
        q, k, v = _tensors()
        some = [2, 0]
        part = _read(stage.select(some), q[:, some], k[:, some], v[:, some])
        error = float((_read(stage, q, k, v)[:, some] - part).abs().max())
        require(error < 1e-12, f"{stage}: select({some}) is not the stage of those heads, by {error:.2g}")


def check_masked_rows(item: Item) -> None:
    """A row that sees no key gives no NaN, forward or backward; empty slots never reach the output, even if they hold NaN."""
    for stage in _examples(item):
        for backend in ("reference", "chunked", None):
            q, k, v = (t.requires_grad_() for t in _tensors())
            positions = torch.tensor([-1, -1, -1, *range(N - 3)])
            queries = torch.arange(-3, N - 3)
            out = _read(stage, q, k, v, backend=backend, query_positions=queries, key_positions=positions)
            require(not bool(out.isnan().any()), f"{stage}: NaN in a row that sees no key")
            grads = _gradients(out.sum(), (q, k, v))
            require(not any(bool(g.isnan().any()) for g in grads), f"{stage}: NaN gradient from a row that sees no key")
            k2, v2 = k.detach().clone(), v.detach().clone()
            k2[:, :, :3] = v2[:, :, :3] = torch.nan
            poisoned = _read(stage, q.detach(), k2, v2, backend=backend, query_positions=queries, key_positions=positions)
            require(torch.equal(poisoned, out.detach()), f"{stage}: what an empty slot holds reaches the output")


def check_neutral(item: Item) -> None:
    """The setting that should do nothing does nothing; the examples do something."""
    q, k, v = _tensors()
    plain = attend(q, k, v, Causal())
    for stage in _examples(item):
        require(not torch.allclose(_read(stage, q, k, v), plain) or isinstance(stage, Causal), f"{stage}: changes nothing")
    make = getattr(item.module, "neutral", None)
    for stage in make(H, D) if make else ():
        error = float((_read(stage, q, k, v) - plain).abs().max())
        require(error < 1e-12, f"{stage}: should change nothing, changes the output by {error:.2g}")


def check_half_precision(item: Item) -> None:
    """bfloat16 is at most twice as far from float64 as PyTorch's own attention is."""
    for stage in _examples(item):
        q, k, v = (t.bfloat16() for t in _tensors(n=32, m=32, seed=3))
        low, exact = (q, k, v), (q.double(), k.double(), v.double())
        base = float((attend(*low, Causal(), backend="sdpa").double() - attend(*exact, Causal())).abs().max())
        error = float((_read(stage, *low).double() - _read(stage, *exact)).abs().max())
        size = max(1.0, float(_read(stage, *exact).abs().max()) / float(attend(*exact, Causal()).abs().max()))
        require(error <= 2 * base * size + 2**-9 * size, f"{stage}: bfloat16 error {error:.2g}, plain attention's {base:.2g}")


def check_extremes(item: Item) -> None:
    """Large inputs stay finite."""
    for stage in _examples(item):
        for scale in (1e-4, 1e3):
            out = _read(stage, *_tensors(dtype=torch.float32, scale=scale))
            require(bool(out.isfinite().all()), f"{stage}: not finite for inputs of size {scale:g}")
