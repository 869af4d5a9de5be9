"""Measures behind the checks for attentions: how exact one computes, its gradients, its twins with other heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..mechanisms import Attention, Projections
from ._build import HEAD_NAMES, instances
from ._check import Item, Skipped, require
from .adapters import HEADS, SIZE, Runner

N = 40  # more than 32, where many kernels begin another block
Q_NAMES = ("q_proj", "q", "query", "wq", "to_q", "q_linear", "query_proj", "W_q")
K_NAMES = ("k_proj", "k", "key", "wk", "to_k", "k_linear", "key_proj", "W_k")
V_NAMES = ("v_proj", "v", "value", "wv", "to_v", "v_linear", "value_proj", "W_v")
OUT_NAMES = ("o_proj", "out", "out_proj", "wo", "to_out", "output", "proj", "W_o")


def each(item: Item, body: Callable[[Runner], None]) -> None:
    """The body for all that is to be checked; skipped if it applies to none."""
    runners, reasons = instances(item), []
    for runner in runners:
        try:
            body(runner)
        except Skipped as why:
            reasons.append(str(why))
    if len(reasons) == len(runners):
        raise Skipped("; ".join(dict.fromkeys(reasons)))


def able(runner: Runner, *what: str) -> None:
    """Raises: Skipped with the reason if the runner can't do something."""
    for name in what:
        if name in runner.cannot:
            raise Skipped(runner.cannot[name])


def way(causal: bool) -> str:
    """How it was run, in words."""
    return "causal" if causal else "reading both sides"


def tokens(runner: Runner, b: int = 2, n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Random tokens (b, n, width)."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(b, n, runner.width, generator=generator, dtype=torch.float64)).to(dtype)


def heads_tensors(seed: int, n: int, m: int, kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (2, h, n, d), k and v (2, kv_heads, m, d)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, n, SIZE), (2, kv_heads, m, SIZE), (2, kv_heads, m, SIZE))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def run(runner: Runner, x: Tensor, **options: Any) -> Tensor:
    """One run without gradients, in its first mode unless said otherwise."""
    options.setdefault("causal", runner.modes[0])
    with torch.no_grad():
        return runner.run(x, **options)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where only one is NaN."""
    difference = (a - b).abs()
    difference = torch.where(a.isnan() & b.isnan(), torch.zeros_like(difference), difference)
    return float(difference.detach().nan_to_num(torch.inf).max()) if difference.numel() else 0.0


def noise(runner: Runner, step: float) -> float:
    """Rounding inside a float64 run, as a part of the output's size: what is left of third differences along a line.

    The median over tokens, so that a choice that flips at some of them (the top k, a bucket) does not count.
    """
    x, along = tokens(runner, 1, N, 11), step * tokens(runner, 1, N, 12)
    a, b, c, d = (run(runner, x + i * along) for i in range(4))
    size = max(1e-6, float(a.abs().max()))
    return float((d - 3 * c + 3 * b - a).abs().amax((0, 2)).median()) / size


def tolerance(runner: Runner) -> float:
    """What counts as equal. Rounding of what is computed in float32 within a float64 run is found by its noise, and allowed."""
    size = max(1e-6, float(run(runner, tokens(runner, 1, N, 11)).abs().max()))
    return size * (1e-10 if noise(runner, 1e-5) < 1e-10 else 3e-5)


def first_position(a: Tensor, b: Tensor, tolerance: float) -> int | None:
    """The first token at which two outputs (b, n, width) differ."""
    wrong = ~((a - b).abs().amax((0, 2)) <= tolerance)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


def tensors_of(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Its parameters and buffers: what it is, name, tensor."""
    yield from (("parameter", name, p) for name, p in module.named_parameters())
    yield from (("buffer", name, b) for name, b in module.named_buffers())


