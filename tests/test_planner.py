"""The planner: folds that are exact where they are used, what runs what, chunks of rows and keys, gradients of biases."""

from __future__ import annotations

import json

import pytest
import torch
from torch._dynamo.utils import counters

from headwise import (
    Alibi,
    Causal,
    Documents,
    IdentityMix,
    KeyBias,
    Sink,
    SinkLogit,
    Softcap,
    Temperature,
    Uniform,
    Window,
    attend,
    explain,
)
from headwise.attention import read as read_module
from headwise.attention.backends import chunked, sdpa
from headwise.attention.folds import fold
from headwise.attention.read import Operands, Read
from headwise.errors import BackendError, ShapeError
from headwise.mechanisms.softmax.cope import ContextualPositions
from headwise.mechanisms.softmax.mta import NearScores, NearWeights
from headwise.models.masks import DenseBias, DenseMask
from headwise.stages.low_rank_bias import LowRankBias
from headwise.stages.per_head import PerHead
from headwise.stages.relative_bias import RelativeBias, t5_bucket
from headwise.stages.strided import Strided


def tensors(b=2, hq=4, hk=2, n=13, m=13, d=8, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((b, hq, n, d), (b, hk, m, d), (b, hk, m, d)))
    return tuple(t.to(dtype).requires_grad_(grad) for t in made)


def grads(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, materialize_grads=True)


