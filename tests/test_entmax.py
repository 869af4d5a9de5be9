"""Entmax and sparsemax: the stages against what defines them, and their kernels against the stages in float64."""

from __future__ import annotations

import pytest
import torch

from headwise import Causal, Sink, Window, attend
from headwise.attention.backends import chunked
from headwise.attention.backends._entmax import LAUNCHES, Launch, _rows, _Setting, entmax_attention, launch
from headwise.attention.kernels import interpreted
from headwise.attention.read import Operands, Read
from headwise.errors import ShapeError
from headwise.stages import entmax as stage
from headwise.stages.entmax import Entmax, entmax
from headwise.stages.sparsemax import Sparsemax

ALPHAS = (1.05, 1.3, 1.5, 1.7, 1.95, 2.0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def scores(rows=12, m=200, scale=1.0, seed=0, dtype=torch.float64):
    return scale * torch.randn(rows, m, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the stages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0, 1e4])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_are_a_distribution_that_solves_its_equation(alpha, scale):
    s = scores(scale=scale)
    p, tau = entmax(s, alpha)
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-14)
    expected = ((alpha - 1) * s - tau[:, None]).clamp(min=0) ** (1 / (alpha - 1))
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-12 * max(1.0, scale))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 20.0])
def test_single_precision(alpha, scale):
    s = scores(4, 3000, scale, dtype=torch.float32)
    exact = entmax(s.double(), alpha)[0]
    assert float((entmax(s, alpha)[0] - exact).abs().max()) < 5e-6 * float(exact.max())


def test_near_one_it_is_softmax():
    s = scores(scale=2.0)
    for alpha, error in ((1.01, 5e-2), (1.0001, 5e-4), (1 + 1e-12, 1e-11)):
        torch.testing.assert_close(entmax(s, alpha)[0], s.softmax(-1), rtol=0, atol=error)


