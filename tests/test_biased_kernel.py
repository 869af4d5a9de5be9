"""Attention with edited scores in our Triton kernels: values and gradients against the formulas in float64.

On a machine without a GPU the kernels run in Triton's interpreter, cut into small tiles, so that small shapes have many.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from headwise.attention.backends import _biased
from headwise.attention.backends._biased import Launch, Terms, biased_attention
from headwise.errors import BackendError, ShapeError

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"))
REAL = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = [ON_CPU, pytest.param("cuda", marks=[pytest.mark.gpu, REAL])]
SMALL = {
    "forward": Launch(16, 32, 4, 1),
    "forward, more": Launch(16, 32, 4, 1),
    "keys": Launch(32, 16, 4, 1),
    "queries": Launch(32, 16, 4, 1),
    "table": Launch(16, 16, 4, 1),
}
SCALE = 0.37

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def cut(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(_biased, "LAUNCHES", {name: {(256, True): cut, (256, False): cut} for name, cut in SMALL.items()})


def reference(q, k, v, terms, query_positions=None, key_positions=None):
    """(output, log-sum-exp) by the formulas, in the inputs' type."""
    n, m = q.shape[2], k.shape[2]
    device, group = q.device, q.shape[1] // k.shape[1]
    i = torch.arange(m - n, m, device=device)[None] if query_positions is None else query_positions
    j = torch.arange(m, device=device)[None] if key_positions is None else key_positions
    away = (i[:, :, None] - j[:, None, :])[:, None]
    there = j[:, None, None, :]
    s = terms.scale * q @ k.repeat_interleave(group, 1).mT
    if terms.softcap is not None:
        s = terms.softcap * torch.tanh(s / terms.softcap)
    if terms.slopes is not None:
        s = s - terms.slopes[:, None, None] * away.abs()
    if terms.table is not None:
        r = terms.table.shape[1] // 2
        bias = terms.table[:, away.clamp(-r, r) + r]  # (heads or 1, b or 1, 1, n, m)
        s = s + bias[:, :, 0].transpose(0, 1)
    seen = (there >= 0).expand(len(q), 1, n, m)
    if terms.causal:
        seen = seen & (away >= 0)
    if terms.window is not None:
        seen = seen & ((away.abs() < terms.window) | (there < terms.sink))
    if terms.query_documents is not None:
        seen = seen & (terms.query_documents[:, None, :, None] == terms.key_documents[:, None, None, :])
    some = seen.any(-1, keepdim=True)
    top = torch.where(some, s.detach().masked_fill(~seen, -torch.inf).amax(-1, keepdim=True), 0.0)
    e = torch.where(seen, s - top, -torch.inf).exp()
    total = e.sum(-1, keepdim=True)
    if terms.logit is not None:
        total = total + (terms.logit[:, None, None] - top).exp()
    total = torch.where(some, total, 1.0)
    return (e / total) @ v.repeat_interleave(group, 1), torch.where(some, total.log() + top, -torch.inf)[..., 0]


