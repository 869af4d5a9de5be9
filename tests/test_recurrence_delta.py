"""The kernels of the delta rule: values and gradients against the operator in PyTorch.

On a machine without a GPU they run in Triton's interpreter, cut into small tiles, so that short rows have many.
"""

from __future__ import annotations

import os

import pytest
import torch

from headwise.recurrence import recur, starts_of

pytest.importorskip("triton")
from headwise.recurrence import kernels
from headwise.recurrence.kernels import delta_launch
from headwise.recurrence.kernels.delta_launch import Cut, Segments, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
GPU = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
# Kernels of decays of channels read foreign memory on a GPU so far, and every test after them would fail
OFF = [*GPU, pytest.mark.skipif(not kernels.CHANNELS, reason="kernels of decays of channels are off on a GPU")]


def of_decay(decay):
    return OFF if decay == "channels" else GPU


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16 tokens, and segments of 48."""
    monkeypatch.setattr(delta_launch, "LAUNCHES", {kernel: {(256, True): Cut(16, 32, 4, 1)} for kernel in delta_launch.LAUNCHES})
    monkeypatch.setattr(delta_launch, "SEGMENTS", Segments(10**6, 10**6, 40))
    monkeypatch.setattr(delta_launch, "CHUNK", {True: 16})


def made(b=1, h=1, n=130, d=24, dv=40, *, decay="scalar", state=True, write=True, documents=False, seed=0, device="cpu",
         dtype=torch.float32, fast=1.0, erase=1.0):  # fmt: skip
    """Inputs by name as views of (b, n, h, ...), and where documents start. erase: at most so much."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    found = {"q": noise(b, n, h, d), "k": torch.nn.functional.normalize(noise(b, n, h, d), dim=-1), "v": noise(b, n, h, dv)}
    found = {name: t.to(device, dtype).transpose(1, 2) for name, t in found.items()}
    if decay is not None:
        g = -fast * torch.nn.functional.softplus(noise(b, n, h, d if decay == "channels" else 1) - 2)
        found["decay"] = (g if decay == "channels" else g[..., 0]).to(device).transpose(1, 2)
    if write:
        found["write"] = torch.sigmoid(noise(b, n, h)).to(device).transpose(1, 2)
    found["erase"] = erase * torch.sigmoid(noise(b, n, h)).to(device).transpose(1, 2)
    if state:
        found["state"] = noise(b, h, d, dv).to(device)
    starts = (torch.rand(b, n, generator=generator) < 4 / n).to(device) if documents else None
    return {name: t.detach().requires_grad_() for name, t in found.items()}, starts


def by_kernel(given, starts):
    documents = None if starts is None else starts.long().cumsum(1)
    names = ("q", "k", "v", "decay", "write", "erase", "state")
    return run(*(given.get(name) for name in names), documents)


