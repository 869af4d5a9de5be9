"""The operator: masks as an algebra, statistics, planner, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import (
    Alibi,
    Causal,
    Gate,
    IdentityMix,
    Sink,
    SinkLogit,
    Softcap,
    Window,
    attend,
    attention_weights,
    explain,
    statistics,
)
from headwise.attention import read as read_module
from headwise.attention import statistic as statistics_module
from headwise.attention.mask import FAR
from headwise.attention.operator import _prepare
from headwise.attention.statistic import Distance, HorizonMass, KeyMass, LocalMass, PositionMass, SpanMass, TopKey, WeightAt
from headwise.attention.sweeps import chunked
from headwise.caches import Keep
from headwise.errors import BackendError, ShapeError


def tensors(b=2, hq=4, hk=4, n=11, m=11, d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g, dtype=dtype) for shape in ((b, hq, n, d), (b, hk, m, d), (b, hk, m, d)))


leaves = st.one_of(st.just(Causal()), st.integers(1, 9).map(Window), st.integers(0, 5).map(Sink))
masks = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        inner.map(lambda p: ~p),
    ),
    max_leaves=5,
)


def dense(mask, n, m):
    return mask.dense(n, m)[0, 0]


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(1, 12), st.integers(0, 8))
def test_one_definition_of_a_mask(mask, n, past):
    """Its reach holds every visible key, and every backend reads what its table says."""
    m = n + past
    table = dense(mask, n, m)
    for i in range(n):
        inside = torch.zeros(m, dtype=torch.bool)
        for start, stop in mask.reach(past + i, past + i + 1):
            inside[max(0, start) : min(m, stop)] = True
        assert not (table[i] & ~inside).any()
    q, k, v = tensors(b=1, hq=2, hk=2, n=n, m=m)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~table, -torch.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v
    for backend in ("reference", "chunked", "sdpa"):
        assert torch.allclose(attend(q, k, v, mask, backend=backend), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_what_a_mask_keeps_is_what_later_queries_see(mask):
    keep = Keep.of(mask & Causal())
    table = dense(mask & Causal(), 40, 40)
    for now in (15, 25):
        later = table[now:, :now].any(0)
        if keep is not None:
            kept = torch.tensor([j < keep.sink or j > now - keep.recent for j in range(now)])
            assert not (later & ~kept).any()


def test_streaming_keeps_sinks_and_a_window():
    assert Keep.of(Window(256) | Sink(64)) == Keep(64, 256)
    assert Keep.of(Causal() & (Window(8) | Sink(2))) == Keep(2, 8)
    assert Keep.of(Window(5) & Window(3)) == Keep(0, 3)
    assert Keep.of(Causal()) is None
    assert Keep.of(None) is None
    assert Causal().reach(3, 5) == [(0, 5)]
    assert (~Causal()).reach(0, 1) == [(0, FAR)]


@pytest.mark.parametrize(
    "stages", [(), (Causal(),), (Causal() & Window(3),), (Causal(), Softcap(2.0)), (Causal(), SinkLogit(torch.zeros(1)))]
)
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_statistics_equal_those_of_the_weights(stages, rows, monkeypatch):
    q, k, _ = tensors(hk=2)
    p = attention_weights(q, k, *stages)
    b, h, n, m = p.shape
    i, j = torch.arange(n)[:, None], torch.arange(m)[None]
    spans = torch.zeros(2, m, dtype=torch.bool)
    spans[0, :3] = spans[1, 5:9] = True
    chosen = torch.randint(-1, m, (b, n), generator=torch.Generator().manual_seed(3))
    counted = torch.rand(b, n, generator=torch.Generator().manual_seed(4)) < 0.5
    want = {
        "entropy": statistics_module.Entropy(), "max": statistics_module.MaxWeight(), "distance": Distance(), "near": Distance(4),
        "spans": SpanMass(spans), "first": PositionMass(0, 2), "local": LocalMass(2, 3), "at": WeightAt(chosen), "top": TopKey(),
        "received": KeyMass(), "some": KeyMass(counted), "horizon": HorizonMass(2, 4),
    }  # fmt: skip
    if rows is not None:
        own = read_module.row_blocks
        monkeypatch.setattr(chunked, "row_blocks", lambda x, _=None: own(x, rows))
    got = statistics(q, k, *stages, want=want, backend=None if rows is None else "chunked")
    close = lambda a, b: torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-10, atol=1e-12)  # noqa: E731
    close(got["entropy"], -torch.xlogy(p, p).sum(-1))
    close(got["max"], p.amax(-1))
    close(got["distance"], (p * (i - j).abs()).sum(-1))
    close(got["near"], (p * (i - j).abs().clamp(max=4)).sum(-1))
    close(got["spans"], torch.stack([p[..., :3].sum(-1), p[..., 5:9].sum(-1)], -1))
    close(got["first"], p[..., :2].sum(-1))
    close(got["local"], (p * (((i - j).abs() < 3) | (j < 2))).sum(-1))
    at = p.gather(-1, chosen.clamp(min=0)[:, None, :, None].expand(b, h, n, 1))[..., 0] * (chosen >= 0)[:, None]
    close(got["at"], at)
    assert torch.equal(got["top"], p.argmax(-1))
    close(got["received"], p.sum(2))
    close(got["some"], (p * counted[:, None, :, None]).sum(2))
    for s in range(m):
        later = [t for t in range(s + 2, s + 5) if t < n]
        close(got["horizon"][..., s], p[:, :, later, s].mean(-1) if later else torch.zeros(b, h))


def test_log_sum_exp_and_grouped_heads_are_summed_over_queries_not_averaged():
    q, k, _ = tensors(hq=4, hk=2)
    got = statistics(q, k, Causal(), want=["log_sum_exp", "key_mass"])
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(got["log_sum_exp"], scores.logsumexp(-1))
    assert got["key_mass"].shape == (2, 4, 11)  # per query head
    torch.testing.assert_close(got["key_mass"].sum(-1), torch.full((2, 4), 11.0, dtype=torch.float64))


def test_no_n_by_n_tensor_is_made(monkeypatch):
    """Chunked reads and statistics hold at most the sweep's share of scores at a time."""
    monkeypatch.setattr(read_module, "SWEEP_BYTES", 64 * 1024)
    largest = 0
    own = torch.matmul

    def watched(a, b):
        nonlocal largest
        out = own(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "matmul", watched)
    q, k, v = tensors(b=1, hq=2, hk=2, n=512, m=512, dtype=torch.float32)
    attend(q, k, v, Causal(), Softcap(3.0))
    statistics(q, k, Causal(), want=["entropy", "key_mass", "distance"])
    assert largest <= 2 * 16 * 512 * 2
    largest = 0
    attend(q, k, v, Causal(), Softcap(3.0), backend="reference")
    assert largest == 2 * 512 * 512


