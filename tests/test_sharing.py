"""Heads that read what another layer holds: everything, or the keys of distant tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import families
import pytest
import torch
from families import inputs

from headwise.attention import attend
from headwise.caches import PAGE, Evict, LayerStore
from headwise.caches.rules.quantized import Quantized
from headwise.caches.rules.shared import Shared
from headwise.caches.rules.shared_keys import SharedKeys
from headwise.caches.rules.snap_kv import SnapKv
from headwise.errors import GeometryError, PlanError
from headwise.models.cache import cache_argument, cache_bytes, cache_of
from headwise.models.inputs import text_rows
from headwise.models.masks import DenseMask
from headwise.models.program import Entry, compile_site
from headwise.models.sharing import SharedReads, check_sharing
from headwise.models.subject import Subject, open_model
from headwise.plans import Plan
from headwise.plans.recipes.kv_sharer import _distances, _last_hidden, _ordered, _plan, _resolved, kv_sharer
from headwise.stages.causal import Causal
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


# ---- everything ---------------------------------------------------------------------------------------------------------


def shares(subject):
    """Two layers share, one of them through the other, and one head of a third."""
    return (
        Plan.empty(subject)
        .use(layer(subject, 3), Shared(1))
        .use(layer(subject, 5), Shared(3))
        .use(layer(subject, 6, kv=1), Shared(2))
    )


def test_shared_heads_read_what_the_other_layer_reads(gqa):
    ids = ids_of()

    def chosen(call, kept):
        if call.site.layer in (3, 5):
            return kept[1]
        if call.site.layer == 6:
            (k, v), (other_k, other_v) = kept[6], kept[2]
            return torch.cat([k[:, :1], other_k[:, 1:]], 1), torch.cat([v[:, :1], other_v[:, 1:]], 1)
        return None

    wanted = replaced(gqa, ids, chosen)
    plain = whole(gqa, ids)
    assert (wanted - plain).abs().max() > 1
    with shares(gqa)(gqa):
        assert torch.allclose(whole(gqa, ids), wanted, atol=1e-10)
        found, cache = in_parts(gqa, ids, CUTS)
        assert torch.allclose(found, wanted, atol=1e-10)
        held = [own.store.held()[0] for own in cache.layers]
    assert [[len(tokens) for tokens in heads] for heads in held] == [[90, 90]] * 3 + [[0, 0], [90, 90], [0, 0], [90, 0], [90, 90]]
    assert torch.equal(whole(gqa, ids), plain)


def test_no_sharing_is_bit_for_bit_the_model(gqa):
    ids = ids_of()
    plan = kv_sharer(gqa, layers=0, rows=1, length=16)
    assert plan.entries == ()
    plain, parts = whole(gqa, ids), in_parts(gqa, ids, CUTS)[0]
    with plan(gqa):
        assert torch.equal(whole(gqa, ids), plain)
        assert torch.equal(in_parts(gqa, ids, CUTS)[0], parts)


def test_layers_that_compute_the_same_share_without_loss():
    """The second layer has the first one's projections and norm, and the first one adds nothing to the stream."""
    subject = Subject(families.ALL[[f.name for f in families.ALL].index("llama")].model().double())
    first, second = subject.model.model.layers
    second.self_attn.k_proj, second.self_attn.v_proj = (copy.deepcopy(getattr(first.self_attn, n)) for n in ("k_proj", "v_proj"))
    ids = inputs("decoder", rows=1, length=40)["input_ids"]
    plan = Plan.empty(subject).use(layer(subject, 1), Shared(0))
    keys = Plan.empty(subject).use(layer(subject, 1), SharedKeys(0, sink=1, recent=3))
    plain = whole(subject, ids)
    for own in (plan, keys):
        with own(subject):
            assert not torch.allclose(whole(subject, ids), plain, atol=1e-6)
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    plain = whole(subject, ids)
    for own in (plan, keys):
        with own(subject):
            assert torch.allclose(whole(subject, ids), plain, atol=1e-12)
            assert torch.allclose(in_parts(subject, ids, (20, 21, 22))[0], plain, atol=1e-12)