def test_two_is_sparsemax_the_nearest_point_of_the_simplex():
    s = scores(3, 6)
    p, _ = Sparsemax().normalize(s)
    assert torch.equal(p, Entmax(2.0).normalize(s)[0])
    rivals = torch.distributions.Dirichlet(torch.full((6,), 0.5, dtype=torch.float64)).sample((4000,))
    rivals = torch.cat([rivals, torch.eye(6, dtype=torch.float64)])
    distance = (rivals[:, None] - s).square().sum(-1)
    assert bool((distance > (p - s).square().sum(-1)).all())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_changes_nothing(alpha):
    s = scores(scale=1.5)
    p, tau = entmax(s, alpha)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    moved, moved_tau = entmax(s + 3.25, alpha)
    torch.testing.assert_close(moved, p, rtol=0, atol=1e-13)
    torch.testing.assert_close(moved_tau, tau + 3.25 * (alpha - 1))
    torch.testing.assert_close(entmax(s[:, order], alpha)[0], p[:, order], rtol=0, atol=1e-14)
    hidden = torch.cat([s, torch.full((12, 30), -torch.inf, dtype=torch.float64)], -1)
    torch.testing.assert_close(entmax(hidden, alpha)[0][:, :200], p, rtol=0, atol=1e-14)
    assert bool((entmax(hidden, alpha)[0][:, 200:] == 0).all())


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_supports_longer_than_what_is_sorted_first(alpha):
    """Rows whose supports end at once, after one more sorting, and never: together and alone."""
    s = torch.cat([scores(4, 900, scale) for scale in (1.0, 2e-2, 1e-4)])
    p, _ = entmax(s, alpha)
    sizes = (p > 0).sum(-1)
    assert int(sizes.min()) < stage.FIRST_SORTED < int(sizes.max())
    for i in range(12):
        torch.testing.assert_close(entmax(s[i], alpha)[0], p[i], rtol=0, atol=1e-15)
        torch.testing.assert_close(p[i].tolist(), stage.oracle(Entmax(alpha), s[i].tolist(), 0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ties_zeros_and_single_keys(alpha):
    p, _ = entmax(torch.tensor([[0.7, 0.7, -9e9, 0.7, 0.7], [5.0, -5.0, -5.0, -5.0, -5.0]], dtype=torch.float64), alpha)
    torch.testing.assert_close(p[0], torch.tensor([0.25, 0.25, 0, 0.25, 0.25], dtype=torch.float64), rtol=0, atol=1e-15)
    assert (float(p[1, 0]) == 1.0) == (alpha > 1.1)
    assert bool((p[1, 1:] == 0).all()) == (alpha > 1.1)  # where 10 (alpha - 1) is above 1
    assert entmax(torch.tensor([-3.0]), alpha)[0].tolist() == [1.0]
    assert entmax(torch.empty(2, 0), alpha)[0].shape == (2, 0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients(alpha):
    s = scores(3, 7, 0.8, seed=5)
    s[1, 3:] = -torch.inf
    s[2] = -torch.inf
    seen = s > -torch.inf

    def of(free):
        p, tau = entmax(torch.where(seen, free, -torch.inf), alpha)
        return p, tau[:2]

    free = torch.where(seen, s, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(of, (free,))
    p, tau = entmax(s.requires_grad_(), alpha)
    (grad,) = torch.autograd.grad((p * torch.arange(7)).sum(), s)
    tau = tau.detach()
    assert p[2].tolist() == [0.0] * 7
    assert float(tau[2]) == -torch.inf
    assert bool((grad[2] == 0).all())
    assert not bool(grad.isnan().any())


def test_alphas_that_are_none():
    for alpha in (1.0, 0.5, 2.1, float("nan")):
        with pytest.raises(ShapeError, match="alpha is"):
            Entmax(alpha)


@pytest.mark.parametrize("normalizer", [Sparsemax(), Entmax(), Entmax(1.3)])
def test_chunks_are_exact_and_hold_no_table(normalizer, largest):
    n = 512
    q, k, v = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(i)).double().requires_grad_() for i in range(3))
    stages = (Causal(), normalizer)
    whole = attend(q, k, v, *stages, backend="reference")
    wanted = torch.autograd.grad(whole.square().sum(), (q, k, v))
    with largest:
        out = chunked.run(Read.of(stages, 8**-0.5), Operands.of(q, k, v), rows=32)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert largest.size <= 2 * n * 32 * 8 * 2  # rows of scores, not n x n of them
    for got, want in zip((out, *grads), (whole, *wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# ---- the kernels -------------------------------------------------------------------------------------------------------

CASES = {
    "all": dict(n=45, m=70),
    "causal": dict(n=70, m=70, causal=True),
    "last queries": dict(n=21, m=70, causal=True, heads=4, kv=2, b=2),
    "window": dict(n=50, m=50, causal=True, window=9),
    "window, sink": dict(n=50, m=83, causal=True, window=20, sink=5),
    "both sides": dict(n=60, m=60, window=7, sink=40),
    "nothing to see": dict(n=40, m=22, causal=True),
    "nearly alike": dict(n=40, m=60, spread=0.02),
    "far apart": dict(n=40, m=60, causal=True, spread=3.0),
    "odd sizes": dict(n=37, m=41, causal=True, d=20, dv=9),
}  # fmt: skip


def made(n, m, d=16, dv=16, heads=2, kv=1, b=1, spread=1.0, seed=0, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, heads, n, d), (b, kv, m, d), (b, kv, m, dv), (b, heads, n, dv))
    q, k, v, w = (torch.randn(shape, generator=g).to(device, dtype) for shape in shapes)
    return (q * spread).requires_grad_(), k.requires_grad_(), v.requires_grad_(), w


def expected(q, k, v, alpha, scale, causal=False, window=None, sink=0):
    """The stage, in float64 and with all scores at once."""
    masks = [Causal()] if causal else []
    masks += [Window(window) | Sink(sink)] if window else []
    return attend(q, k, v, *masks, Entmax(alpha), scale=scale, backend="reference")


def both(q, k, v, w, alpha, scale, **mask):
    """[(got, expected)] of the output and of all gradients."""
    out = entmax_attention(q, k, v, alpha=alpha, scale=scale, **mask)
    grads = torch.autograd.grad(out, (q, k, v), w)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = expected(*exact, alpha, scale, **mask)
    return list(zip((out, *grads), (wanted, *torch.autograd.grad(wanted, exact, w.double())), strict=True))


def check(pairs, tolerance):
    for name, (got, want) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
        got, want = got.detach().double(), want.detach()
        assert bool(got.isfinite().all()), name
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max())), name


@interpreter
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel(case, alpha):
    mask = dict(CASES[case])
    shape = {name: mask.pop(name) for name in ("n", "m", "d", "dv", "spread", "heads", "kv", "b") if name in mask}
    q, k, v, w = made(**shape)
    check(both(q, k, v, w, alpha, 0.6, **mask), 5e-6)


@interpreter
def test_the_kernel_skips_tiles_that_hold_no_weight():
    """Near keys far above the rest: few tiles stay; and to call them dead too early would show."""
    q, k, v, w = made(64, 64, heads=4, kv=4)
    with torch.no_grad():
        k.copy_(torch.nn.functional.one_hot(torch.arange(64) // 4, 16).float() * 3)
        q.copy_(k)
    check(both(q, k, v, w, 1.5, 0.5, causal=True), 2e-6)
    with torch.no_grad():
        live = _rows(q, k, v, _Setting(1.5, 0.5, True, None, 0))[3]
        near = _rows(q, k, v, _Setting(1.5, 0.15, False, None, 0))[3]  # gaps of 0.675: below the threshold at 0.5, but not by 1
    assert live.tolist() == near.tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]]] * 4


