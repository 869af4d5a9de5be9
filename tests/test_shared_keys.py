"""Heads that read distant tokens by the keys of another layer, and which layers look at them alike."""

from __future__ import annotations

import math

import families
import pytest
import torch
from families import inputs

from headwise.attention import attend
from headwise.attention.statistic import NAMED
from headwise.caches import PAGE
from headwise.caches.rules.shared import Shared
from headwise.caches.rules.shared_keys import SharedKeys
from headwise.errors import InputError, PlanError
from headwise.models.cache import cache_argument, cache_of
from headwise.models.call import Reading
from headwise.models.sharing import SplitReading
from headwise.models.subject import Subject, open_model
from headwise.plans import Plan
from headwise.plans.recipes.kv_sharer import _distances, _ordered, _plan
from headwise.plans.recipes.pod import blocks, pod, similarity
from headwise.stages.causal import Causal
from headwise.stages.entmax import Entmax
from headwise.stages.sink import Sink
from headwise.stages.sink_logit import SinkLogit
from headwise.stages.window import Window


@pytest.fixture(scope="module")
def gqa():
    return open_model("tiny-gqa", dtype="float64")


def layer(subject, number, kv=None):
    site = subject.main.sites[number]
    heads = range(site.heads) if kv is None else range(kv * site.groups, (kv + 1) * site.groups)
    return subject.heads([(number, head) for head in heads])


def ids_of(rows=1, length=90, seed=0):
    return torch.randint(3, 4096, (rows, length), generator=torch.Generator().manual_seed(seed))


def whole(subject, ids, **given):
    with torch.no_grad():
        return subject.model(ids, use_cache=False, **given).logits


def in_parts(subject, ids, cuts, **given):
    """Logits of a text that comes in parts, and the cache."""
    name, found, cache = cache_argument(subject.model), [], None
    mask = given.pop("attention_mask", None)
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        more = {name: cache} if cache is not None else {"use_cache": True}
        if mask is not None:
            more["attention_mask"] = mask[:, :stop]
        with torch.no_grad():
            out = subject.model(ids[:, start:stop], **more)
        cache = cache_of(out)
        found.append(out.logits)
    return torch.cat(found, 1), cache


CUTS = (40, 41, 42, 75, 76, 80, 81)


def replaced(subject, ids, chosen, **given):
    """Logits where some heads read other keys and values: chosen(call, kept) -> (k, v) or None; kept: (k, v) by layer."""
    kept = {}

    def tap(call, out):
        kept[call.site.layer] = call.k, call.v
        made = chosen(call, kept)
        if made is None:
            return None
        kept[call.site.layer] = made
        return attend(call.q, *made, Causal(), backend="reference").transpose(1, 2)

    with subject.tap(tap):
        return whole(subject, ids, **given)


# ---- keys of distant tokens ---------------------------------------------------------------------------------------------


def by_query(q, k, far, v, sink, recent, skip=None):
    """(b, h, n, d): every query's own choice of keys, one softmax, in plain loops."""
    groups = q.shape[1] // k.shape[1]
    k, far, v = (x.repeat_interleave(groups, 1) for x in (k, far, v))
    out = torch.empty_like(q)
    for i in range(q.shape[2]):
        near = [j < sink or i - j < recent for j in range(i + 1)]
        keys = torch.stack([(k if own else far)[:, :, j] for j, own in enumerate(near)], 2)
        weights = ((keys @ q[:, :, i, :, None])[..., 0] * q.shape[-1] ** -0.5).softmax(-1)
        if skip is not None:
            own = torch.tensor(near)
            share = weights[..., own].sum(-1, keepdim=True)
            weights = torch.where((share > skip) & ~own, 0.0, weights)
            weights = weights / weights.sum(-1, keepdim=True)
        out[:, :, i] = (weights[..., None] * v[:, :, : i + 1]).sum(2)
    return out


@pytest.mark.parametrize(("sink", "recent", "skip"), [(3, 10, None), (0, 1, None), (1, 20, 0.6), (3, 10, 1.0)])
def test_distant_tokens_are_read_by_the_other_layers_keys(gqa, sink, recent, skip):
    ids = ids_of(length=60)
    rule = SharedKeys(1, sink, recent, skip)
    plan = Plan.empty(gqa).use(layer(gqa, 2), rule).use(layer(gqa, 5, kv=1), rule)
    kept = {}

    def tap(call, out):
        kept[call.site.layer] = call.k, call.v
        if call.site.layer == 2:
            return by_query(call.q, *kept[2][:1], kept[1][0], kept[2][1], sink, recent, skip).transpose(1, 2)
        if call.site.layer == 5:
            k, v = (x[:, 1:] for x in kept[5])
            part = by_query(call.q[:, 4:], k, kept[1][0][:, 1:], v, sink, recent, skip).transpose(1, 2)
            return torch.cat([out[:, :, :4], part], 2)
        return None

    with gqa.tap(tap):
        wanted = whole(gqa, ids)
    assert (wanted - whole(gqa, ids)).abs().max() > 0.1
    with plan(gqa):
        assert torch.allclose(whole(gqa, ids), wanted, atol=1e-10)
        assert torch.allclose(in_parts(gqa, ids, (25, 26, 27, 50, 51))[0], wanted, atol=1e-10)
        assert torch.allclose(in_parts(gqa, ids, (1, 2, 3, 40))[0], wanted, atol=1e-10)