def snapshot(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """A copy of its parameters and buffers."""
    return {name: (what, t.detach().clone()) for what, name, t in tensors_of(module)}


def require_unchanged(runner: Runner, before: dict[str, tuple[str, Tensor]], when: str) -> None:
    """Raises: CheckFailed if a parameter or buffer is not as before."""
    for what, name, now in tensors_of(runner.module):
        old = before.get(name)
        same = old is None or (old[1].shape == now.shape and torch.equal(old[1].nan_to_num(), now.detach().nan_to_num()))
        require(same, f"{runner.about}: {when} changes its {what} {name}")


def require_slope(about: str, which: str, f: Callable[[], Tensor], leaf: Tensor, exact: bool, seed: int) -> None:
    """Compares the analytic gradient of the sum of f() with the numeric one, along a random direction."""
    gradient = torch.autograd.grad(f(), leaf, allow_unused=True)[0]
    if gradient is None:
        require(False, f"{about}: {which} is not used: no gradient reaches it")
        return
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed), dtype=leaf.dtype)
    analytic, told = float((gradient * direction).sum()), ""
    for step, part in ((1e-5, 1e-5), (1e-7, 1e-4)) if exact else ((1e-2, 5e-2),):  # the smaller one where it lies on a kink
        numeric = _slope(f, leaf, step * direction) / (2 * step)
        if abs(numeric - analytic) <= part * (float(gradient.norm()) + abs(numeric)) + 1e-8:
            return
        told = told or f"along a random direction {analytic:.6g}, numerically {numeric:.6g}"
    require(False, f"{about}: wrong gradient of {which}: {told}")


def _slope(f: Callable[[], Tensor], leaf: Tensor, by: Tensor) -> float:
    kept, sides = leaf.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            leaf.copy_(kept + sign * by)
            sides.append(float(f()))
        leaf.copy_(kept)
    return sides[0] - sides[1]


class Maps(NamedTuple):
    """The linear maps to queries, keys, values and back that were recognised in a module, by their names."""

    q: str
    k: str
    v: str
    out: str | None
    heads: int
    kv_heads: int
    size: int


def maps_of(module: nn.Module) -> Maps:
    """Raises: Skipped if there are none."""
    linear = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    for name in linear:
        parent, _, last = name.rpartition(".")
        if last not in K_NAMES:
            continue
        at = K_NAMES.index(last)
        prefix = f"{parent}." if parent else ""
        q, v = prefix + Q_NAMES[at], prefix + V_NAMES[at]
        if q not in linear or v not in linear:
            continue
        heads = _number(module, HEAD_NAMES) or HEADS
        if any(linear[each].in_features != linear[name].in_features for each in (q, v)):
            continue
        size = linear[q].out_features // heads
        out = next((prefix + n for n in OUT_NAMES if prefix + n in linear), None)
        return Maps(q, name, v, out, heads, linear[name].out_features // size, size)
    raise Skipped("has no separate linear maps with well-known names (k_proj and v_proj, projections.k and projections.v, ...)")


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    holders = [*module.modules(), getattr(module, "config", None)]
    return next((getattr(h, n) for h in holders for n in names if type(getattr(h, n, None)) is int), None)


def plain_twin(runner: Runner) -> Attention:
    """Plain softmax attention with the runner's own projections.

    Raises: Skipped if its linear maps are not recognised, or do not read the whole width.
    """
    module = runner.module
    own = getattr(module, "projections", None)
    maps = maps_of(module)
    v: Any = module.get_submodule(maps.v)
    if v.out_features != maps.kv_heads * maps.size:
        raise Skipped("its values are of another size than its keys")
    if module.get_submodule(maps.q).in_features != runner.width:
        raise Skipped("its linear maps read only a part of the width")
    twin = Attention(runner.width, maps.heads, kv_heads=maps.kv_heads, head_dim=maps.size)
    if isinstance(own, Projections):
        twin.projections = own
        return twin.eval()
    if maps.out is None:
        raise Skipped("its output projection has no well-known name")
    for name, path in zip(("q", "k", "v", "out"), maps[:4], strict=True):
        setattr(twin.projections, name, module.get_submodule(str(path)))
    return twin.eval()


def baseline(runner: Runner) -> Attention:
    """Plain attention to compare rounding with: of the same projections where they are known, else of the same shape."""
    try:
        return plain_twin(runner)
    except Skipped:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Attention(runner.width, HEADS, head_dim=max(1, runner.width // HEADS)).eval()


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, as a part of b's."""
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))
