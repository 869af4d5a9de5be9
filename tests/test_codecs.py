"""What keys and values are kept as: codes, directions, the host's memory."""

from __future__ import annotations

import pytest
import torch

from headwise.caches import PAGE, Keep, LayerStore
from headwise.caches.rules.low_rank import LowRank
from headwise.caches.rules.offloaded import Offloaded
from headwise.caches.rules.quantized import Quantized
from headwise.caches.rules.snap_kv import SnapKv
from headwise.errors import GeometryError, PlanError
from headwise.models.cache import cache_argument, cache_bytes, cache_of
from headwise.models.inputs import text_rows
from headwise.models.subject import open_model
from headwise.plans import Plan
from headwise.plans.recipes.low_rank import low_rank
from headwise.plans.recipes.offloaded import offloaded
from headwise.plans.recipes.quantized import quantized
from headwise.plans.recipes.staircase import staircase
from headwise.stages.sink import Sink
from headwise.stages.window import Window

D = 8


@pytest.fixture(scope="module")
def gqa():
    return open_model("tiny-gqa", dtype="float64")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def back(codec, k, v):
    return codec.decode(codec.encode(k, v), k.dtype)


def steps(parts, name, codec, d):
    """The step of each channel, as kept."""
    return parts[f"{name}.scale"].double().repeat_interleave(codec.group, -1)[..., :d]


# ---- codes --------------------------------------------------------------------------------------------------------------

QUANTIZED = [
    Quantized(bits, group, symmetric, half)
    for bits, group in ((8, 8), (4, 5), (2, 3), (4, 64))
    for symmetric in (False, True)
    for half in (False, True)
]
CASES = {
    "plain": drawn(2, 3, 5, 24),
    "sizes": drawn(2, 3, 5, 24) * 10.0 ** drawn(2, 3, 5, 1, seed=1),
    "far from zero": 1000 + 0.01 * drawn(2, 3, 5, 24),
    "tiny": 1e-7 * drawn(2, 3, 5, 24),
    "subnormal in float16": 1e-10 * drawn(2, 3, 5, 24),
    "constant": torch.full((1, 1, 2, 24), 0.3, dtype=torch.float64),
    "zero": torch.zeros(1, 1, 2, 24, dtype=torch.float64),
    "outlier": torch.cat([drawn(1, 2, 4, 23), torch.full((1, 2, 4, 1), 300.0, dtype=torch.float64)], -1),
}


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_codes_are_off_by_half_a_step_at_most(codec, case):
    x = CASES[case]
    parts = codec.encode(x, -2 * x)
    k, v = codec.decode(parts, x.dtype)
    for name, wanted, found in (("k", x, k), ("v", -2 * x, v)):
        step = steps(parts, name, codec, 24)
        assert parts[f"{name}.scale"].dtype == (torch.float16 if codec.half else torch.float64)
        assert ((found - wanted).abs() <= step / 2 * (1 + 1e-12)).all()
        if case in ("plain", "outlier"):  # and the step is no longer than it must be
            wide = torch.cat([wanted, wanted[..., -1:].expand(*wanted.shape[:-1], -24 % codec.group)], -1)
            grouped = wide.unflatten(-1, (-1, codec.group))
            span = 2 * grouped.abs().amax(-1) if codec.symmetric else grouped.amax(-1) - grouped.amin(-1)
            levels = 2**codec.bits - (2 if codec.symmetric else 1)
            assert torch.allclose(
                parts[f"{name}.scale"].double() * levels, span, rtol=5e-3 if codec.half else 1e-12, atol=5e-3 * codec.half
            )


def test_codes_are_packed_lower_bits_first():
    x = torch.arange(16, dtype=torch.float64).expand(1, 1, 1, 16)
    parts = Quantized(4, 16, half=False).encode(x, x.flip(-1))
    assert parts["k.codes"].flatten().tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]
    two = Quantized(2, 4, half=False).encode(x[..., :4], x[..., :4])
    assert two["k.codes"].flatten().tolist() == [0 + 1 * 4 + 2 * 16 + 3 * 64]
    symmetric = Quantized(4, 4, symmetric=True, half=False).encode(x[..., :4] - 3, x[..., :4])
    assert set(symmetric) == {"k.codes", "k.scale", "v.codes", "v.scale"}
    assert symmetric["k.codes"].flatten().tolist() == [0 + 16 * round(7 - 14 / 3), round(7 - 7 / 3) + 16 * 7]


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
def test_what_was_encoded_before_stays_as_it_is(codec):
    """Evicting after a later prompt encodes again what was read back."""
    x = drawn(2, 3, 50, 24, dtype=torch.float32)
    once = back(codec, x, x)
    twice = back(codec, *once)
    assert torch.allclose(twice[0], once[0], rtol=0, atol=3e-6 if codec.half else 1e-5)