def test_shared_layers_take_no_bytes(gqa):
    """(L - C) 2 h d bytes a token, and what numbers and pages take."""
    ids = ids_of(length=3 * PAGE)
    with _plan(gqa, {3: 1, 5: 1, 6: 2})(gqa):
        _, cache = in_parts(gqa, ids, ())
    assert cache_bytes(cache) == (8 - 3) * 2 * (2 * 32 * 8 + 4) * 3 * PAGE
    assert [own.store.bytes() for own in cache.layers][3:7] == [0, cache_bytes(cache) // 5, 0, 0]


@pytest.mark.parametrize("rule", [Shared(1), SharedKeys(1, sink=3, recent=10), SharedKeys(1, sink=3, recent=10, skip=0.6)], ids=str)
def test_rows_padding_beams_and_errors(gqa, rule):
    plan = Plan.empty(gqa).use(layer(gqa, 2), rule).use(layer(gqa, 4), rule)
    ids = ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with plan(gqa):
        alone = [in_parts(gqa, ids[:1], CUTS)[0][0], in_parts(gqa, ids[1:, 17:], [cut - 17 for cut in CUTS])[0][0]]
        both, cache = in_parts(gqa, ids, CUTS, attention_mask=mask)
        assert torch.allclose(both[0], alone[0], atol=1e-10)
        assert torch.allclose(both[1, 17:], whole(gqa, ids, attention_mask=mask)[1, 17:], atol=1e-10)
        assert torch.allclose(both[1, 17:], alone[1], atol=1e-4)  # other positions, turned by angles in float32
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "num_beams": 3}
        made = [
            gqa.model.generate(ids[:, :30], attention_mask=torch.ones_like(ids[:, :30]), use_cache=use, **options)
            for use in (True, False)
        ]
        assert torch.equal(*made)

        def tap(call, out):
            if call.site.layer == 7:
                raise MemoryError

        name, length = cache_argument(gqa.model), ids.shape[1]
        longer = torch.cat([mask, mask[:, -1:]], 1)
        with torch.no_grad():
            with gqa.tap(tap), pytest.raises(MemoryError):
                gqa.model(ids[:, :1], attention_mask=longer, **{name: cache})
            again = gqa.model(ids[:, :1], attention_mask=longer, **{name: cache}).logits
            fresh = whole(gqa, torch.cat([ids, ids[:, :1]], 1), attention_mask=longer)[:, length:]
        assert torch.allclose(again, fresh, atol=1e-10)
        assert (fresh[:, 0] - both[:, -1]).abs().max() > 1


def test_sharing_with_what_the_other_layer_encodes_or_evicts(gqa):
    ids = ids_of()
    shared = Plan.empty(gqa).use(layer(gqa, 3), Shared(1))
    with shared.use(layer(gqa, 1), Quantized(8, half=False))(gqa):
        encoded = in_parts(gqa, ids, CUTS)[0]
    with shared(gqa):
        plain = in_parts(gqa, ids, CUTS)[0]
    assert 0 < (encoded - plain).std() < 0.1 * plain.std()
    # a layer that evicts, and one that reads it: as if its own keys and values were the same and it had evicted the same
    with shared.use(layer(gqa, 1), SnapKv(20, window=4))(gqa):
        found, cache = in_parts(gqa, ids, (60, 61, 62, 63))
        assert [len(tokens) for tokens in cache.layers[1].store.held()[0]] == [50, 50]  # a later prompt of 27 is a draft
    kept = [set(tokens) | set(range(60, 90)) for tokens in cache.layers[1].store.held()[0]]

    def chosen(call, kv):
        return kv[1] if call.site.layer == 3 else None

    def hidden(call, out, kv={}):  # noqa: B006
        kv[call.site.layer] = call.k, call.v
        if call.site.layer not in (1, 3):
            return None
        k, v = kv[1]
        mask = torch.ones(8, 90, 90, dtype=torch.bool)
        for head, tokens in enumerate(kept):
            mask[4 * head : 4 * head + 4, 60:] = torch.tensor([n in tokens for n in range(90)])
        return attend(call.q, k, v, Causal(), DenseMask(mask[None]), backend="reference").transpose(1, 2)

    with gqa.tap(hidden):
        wanted = whole(gqa, ids)
    assert torch.allclose(found, wanted, atol=1e-9)
    with pytest.raises(PlanError, match="reads more tokens than layer 1 keeps"), shared.use(layer(gqa, 1), Window(8))(gqa):
        in_parts(gqa, ids, CUTS)
    both = Plan.empty(gqa).use(layer(gqa, 1) | layer(gqa, 3), Window(8)).use(layer(gqa, 3), Shared(1))
    with both(gqa):
        assert torch.allclose(in_parts(gqa, ids, CUTS)[0], whole(gqa, ids), atol=1e-10)