def test_plain_reads_are_torch_sdpa_bit_for_bit():
    q, k, v = tensors(hk=2, dtype=torch.float32)
    assert torch.equal(attend(q, k, v, Causal()), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert torch.equal(attend(q[:, :, -1:], k, v, Causal()), F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True))
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_windows_cost_what_they_read():
    q, k, v = tensors(b=1, n=4096, m=4096, d=4, dtype=torch.float32)
    full, narrow = explain(q, k, v, Causal()), explain(q, k, v, Causal() & (Window(128) | Sink(4)))
    assert full.flops > 5 * narrow.flops
    assert narrow.backend == "sdpa"
    narrow_out, exact = (attend(q, k, v, Causal() & (Window(128) | Sink(4)), backend=b) for b in ("sdpa", "reference"))
    torch.testing.assert_close(narrow_out, exact, rtol=1e-4, atol=1e-5)


def test_explain_says_why():
    q, k, v = tensors()
    told = explain(q, k, v, Causal(), IdentityMix(0.3), Gate(torch.ones(4)))
    assert told.backend == "sdpa"
    assert told.folds == ("IdentityMix on the weights = OwnValueMix on the output",)
    told = explain(q, k, v, Causal(), Softcap(2.0))
    assert told.backend == "chunked"
    assert "Softcap changes scores by more than adding" in told.refused["sdpa"]
    assert "not sdpa" in str(told)
    assert set(told.to_dict()) == {"backend", "folds", "refused", "flops", "bytes", "not_folded", "kernel", "statistics"}
    with pytest.raises(BackendError, match="cannot run this read: Softcap"):
        attend(q, k, v, Softcap(2.0), backend="sdpa")
    with pytest.raises(BackendError, match="there are: sdpa, kernel, flex, chunked, reference"):
        attend(q, k, v, backend="flash")


def test_order_of_stages_counts():
    q, k, v = tensors()
    bias = Alibi.geometric(4)
    first = attend(q, k, v, Causal(), Softcap(0.5), bias)
    second = attend(q, k, v, Causal(), bias, Softcap(0.5))
    assert not torch.allclose(first, second)


def test_positions_move_masks():
    """Empty slots and an order of one's own: the same as sorting the keys."""
    q, k, v = tensors(n=1)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    slots = torch.cat([order, torch.tensor([-1, -1])])
    pad = lambda x: torch.cat([x[:, :, order], torch.full((2, 4, 2, 8), torch.nan, dtype=x.dtype)], 2)  # noqa: E731
    expected = attend(q, k, v, Causal() & (Window(4) | Sink(2)))
    got = attend(q, pad(k), pad(v), Causal() & (Window(4) | Sink(2)), query_positions=torch.tensor([10]), key_positions=slots)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q, k, v: attend(q[0], k, v), "q has 3 dimensions"),
        (lambda q, k, v: attend(q, k[..., :4], v), "head size 8, k has 4"),
        (lambda q, k, v: attend(q[:, :3], k[:, :2], v[:, :2]), "3 query heads are no multiple of 2"),
        (lambda q, k, v: attend(q, k, v[:, :, :5]), "batch, heads and tokens must agree"),
        (lambda q, k, v: attend(q, k, v, "causal"), "is no stage"),
        (lambda q, k, v: attend(q, k, v, Gate(torch.ones(3))), "3 entries for 4 heads"),
        (lambda q, k, v: attend(q, k, v, SinkLogit(torch.zeros(1)), SinkLogit(torch.zeros(1))), "one normalizer, not 2"),
        (lambda q, k, v: attend(q, k, v, query_positions=torch.arange(3)), "3 query and 11 key positions"),
        (lambda q, k, v: Window(0), "at least 1"),
    ],
)
def test_shapes_that_do_not_fit(make, message):
    with pytest.raises(ShapeError, match=message):
        make(*tensors())


def test_everything_masked_is_zero_with_every_backend():
    q, k, v = tensors()
    for backend in ("sdpa", "chunked", "reference"):
        assert (attend(q, k, v, Sink(0), backend=backend) == 0).all()
    got = statistics(
        q, k, Sink(0), want={"entropy": statistics_module.Entropy(), "top": TopKey(), "lse": statistics_module.LogSumExp()}
    )
    assert (got["entropy"] == 0).all()
    assert (got["top"] == -1).all()
    assert (got["lse"] == -torch.inf).all()


def test_prepare_does_not_touch_aligned_tensors():
    q, k, v = tensors()
    _, x = _prepare(q, k, v, (), None, None, None)
    assert x.k is k
    assert x.v is v