def random(*shape, seed, device, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def made(device, n=40, m=40, d=16, dv=None, heads=2, kv=1, b=1, dtype=torch.float32):
    shapes = ((b, heads, n, d), (b, kv, m, d), (b, kv, m, dv or d))
    return [random(*shape, seed=seed, device=device, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def edits(device, heads, *names, r=11, shared=False):
    size = 1 if shared else heads
    every = {
        "slopes": 0.2 * random(size, seed=5, device=device).abs(), "logit": random(size, seed=6, device=device),
        "table": random(size, 2 * r + 1, seed=7, device=device),
    }  # fmt: skip
    return {name: every[name].requires_grad_() for name in names}


def documents(device, n, m, b):
    ids = torch.stack([torch.arange(m) // (13 + row) for row in range(b)]).to(device)
    return {"query_documents": ids[:, m - n :], "key_documents": ids}


CASES = {
    "plain": ({}, {}, ()),
    "causal": ({}, {"causal": True}, ()),
    "grouped": ({"heads": 6, "kv": 2, "b": 2, "n": 23, "m": 37}, {"causal": True}, ()),
    "queries last": ({"n": 21, "m": 75}, {"causal": True}, ()),
    "more queries than keys": ({"n": 45, "m": 22}, {"causal": True}, ()),
    "window": ({"n": 70, "m": 77}, {"causal": True, "window": 19}, ()),
    "two-sided window": ({"n": 61, "m": 61}, {"window": 12}, ()),
    "wide window": ({"n": 100, "m": 105}, {"causal": True, "window": 70}, ()),
    "wide two-sided window": ({"n": 100, "m": 105}, {"window": 62}, ()),
    "window and sink": ({"n": 90, "m": 93}, {"causal": True, "window": 9, "sink": 5}, ()),
    "two-sided window and sink": ({"n": 70, "m": 70}, {"window": 7, "sink": 50}, ()),
    "documents": ({"n": 33, "m": 50, "b": 2}, {"causal": True, "documents": True}, ()),
    "documents in a window": ({"n": 50, "m": 50}, {"causal": True, "window": 9, "documents": True}, ()),
    "softcap": ({}, {"softcap": 1.5}, ()),
    "alibi": ({"heads": 4, "kv": 2}, {"causal": True}, ("slopes",)),
    "alibi both ways": ({"n": 23, "m": 41}, {}, ("slopes",)),
    "shared slope and logit": ({}, {"causal": True, "shared": True}, ("slopes", "logit")),
    "table": ({"n": 70, "m": 70}, {"causal": True}, ("table",)),
    "table both ways": ({"n": 70, "m": 83, "b": 2}, {}, ("table",)),
    "table that ends with a tile": ({"n": 70, "m": 70}, {"r": 18}, ("table",)),
    "wide table": ({"n": 50, "m": 67}, {"causal": True, "r": 80}, ("table",)),
    "wide table both ways": ({"n": 53, "m": 53}, {"r": 60}, ("table",)),
    "shared table": ({"n": 40, "m": 50, "heads": 4, "kv": 2, "b": 2}, {"causal": True, "shared": True, "r": 30}, ("table",)),
    "table of one entry": ({}, {"r": 0}, ("table",)),
    "table of three entries": ({"n": 33}, {"r": 1}, ("table",)),
    "table in a window": ({"n": 90, "m": 95}, {"causal": True, "window": 20, "r": 30}, ("table",)),
    "table in a window and sinks": ({"n": 110, "m": 110}, {"causal": True, "window": 18, "sink": 18, "r": 120}, ("table",)),
    "table in a two-sided window and sinks": ({"n": 90, "m": 90}, {"window": 10, "sink": 35, "r": 40}, ("table",)),
    "table and documents": ({"n": 50, "m": 50}, {"causal": True, "documents": True}, ("table",)),
    "table, more queries than keys": ({"n": 45, "m": 22}, {"r": 20}, ("table",)),
    "logit": ({"heads": 4}, {"causal": True}, ("logit",)),
    "everything": ({"n": 60, "m": 72, "heads": 4, "kv": 2, "b": 2}, {"causal": True, "softcap": 2.0, "window": 25},
                   ("slopes", "table", "logit")),
    "head size 8": ({"d": 8}, {"causal": True}, ()),
    "head size 24": ({"d": 24, "n": 19}, {"causal": True}, ("slopes",)),
    "head size 64": ({"d": 64}, {"causal": True}, ("table",)),
    "narrower values": ({"d": 24, "dv": 8}, {"causal": True}, ("table",)),
    "wider values": ({"d": 8, "dv": 33}, {}, ()),
    "one query": ({"n": 1, "m": 50}, {"causal": True}, ("slopes", "table")),
    "one key": ({"n": 1, "m": 1}, {"causal": True}, ("table", "logit")),
}  # fmt: skip


def case(name, device):
    """(q, k, v), terms, names of the edits that want gradients. On a GPU everything is some times longer."""
    shape, given, names = CASES[name]
    shape, given = dict(shape), dict(given)
    longer = 1 if device == "cpu" else 7
    shape |= {size: shape.get(size, 40) * longer + (longer > 1) * (3 if shape.get(size, 40) > 1 else 0) for size in ("n", "m")}
    if shape["n"] == 1 or CASES[name][0].get("n") == 1:
        shape["n"] = 1
    for size in ("window", "sink", "r"):
        if given.get(size, 0) > 1:
            given[size] *= longer
    x = made(device, **shape)
    heads = shape.get("heads", 2)
    extra = edits(device, heads, *names, r=given.pop("r", 11 * longer), shared=given.pop("shared", False))
    if given.pop("documents", False):
        given |= documents(device, shape["n"], shape["m"], len(x[0]))
    return x, Terms(SCALE, **given, **extra), names


def in_double(x, terms, names):
    """The same, in float64, to be differentiated."""
    exact = {name: getattr(terms, name).detach().double().requires_grad_() for name in names}
    return [t.detach().double().requires_grad_() for t in x], replace(terms, **exact)


def wanting(x, terms, names):
    return [*x, *(getattr(terms, name) for name in names)]


def assert_close(got, want, tolerance, name):
    assert got.shape == want.shape, name
    got, want = got.detach().double(), want.detach()
    error, size = float((got - want).abs().max()), max(1.0, float(want.abs().max()))
    assert error < tolerance * size, f"{name} differs by {error:.2g} of {size:.2g}"


def check(x, terms, names, clean=None, **places):
    """Against float64; clean: the inputs without what nobody should read."""
    tolerance = 1e-5 if x[0].device.type == "cpu" else 5e-5  # much longer sums
    out, lse = biased_attention(*x, terms, **places)
    exact, exact_terms = in_double(clean or x, terms, names)
    right, right_lse = reference(*exact, exact_terms, **places)
    assert out.dtype == x[0].dtype
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert_close(out, right, tolerance, "output")
    assert torch.equal(lse.isinf(), right_lse.isinf())
    assert_close(lse.nan_to_num(neginf=0), right_lse.nan_to_num(neginf=0), tolerance, "log-sum-exp")
    grad = random(*out.shape, seed=9, device=out.device)
    got = torch.autograd.grad(out, wanting(x, terms, names), grad)
    want = torch.autograd.grad(right, wanting(exact, exact_terms, names), grad.double())
    for name, one, other in zip(("q", "k", "v", *names), got, want, strict=True):
        assert_close(one, other, tolerance, f"gradient of {name}")
    return out, got


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_formulas(name, device):
    check(*case(name, device))


def placed(device):
    """Left and right padding: empty slots hold NaN, and the first queries come before every key."""
    x = made(device, n=20, m=37, b=2, heads=4, kv=2)
    pads = torch.tensor([0, 18])
    keys = (torch.arange(37)[None] - pads[:, None]).clamp(min=-1)
    keys[0, 33:] = -1
    queries = torch.arange(17, 37)[None] - pads[:, None] - torch.tensor([[0], [4]])
    gone = (keys < 0).to(device)[:, None, :, None]
    clean = [x[0], *(t.detach().masked_fill(gone, 0.0) for t in x[1:])]
    dirty = [x[0], *(t.detach().masked_fill(gone, torch.nan).requires_grad_() for t in x[1:])]
    return dirty, clean, {"query_positions": queries.to(device), "key_positions": keys.to(device)}


@pytest.mark.parametrize("given", [{"causal": True}, {}, {"causal": True, "window": 7, "sink": 3}, {"window": 5}])
def test_given_positions_and_empty_slots(given, device):
    dirty, clean, places = placed(device)
    names = ("slopes", "logit")
    out, grads = check(dirty, Terms(SCALE, **given, **edits(device, 4, *names)), names, clean=clean, **places)
    if given.get("causal"):
        assert bool((out[1, :, :5] == 0).all())
        assert bool((grads[0][1, :, :5] == 0).all())


def test_a_table_at_given_positions(device):
    dirty, clean, places = placed(device)
    terms = Terms(SCALE, causal=True, table=edits(device, 4, "table")["table"])
    with pytest.raises(ShapeError, match="in order"):
        biased_attention(*dirty, terms, **places)
    check(dirty, replace(terms, table=terms.table.detach()), (), clean=clean, **places)


def test_rows_that_see_nothing(device):
    x = made(device, n=30, m=30)
    ids = torch.arange(30, device=device)[None] // 10
    names = ("slopes", "table", "logit")
    terms = Terms(SCALE, query_documents=torch.where(ids == 1, 7, ids), key_documents=ids, **edits(device, 2, *names))
    out, grads = check(x, terms, names)
    assert bool((out[:, :, 10:20] == 0).all())
    assert bool((grads[0][:, :, 10:20] == 0).all())
    assert not any(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 128, 256])
def test_halves_are_as_good_as_in_eager_mode(size, dtype, device):
    if device == "cpu" and size > 16:
        pytest.skip("too slow in the interpreter")
    names = ("slopes", "table", "logit")
    n = 40 if device == "cpu" else 450
    x = made(device, n=n, m=n + 9, d=size, heads=4, kv=2, dtype=dtype)
    terms = Terms(size**-0.5, causal=True, softcap=3.0, **edits(device, 4, *names))
    halves = replace(terms, **{name: getattr(terms, name).detach().to(dtype).requires_grad_() for name in names})
    grad = random(*x[0].shape, seed=9, device=device, dtype=dtype)
    exact, exact_terms = in_double(x, terms, names)

    def run(function, x, terms):
        out = function(*x, terms)[0]
        return [out, *torch.autograd.grad(out, wanting(x, terms, names), grad.to(out.dtype))]

    right = run(reference, exact, exact_terms)
    ours, eager = run(biased_attention, x, terms), run(reference, x, halves)
    for name, one, plain, best in zip(("output", "q", "k", "v", *names), ours, eager, right, strict=True):
        error, usual = (float(((t - best).norm() / best.norm()).detach()) for t in (one, plain))
        assert error < 2 * usual, f"{name}: {error:.2g}, in eager mode {usual:.2g}"


def gradients(x, terms, names):
    out, _ = biased_attention(*x, terms)
    return [out, *torch.autograd.grad(out, wanting(x, terms, names), random(*out.shape, seed=9, device=out.device).to(out.dtype))]


def test_the_same_bits_twice_and_in_portions(device, monkeypatch):
    """However few heads, or blocks of one head, the buffer of diagonals holds."""
    longer, dtype = (1, torch.float32) if device == "cpu" else (17, torch.bfloat16)
    x = made(device, n=40 * longer, m=45 * longer, heads=3, dtype=dtype)
    names = ("slopes", "table", "logit")
    terms = Terms(SCALE, causal=True, softcap=2.0, **edits(device, 3, *names, r=11 * longer))
    zeros, sizes = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kwargs: (sizes.append(shape), zeros(*shape, **kwargs))[1])
    once = gradients(x, terms, names)
    (rows, blocks, width) = next(shape for shape in sizes if len(shape) == 3)
    assert rows == 3
    assert blocks > 2
    for limit, portion in (
        (_biased.PARTIAL_BYTES, (3, blocks)),
        (2 * blocks * width * 4, (2, blocks)),
        (2 * width * 4, (1, 2)),
        (1, (1, 1)),
    ):
        monkeypatch.setattr(_biased, "PARTIAL_BYTES", limit)
        sizes.clear()
        again = gradients(x, terms, names)
        assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
        assert (*portion, width) in sizes


def test_strides_and_partial_gradients(device):
    """Inputs laid out in other ways, a gradient that is one number for all, and only some gradients wanted."""
    x, terms, names = made(device, n=17, m=30, heads=2, b=2), Terms(SCALE, causal=True), ()
    once = gradients(x, terms, names)
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in x]  # heads next to tokens
    apart = [t.detach().mT.contiguous().mT.requires_grad_() for t in x]  # numbers of a head apart
    for others in (turned, apart):
        assert all(torch.equal(a, b) for a, b in zip(once, gradients(others, terms, names), strict=True))
    exact, exact_terms = in_double(x, terms, names)
    reference(*exact, exact_terms)[0].sum().backward()
    biased_attention(*x, terms)[0].sum().backward()
    for one, other in zip(x, exact, strict=True):
        assert_close(one.grad, other.grad, 1e-5, "gradient of a sum")
    for at in range(3):
        some = [t.detach().requires_grad_(i == at) for i, t in enumerate(x)]
        biased_attention(*some, terms)[0].sum().backward()
        assert torch.equal(some[at].grad, x[at].grad)
        assert all(t.grad is None for i, t in enumerate(some) if i != at)
    table = edits(device, 2, "table")["table"]
    biased_attention(*(t.detach() for t in x), replace(terms, table=table))[0].sum().backward()
    assert table.grad is not None


def test_what_does_not_fit_is_refused(device):
    q, k, v = made(device, heads=4, kv=2)
    for wrong in ({"slopes": torch.ones(3)}, {"table": torch.ones(4, 10)}, {"table": torch.ones(3, 11)},
                  {"logit": torch.ones(4, 1)}, {"query_documents": torch.zeros(1, 40)}):  # fmt: skip
        with pytest.raises(ShapeError):
            biased_attention(q, k, v, Terms(SCALE, **wrong))
    with pytest.raises(ShapeError, match="fit together"):
        biased_attention(q, k, v[:, :, :-1], Terms(SCALE))
    with pytest.raises(ShapeError, match="query_positions"):
        biased_attention(q, k, v, Terms(SCALE), query_positions=torch.arange(40))
    with pytest.raises(BackendError, match="float64"):
        biased_attention(q.double(), k.double(), v.double(), Terms(SCALE))
    out, lse = biased_attention(q, k[:, :, :0], v[:, :, :0], Terms(SCALE))
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