def test_near_tokens_alone_and_blocks_of_one_are_the_model(gqa):
    ids = ids_of(length=60)
    plain = whole(gqa, ids)
    with Plan.empty(gqa).use(layer(gqa, 2), SharedKeys(1, sink=2, recent=60))(gqa):
        assert torch.allclose(whole(gqa, ids), plain, atol=1e-10)
        assert torch.allclose(in_parts(gqa, ids, (30, 31, 50))[0], plain, atol=1e-10)
    alone = pod(gqa, threshold=1.0, sink=4, recent=16, rows=1, length=60)
    assert alone.entries == ()
    assert alone.about["blocks"] == {"0": [[i] for i in range(8)], "1": [[i] for i in range(8)]}
    every = Plan.empty(gqa).use(layer(gqa, 2), SharedKeys(1, sink=2, recent=3, skip=0.0))
    with every(gqa):  # near tokens always have more than nothing: heads that stream
        skipped = whole(gqa, ids)
    with Plan.empty(gqa).use(layer(gqa, 2), Window(3) | Sink(2))(gqa):
        assert torch.allclose(whole(gqa, ids), skipped, atol=1e-10)


@pytest.mark.parametrize(
    "stages", [(), (SinkLogit(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),), (Entmax(1.5),)], ids=str
)
def test_two_reads_are_one(stages):
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(2, 4, 30, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, far, v = (torch.randn(2, 2, 30, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    reading = Reading((0, 1, 2, 3), q, k, v, (*stages, Causal()), 0.7)
    split = SplitReading.of(reading, far, SharedKeys(0, 2, 5))
    assert torch.allclose(split.run(), Reading.run(split.joined(), "reference"), atol=1e-12)
    q.requires_grad_()
    learned = SplitReading.of(Reading((0, 1, 2, 3), q, k, v, (*stages, Causal()), 0.7), far, SharedKeys(0, 2, 5)).run()
    assert torch.allclose(learned, split.run(), atol=1e-12)
    if stages[:1] == () or isinstance(stages[0], SinkLogit):
        assert learned.requires_grad
    gated = SplitReading.of(reading, far, SharedKeys(0, 2, 5, skip=0.5))
    if stages and isinstance(stages[0], Entmax):
        with pytest.raises(PlanError, match="Entmax has no share"), torch.no_grad():
            gated.run()
    else:
        with torch.no_grad():
            assert not torch.allclose(gated.run(), split.run(), atol=1e-3)


def test_bytes_of_near_keys_and_all_values(gqa):
    """Distant tokens take d (L + blocks) a head; near ones 2 d L; and numbers, by pages."""
    ids = ids_of(length=5 * PAGE)
    rule = SharedKeys(0, sink=4, recent=PAGE - 4)
    with Plan.empty(gqa).use(layer(gqa, 1), rule).use(layer(gqa, 2), rule)(gqa):
        _, cache = in_parts(gqa, ids, ())
    full, values, near = 5 * (2 * 32 * 8 + 4), 5 * (32 * 8 + 4), 32 * 8 + 4
    assert [own.store.bytes() for own in cache.layers] == [2 * PAGE * n for n in [full] + [values + near] * 2 + [full] * 5]
    assert cache.layers[1].store.held()[0] == [list(range(5 * PAGE))] * 2


def test_statistics_see_the_keys_that_are_read(gqa):
    """Taps under the plan: weights sum to one over near tokens by own keys and distant ones by others."""
    ids, found = ids_of(length=40), {}
    plan = Plan.empty(gqa).use(layer(gqa, 2), SharedKeys(1, sink=2, recent=6))

    def tap(call, out):
        if call.site.layer == 2:
            found["weights"] = call.weights()
            found["entropy"] = call.statistics({"entropy": NAMED["entropy"]})["entropy"]

    with plan(gqa), gqa.tap(tap):
        whole(gqa, ids)
    weights = found["weights"]
    assert weights.shape == (1, 8, 40, 80)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 8, 40, dtype=torch.float64))
    near = torch.tensor([[j < 2 or 0 <= i - j < 6 for j in range(40)] for i in range(40)])
    assert not weights[..., :40][..., ~near].any()
    assert not weights[..., 40:][..., near].any()
    assert torch.allclose(found["entropy"], -torch.xlogy(weights, weights).sum(-1), atol=1e-9)


# ---- which layers look alike --------------------------------------------------------------------------------------------


def test_similarity_is_of_weights_on_distant_tokens(gqa):
    ids, weights = ids_of(length=50), {}

    def tap(call, out):
        scores = (call.q @ call.k.repeat_interleave(4, 1).mT) * 32**-0.5
        i, j = torch.arange(50)[:, None], torch.arange(50)
        weights[call.site.layer] = scores.masked_fill(~((i - j >= 20) & (j >= 3)), -torch.inf)[0, :, -4:].softmax(-1)

    with gqa.tap(tap):
        whole(gqa, ids)
    found = similarity(gqa, ids, sink=3, recent=20, queries=4)
    assert found.shape == (2, 8, 8)
    for a, b in ((0, 1), (6, 2)):
        for kv in range(2):
            p, q = (weights[n][4 * kv : 4 * kv + 4] for n in (a, b))
            middle = (p + q) / 2
            kl = [torch.where(x > 0, x * (x / middle).log2(), 0.0).sum(-1) for x in (p, q)]
            assert math.isclose(float(found[kv, a, b]), float((1 - (kl[0] + kl[1]) / 2).mean()), abs_tol=1e-9)
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), torch.ones(2, 8, dtype=torch.float64), atol=1e-9)
    assert ((found >= 0) & (found <= 1 + 1e-9)).all()
    both = similarity(gqa, torch.cat([ids, ids_of(length=50, seed=1)]), sink=3, recent=20, queries=4)
    other = similarity(gqa, ids_of(length=50, seed=1), sink=3, recent=20, queries=4)
    assert torch.allclose(both, (found + other) / 2, atol=1e-12)
    with pytest.raises(InputError, match="no distant ones"):
        similarity(gqa, ids, sink=3, recent=44, queries=4)
    assert similarity(gqa, ids, sink=3, recent=43, queries=4).isfinite().all()


