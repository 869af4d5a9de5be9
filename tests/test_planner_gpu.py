"""What the planner chooses on a GPU, against the reference in float64. Run by hand: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from headwise import Alibi, Causal, Documents, Sink, SinkLogit, Softcap, Temperature, Window, attend, explain
from headwise.attention.backends import sdpa
from headwise.stages.entmax import Entmax
from headwise.stages.low_rank_bias import LowRankBias
from headwise.stages.per_head import PerHead
from headwise.stages.relative_bias import RelativeBias
from headwise.stages.strided import Strided

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def tensors(n=700, m=None, d=64, hq=8, hk=2, dtype=torch.bfloat16, b=2):
    g = torch.Generator("cuda").manual_seed(0)
    m = m or n
    shapes = ((b, hq, n, d), (b, hk, m, d), (b, hk, m, d))
    return tuple(torch.randn(shape, generator=g, device="cuda", dtype=dtype).requires_grad_() for shape in shapes)


def low_rank():
    """Only where there is a GPU: the features must be where the tensors are."""
    features = torch.randn(2, 1, 8, 700, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    return LowRankBias(*(features.cuda() if torch.cuda.is_available() else features))


CASES = [
    ("plain", (Causal(),), "sdpa"),
    ("window", (Causal() & Window(100),), "kernel"),
    ("streaming", (Causal() & (Window(100) | Sink(4)),), "kernel"),
    ("documents", (Causal(), Documents(torch.arange(700) // 90)), "kernel"),
    ("alibi", (Causal(), Alibi.geometric(8)), "kernel"),
    ("both ways", (Alibi.geometric(8),), "kernel"),
    ("softcap", (Causal(), Softcap(5.0)), "kernel"),
    ("logit", (Causal(), SinkLogit(torch.linspace(-1, 1, 8))), "kernel"),
    ("relative", (Causal(), RelativeBias(torch.randn(8, 101, generator=torch.Generator().manual_seed(0)))), "kernel"),
    ("entmax", (Causal(), Entmax(1.5)), "kernel"),
    ("low rank", (Causal(), low_rank()), "sdpa"),
    ("strided", (Causal() & (Strided(7) | Window(9)),), "flex"),
    ("temperature", (Causal(), Temperature(torch.linspace(0.5, 2, 8))), "flex"),
    ("heads apart", (PerHead((Causal(), Causal() & Window(50)), torch.arange(8) % 2),), "flex"),
]


@pytest.mark.parametrize(("stages", "backend"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_planner_on_a_gpu(stages, backend):
    """It picks the fused path, and that is as exact as plain attention in bfloat16, gradients too."""
    x = tensors()
    told = explain(*x, *stages)
    assert told.backend == backend, str(told)
    weight = torch.randn_like(x[0])
    results = []
    for name in (None, "reference"):
        inputs = x if name is None else tuple(t.detach().double().requires_grad_() for t in x)
        out = attend(*inputs, *stages, backend=name)
        results.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), inputs)])
    inputs = tuple(t.detach().double().requires_grad_() for t in x)
    plain = []
    for part in (x, inputs):
        out = attend(*part, Causal())
        plain.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), part)])
    for mine, exact, base, base_exact in zip(*results, *plain, strict=True):
        size = max(1.0, float(exact.abs().max() / base_exact.abs().max()))
        error, allowed = float((mine - exact).abs().max()), float((base - base_exact).abs().max())
        assert error <= 2.5 * allowed * size + 2**-9 * size, f"{error:.3g} against {allowed:.3g} of plain attention"


@pytest.mark.parametrize("name", ["alibi", "relative", "entmax"])
def test_gradients_are_the_same_bits_twice(name):
    stages = next(case[1] for case in CASES if case[0] == name)
    runs = []
    for _ in range(2):
        x = tensors()
        out = attend(*x, *stages)
        runs.append(torch.autograd.grad(out.float().square().sum(), x))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_cudnn_is_asked_first_on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    assert explain(*tensors(2048, d=128), Causal()).kernel == "sdpa (cuDNN)"
    assert explain(*tensors(100, d=128), Causal()).kernel == "sdpa (PyTorch's choice)"
    x = tensors(sdpa.CUDNN_QUERIES, d=128)
    exact = attend(*(t.double() for t in x), Causal(), backend="reference")
    torch.testing.assert_close(attend(*x, Causal()).double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["alibi", "strided", "low rank"])
def test_decoding_on_a_gpu(name):
    """One query against many keys."""
    stages = next(case[1] for case in CASES if case[0] == name)
    x = tensors()
    with torch.no_grad():
        whole = attend(*x, *stages)
        one = attend(x[0][:, :, -1:], x[1], x[2], *stages)
    torch.testing.assert_close(one, whole[:, :, -1:], rtol=0, atol=2e-2)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("stages", [(Causal(),), (Causal(), Window(200))], ids=["causal", "window"])
def test_gradients_are_right_however_the_gradient_that_comes_is_laid_out(kv_heads, stages):
    """PyTorch keeps plans of cuDNN's backward pass for a layout that it does not look at again."""
    for tokens in (64, 640):
        generator = torch.Generator("cuda").manual_seed(tokens)
        shapes = [(2, heads, tokens, 32) for heads in (4, kv_heads, kv_heads, 4)]
        q, k, v, comes = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes)
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        wanted = torch.autograd.grad(attend(*leaves, *stages, backend="reference"), leaves, comes.double())
        for layout in ("as it is", "tokens before heads", "as it is", "a part of something larger"):
            if layout == "tokens before heads":
                comes = comes.transpose(1, 2).contiguous().transpose(1, 2)
            elif layout == "a part of something larger":
                comes = torch.cat([comes, comes], -1)[..., :32]
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            found = torch.autograd.grad(attend(*leaves, *stages), leaves, comes)
            for mine, right in zip(found, wanted, strict=True):
                off = float((mine.double() - right).norm() / right.norm())
                assert off < 0.02, (layout, tokens, off)
