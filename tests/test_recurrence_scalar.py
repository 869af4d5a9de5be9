"""The kernels of states with one decay a token, or none: values and gradients against the operator in PyTorch.

On a machine without a GPU they run in Triton's interpreter, cut into small tiles, so that short rows have many.
"""

from __future__ import annotations

import pytest
import torch
from recurrences import (
    ALLOWED,
    CPU,
    GPU,
    apart,
    check_documents_apart,
    check_grouped_and_half,
    check_on_a_gpu,
    check_only_what_is_wanted,
    check_repeats,
    check_same,
    documents_of,
    exact,
    heads,
    leaves,
)

pytest.importorskip("triton")
from headwise.recurrence.kernels import scalar_launch
from headwise.recurrence.kernels.scalar_launch import Cut, Segments, run

SMALL = {(64, True): Cut(16, 16, 4, 1), (256, True): Cut(16, 32, 4, 1)}


@pytest.fixture
def small(monkeypatch):
    """Chunks of 16 tokens, and segments of 48."""
    both = {(64, True): Cut(16, 0, 4, 1)}
    cuts = dict.fromkeys(scalar_launch.LAUNCHES, SMALL) | {"both": both, "values": {(256, True): Cut(32, 16, 4, 1)}}
    monkeypatch.setattr(scalar_launch, "LAUNCHES", cuts)
    monkeypatch.setattr(scalar_launch, "SEGMENTS", Segments(10**6, 33, 96))


def made(b=2, h=2, n=130, d=24, dv=40, *, decay=True, state=True, documents=False, seed=0, device="cpu", dtype=torch.float32,
         fast=1.0):  # fmt: skip
    """Inputs by name as views of (b, n, h, ...), and where documents start."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    found = heads(noise, b, n, h, d, dv, device, dtype)
    if decay:
        found["decay"] = (-fast * torch.nn.functional.softplus(noise(b, n, h) - 2)).to(device).transpose(1, 2)
    if state:
        found["state"] = noise(b, h, d, dv).to(device)
    starts = (torch.rand(b, n, generator=generator) < 4 / n).to(device) if documents else None
    return leaves(found), starts


def by_kernel(given, starts):
    return run(given["q"], given["k"], given["v"], given.get("decay"), given.get("state"), documents_of(starts))


CASES = {
    "all": {},
    "documents": {"documents": True},
    "plain": {"decay": False, "state": False},
    "plain, documents": {"decay": False, "documents": True},
    "no state": {"state": False, "n": 100},
    "one token": {"n": 1},
    "one chunk": {"n": 16, "state": False},
    "less than a segment": {"n": 37, "documents": True},
    "whole chunks": {"n": 96, "d": 16, "dv": 32},
    "wide": {"d": 40, "dv": 72, "b": 1, "h": 1},
    "wide, documents": {"d": 72, "dv": 24, "b": 1, "h": 1, "documents": True, "n": 70},
    "fast": {"fast": 30.0},
}


@CPU
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, small):
    check_same(by_kernel, *made(**CASES[name]))


@CPU
@pytest.mark.parametrize("documents", [False, True])
def test_without_a_gradient_of_the_last_state(documents, small):
    check_same(by_kernel, *made(documents=documents), of_last=False)
    check_same(by_kernel, *made(documents=documents, n=40), of_last=False)


@CPU
@pytest.mark.parametrize("name", ["all", "documents", "plain"])
def test_as_it_is_cut_for_float32(name):
    check_same(by_kernel, *made(**CASES[name]))


@CPU
def test_only_what_is_wanted_is_differentiated(small):
    check_only_what_is_wanted(by_kernel, made()[0])


@CPU
def test_grouped_keys_and_half_precision(small):
    check_grouped_and_half(by_kernel, made(h=4, n=70)[0])


@CPU
def test_nothing_of_another_document_is_read(small):
    check_documents_apart(by_kernel, made(b=1, n=90, state=False)[0], 50)


ON_GPU = [
    ("all", {"n": 1500, "d": 128, "dv": 128, "documents": True}, torch.bfloat16),
    ("long", {"n": 9000, "d": 64, "dv": 64, "b": 1}, torch.bfloat16),
    ("fast", {"n": 4096, "d": 128, "dv": 128, "b": 1, "fast": 20.0}, torch.bfloat16),
    ("slow", {"n": 4096, "d": 128, "dv": 64, "b": 1, "fast": 0.02}, torch.bfloat16),
    ("plain", {"n": 1024, "d": 128, "dv": 128, "decay": False, "state": False}, torch.bfloat16),
    ("float16", {"n": 1500, "d": 128, "dv": 128, "documents": True}, torch.float16),
    ("narrow float32", {"n": 600, "d": 64, "dv": 64, "documents": True}, torch.float32),
    ("float32", {"n": 1500, "d": 128, "dv": 96, "documents": True}, torch.float32),
]


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("name", "shape", "dtype"), [pytest.param(*case, marks=GPU, id=case[0]) for case in ON_GPU])
def test_on_a_gpu(name, shape, dtype, descriptors, monkeypatch):
    monkeypatch.setattr(scalar_launch, "TMA_FROM", 0 if descriptors else 1 << 30)
    given, starts = made(**shape, device="cuda", dtype=dtype)
    check_on_a_gpu(by_kernel, given, starts, ALLOWED[dtype], loose={"decay"})


@pytest.mark.parametrize("fused", [pytest.param(True, marks=GPU), pytest.param(False, marks=GPU)])
def test_a_gpu_repeats_its_bits(fused, monkeypatch):
    if not fused:
        monkeypatch.setitem(scalar_launch.LAUNCHES, "both", {})
    given, starts = made(n=3000, d=128, dv=128, documents=True, device="cuda", dtype=torch.bfloat16)
    found = check_repeats(by_kernel, given, starts)
    _, right = exact(given, starts)
    for leaf, mine, theirs in zip(given, found, right, strict=True):
        assert apart(mine, theirs) < 3e-2, leaf
