"""The kernels of states with a decay of each channel of keys: values and gradients against the operator in PyTorch.

On a machine without a GPU they run in Triton's interpreter, cut into small chunks, so that short rows have many.
"""

from __future__ import annotations

import pytest
import torch
from recurrences import (
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
    gradients,
    heads,
    leaves,
)

pytest.importorskip("triton")
from headwise.recurrence.inputs import inputs
from headwise.recurrence.kernels import channels_launch
from headwise.recurrence.kernels.channels_launch import Cut, Segments, refuses, run

SMALL = {
    "outputs": Cut(0, 32, 4, 1), "values": Cut(0, 16, 4, 1), "states": Cut(16, 16, 4, 1),
    **dict.fromkeys(("chunks", "fast chunks", "gradients", "fast gradients"), Cut(16, 16, 4, 1)),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Chunks of 32 tokens, and segments of 64."""
    monkeypatch.setattr(channels_launch, "LAUNCHES", {name: {(256, True): cut} for name, cut in SMALL.items()})
    monkeypatch.setattr(channels_launch, "SEGMENTS", Segments(10**6, 10**6, 40))


def made(b=1, h=2, n=130, d=24, dv=40, *, state=True, documents=False, fast=1.0, seed=0, device="cpu", dtype=torch.float32):
    """Inputs by name as views of (b, n, h, ...), and where documents start. fast: a factor of the decay, "even" or "mixed"."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    found = heads(noise, b, n, h, d, dv, device, dtype)
    decay = -torch.nn.functional.softplus(noise(b, n, h, d) - 2)
    if fast == "mixed":  # slow and fast channels, and stretches in which all of the chunk is slow, or some tokens forget all
        decay = decay * torch.rand(d, generator=generator) ** 4 * 200
        decay[:, : n // 3] *= 1e-3
        decay[:, n // 2] = -60.0
    elif fast == "even":  # fast over a chunk, but not over a few tokens
        decay = -2.0 - 0.5 * torch.rand(b, n, h, d, generator=generator)
    else:
        decay = decay * fast
    found["decay"] = decay.to(device).transpose(1, 2)
    if state:
        found["state"] = noise(b, h, d, dv).to(device)
    starts = (torch.rand(b, n, generator=generator) < 4 / n).to(device) if documents else None
    return leaves(found), starts


def by_kernel(given, starts):
    return run(given["q"], given["k"], given["v"], given["decay"], given.get("state"), documents_of(starts))


CASES = {
    "all": {},
    "documents": {"documents": True, "b": 2, "h": 1},
    "no state": {"state": False, "n": 100},
    "one token": {"n": 1},
    "one chunk": {"n": 32, "state": False},
    "less than a segment": {"n": 37, "documents": True, "b": 2},
    "whole chunks": {"n": 96, "d": 16, "dv": 32},
    "wide": {"d": 40, "dv": 72, "h": 1},
    "wide, documents": {"d": 72, "dv": 24, "h": 1, "documents": True, "n": 70},
    "fast": {"fast": 20.0},
    "very fast": {"fast": 300.0, "documents": True, "h": 1},
    "mixed": {"fast": "mixed"},
    "even": {"fast": "even", "documents": True, "h": 1},
    "slow": {"fast": 1e-3, "documents": True},
}


@CPU
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, small):
    check_same(by_kernel, *made(**CASES[name]), wide=True)


@CPU
@pytest.mark.parametrize("documents", [False, True])
def test_without_a_gradient_of_the_last_state(documents, small):
    check_same(by_kernel, *made(documents=documents), of_last=False, wide=True)


@CPU
@pytest.mark.parametrize("name", ["all", "documents"])
def test_as_it_is_cut_for_float32(name):
    check_same(by_kernel, *made(**CASES[name]), wide=True)


@CPU
def test_longer_chunks_with_what_was_prepared_kept(small, monkeypatch):
    monkeypatch.setattr(channels_launch, "CHUNK", {False: 64, True: 64})
    monkeypatch.setattr(channels_launch, "KEEP", True)
    for fast in ("mixed", "even", 1.0):
        check_same(by_kernel, *made(h=1, fast=fast, documents=fast != 1.0), wide=True)


@CPU
def test_only_what_is_wanted_is_differentiated(small):
    check_only_what_is_wanted(by_kernel, made(n=34, h=1)[0])


@CPU
def test_grouped_keys_and_half_precision(small):
    check_grouped_and_half(by_kernel, made(h=4, n=70)[0])


@CPU
def test_nothing_of_another_document_is_read(small):
    found = check_documents_apart(by_kernel, made(n=90, state=False)[0], 50)
    assert not found["decay"][:, :, [0, 50]].any()  # nothing was there to decay


@CPU
def test_a_row_goes_on_where_it_ended(small):
    given, _ = made(n=100, state=False)
    whole, end = by_kernel(given, None)
    state, outs = None, []
    for a, b in [(0, 33), (33, 34), (34, 100)]:
        piece = {name: t[:, :, a:b] for name, t in given.items()}
        out, state = by_kernel(piece if state is None else piece | {"state": state}, None)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state, end, rtol=2e-5, atol=2e-5)


def test_refusals():
    q, scalar, wide = torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, 272)

    def why(q, decay, erase=None):
        return refuses(inputs(q, q, q, decay, None, erase, None, None, None, None))

    assert why(q, torch.zeros_like(q)) is None
    assert "each channel" in why(q, scalar)
    assert "each channel" in why(q, None)
    assert "only decay and add" in why(q, torch.zeros_like(q), scalar)
    assert "larger than 256" in why(wide, torch.zeros_like(wide))
    assert "know" in why(q.double(), torch.zeros_like(q))