def test_blocks_are_runs_of_layers_that_are_alike():
    like = torch.eye(5)
    for i, j, value in ((0, 1, 0.6), (1, 2, 0.6), (0, 2, 0.4), (2, 3, 0.5), (3, 4, 0.9), (2, 4, 0.7)):
        like[i, j] = like[j, i] = value
    assert blocks(like, 0.5, every=True) == [[0, 1], [2, 3, 4]]
    assert blocks(like, 0.65, every=False) == [[0], [1], [2], [3, 4]]
    like[3, 4] = like[4, 3] = 0.1
    assert blocks(like, 0.5, every=True) == [[0, 1], [2, 3], [4]]
    assert blocks(like, 0.5, every=False) == [[0, 1], [2, 3, 4]]
    assert blocks(like, 0.5, every=True, sharing=[True, False, True, True, True]) == [[0], [1], [2, 3], [4]]
    assert blocks(like, 0.5, every=False, sharing=[False, True, True, True, True]) == [[0], [1, 2], [3], [4]]


def test_a_plan_of_blocks_shares_by_head(gqa):
    plan = pod(gqa, threshold=0.6, sink=4, recent=16, rows=1, length=80, queries=4)
    wanted = {}
    for kv, runs in plan.about["blocks"].items():
        assert [number for run in runs for number in run] == list(range(8))
        for first, *others in runs:
            for number in others:
                wanted |= {(number, head): first for head in range(4 * int(kv), 4 * int(kv) + 4)}
    found = {tuple(h): entry.stage.layer for entry in plan.entries for h in entry.heads.list()}
    assert found == wanted
    assert plan.about["blocks"]["0"] != plan.about["blocks"]["1"]
    assert {(e.stage.sink, e.stage.recent, e.stage.skip) for e in plan.entries} == {(4, 16, None)}
    with plan(gqa):
        assert torch.allclose(in_parts(gqa, ids_of(), CUTS)[0], whole(gqa, ids_of()), atol=1e-9)
    with pytest.raises(PlanError, match="no similarity"):
        pod(gqa, threshold=1.1)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_sharing_on_other_families(name):
    """Without rotary positions, with parallel blocks, with soft caps and windows in every other layer."""
    family = next(f for f in families.ALL if f.name == name)
    subject = Subject(family.model().double())
    ids = inputs("decoder", rows=1, length=40)["input_ids"]
    plain = whole(subject, ids)
    if name == "gemma2":  # its first layer has a window, its second has none
        with pytest.raises(PlanError, match="reads more tokens"), Plan.empty(subject).use(layer(subject, 1), Shared(0))(subject):
            in_parts(subject, ids, (20, 21))
        assert _plan(subject, {}).entries == ()
        assert list(_ordered(subject, _distances(subject, ids), "similar", 0)) == []
        return
    for rule in (Shared(0), SharedKeys(0, sink=1, recent=4)):
        with Plan.empty(subject).use(layer(subject, 1), rule)(subject):
            changed = whole(subject, ids)
            assert torch.allclose(in_parts(subject, ids, (20, 21, 22))[0], changed, atol=1e-10)
        assert not torch.allclose(changed, plain, atol=1e-4)
    assert torch.equal(whole(subject, ids), plain)