@dataclass(frozen=True, eq=False)
class Newest(Evict):
    """Keeps the last tokens, after every token."""

    budget: int
    every = True

    def score(self, seen):
        return -seen.age.double()


@pytest.mark.parametrize("rule", [Newest(4), Quantized(8)], ids=str)
def test_what_a_layer_read_stays_while_its_store_moves_on(gqa, rule):
    """A token that is evicted after a read is still there for the layers that read it later in the same call."""
    shared, site = SharedReads(), gqa.main.sites[0]
    program = compile_site(site, [Entry(layer(gqa, 0), rule)])
    store = LayerStore([None] * 2, program.rules)
    for count in (6, 1, 1):
        k = torch.randn(1, 2, count, 32, dtype=torch.float64)
        views = store.extend(k, k)
        shared.note(site, program, views)
        seen = [(view.k.clone(), view.v.clone()) for view in views]
        store.settle(torch.zeros(1, 8, count, 32, dtype=torch.float64), 1.0, ())
    assert [len(tokens) for tokens in store.held()[0]] == [4 if isinstance(rule, Newest) else 8] * 2
    for (k, v), view in zip(seen, shared.views[0], strict=True):
        assert torch.equal(view.k, k)
        assert torch.equal(view.v, v)
    shared.forget()
    assert shared.views == {}


def test_what_sharing_refuses(gqa):
    ids = ids_of(length=10)
    for rule, number in ((Shared(3), 3), (Shared(5), 3), (SharedKeys(3), 3)):
        plan = Plan.empty(gqa).use(layer(gqa, number), rule)
        with pytest.raises(PlanError, match=f"layer 3 cannot read layer {rule.layer}"), plan(gqa):
            whole(gqa, ids)
    with pytest.raises(PlanError, match="no layer -1"):
        Shared(-1)
    plan = Plan.empty(gqa).use(layer(gqa, 3), Shared(1))
    for other in (SnapKv(8), Quantized(), Shared(2)):
        with pytest.raises(PlanError, match="both Shared"), plan.use(layer(gqa, 3), other)(gqa):
            whole(gqa, ids)
    keys = Plan.empty(gqa).use(layer(gqa, 3), SharedKeys(1, sink=1, recent=2))
    for other in (SnapKv(8), SharedKeys(0)):
        with pytest.raises(PlanError, match="holds all tokens and keys"), keys.use(layer(gqa, 1), other)(gqa):
            whole(gqa, ids)
    with pytest.raises(PlanError, match="holds all tokens and keys"), plan.use(layer(gqa, 1), SharedKeys(0))(gqa):
        whole(gqa, ids)
    with pytest.raises(PlanError, match="which masks them"), keys.use(layer(gqa, 1), Window(3))(gqa):
        whole(gqa, ids)
    with pytest.raises(PlanError, match="a mask and SharedKeys"), keys.use(layer(gqa, 3), Window(3))(gqa):
        whole(gqa, ids)
    for options in ({"sink": -1}, {"recent": 0}, {"skip": 1.5}):
        with pytest.raises(PlanError, match="do not go"):
            SharedKeys(0, **options)
    first, second = gqa.main.sites[:2]
    program = type("P", (), {"rules": (((0,), Shared(0)),), "groups": ()})
    with pytest.raises(GeometryError, match="2 key/value heads of size 32, layer 0 has 2 of size 16"):
        check_sharing(second, program, (type(first)(**{**vars(first), "head_dim": 16}), second), lambda site: program)
    with pytest.raises(PlanError, match="has not been read in this call"):
        LayerStore([None], [((0,), Shared(0))], (1, 2)).extend(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))