# ---- folds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ((Temperature(torch.tensor([0.5, 1.0, 1.5, 2.0])),), "Temperature = a factor on q"),
        ((Uniform(),), "Uniform = a factor on q"),
        ((Alibi.geometric(4),), "Alibi = 1 column of q and k"),
        ((KeyBias(2, 5, 3.0),), "KeyBias = 1 column of q and k"),
        ((LowRankBias(*torch.randn(2, 1, 4, 13, 3, dtype=torch.float64)),), "LowRankBias = 3 columns of q and k"),
        ((Temperature(torch.tensor([2.0])), Alibi.geometric(4), KeyBias(0, 1, 0.1)), "KeyBias = 1 column of q and k"),
        ((IdentityMix(0.3), Alibi.geometric(4)), "IdentityMix on the weights = OwnValueMix on the output"),
    ],
    ids=lambda p: "-".join(type(s).__name__ for s in p) if isinstance(p, tuple) else "",
)
def test_folds_leave_plain_attention_and_change_nothing(stages, told):
    q, k, v = tensors(grad=True)
    explanation = explain(q, k, v, Causal(), *stages)
    assert told in explanation.folds
    assert explanation.backend == "sdpa"
    x = Operands.of(q, k, v)
    folded = fold(Read.of((Causal(), *stages), 8**-0.5), x)
    assert not folded.read.scoring
    assert not folded.read.weights
    out, expected = attend(q, k, v, Causal(), *stages), attend(q, k, v, Causal(), *stages, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, wanted in zip(grads(out, (q, k, v)), grads(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11)


def test_a_fold_is_used_only_where_it_is_exact():
    """Positions as columns: in float64 always, in float32 while products are small, in half precision never."""
    short, long = tensors(n=64, m=64, dtype=torch.float32), tensors(n=4096, m=4096, b=1, dtype=torch.float32)
    assert explain(*short, Causal(), Alibi.geometric(4)).folds == ("Alibi = 1 column of q and k",)
    told = explain(*long, Causal(), Alibi.geometric(4))
    assert told.folds == ()
    assert "are off by up to" in told.not_folded[0]
    half = tensors(n=64, m=64, dtype=torch.bfloat16)
    told = explain(*half, Causal(), Alibi.geometric(4))
    assert told.not_folded == ("Alibi = columns of q and k, but they are rounded to bfloat16",)
    assert "no fold" in str(told)
    assert json.loads(json.dumps(told.to_dict()))["not_folded"] == list(told.not_folded)
    # and what runs instead is as good as plain attention in that precision
    out, exact = (attend(*(t.to(dtype) for t in half), Causal(), Alibi.geometric(4)) for dtype in (torch.bfloat16, torch.float64))
    plain, plain_exact = (attend(*(t.to(dtype) for t in half), Causal()) for dtype in (torch.bfloat16, torch.float64))
    assert (out - exact).abs().max() <= 2 * (plain - plain_exact).abs().max()
    assert explain(*tensors(), Alibi.geometric(4)).folds == ()  # without a causal mask distances have full rank
    assert explain(*half, Causal(), Temperature(torch.tensor([2.0, 1.0, 0.5, 4.0]))).folds == ("Temperature = a factor on q",)
    assert "would be rounded again" in explain(*half, Causal(), Temperature(torch.tensor([3.0]))).not_folded[0]


@pytest.mark.parametrize("d", [8, 16])  # scales of 1 / sqrt(8), which bfloat16 rounds, and 1 / 4
def test_features_in_half_precision_fold_without_being_rounded(d):
    q, k, v = tensors(d=d, n=32, m=32, dtype=torch.bfloat16)
    features = 4 * torch.randn(2, 1, 4, 32, 3, generator=torch.Generator().manual_seed(0))
    narrow = [part.bfloat16() for part in features]
    assert explain(q, k, v, Causal(), LowRankBias(*narrow)).folds == ("LowRankBias = 3 columns of q and k",)
    told = explain(q, k, v, Causal(), LowRankBias(*features))
    assert told.folds == ()
    assert "cast the factors yourself" in told.not_folded[0]
    exact = attend(q.double(), k.double(), v.double(), Causal(), LowRankBias(*(part.double() for part in narrow)))
    plain = attend(q, k, v, Causal()) - attend(q.double(), k.double(), v.double(), Causal())
    assert (attend(q, k, v, Causal(), LowRankBias(*narrow)) - exact).abs().max() <= 2 * plain.abs().max()


def test_all_biases_fold_or_none():
    """What is said to be folded is folded."""
    q, k, v = tensors(n=32, m=32, dtype=torch.float32)
    told = explain(q, k, v, Causal(), KeyBias(0, 3, 2.0), RelativeBias(torch.randn(4, 9)))
    assert told.folds == ()
    assert told.not_folded == ()


def test_columns_of_each_row_beside_keys_that_all_share():
    q = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64)
    bias = LowRankBias(*torch.randn(2, 3, 4, 9, 2, dtype=torch.float64))
    assert explain(q, k, v, Causal(), bias).folds == ("LowRankBias = 2 columns of q and k",)
    torch.testing.assert_close(
        attend(q, k, v, Causal(), bias), attend(q, k, v, Causal(), bias, backend="reference"), rtol=0, atol=1e-12
    )


def test_order_matters_for_folds():
    """What comes before a cap cannot move behind it."""
    q, k, v = tensors()
    for stages in ((Softcap(1.0), Temperature(torch.tensor([2.0]))), (Alibi.geometric(4), Softcap(1.0))):
        told = explain(q, k, v, Causal(), *stages)
        assert told.folds == ()
        assert told.backend == "chunked"
        torch.testing.assert_close(
            attend(q, k, v, Causal(), *stages), attend(q, k, v, Causal(), *stages, backend="reference"), rtol=0, atol=1e-12
        )
    folded = explain(q, k, v, Causal(), Temperature(torch.tensor([2.0])), Softcap(1.0))
    assert folded.folds == ("Temperature = a factor on q",)


# ---- rows that depend on rows before, and rows in pieces ------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(4), Causal() & (Window(3) | Sink(2))], ids=str)
def test_blocks_of_rows_see_the_rows_that_they_depend_on(rows, mask):
    q, k, v = tensors(grad=True)
    g = torch.Generator().manual_seed(3)
    near = (
        ContextualPositions(torch.randn(4, 8, generator=g, dtype=torch.float64)),
        NearScores(torch.randn(4, 3, 5, generator=g, dtype=torch.float64), torch.randn(4, 4, generator=g, dtype=torch.float64)),
        NearWeights(torch.randn(4, 2, 3, generator=g, dtype=torch.float64), None),
    )
    read, x = Read.of((mask, *near), 8**-0.5), Operands.of(q, k, v)
    assert read_module.past_rows(read) == 3
    expected = attend(q, k, v, mask, *near, backend="reference")
    out = chunked.run(read, x, rows)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for mine, wanted in zip(grads(out, (q, k, v)), grads(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (4, 3), (13, 5), (5, 13), (100, 100)])
@pytest.mark.parametrize("logit", [None, SinkLogit(torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64))])
def test_pieces_of_rows_are_merged_exactly(rows, keys, logit):
    q, k, v = tensors(grad=True)
    slopes = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    stages = (Causal() & ~Window(2), Alibi(slopes), *([logit] if logit else []))  # the first queries see nothing
    read, x = Read.of(stages, 8**-0.5), Operands.of(q, k, v)
    assert chunked.splits(read)
    out, expected = chunked.run(read, x, rows, keys), attend(q, k, v, *stages, backend="reference")
    assert bool((out[:, :, :2] == 0).all())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, wanted in zip(grads(out, (q, k, v, slopes)), grads(expected, (q, k, v, slopes)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11)


def test_long_rows_are_cut_by_themselves(largest, monkeypatch):
    """Where even few whole rows would not fit, keys are cut too."""
    monkeypatch.setattr(read_module, "SWEEP_BYTES", 64 * 1024)
    q, k, v = tensors(b=1, hq=2, hk=2, n=64, m=4096, dtype=torch.float32)
    expected = attend(q, k, v, Softcap(3.0), backend="reference")
    with largest:
        out = attend(q, k, v, Softcap(3.0))
    assert largest.size < 4096 * 8 * 2 * 4 * 2  # of the order of k itself; whole rows of 16 would take twice SWEEP_BYTES
    torch.testing.assert_close(out, expected)


# ---- learned biases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [2, 12, 40])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("m", [13, 9])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_a_learned_bias_sums_diagonals(reach, given, m, causal):
    q, k, v = tensors(n=m if m < 13 else 13, m=13, grad=True)
    table = torch.randn(4, 2 * reach + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    n = q.shape[2]
    places = {"query_positions": torch.arange(13 - n, 13)[None], "key_positions": torch.arange(13)[None]} if given else {}
    i, j = torch.arange(13 - n, 13)[:, None], torch.arange(13)
    dense = table[:, (i - j).clamp(-reach, reach) + reach]
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + dense
    expected = scores.masked_fill(causal & (j > i), -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    wanted = grads(expected, (q, k, v, table))
    masks = [Causal()] if causal else []
    for backend in ("sdpa", "chunked", "reference"):
        out = attend(q, k, v, *masks, RelativeBias(table), backend=backend, **places)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        for mine, other in zip(grads(out, (q, k, v, table)), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
def test_gradients_of_biases_are_the_same_bits_twice(backend):
    q, k, v = tensors(n=200, m=200, dtype=torch.float32, grad=True)
    table = torch.randn(4, 81, requires_grad=True)
    slopes = torch.rand(4, requires_grad=True)
    runs = []
    for _ in range(3):
        out = attend(q, k, v, Causal(), RelativeBias(table), Alibi(slopes), backend=backend)
        runs.append(grads(out, (q, k, v, table, slopes)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_t5_buckets_are_those_of_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for causal in (True, False):
        wanted = T5Attention._relative_position_bucket(-distance, bidirectional=not causal, num_buckets=32, max_distance=128)
        assert torch.equal(t5_bucket(distance, 32, 128, causal=causal), wanted)
    with pytest.raises(ShapeError, match="2 R"):
        RelativeBias(torch.zeros(4, 6))


# ---- which backend -----------------------------------------------------------------------------------------------------------


def test_named_backends_say_why_not():
    q, k, v = tensors(dtype=torch.float32, d=16)
    for backend, stage, reason in (
        ("kernel", Strided(3), "has no simple form"),
        ("flex", NearScores(None, torch.eye(4)), "NearScores needs whole rows"),
        ("sdpa", Softcap(1.0), "more than adding"),
    ):
        with pytest.raises(BackendError, match=reason):
            attend(q, k, v, Causal(), stage, backend=backend)
    with pytest.raises(BackendError, match="no float64"):
        attend(q.double(), k.double(), v.double(), Causal(), backend="flex")
    with pytest.raises(BackendError, match="no backward pass on a CPU"):
        attend(q.requires_grad_(), k, v, Causal(), backend="flex")
    told = explain(q.detach(), k, v, Causal(), Softcap(1.0))
    assert told.backend == "chunked"
    assert set(told.refused) == {"sdpa", "kernel", "flex"}
    assert "compiles for many seconds" in told.refused["flex"]


def test_biases_keep_their_digits_on_a_gpu():
    """A GPU's kernels take biases in the dtype of q: what is wider goes elsewhere, a model's own table does not."""
    table = DenseBias(torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16))
    for stages, lost in (
        ((Causal(),), False), ((Causal(), Alibi.geometric(4)), True), ((table,), False),
        ((DenseBias(table.table.float()),), True), ((SinkLogit(torch.zeros(4)),), True),
        ((SinkLogit(torch.zeros(4, dtype=torch.bfloat16)), DenseMask(torch.ones(1, 1, 5, 5, dtype=torch.bool))), False),
    ):  # fmt: skip
        read = Read.of(stages, 1.0)
        assert sdpa.rounds(read, torch.bfloat16) == lost
        assert not sdpa.rounds(read, torch.float32)
    assert (Causal() & DenseMask(torch.ones(1, 1, 5, 5, dtype=torch.bool))).given() == torch.bool


def test_flex_reads_what_the_reference_reads_and_compiles_once_for_all_lengths():
    counters.clear()
    for n in (300, 333, 500):
        q, k, v = tensors(n=n, m=n, d=16, dtype=torch.float32)
        stages = (Causal(), Alibi.geometric(4))
        out = attend(q, k, v, *stages, backend="flex")
        torch.testing.assert_close(out, attend(q, k, v, *stages, backend="reference"), rtol=0, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 1
    q, k, v = tensors(n=90, m=150, d=16, dtype=torch.float32)
    mask = PerHead((Causal() & Strided(7), Causal() & Documents(torch.arange(150) // 40)), torch.tensor([0, 1, 1, 0]))
    stages = (mask, Softcap(2.0), RelativeBias(torch.randn(4, 21)))
    out = attend(q, k, v, *stages, backend="flex")
    torch.testing.assert_close(out, attend(q, k, v, *stages, backend="reference"), rtol=0, atol=2e-5)
    places = torch.cat([torch.full((2, 10), -1), torch.arange(140).expand(2, -1)], 1)
    options = {"query_positions": places[:, 60:], "key_positions": places}
    out = attend(q, k, v, Causal(), backend="flex", **options)
    torch.testing.assert_close(out, attend(q, k, v, Causal(), backend="reference", **options), rtol=0, atol=2e-5)
