"""The Triton kernels on a real GPU: exact, repeatable, at lengths and head sizes that the interpreter is too slow for."""

from __future__ import annotations

import pytest
import torch
from test_statistics import CASES, B, H, assert_same, expected, wanted

from headwise import Causal, Documents, Sink, Window, attend, explain, statistics
from headwise.attention.statistic import LocalMass, PositionMass, RecentMass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
N = 700


def made(n, m, dtype, d=128, kv=2):
    g = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(B, h, t, d, generator=g, device="cuda").to(dtype) for h, t in ((H, n), (kv, m), (kv, m)))


def on_gpu(want):
    """The statistics' own tensors stay on the CPU: the sweep moves them."""
    return {name: statistic for name, statistic in want.items() if name not in ("top", "inner")}


def reference(q, k, stages, want, **places):
    return expected(q.cpu(), k.cpu(), stages, want, **places)


def check(q, k, v, stages, want, tolerance, **places):
    result, p = reference(q, k, stages, want, **{name: place.cpu() for name, place in places.items()})
    result = {name: value for name, value in result.items() if name in want}
    alone = statistics(q, k, *stages, want=want, backend="kernel", **places)
    assert_same({name: value.cpu() for name, value in alone.items()}, result, p, tolerance)
    out, got = attend(q, k, v, *stages, statistics=want, backend="kernel", **places)
    assert_same({name: value.cpu() for name, value in got.items()}, result, p, tolerance)
    exact = p @ v.cpu().double().repeat_interleave(H // v.shape[1], 1)
    assert float((out.cpu().double() - exact).abs().max()) < (2e-2 if v.dtype != torch.float32 else 1e-4)
    again = statistics(q, k, *stages, want=want, backend="kernel", **places)
    assert all(torch.equal(alone[name], again[name]) for name in want), "not the same bits twice"


EVERY = [*((case, torch.bfloat16) for case in CASES), ("causal", torch.float16), ("causal", torch.float32)]


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_every_mask(case, dtype):
    stages, n, m = CASES[case]
    n, m = (n if n < 10 else 10 * n + 3), 10 * m + 3
    stages = tuple(Documents(torch.arange(m) // 130) if isinstance(stage, Documents) else stage for stage in stages)
    q, k, v = made(n, m, dtype)
    check(q, k, v, stages, on_gpu(wanted(n, m)), 2e-5)


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (80, torch.bfloat16), (256, torch.bfloat16), (256, torch.float32)])
def test_every_head_size(d, dtype):
    q, k, v = made(N, N, dtype, d)
    check(q, k, v, (Causal(),), on_gpu(wanted(N, N)), 2e-5)


@pytest.mark.parametrize("stages", [(Causal(),), (), (Causal(), Window(300) | Sink(70)), (Window(200),)])
def test_wide_windows_of_statistics(stages):
    q, k, v = made(N, N + 61, torch.bfloat16)
    want = on_gpu(wanted(N, N + 61)) | {"recent": RecentMass(400), "local": LocalMass(2, 350), "sink": PositionMass(0, 3)}
    check(q, k, v, stages, want, 2e-5)


def test_padding():
    q, k, v = made(N, N, torch.bfloat16)
    pads = torch.tensor([0, 200], device="cuda")
    places = (torch.arange(N, device="cuda")[None] - pads[:, None]).clamp(min=-1)
    queries = torch.arange(N, device="cuda")[None] - pads[:, None]
    k[1, :, :200] = v[1, :, :200] = torch.nan
    clean = torch.where(places[:, None, :, None] >= 0, k, 0)
    want = on_gpu(wanted(N, N))
    want.pop("horizon")
    result, p = reference(q, clean, (Causal(),), want, query_positions=queries.cpu(), key_positions=places.cpu())
    got = statistics(q, k, Causal(), want=want, backend="kernel", query_positions=queries, key_positions=places)
    assert_same({name: value.cpu() for name, value in got.items()}, {n: r for n, r in result.items() if n in want}, p, 2e-5)


def test_decode_shares_keys_among_programs():
    q, k, v = made(1, 9000, torch.bfloat16)
    check(q, k, v, (Causal(),), on_gpu(wanted(1, 9000)), 2e-5)


def test_the_kernel_is_the_planners_choice():
    q, k, v = made(256, 256, torch.bfloat16)
    assert explain(q, k, v, Causal(), statistics=["entropy", "key_mass"]).statistics == {"entropy": "kernel", "key_mass": "kernel"}
