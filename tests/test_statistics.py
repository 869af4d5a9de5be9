"""Statistics: every sweep gives what the weights in float64 give, whatever the mask, the shape and the places."""

from __future__ import annotations

import pytest
import torch

from headwise import (
    Alibi,
    Causal,
    Documents,
    Sink,
    SinkLogit,
    Softcap,
    Temperature,
    Window,
    attend,
    attention_weights,
    explain,
    statistics,
)
from headwise.attention.statistic import (
    Distance,
    DistanceSquare,
    Entropy,
    HorizonMass,
    KeyMass,
    LocalMass,
    LogSumExp,
    MaxWeight,
    PositionMass,
    RecentMass,
    SegmentMass,
    SpanMass,
    TopKey,
    WeightAt,
    WeightSquare,
)
from headwise.attention.sweeps import blocked, kernel
from headwise.errors import BackendError, ShapeError

B, H = 2, 4


def made(n, m, kv=2, d=16, seed=0, dtype=torch.float32, scale=1.5, b=B, h=H):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, kv, m, d), (b, kv, m, d))
    return tuple((scale * torch.randn(shape, generator=g)).to(dtype) for shape in shapes)


def wanted(n, m, seed=1, b=B):
    g = torch.Generator().manual_seed(seed)
    spans = torch.zeros(3, m, dtype=torch.bool)
    spans[0, : m // 3] = spans[1, m // 4 : m // 2] = spans[2, ::2] = True
    return {
        "lse": LogSumExp(), "max": MaxWeight(), "entropy": Entropy(), "distance": Distance(), "distance2": DistanceSquare(),
        "square": WeightSquare(), "sink": PositionMass(0, 3), "inner": PositionMass(2, 5), "recent": RecentMass(7),
        "local": LocalMass(2, 5),
        "near": Distance(6), "segments": SegmentMass(torch.randint(-1, 5, (b, m), generator=g).sort(-1).values, 5),
        "spans": SpanMass(spans), "received": KeyMass(), "group": KeyMass(per="key_value_head"),
        "some": KeyMass(torch.rand(b, n, generator=g) < 0.5), "horizon": HorizonMass(2, 9),
        "at": WeightAt(torch.randint(-1, m, (b, n), generator=g)), "top": TopKey(),
    }  # fmt: skip


def expected(q, k, stages, want, **places):
    """From the whole float64 weights, by formulas of their own."""
    double = list(stages)
    p = attention_weights(q.double(), k.double(), *double, **places)
    b, h, n, m = p.shape
    qp = places.get("query_positions", torch.arange(m - n, m)).reshape(-1, n).expand(b, n)
    kp = places.get("key_positions", torch.arange(m)).reshape(-1, m).expand(b, m)
    d = (qp[:, :, None] - kp[:, None, :]).abs()[:, None]
    kq = kp[:, None, None, :]
    result = {
        "entropy": -torch.xlogy(p, p).sum(-1), "max": p.amax(-1), "distance": (p * d).sum(-1), "distance2": (p * d * d).sum(-1),
        "square": (p * p).sum(-1), "sink": (p * ((kq >= 0) & (kq < 3))).sum(-1), "inner": (p * ((kq >= 2) & (kq < 5))).sum(-1),
        "recent": (p * (d < want["recent"].window)).sum(-1), "near": (p * d.clamp(max=want["near"].window)).sum(-1),
        "local": (p * ((d < want["local"].window) | ((kq >= 0) & (kq < want["local"].sink)))).sum(-1),
        "segments": torch.stack([(p * (want["segments"].segments == i)[:, None, None]).sum(-1) for i in range(5)], -1),
        "spans": torch.stack([(p * span).sum(-1) for span in want["spans"].spans], -1),
        "received": p.sum(2), "group": p.sum(2).view(b, k.shape[1], -1, m).sum(2),
        "some": (p * want["some"].rows[:, None, :, None]).sum(2),
        "at": p.gather(-1, want["at"].keys.clamp(min=0)[:, None, :, None].expand(b, h, n, 1))[..., 0]
        * (want["at"].keys >= 0)[:, None],
    }  # fmt: skip
    return result, p


CASES = {
    "causal": ((Causal(),), 40, 40), "decode": ((Causal(),), 1, 70), "chunk": ((Causal(),), 9, 70), "both ways": ((), 40, 40),
    "cross": ((), 37, 21), "window": ((Causal(), Window(11)), 45, 45), "sink and window": ((Causal(), Window(9) | Sink(3)), 70, 70),
    "two-sided window": ((Window(8),), 40, 40), "documents": ((Causal(), Documents(torch.arange(60) // 13)), 60, 60),
    "sink alone": ((Causal(), Sink(4)), 33, 33),
    "packed window": ((Causal(), Window(5), Documents(torch.arange(60) // 21)), 40, 60),
}  # fmt: skip


def assert_same(got, result, p, tolerance):
    for name, value in result.items():
        error = float((got[name].double() - value).abs().max())
        size = max(1.0, float(value.abs().max()))
        assert error < tolerance * size, f"{name} differs by {error:.2g}"
    assert torch.equal(got["lse"].isinf(), p.sum(-1) == 0)


@pytest.mark.parametrize("sweep", ["blocked", "chunked", "reference", "kernel"])
@pytest.mark.parametrize("case", CASES)
def test_every_sweep_equals_the_float64_weights(case, sweep):
    stages, n, m = CASES[case]
    q, k, v = made(n, m)
    want = wanted(n, m)
    result, p = expected(q, k, stages, want)
    if sweep == "kernel":
        want.pop("top")
    out, got = attend(q, k, v, *stages, statistics=want, backend=sweep)
    assert_same(got, result, p, 3e-6)
    exact = p @ v.double().repeat_interleave(H // v.shape[1], 1)
    assert float((out - exact).abs().max()) < 1e-5
    if sweep != "kernel":
        seen = p.sum(-1) > 0
        assert torch.equal(got["top"][seen], p.argmax(-1)[seen])
    alone = statistics(q, k, *stages, want=want, backend=sweep)
    assert_same(alone, result, p, 3e-6)
    again = statistics(q, k, *stages, want=want, backend=sweep)
    assert all(torch.equal(alone[name], again[name]) for name in want)


@pytest.mark.parametrize("sweep", ["blocked", "chunked", "kernel"])
def test_padding_and_empty_rows(sweep):
    """Left and right padding by positions: empty slots hold NaN, and rows that see nothing give zeros."""
    q, k, v = made(12, 20)
    pads = torch.tensor([0, 6])
    places = (torch.arange(20)[None] - pads[:, None]).clamp(min=-1)
    places[0, 18:] = -1
    queries = torch.arange(8, 20)[None] - pads[:, None] - torch.tensor([[0], [4]])  # some before the first key
    k[0, :, 18:] = v[0, :, 18:] = k[1, :, :6] = v[1, :, :6] = torch.nan
    want = wanted(12, 20)
    want.pop("horizon")
    clean = torch.where(places[:, None, :, None] >= 0, k, 0)
    stages = (Causal(), Window(6))
    result, p = expected(q, clean, stages, want, query_positions=queries, key_positions=places)
    assert (p.sum(-1) == 0).any()
    if sweep == "kernel":
        want.pop("top")
    _, got = attend(q, k, v, *stages, statistics=want, backend=sweep, query_positions=queries, key_positions=places)
    assert_same(got, result, p, 3e-6)
    assert all(not value.isnan().any() for value in got.values())
    assert all(
        (value[got["lse"].isinf()] == 0).all()
        for name, value in got.items()
        if value.shape == got["lse"].shape and name not in ("lse", "top")
    )


@pytest.mark.parametrize("kernel_tile", [kernel.Tile(32, 16, 8, 4, 1), kernel.Tile(16, 32, 1, 4, 1), kernel.Tile(64, 64, 8, 4, 1)])
@pytest.mark.parametrize("stages", [(Causal(),), (Causal(), Window(40) | Sink(20)), (), (Window(30),), (Window(2) | Sink(120),)])
def test_the_kernel_at_many_tiles(kernel_tile, stages, monkeypatch):
    """Lengths at which every kind of tile comes: whole ones, edges, the diagonal, near places, sinks, the tail."""
    monkeypatch.setattr(kernel, "row_tile", lambda *_: kernel_tile)
    monkeypatch.setattr(kernel, "column_tile", lambda *_: kernel_tile)
    monkeypatch.setattr(kernel, "ROWS_IN_FLIGHT", 1)  # every kind of tile in one program, as in long rows
    n, m = 130, 163
    q, k, v = made(n, m, kv=1, d=24, b=1, h=2)
    want = wanted(n, m, b=1) | {"recent": RecentMass(85), "local": LocalMass(3, 85), "near": Distance(20)}
    for name in ("top", "inner", "segments", "at", "group"):
        want.pop(name)
    result, p = expected(q, k, stages, wanted(n, m, b=1) | want)
    places = torch.arange(n)[None]
    ranges = [(places >= 37) & (places < 101), places >= 90, places < 5, places < 0]
    for i, rows in enumerate(ranges):
        want[f"range {i}"] = KeyMass(rows)
        result[f"range {i}"] = (p * rows[:, None, :, None]).sum(2)
    result = {name: result[name] for name in want if name in result}
    assert_same(statistics(q, k, *stages, want=want, backend="kernel"), result, p, 5e-6)
    if kernel_tile.classes == 1:
        out, got = attend(q, k, v, *stages, statistics=want, backend="kernel")
        assert_same(got, result, p, 5e-6)
        assert float((out - p @ v.double().repeat_interleave(2, 1)).abs().max()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_rows_and_heads_meet(case, monkeypatch):
    """The blocked sweep in the smallest blocks: runs of rows, heads apart, whole and partial strips."""
    for name, value in {"ROWS": 8, "RUN": 2, "ELEMENTS": 1}.items():
        monkeypatch.setattr(blocked, name, value)
    stages, n, m = CASES[case]
    q, k, v = made(n, m)
    want = wanted(n, m) | {"recent": RecentMass(20), "local": LocalMass(5, 20)}
    result, p = expected(q, k, stages, want)
    out, got = attend(q, k, v, *stages, statistics=want, backend="blocked")
    assert_same(got, result, p, 3e-6)
    assert float((out - p @ v.double().repeat_interleave(2, 1)).abs().max()) < 1e-5


@pytest.mark.parametrize("stage", [Softcap(2.0), SinkLogit(torch.linspace(-1, 1, H)), SinkLogit(torch.zeros(1))])
@pytest.mark.parametrize("n", [1, 40])
def test_the_kernel_with_softcap_and_sink_logit(stage, n):
    q, k, v = made(n, 40)
    want = wanted(n, 40)
    want.pop("top")
    result, p = expected(q, k, (Causal(), stage), want)
    out, got = attend(q, k, v, Causal(), stage, statistics=want, backend="kernel")
    assert_same(got, result, p, 3e-6)
    assert float((out - p @ v.double().repeat_interleave(2, 1)).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_in_half_precision(dtype):
    """Scores are exact products of the half-precision tensors, so nothing but float32 rounding is lost."""
    q, k, v = made(40, 40, dtype=dtype)
    want = wanted(40, 40)
    want.pop("top")
    result, p = expected(q, k, (Causal(),), want)
    out, got = attend(q, k, v, Causal(), statistics=want, backend="kernel")
    assert_same(got, result, p, 3e-6)
    assert out.dtype == dtype


@pytest.mark.parametrize("d", [8, 40, 80, 200, 256])
def test_the_kernel_at_any_head_size(d):
    q, k, v = made(20, 33, d=d, scale=0.7)
    want = {"entropy": Entropy(), "max": MaxWeight(), "lse": LogSumExp(), "received": KeyMass()}
    p = attention_weights(q.double(), k.double(), Causal())
    out, got = attend(q, k, v, Causal(), statistics=want, backend="kernel")
    torch.testing.assert_close(got["max"].double(), p.amax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["entropy"].double(), -torch.xlogy(p, p).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["received"].double(), p.sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), p @ v.double().repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)


def test_keys_shared_among_programs_give_the_same(monkeypatch):
    q, k, _ = made(3, 200)
    want = wanted(3, 200)
    want.pop("top")
    result, p = expected(q, k, (Causal(),), want)
    for in_flight in (1, 64, 4096):
        monkeypatch.setattr(kernel, "ROWS_IN_FLIGHT", in_flight)
        assert_same(statistics(q, k, Causal(), want=want, backend="kernel"), result, p, 3e-6)


@pytest.mark.parametrize("backend", ["folded", "chunked", None])
def test_gradients(backend):
    """Of folds over fused attention and of the chunked sweep, against those of the whole weights."""
    q, k, v = (t.double().requires_grad_() for t in made(10, 14, d=4))
    segments = torch.arange(14) // 4
    want = {"sink": PositionMass(0, 2), "far": Distance(), "segments": SegmentMass(segments, 4)}
    if backend != "folded":
        want |= {"entropy": Entropy(), "lse": LogSumExp(), "received": KeyMass(per="key_value_head")}

    def loss(out, found):
        return out.square().sum() + sum(
            (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum() for value in found
        )

    out, got = attend(q, k, v, Causal(), statistics=want, backend=backend)
    fast = torch.autograd.grad(loss(out, [got[name] for name in want]), (q, k, v))
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 2).masked_fill(torch.ones(10, 14, dtype=torch.bool).triu(5), -torch.inf)
    p, place = s.softmax(-1), torch.arange(14, dtype=torch.float64)
    found = {
        "sink": p[..., :2].sum(-1), "far": (torch.arange(4, 14) - (p * place).sum(-1)),
        "segments": torch.stack([p[..., segments == i].sum(-1) for i in range(4)], -1),
        "entropy": -(p * s.log_softmax(-1).clamp(min=-1e3)).sum(-1), "lse": s.logsumexp(-1),
        "received": p.sum(2).view(B, 2, 2, 14).sum(2),
    }  # fmt: skip
    slow = torch.autograd.grad(loss(p @ v.repeat_interleave(2, 1), [found[name] for name in want]), (q, k, v))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sweep", ["blocked", "chunked", "kernel"])
def test_limits_that_need_no_reference(sweep):
    """Heads that see all alike, and heads that see one key: every statistic has a number of its own."""
    n = 48
    place = torch.arange(n, dtype=torch.float64)
    spans = torch.stack([torch.arange(n) < 10, torch.arange(n) >= 10])
    want = {
        "lse": LogSumExp(), "max": MaxWeight(), "entropy": Entropy(), "distance": Distance(), "distance2": DistanceSquare(),
        "square": WeightSquare(), "sink": PositionMass(0, 4), "recent": RecentMass(8), "near": Distance(8),
        "spans": SpanMass(spans), "local": LocalMass(4, 8), "received": KeyMass(), "group": KeyMass(per="key_value_head"),
        "horizon": HorizonMass(1, 3),
    }  # fmt: skip

    def assert_rows(got, expected, tolerance=1e-5):
        for name, value in expected.items():
            error = float((got[name].double() - value).abs().max())
            assert error < tolerance * max(1.0, float(value.abs().max())), f"{name} differs by {error:.2g}"

    q, k = torch.zeros(1, 4, n, 16), torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(0))
    seen = place + 1  # uniform: a query at place t weighs each of t + 1 keys alike
    received = torch.stack([(1 / seen[j:]).sum() for j in range(n)])
    horizon = torch.stack(
        [(1 / seen[j + 1 : j + 4]).mean() if j + 1 < n else torch.zeros((), dtype=torch.float64) for j in range(n)]
    )
    uniform = {
        "lse": seen.log(), "max": 1 / seen, "entropy": seen.log(), "distance": place / 2, "distance2": place * (2 * place + 1) / 6,
        "square": 1 / seen, "sink": seen.clamp(max=4) / seen, "recent": seen.clamp(max=8) / seen,
        "local": seen.clamp(max=12) / seen,
        "spans": torch.stack([seen.clamp(max=10), (seen - 10).clamp(min=0)], -1) / seen[:, None],
        "received": received, "group": 2 * received, "horizon": horizon,
    }  # fmt: skip
    assert_rows(statistics(q, k, Causal(), want=want, backend=sweep), uniform)

    codes = 100.0 * torch.eye(n).expand(1, 2, n, n)  # one key: a query finds the key 5 places back, the first before that
    back = (torch.arange(n) - 5).clamp(min=0)
    looked = (place - back).double()
    one = torch.ones(n, dtype=torch.float64)
    counts = torch.bincount(back, minlength=n).double()
    sharp = {
        "max": one, "entropy": 0 * one, "distance": looked, "distance2": looked**2, "square": one, "sink": (back < 4).double(),
        "recent": one, "near": looked, "local": one, "received": counts, "group": 2 * counts,
    }  # fmt: skip
    assert_rows(statistics(codes[:, :, back].repeat_interleave(2, 1), codes, Causal(), want=want, backend=sweep), sharp)


def test_other_stages_are_swept_in_chunks():
    q, k, _ = made(20, 20)
    for stage in (Alibi.geometric(H), Temperature(torch.linspace(0.5, 2, H))):
        p = attention_weights(q.double(), k.double(), Causal(), stage)
        got = statistics(q, k, Causal(), stage, want=["entropy", "key_mass"])
        torch.testing.assert_close(got["key_mass"].double(), p.sum(2), rtol=1e-5, atol=1e-5)
        with pytest.raises(BackendError, match="blocked"):
            statistics(q, k, Causal(), stage, want=["entropy"], backend="blocked")


@pytest.mark.parametrize("backend", ["blocked", "chunked", "kernel"])
def test_means_on_the_fly(backend, monkeypatch):
    """Reduced while gathered: the same as the mean of the whole, with rows of wide statistics a few at a time."""
    from headwise.attention import reduction

    monkeypatch.setattr(reduction, "ELEMENTS", 1)
    n = 300
    q, k, _ = made(n, n)
    counted = torch.rand(B, n, generator=torch.Generator().manual_seed(4)) < 0.7
    want = {
        "entropy": Entropy(),
        "segments": SegmentMass(torch.arange(n) // 7, 43),
        "received": KeyMass(),
        "horizon": HorizonMass(1, 5),
    }
    whole = statistics(q, k, Causal(), want=want, backend=backend)
    mean = statistics(q, k, Causal(), want=want, mean=True, counted=counted, backend=backend)
    rows = counted[:, None, :].expand(B, H, n)
    assert mean["entropy"].shape == (H,)
    assert mean["segments"].shape == (H, 43)
    for head in range(H):
        torch.testing.assert_close(
            mean["entropy"][head], whole["entropy"][:, head][rows[:, head]].double().mean(), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            mean["segments"][head], whole["segments"][:, head][rows[:, head]].double().mean(0), rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(mean["received"], whole["received"].double().sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean["horizon"], whole["horizon"].double().sum(0), rtol=1e-9, atol=1e-9)


def test_no_rectangle_of_weights_is_held(largest):
    """The blocked and chunked sweeps allocate nothing that grows with n x m."""
    n = 4096
    q, k, v = (t[:1] for t in made(n, n))
    with largest:
        attend(q, k, v, Causal(), statistics=["entropy", "max_weight", "distance", "key_mass"])
    assert largest.size <= 4 * 2**22  # a block of the sweep; one head's weights would be 64 MiB, all of them 256


def test_errors_and_explanations():
    q, k, v = made(8, 8)
    with pytest.raises(ShapeError, match="no statistic 'entropi'"):
        statistics(q, k, want=["entropi"])
    with pytest.raises(BackendError, match="no statistics backend 'magic'"):
        statistics(q, k, want=["entropy"], backend="magic")
    with pytest.raises(BackendError, match="fixed factor"):
        statistics(q, k, want=["entropy"], backend="folded")
    with pytest.raises(ShapeError, match="there are no queries"):
        statistics(q[:, :, :0], k, want=["entropy"])
    with pytest.raises(ShapeError, match="segments are"):
        statistics(q, k, want={"s": SegmentMass(torch.zeros(5, dtype=torch.long), 1)})
    with pytest.raises(ShapeError, match="counted rows"):
        statistics(q, k, want={"s": KeyMass(torch.ones(1, 3))})
    with pytest.raises(BackendError, match="no gradients"):
        statistics(q.requires_grad_(), k, want=["entropy"], backend="blocked")
    q.requires_grad_(False)
    told = explain(q, k, v, Causal(), statistics={"e": Entropy(), "top": TopKey()})
    assert told.statistics == {"e": "blocked", "top": "blocked"}
    assert "sweep     e: blocked" in str(told)