# ---- the search ---------------------------------------------------------------------------------------------------------


def test_the_search_takes_the_most_distant_pairs_that_pass(gqa):
    ids = text_rows(gqa, None, 3, 32)
    means = {}

    def tap(call, out):
        means[call.site.layer] = call.k.mean(0), call.v.mean(0)

    with gqa.tap(tap):
        whole(gqa, ids)
    distances = _distances(gqa, ids)
    for i, j in ((5, 2), (1, 0)):
        k, v = (means[i][part] - means[j][part] for part in (0, 1))
        wanted = (k.square().sum(-1).sqrt().mean() + v.square().sum(-1).sqrt().mean()) / 2
        assert torch.allclose(distances[i, j], wanted, atol=1e-12)
    orders = {order: list(_ordered(gqa, distances, order, 0)) for order in ("dissimilar", "similar", "random")}
    assert orders["similar"] == orders["dissimilar"][::-1]
    assert sorted(orders["random"]) == sorted(orders["similar"])
    assert orders["random"] != orders["similar"]
    assert all(i > j for i, j in orders["random"])
    assert len(orders["random"]) == 28
    assert distances[orders["dissimilar"][0]] == distances.tril(-1).max()
    base, shared = _last_hidden(gqa, ids, Plan.empty(gqa)), {}
    cosines = []
    for deep, shallow in orders["dissimilar"]:
        if deep in shared or len(shared) == 3:
            continue
        tried = dict(shared) | {deep: shallow}
        for own in list(tried):
            while tried[own] in tried:
                tried[own] = tried[tried[own]]
        hidden = _last_hidden(gqa, ids, _plan(gqa, tried))
        cosines.append(float((base * hidden).sum(1).div(base.norm(dim=1) * hidden.norm(dim=1)).mean()))
        if cosines[-1] > 0.75:
            shared = tried
    assert min(cosines) < 0.75 < max(cosines)
    made = kv_sharer(gqa, layers=3, rows=3, length=32, threshold=0.75)
    assert made.about["shared"] == {str(deep): shared[deep] for deep in sorted(shared)}
    assert kv_sharer(gqa, layers=3, rows=3, length=32, threshold=1.0).about["shared"] == {}
    assert _last_hidden(gqa, ids, Plan.empty(gqa)).shape == (3, 32 * 256)


def test_chains_end_at_layers_that_do_not_share():
    assert _resolved({5: 3, 3: 1, 7: 5, 2: 0}) == {5: 1, 3: 1, 7: 1, 2: 0}


def test_every_order_of_the_search_makes_a_plan_to_measure(gqa):
    for order in ("dissimilar", "similar", "random"):
        plan = kv_sharer(gqa, layers=2, rows=1, length=16, threshold=-1.0, order=order)
        assert len(plan.about["shared"]) == 2
        assert plan.about["order"] == order
    assert len(kv_sharer(gqa, rows=1, length=16, threshold=-1.0).about["shared"]) == 2
    for options in ({"order": "best"}, {"layers": 8}, {"layers": -1}):
        with pytest.raises(PlanError, match="orders are dissimilar"):
            kv_sharer(gqa, **options)
