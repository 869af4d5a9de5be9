"""The kernels of the delta rule: values and gradients against the operator in PyTorch.

On a machine without a GPU they run in Triton's interpreter, cut into small tiles, so that short rows have many.
"""

from __future__ import annotations

import pytest
import torch
from recurrences import (
    ALLOWED,
    CPU,
    GPU,
    check_documents_apart,
    check_grouped_and_half,
    check_on_a_gpu,
    check_only_what_is_wanted,
    check_repeats,
    check_same,
    documents_of,
    heads,
    leaves,
)

pytest.importorskip("triton")
from headwise.recurrence.kernels import delta_launch
from headwise.recurrence.kernels.delta_launch import Cut, Segments, run


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

    found = heads(noise, b, n, h, d, dv, device, dtype)
    if decay is not None:
        g = -fast * torch.nn.functional.softplus(noise(b, n, h, d if decay == "channels" else 1) - 2)
        found["decay"] = (g if decay == "channels" else g[..., 0]).to(device).transpose(1, 2)
    if write:
        found["write"] = torch.sigmoid(noise(b, n, h)).to(device).transpose(1, 2)
    found["erase"] = erase * torch.sigmoid(noise(b, n, h)).to(device).transpose(1, 2)
    if state:
        found["state"] = noise(b, h, d, dv).to(device)
    starts = (torch.rand(b, n, generator=generator) < 4 / n).to(device) if documents else None
    return leaves(found), starts


def by_kernel(given, starts):
    names = ("q", "k", "v", "decay", "write", "erase", "state")
    return run(*(given.get(name) for name in names), documents_of(starts))


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
    check_same(by_kernel, *made(**CASES[name]))


@CPU
@pytest.mark.parametrize("decay", [None, "scalar", "channels"])
def test_as_it_is_cut_for_float32(decay):
    check_same(by_kernel, *made(n=70, decay=decay, documents=True))


@CPU
@pytest.mark.parametrize("decay", ["scalar", "channels"])
def test_without_a_gradient_of_the_last_state(decay, small):
    check_same(by_kernel, *made(n=70, decay=decay), of_last=False)


@CPU
def test_only_what_is_wanted_is_differentiated(small):
    check_only_what_is_wanted(by_kernel, made(n=20)[0])


@CPU
def test_repeated_keys(small):
    """Each token takes out what the last one wrote, or twice that: the hardest triangle to invert."""
    for strength in (1.0, 2.0):
        given, _ = made(n=33, decay=None)
        given["k"] = given["k"][:, :, :1].expand_as(given["k"]).detach().requires_grad_()
        given["erase"] = torch.full_like(given["erase"], strength).requires_grad_()
        check_same(by_kernel, given, None, 5e-5)


@CPU
def test_grouped_keys_and_half_precision(small):
    check_grouped_and_half(by_kernel, made(h=4, n=40)[0])


@CPU
@pytest.mark.parametrize("decay", [None, "scalar", "channels"])
def test_nothing_of_another_document_is_read(decay, small):
    check_documents_apart(by_kernel, made(n=70, state=False, decay=decay)[0], 40)


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


@pytest.mark.parametrize(("name", "shape", "dtype"), [pytest.param(*case, marks=GPU, id=case[0]) for case in ON_GPU])
def test_on_a_gpu(name, shape, dtype):
    given, starts = made(**{"b": 2, "h": 2} | shape, device="cuda", dtype=dtype)
    check_on_a_gpu(by_kernel, given, starts, ALLOWED[dtype], loose={"decay", "erase"})


@pytest.mark.parametrize("decay", [pytest.param(decay, marks=GPU) for decay in (None, "scalar", "channels")])
def test_a_gpu_repeats_its_bits(decay):
    given, starts = made(b=2, n=3000, d=128, dv=128, decay=decay, documents=True, device="cuda", dtype=torch.bfloat16)
    check_repeats(by_kernel, given, starts)
