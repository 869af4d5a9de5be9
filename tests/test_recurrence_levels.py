"""The kernels of log-linear attention: values and gradients against the operator in PyTorch.

On a machine without a GPU they run in Triton's interpreter, cut into small tiles, so that short rows have many.
"""

from __future__ import annotations

import pytest
import torch
from recurrences import ALLOWED, CPU, GPU, apart, check_only_what_is_wanted, gradients, heads, leaves

from headwise.recurrence import recur

pytest.importorskip("triton")
from headwise.recurrence.kernels import levels_launch
from headwise.recurrence.kernels.levels_launch import Cut, run


@pytest.fixture
def small(monkeypatch):
    """Units of 16 tokens, chunks of 8."""
    cuts = {name: {(256, True): Cut(8, 16, 64 if name == "queries" else 32, 4, 1)} for name in levels_launch.LAUNCHES}
    monkeypatch.setattr(levels_launch, "LAUNCHES", cuts | {"keys": {(256, True): Cut(16, 16, 16, 4, 1)}})


def made(b=2, h=2, n=130, d=24, dv=40, levels=12, *, decay=True, seed=0, device="cpu", dtype=torch.float32, fast=1.0):
    """Inputs by name as views of (b, n, h, ...)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    found = heads(noise, b, n, h, d, dv, device, dtype)
    if decay:
        found["decay"] = (-fast * torch.nn.functional.softplus(noise(b, n, h) - 2)).to(device).transpose(1, 2)
    found["levels"] = noise(b, n, h, levels).sigmoid().to(device).transpose(1, 2)
    return leaves(found)


def by_kernel(given, starts=None):
    """Levels have kernels from no state only, and no last state."""
    return run(given["q"], given["k"], given["v"], given.get("decay"), given["levels"]), None


def check_levels(given, allowed=2e-5):
    out, _ = by_kernel(given)
    wanted = recur(**given, backend="torch", last=False).out
    torch.testing.assert_close(out, wanted, rtol=allowed, atol=allowed)
    for name, mine, theirs in zip(given, gradients(out, None, given), gradients(wanted, None, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=allowed, atol=10 * allowed, msg=lambda text, name=name: f"{name}: {text}")


CASES = {
    "all": {"h": 1},
    "many units": {"n": 290, "b": 1, "h": 1, "d": 16, "dv": 16},
    "no decay": {"decay": False, "n": 70},
    "few levels": {"levels": 4, "n": 90},
    "two levels": {"levels": 2, "n": 40},
    "levels that end within a unit": {"levels": 6, "n": 70, "h": 1},
    "one token": {"n": 1},
    "one unit": {"n": 16},
    "two units": {"n": 32, "d": 16, "dv": 32},
    "ragged": {"n": 37, "dv": 16},
    "fast": {"fast": 30.0, "n": 70},
}


@CPU
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, small):
    check_levels(made(**CASES[name]))


@CPU
def test_as_it_is_cut_for_float32():
    check_levels(made(n=300, h=1, b=1))


@CPU
@pytest.mark.parametrize("units", [9, 17, 33])
def test_running_sums_are_written_where_they_belong(units, monkeypatch):
    """Rows of more units than one program sums, and of less than two."""
    monkeypatch.setattr(levels_launch, "LAUNCHES", {name: {(256, True): Cut(16, 256, 16, 4, 1)} for name in levels_launch.LAUNCHES})
    given = made(b=1, h=2, n=256 * units, d=16, dv=16)
    sums = torch.full((4, units, 256), torch.nan)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda own, *size, **how: sums[:2] if size == (2, units, 256) else own.new_zeros(*size)
    )
    call = levels_launch.Call(given["q"], given["v"], given["decay"], given["levels"])
    wanted = given["decay"].detach().reshape(2, units, 256).cumsum(-1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(call.sums, wanted, rtol=1e-4, atol=1e-4)
    assert sums[2:].isnan().all()


@CPU
def test_only_what_is_wanted_is_differentiated(small):
    check_only_what_is_wanted(by_kernel, made(b=1, h=1, n=40))


ON_GPU = [
    ("all", {"n": 3000, "d": 128, "dv": 128}, torch.bfloat16),
    ("long", {"n": 9000, "d": 64, "dv": 64, "b": 1, "levels": 15}, torch.bfloat16),
    ("few levels", {"n": 1024, "d": 128, "dv": 64, "levels": 5}, torch.bfloat16),
    ("no decay", {"n": 1024, "d": 128, "dv": 128, "decay": False}, torch.bfloat16),
    ("float16", {"n": 1500, "d": 128, "dv": 128}, torch.float16),
    ("narrow float32", {"n": 600, "d": 64, "dv": 64}, torch.float32),
    ("float32", {"n": 1100, "d": 128, "dv": 96}, torch.float32),
]


on_gpu = pytest.mark.parametrize(("name", "shape", "dtype"), [pytest.param(*case, marks=GPU, id=case[0]) for case in ON_GPU])


def on_both(shape, dtype):
    """Inputs, what the kernel reads, and inputs and outputs in float64."""
    given = made(**shape, device="cuda", dtype=dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    return given, by_kernel(given)[0], wide, recur(**wide, backend="torch", last=False).out


@on_gpu
def test_values_on_a_gpu(name, shape, dtype):
    given, out, _, wanted = on_both(shape, dtype)
    assert apart(out, wanted) < ALLOWED[dtype]
    assert torch.equal(by_kernel(given)[0], out)


@on_gpu
def test_gradients_on_a_gpu(name, shape, dtype):
    given, out, wide, wanted = on_both(shape, dtype)
    for leaf, mine, theirs in zip(given, gradients(out, None, given), gradients(wanted, None, wide), strict=True):
        assert apart(mine, theirs) < (5 if leaf == "decay" else 2) * ALLOWED[dtype], leaf


@pytest.mark.parametrize("n", [pytest.param(3000, marks=GPU)])
def test_a_gpu_repeats_its_bits(n):
    given = made(n=n, d=128, dv=128, device="cuda", dtype=torch.bfloat16)
    runs = [(out := by_kernel(given)[0], *gradients(out, None, given)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