def test_types_limits_and_refusals():
    x = drawn(1, 2, 3, 8, dtype=torch.bfloat16)
    for codec in QUANTIZED[:4]:
        assert all(part.dtype == torch.bfloat16 for part in back(codec, x, x))
    huge = torch.full((1, 1, 1, 8), 1e30)
    huge[..., 0] = -1e30
    assert all(bool(part.isfinite().all()) for part in back(Quantized(), huge, huge))
    with pytest.raises(PlanError, match="3 bits"):
        Quantized(3)
    with pytest.raises(PlanError, match="group of 0"):
        Quantized(group=0)
    with pytest.raises(GeometryError, match="use 4 or more"):
        Quantized(2).encode(drawn(1, 1, 1, 6), drawn(1, 1, 1, 6))
    with pytest.raises(GeometryError, match="use 8 or more"):
        Quantized(4).encode(drawn(1, 1, 1, 7), drawn(1, 1, 1, 7))


@pytest.mark.parametrize(
    ("codec", "each"),
    [
        (Quantized(8, 4), 8 + 2 * 2 * 2),
        (Quantized(4, 8), 4 + 2 * 2),
        (Quantized(2, 3), 2 + 3 * 2 * 2),
        (Quantized(4, 8, symmetric=True), 4 + 2),
        (Quantized(4, 4, half=False), 4 + 2 * 2 * 8),
    ],
    ids=str,
)
def test_bytes_of_codes_are_those_allocated(codec, each):
    store = LayerStore([None] * 3, [((0, 1, 2), codec)])
    store.extend(drawn(2, 3, 200, D), drawn(2, 3, 200, D))
    assert store.bytes() == 2 * 3 * -(-200 // PAGE) * PAGE * (2 * each + 4)


# ---- directions ---------------------------------------------------------------------------------------------------------


def directions(heads, d, rank, seed=0):
    return torch.linalg.qr(drawn(heads, d, d, seed=seed)).Q[..., :rank]


def test_all_directions_lose_nothing_and_few_project():
    k, v = drawn(2, 3, 5, D), drawn(2, 3, 5, D + 2, seed=1)
    whole = LowRank(directions(3, D, D), directions(3, D + 2, D + 2))
    for found, wanted in zip(back(whole, k, v), (k, v), strict=True):
        assert torch.allclose(found, wanted, atol=1e-13)
    few = LowRank(directions(3, D, 3), directions(1, D + 2, 5))
    parts = few.encode(k, v)
    assert (parts["k"].shape, parts["v"].shape) == ((2, 3, 5, 3), (2, 3, 5, 5))
    found = few.decode(parts, k.dtype)
    for head in range(3):
        assert torch.allclose(found[0][:, head], k[:, head] @ few.keys[head] @ few.keys[head].T, atol=1e-13)
        assert torch.allclose(found[1][:, head], v[:, head] @ few.values[0] @ few.values[0].T, atol=1e-13)
    with pytest.raises(GeometryError, match="for 3 heads of size 8"):
        few.encode(v, v)
    with pytest.raises(GeometryError, match="for 3 heads of size 8"):
        few.encode(k[:, :2], v[:, :2])
    with pytest.raises(GeometryError, match="rank up to the size"):
        LowRank(directions(3, D, D).repeat(1, 1, 2), few.values)


def test_each_group_of_heads_gets_its_own_directions():
    """Masks and evictions part the heads of one rule, in any order."""
    rule = LowRank(directions(4, D, 5), directions(4, D, 6, seed=1))
    k, v = drawn(1, 4, 40, D), drawn(1, 4, 40, D, seed=1)
    wanted = back(rule, k, v)
    store = LayerStore([Keep(1, 4), None, Keep(1, 4), Keep(2, 3)], [((0, 1, 2, 3), rule), ((1,), SnapKv(20, window=2))])
    store.extend(k, v)
    store.settle(drawn(1, 4, 40, D, seed=2), 1.0, ())
    views = store.extend(k[:, :, :1], v[:, :, :1])
    assert sorted(head for view in views for head in view.heads) == [0, 1, 2, 3]
    for view in views:
        for part in view.split():
            numbers = part.number[0].tolist()
            assert len(numbers) == (21 if part.heads == (1,) else 5)
            for place, head in enumerate(part.heads):
                for slot, number in enumerate(numbers):
                    token = number % 40  # the last is the first one again
                    assert torch.allclose(part.k[0, place, slot], wanted[0][0, head, token], atol=1e-12)
                    assert torch.allclose(part.v[0, place, slot], wanted[1][0, head, token], atol=1e-12)


def squares_of(subject, ids):
    """By layer: all keys, values and queries of a text."""
    found = {}

    def tap(call, out):
        found[call.site.layer] = call.k, call.v, call.q

    with torch.no_grad(), subject.tap(tap):
        subject.run({"input_ids": ids})
    return found


@pytest.mark.parametrize("queries", [False, True])
def test_measured_directions_are_those_of_most_squares(gqa, queries):
    ids = text_rows(gqa, None, 1, 200)
    plan = low_rank(gqa, rank=6, rows=1, length=200, queries=queries)
    (entry,) = plan.entries
    order = entry.heads.list()
    found = squares_of(gqa, ids)
    for site in gqa.main.sites[:2]:
        k, v, q = found[site.layer]
        for head in (0, site.heads - 1):
            kv = head // site.groups
            own = q[0, kv * site.groups : (kv + 1) * site.groups].flatten(0, 1)
            keys = torch.cat([k[0, kv], own]) if queries else k[0, kv]
            for rows, basis in ((keys, entry.stage.keys), (v[0, kv], entry.stage.values)):
                basis = basis[order.index((site.layer, head))]
                assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-12)
                lost = (rows - rows @ basis @ basis.T).square().sum()
                assert torch.allclose(lost, torch.linalg.svdvals(rows)[6:].square().sum(), rtol=1e-8)