ON_GPU = {
    "bfloat16": ({"d": 128, "dv": 128}, torch.bfloat16, 1e-2),
    "small heads": ({"d": 64, "dv": 64, "documents": True}, torch.bfloat16, 1e-2),
    "wide heads": ({"d": 256, "dv": 256, "n": 700}, torch.bfloat16, 1e-2),
    "odd heads": ({"d": 24, "dv": 40, "n": 333, "documents": True}, torch.bfloat16, 1e-2),
    "fast": ({"d": 128, "dv": 64, "fast": 3.0}, torch.bfloat16, 1e-2),
    "very fast": ({"d": 64, "dv": 128, "fast": 100.0, "documents": True}, torch.bfloat16, 1e-2),
    "mixed": ({"d": 128, "dv": 128, "fast": "mixed"}, torch.bfloat16, 1e-2),
    "even": ({"d": 128, "dv": 64, "fast": "even"}, torch.bfloat16, 1e-2),
    "float16": ({"d": 64, "dv": 128, "documents": True}, torch.float16, 3e-3),
    "float32": ({"d": 64, "dv": 64, "documents": True}, torch.float32, 2e-5),
    "float32, mixed": ({"d": 40, "dv": 72, "fast": "mixed", "n": 500}, torch.float32, 5e-5),
}


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in ON_GPU])
def test_on_a_gpu(name, segments, monkeypatch):
    monkeypatch.setattr(channels_launch, "SEGMENTS", Segments(10**6 if segments else 0, 10**6, 300))
    sizes, dtype, allowed = ON_GPU[name]
    given, starts = made(**({"b": 2, "h": 3, "n": 1500} | sizes), device="cuda", dtype=dtype)
    check_on_a_gpu(by_kernel, given, starts, allowed)
    check_repeats(by_kernel, given, starts)


@pytest.mark.parametrize("n", [pytest.param(65536, marks=GPU)])
def test_a_long_row_on_a_gpu(n):
    """Slow decay: the decay's gradient does not drift."""
    given, _ = made(h=1, n=n, d=64, dv=64, fast=0.01, device="cuda", dtype=torch.bfloat16)
    wanted, right = exact(given, None)
    out, last = by_kernel(given, None)
    assert apart(out, wanted.out) < 1e-2
    for of, found, other in zip(given, gradients(out, last, given), right, strict=True):
        assert apart(found, other) < 2e-2, of