def gradients(out, last, given, of_last=True):
    """Of a weighted sum of outputs, and of the last state."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    total = (out * weight).sum(dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    if of_last:
        total = total + (last * torch.randn(last.shape, generator=generator).to(last.device)).sum()
    return torch.autograd.grad(total, list(given.values()))


def check_same(given, starts, allowed=2e-5, of_last=True):
    out, last = by_kernel(given, starts)
    wanted = recur(**given, starts=starts, backend="torch")
    torch.testing.assert_close(out, wanted.out, rtol=allowed, atol=allowed)
    torch.testing.assert_close(last, wanted.state, rtol=allowed, atol=allowed)
    right = gradients(*wanted, given, of_last)
    for name, mine, theirs in zip(given, gradients(out, last, given, of_last), right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=allowed, atol=10 * allowed, msg=lambda text, name=name: f"{name}: {text}")


SHAPES = {
    "all": {"h": 2, "n": 90},
    "documents": {"documents": True, "b": 2, "n": 64},
    "no state": {"state": False, "n": 64},
    "no state, documents": {"state": False, "n": 84, "documents": True},
    "one token": {"n": 1},
    "less than a segment": {"n": 37, "write": False, "documents": True},
    "whole": {"n": 48, "d": 16, "dv": 32},
    "wide": {"d": 40, "dv": 72, "n": 50},
    "strong": {"erase": 2.0, "n": 70},
}
CASES = {f"{decay or 'plain'}, {name}": {"decay": decay} | shape
         for decay in (None, "scalar", "channels") for name, shape in SHAPES.items()}  # fmt: skip
CASES |= {
    "scalar, fast": {"fast": 30.0, "n": 70},
    "channels, fast": {"decay": "channels", "fast": 30.0, "documents": True, "n": 70},
    "channels, faster than chunks": {"decay": "channels", "fast": 10.0, "n": 40, "d": 16, "dv": 16},
}


@CPU
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, small):
    check_same(*made(**CASES[name]))


@CPU
@pytest.mark.parametrize("decay", [None, "scalar", "channels"])
def test_as_it_is_cut_for_float32(decay):
    check_same(*made(n=70, decay=decay, documents=True))


@CPU
@pytest.mark.parametrize("decay", ["scalar", "channels"])
def test_without_a_gradient_of_the_last_state(decay, small):
    check_same(*made(n=70, decay=decay), of_last=False)


@CPU
def test_only_what_is_wanted_is_differentiated(small):
    given, _ = made(n=20)
    for name in given:
        alone = {other: t if other == name else t.detach() for other, t in given.items()}
        (mine,) = torch.autograd.grad(by_kernel(alone, None)[0].square().sum(), [alone[name]])
        (theirs,) = torch.autograd.grad(recur(**alone, backend="torch").out.square().sum(), [alone[name]])
        torch.testing.assert_close(mine, theirs, rtol=5e-4, atol=5e-4)


@CPU
def test_repeated_keys(small):
    """Each token takes out what the last one wrote, or twice that: the hardest triangle to invert."""
    for strength in (1.0, 2.0):
        given, _ = made(n=33, decay=None)
        given["k"] = given["k"][:, :, :1].expand_as(given["k"]).detach().requires_grad_()
        given["erase"] = torch.full_like(given["erase"], strength).requires_grad_()
        check_same(given, None, 5e-5)


@CPU
def test_grouped_keys_and_half_precision(small):
    given, _ = made(h=4, n=40)
    shared = {name: t[:, :2] if name in "kv" else t for name, t in given.items()}
    wanted = recur(**shared, backend="torch")
    repeated = {name: t.repeat_interleave(2, 1) if name in "kv" else t for name, t in shared.items()}
    torch.testing.assert_close(by_kernel(repeated, None)[0], wanted.out, rtol=2e-5, atol=2e-5)
    low = {name: t.detach().bfloat16() if name in "qkv" else t.detach() for name, t in given.items()}
    out, _ = by_kernel(low, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, recur(**low, backend="torch").out, rtol=2e-2, atol=2e-2)


@CPU
@pytest.mark.parametrize("decay", [None, "scalar", "channels"])
def test_nothing_of_another_document_is_read(decay, small):
    given, _ = made(n=70, state=False, decay=decay)
    given = {name: t.detach() for name, t in given.items()}
    starts = starts_of(torch.tensor([0, 40, 70]))
    wanted, last = by_kernel(given, starts)
    loud = {name: t.clone() for name, t in given.items()}
    loud["v"][:, :, :40] = 1e30
    out, same = by_kernel(loud, starts)
    assert torch.equal(out[:, :, 40:], wanted[:, :, 40:])
    assert torch.equal(last, same)


def exact(given, starts):
    """The same in float64, and its gradients."""
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    found = recur(**wide, starts=starts, backend="torch")
    return found, gradients(*found, wide)


def apart(mine, theirs):
    """The distance of two tensors, of the size of the second."""
    return float((mine.double() - theirs).norm() / theirs.norm())


ON_GPU = [
    ("all", {"n": 1500, "d": 128, "dv": 128, "documents": True}, torch.bfloat16),
    ("plain", {"n": 1024, "d": 128, "dv": 128, "decay": None, "state": False}, torch.bfloat16),
    ("long", {"n": 9000, "d": 64, "dv": 64}, torch.bfloat16),
    ("long, documents", {"n": 9000, "d": 128, "dv": 128, "documents": True}, torch.bfloat16),
    ("strong", {"n": 2000, "d": 128, "dv": 128, "erase": 2.0, "decay": None}, torch.bfloat16),
    ("fast", {"n": 4096, "d": 128, "dv": 128, "fast": 20.0}, torch.bfloat16),
    ("slow", {"n": 4096, "d": 128, "dv": 64, "fast": 0.02}, torch.bfloat16),
    ("channels", {"n": 1500, "d": 128, "dv": 128, "decay": "channels", "documents": True}, torch.bfloat16),
    ("slow channels", {"n": 4096, "d": 128, "dv": 128, "decay": "channels", "fast": 0.1}, torch.bfloat16),
    ("fast channels", {"n": 4096, "d": 64, "dv": 64, "decay": "channels", "fast": 20.0}, torch.bfloat16),
    ("float16", {"n": 1500, "d": 128, "dv": 128, "documents": True}, torch.float16),
    ("float16 channels", {"n": 600, "d": 64, "dv": 64, "decay": "channels"}, torch.float16),
    ("float32", {"n": 3500, "d": 128, "dv": 96, "documents": True}, torch.float32),
    ("float32 channels", {"n": 600, "d": 64, "dv": 64, "decay": "channels", "documents": True}, torch.float32),
]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"), [pytest.param(*case, marks=of_decay(case[1].get("decay")), id=case[0]) for case in ON_GPU]
)
def test_on_a_gpu(name, shape, dtype):
    given, starts = made(**{"b": 2, "h": 2} | shape, device="cuda", dtype=dtype)
    wanted, right = exact(given, starts)
    out, last = by_kernel(given, starts)
    allowed = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}[dtype]
    assert apart(out, wanted.out) < allowed
    assert apart(last, wanted.state) < allowed
    for leaf, mine, theirs in zip(given, gradients(out, last, given), right, strict=True):
        assert apart(mine, theirs) < (5 if leaf in ("decay", "erase") else 2) * allowed, leaf


@pytest.mark.parametrize("decay", [pytest.param(decay, marks=of_decay(decay)) for decay in (None, "scalar", "channels")])
def test_a_gpu_repeats_its_bits(decay):
    given, starts = made(b=2, n=3000, d=128, dv=128, decay=decay, documents=True, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(3):
        out, last = by_kernel(given, starts)
        runs.append((out, last, *gradients(out, last, given)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