def test_energy_gives_each_head_a_rank_of_its_own(gqa):
    plan = low_rank(gqa, energy=0.9, queries=False, rows=1, length=200)
    assert len(plan.entries) > 1
    assert sum(entry.heads.count() for entry in plan.entries) == gqa.main.exists().count()
    found, kept, total = squares_of(gqa, text_rows(gqa, None, 1, 200)), 0, 0
    for entry in plan.entries:
        for layer, head in entry.heads.list():
            for x, rank in ((found[layer][0], entry.stage.keys.shape[2]), (found[layer][1], entry.stage.values.shape[2])):
                sizes = torch.linalg.svdvals(x[0, head // gqa.main.sites[layer].groups]).square()
                share = sizes.cumsum(0) / sizes.sum()
                assert share[rank - 1] >= 0.9 - 1e-9
                assert rank == 1 or share[rank - 2] < 0.9
                kept, total = kept + rank, total + 32
    assert plan.about["share"] == pytest.approx(kept / total)
    for options in ({"rank": 0}, {"energy": 1.5}, {"energy": 0.0}):
        with pytest.raises(PlanError, match="keep nothing"):
            low_rank(gqa, **options)


# ---- whole models -------------------------------------------------------------------------------------------------------


def decoded(subject, ids, more):
    """Logits of tokens that come one by one after a prompt, and the cache."""
    steps = []
    with torch.no_grad():
        cache = cache_of(subject.model(input_ids=ids, use_cache=True))
        for i in range(more.shape[1]):
            out = subject.model(input_ids=more[:, i : i + 1], **{cache_argument(subject.model): cache})
            steps.append(out.logits[:, -1])
    return torch.stack(steps, 1), cache


MASKS = {
    "everything": lambda plan, heads: plan,
    "evicted": lambda plan, heads: plan.use(heads, SnapKv(torch.arange(20, 20 + heads.count()), window=8)),
    "ring": lambda plan, heads: plan.use(heads, Window(30) | Sink(3)),
}


@pytest.mark.parametrize("kept", MASKS)
def test_exact_codecs_change_nothing(gqa, kept):
    """Offloading, all directions, and codes so fine that they do not count, beside evictions and masks: the same reads."""
    every, ids = gqa.main.exists(), text_rows(gqa, None, 1, 104)
    plans = {
        "none": Plan.empty(gqa),
        "offloaded": offloaded(gqa),
        "low_rank": low_rank(gqa, rank=1.0, rows=1, length=64),
    }
    found = {}
    for name, plan in plans.items():
        with MASKS[kept](plan, every)(gqa):
            found[name] = decoded(gqa, ids[:, :100], ids[:, 100:])
    plain, cache = found["none"]
    assert torch.equal(found["offloaded"][0], plain) or kept != "ring"
    assert torch.allclose(found["offloaded"][0], plain, atol=1e-11)
    assert torch.allclose(found["low_rank"][0], plain, atol=1e-9)
    if kept != "everything":
        for name in ("offloaded", "low_rank"):
            for own, layer in zip(cache.layers, found[name][1].layers, strict=True):
                assert own.store.held() == layer.store.held()
    away = found["offloaded"][1]
    numbers = sum(sequences.arena.pools["number"].nbytes for layer in away.layers for sequences in layer.store.sequences.values())
    assert cache_bytes(away) == numbers > 0
    assert away.host_bytes() == numbers // 4 * 2 * 32 * 8


def test_fewer_bits_read_less_exactly(gqa):
    ids = text_rows(gqa, None, 1, 104)
    plain, cache = decoded(gqa, ids[:, :100], ids[:, 100:])
    off, size = {}, {}
    for bits in (8, 4, 2):
        for symmetric in (False, True):
            with quantized(gqa, bits=bits, symmetric=symmetric)(gqa):
                found, own = decoded(gqa, ids[:, :100], ids[:, 100:])
            off[bits, symmetric] = float((found - plain).std() / plain.std())
            size[bits, symmetric] = cache_bytes(own)
    for symmetric in (False, True):
        assert off[8, symmetric] < off[4, symmetric] / 4 < off[2, symmetric]
        assert size[2, symmetric] < size[4, symmetric] < size[8, symmetric] < cache_bytes(cache)
        assert 0 < off[8, symmetric] < 0.02
    with staircase(gqa, ages=(16, 32))(gqa):
        steps = float((decoded(gqa, ids[:, :100], ids[:, 100:])[0] - plain).std() / plain.std())
    assert off[8, False] < steps < off[4, False]


def test_offloaded_codes_are_the_codes(gqa):
    ids = text_rows(gqa, None, 1, 104)
    with quantized(gqa, bits=4, group=16)(gqa):
        wanted, cache = decoded(gqa, ids[:, :100], ids[:, 100:])
    with offloaded(gqa, bits=4, group=16)(gqa):
        found, away = decoded(gqa, ids[:, :100], ids[:, 100:])
    assert torch.equal(found, wanted)
    assert cache_bytes(away) + away.host_bytes() == cache_bytes(cache)
    assert away.host_bytes() == cache_bytes(away) // 4 * 2 * (16 + 2 * 2 * 2)
    assert cache.host_bytes() == 0
    rule = Offloaded(LowRank(directions(4, 32, 5), directions(4, 32, 6)))
    assert torch.equal(rule.select([2]).codec.keys, rule.codec.keys[2:3])


@pytest.mark.parametrize("codec", [Quantized(4), Offloaded(Quantized(4)), Quantized(8, symmetric=True)], ids=str)
@pytest.mark.parametrize("pads", [None, [0, 3]])
def test_kept_tokens_are_read_as_they_were_encoded(codec, pads):
    """With evictions, rings and padding: what is read of a token is what its codes say."""
    k, v = drawn(2, 3, 60, D), drawn(2, 3, 60, D, seed=1)
    wanted = back(codec, k, v)
    store = LayerStore([Keep(2, 9), None, None], [((0, 1, 2), codec), ((1,), SnapKv(15, window=4))])
    q = drawn(2, 6, 60, D, seed=2)
    for start, stop in ((0, 40), (40, 41), (41, 44), (44, 60)):
        views = store.extend(k[:, :, start:stop], v[:, :, start:stop], pads)
        for view in views:
            for part in view.split():
                number = part.number.expand(2, -1)
                for row, numbers in enumerate(number.tolist()):
                    for slot, token in enumerate(numbers):
                        if token < (pads or [0, 0])[row] or token >= start:
                            continue
                        for place, head in enumerate(part.heads):
                            assert torch.allclose(part.k[row, place, slot], wanted[0][row, head, token], atol=1e-12)
                            assert torch.allclose(part.v[row, place, slot], wanted[1][row, head, token], atol=1e-12)
        store.settle(q[:, :, start:stop], 1.0, ())
    assert [len(tokens) for tokens in store.held()[0]] == [11, 15 + 1 + 3 + 16, 60]