@interpreter
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_kernel_with_ties(alpha):
    q, k, v, w = made(20, 33)
    with torch.no_grad():
        k[:, :, 1::2] = k[:, :, :-1:2]
        k[:, :, 20:] = k[:, :, 19:20]
        q[:, :, :3] = 0
    check(both(q, k, v, w, alpha, 0.5), 2e-6)


@interpreter
@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_the_kernel_at_other_scales(scale):
    q, k, v, w = made(20, 33, kv=2)
    check(both(q, k, v, w, 1.5, scale, causal=True), 2e-6)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_in_half_precision(dtype):
    n = 150 if dtype == torch.float16 else 40  # the interpreter knows no bfloat16: there it is float32, in smaller tiles
    q, k, v, w = made(n, n, dtype=dtype)
    check(both(q, k, v, w, 1.5, 0.5, causal=True, window=90, sink=4), 2e-2)
    out = entmax_attention(q, k, v, alpha=1.5, scale=0.5)
    assert out.dtype == dtype
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.sum(), (q, k, v)))


@interpreter
def test_the_kernel_repeats_its_bits_and_reads_any_layout():
    q, k, v, w = made(35, 35, b=2)

    def run(*tensors, of):
        out = entmax_attention(*tensors, alpha=1.5, scale=0.6, causal=True)
        return (out, *torch.autograd.grad(out, tensors, of))

    first = run(q, k, v, of=w)
    assert all(torch.equal(a, b) for a, b in zip(first, run(q, k, v, of=w), strict=True))
    strange = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k)]
    strange.append(v.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_())
    again = run(*strange, of=w.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@interpreter
def test_the_kernel_hides_nothing_that_is_wrong():
    q, k, v, _ = made(20, 40, heads=4, kv=4)
    with torch.no_grad():
        q[0, 1, 3] = k[0, 2, 30, 2] = torch.nan
    out = entmax_attention(q, k, v, alpha=1.5, scale=0.6, causal=True)
    wrong = out.isnan().all(-1)
    assert torch.equal(wrong, out.isnan().any(-1))
    assert wrong[0, 1].nonzero().flatten().tolist() == [3]
    assert wrong[0, 2].nonzero().flatten().tolist() == list(range(10, 20))
    assert not bool(wrong[0, ::3].any())


@interpreter
def test_the_kernel_without_queries_or_keys():
    for n, m in ((0, 5), (4, 0)):
        q, k, v, w = made(n, m)
        out = entmax_attention(q, k, v, alpha=2.0, scale=1.0)
        assert out.tolist() == torch.zeros(1, 2, n, 16).tolist()
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(out, (q, k, v), w))


def test_what_the_kernel_refuses():
    q, k, v, _ = made(4, 4)
    with pytest.raises(ShapeError, match=r"alpha is 1\.4"):
        entmax_attention(q, k, v, alpha=1.4, scale=1.0)
    with pytest.raises(ShapeError, match="do not fit"):
        entmax_attention(q, k[:, :, :3], v, alpha=1.5, scale=1.0)
    with pytest.raises(ShapeError, match="larger than 128"):
        entmax_attention(*(t.repeat(1, 1, 1, 9) for t in (q, k, v)), alpha=1.5, scale=1.0)


def test_launches_fit_each_other():
    for d in (16, 64, 128):
        for exact in (False, True):
            rows, queries, keys = (launch(kernel, d, exact) for kernel in LAUNCHES)
            assert (queries.m, queries.n) == (rows.m, rows.n)
            assert keys.n == rows.n
            assert rows.m % keys.m == 0
            assert all(isinstance(cut, Launch) for cut in (rows, queries, keys))


# ---- on a GPU ----------------------------------------------------------------------------------------------------------

ON_GPU = [(case, torch.bfloat16) for case in CASES] + [("causal", torch.float16), ("window, sink", torch.float32)]


def on_gpu(n, m, dtype, **more):
    return made(n, m, dtype=dtype, device="cuda", b=2, heads=4, kv=2, **more)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*each, marks=gpu) for each in ON_GPU])
def test_on_a_gpu(case, dtype, alpha):
    mask = dict(CASES[case])
    n, m = (9 * mask.pop(name) + 5 for name in ("n", "m"))
    q, k, v, w = on_gpu(n, m, dtype, d=mask.pop("d", 64), dv=mask.pop("dv", 64), spread=mask.pop("spread", 1.0))
    mask = {name: mask[name] for name in ("causal", "window", "sink") if name in mask}
    mask = {name: number if isinstance(number, bool) else 9 * number for name, number in mask.items()}
    check(both(q, k, v, w, alpha, 0.125, **mask), 2e-5 if dtype == torch.float32 else 2e-2)


WIDE = [pytest.param(*each, marks=gpu) for each in ((128, torch.bfloat16), (80, torch.float32))]


@pytest.mark.parametrize(("d", "dtype"), WIDE)
def test_wide_heads_on_a_gpu(d, dtype):
    q, k, v, w = on_gpu(700, 700, dtype, d=d, dv=d)
    check(both(q, k, v, w, 1.5, d**-0.5, causal=True), 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("alpha", [pytest.param(alpha, marks=gpu) for alpha in (1.5, 2.0)])
def test_a_gpu_repeats_its_bits(alpha):
    q, k, v, w = on_gpu(2100, 2100, torch.bfloat16, d=64, dv=64)
    runs = []
    for _ in range(3):
        out = entmax_attention(q, k, v, alpha=alpha, scale=0.125, causal=True)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), w)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("n", [pytest.param(n, marks=gpu) for n in (32768,)])
def test_memory_on_a_gpu_is_that_of_rows(n):
    q, k, v, w = made(n, n, d=64, dv=64, heads=2, kv=1, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = entmax_attention(q, k, v, alpha=1.5, scale=0.125, causal=True)
    torch.autograd.grad(out, (q, k, v), w)
    assert torch.cuda.max_memory_allocated() - before < n * n // 16
