"""Rules that evict, in cases in which what they keep is something known, and in models."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from evictions import KV, RULES, SCALE, D, H, prompted

from headwise import Plan, open_model
from headwise.caches import LayerStore
from headwise.caches.rule import Seen, order_by
from headwise.caches.rules.ada_kv import AdaKv
from headwise.caches.rules.h2o import H2o
from headwise.caches.rules.key_norm import KeyNorm
from headwise.caches.rules.pyramid_kv import PyramidKv
from headwise.caches.rules.snap_kv import SnapKv
from headwise.caches.rules.tova import Tova
from headwise.errors import PlanError, SelectionError
from headwise.models.cache import cache_argument, cache_of
from headwise.models.rotary import RotaryPositions
from headwise.plans.recipes.ada_kv import ada_kv
from headwise.plans.recipes.h2o import h2o
from headwise.plans.recipes.key_norm import key_norm
from headwise.plans.recipes.pyramid_kv import pyramid_kv
from headwise.plans.recipes.snap_kv import snap_kv
from headwise.plans.recipes.tova import tova
from headwise.types import HeadTable

# ---- what is known of each ------------------------------------------------------------------------------------------------


def seen_of(q, k, **more):
    number = torch.arange(k.shape[2]).expand(k.shape[:3])
    return Seen(q, k, k, number, torch.zeros(len(k), dtype=torch.long), k.shape[2], SCALE, **more)


def random_seen(n=30, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, n, D, generator=g, dtype=torch.float64) for _ in range(2))
    return seen_of(q, k), (q @ k.transpose(2, 3) * SCALE + torch.full((n, n), -torch.inf).triu(1)).softmax(-1)


def test_snap_kv_with_one_vote_and_no_pooling_ranks_by_the_last_row():
    seen, weights = random_seen()
    scores = SnapKv(9, window=1, kernel=1).score(seen)
    assert scores[..., :-1].argsort(-1).equal(weights[:, :, -1, :-1].argsort(-1))
    assert scores[..., -1].isinf().all()


def test_mean_pooling_counts_zeros_beyond_the_ends():
    """Even votes, kernel 5: 3/5, 4/5, 1, ..., and the same before the window, as in the published code."""
    seen = seen_of(torch.zeros(1, 1, 12, D), torch.zeros(1, 1, 12, D))
    scores = SnapKv(9, window=1, kernel=5, pooling="mean").score(seen)[0, 0, :-1] * 12
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.8, *[1.0] * 7, 0.8, 0.6]))


def test_max_pooling_and_the_mean_over_a_group_do_not_commute():
    """SnapKV pools each query head first, AdaKV the group's mean."""
    q = torch.zeros(1, 2, 8, 8)
    q[0, 0, -1, 1] = q[0, 1, -1, 3] = 20.0  # one head looks at token 1, the other at token 3
    seen = seen_of(q, torch.eye(8)[None, None])
    first = SnapKv(5, window=1, kernel=3).score(seen)[0, 0, :6]
    second = AdaKv(5, window=1, kernel=3).score(seen)[0, 0, :6]
    torch.testing.assert_close(first, torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(second, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [SnapKv, PyramidKv, AdaKv])
def test_the_window_is_kept_and_a_needle_that_it_asks_for(make):
    """Asked after the window, the needle is lost."""
    g = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 1, 60, D, generator=g)
    k[0, 0, 20], q = torch.tensor([9.0, 0, 0, 0]), torch.zeros(1, 1, 60, D)
    for asked, survives in ((57, True), (40, False)):
        asking = q.clone()
        asking[0, 0, asked, 0] = 5.0
        store = LayerStore([None], [((0,), make(12, window=8, kernel=1))])
        store.extend(k, k)
        store.settle(asking - 0.5 * (torch.arange(D) == 0), SCALE, ())  # others look away from it
        (held,) = store.held()[0]
        assert (20 in held) == survives
        assert held[-8:] == list(range(52, 60))


def test_a_budget_below_the_window_keeps_the_last_tokens():
    for make in (SnapKv, PyramidKv, AdaKv):
        store, *_ = prompted(make(3, window=8))
        assert store.held() == [[[47, 48, 49]] * KV]


def layer_budgets(budget, window, beta, layers, n):
    number = torch.arange(n)[None, None]
    seen = Seen(*[torch.zeros(1, 1, n, 1)] * 3, number, torch.zeros(1, dtype=torch.long), n, 1.0, layers=layers)
    rule = PyramidKv(budget, window=window, beta=beta)
    return [int(rule.counts(Seen(**{**vars(seen), "layer": layer}), torch.zeros(1, 1, n))) for layer in range(layers)]


def test_pyramid_kv_meets_its_mean_where_the_published_code_misses_it():
    """2048 tokens, window 32, 32 layers: rounding the step down gives 2025.5 in the mean behind the window, not 2016."""
    low, mean = 2016 // 20, 2016
    step = (2 * mean - 2 * low) // 31
    assert sum(2 * mean - low - layer * step for layer in range(32)) / 32 == 2025.5
    own = layer_budgets(2048, 32, 20, 32, 9000)
    assert sum(own) == 32 * 2048
    assert (own[0], own[-1]) == (2 * mean - low + 32, low + 32)
    line = [2 * mean - low - Fraction(layer * (2 * mean - 2 * low), 31) + 32 for layer in range(32)]
    assert max(abs(x - y) for x, y in zip(own, line, strict=True)) <= Fraction(1, 2)


@pytest.mark.parametrize(("layers", "budget", "beta"), [(8, 64, 20), (7, 65, 3), (2, 50, 20), (1, 50, 20), (12, 33, 1)])
def test_pyramid_kv_sums_and_falls(layers, budget, beta):
    """Three regimes: shorter than the budget, than twice the budget behind the window, and longer."""
    mean = budget - 16
    for n in (budget - 1, budget, 2 * mean - 1, 2 * mean, 2 * mean + 5, 500):
        own = layer_budgets(budget, 16, beta, layers, n)
        assert sum(own) == layers * budget
        assert own == sorted(own, reverse=True)
        assert max(own) <= max(n, budget)
        flat = n < budget or n < 2 * mean or beta == 1 or layers == 1
        assert (len(set(own)) == 1) == flat
        if not flat:
            assert own[0] == min(n, 16 + 2 * mean - mean // beta)


def test_pyramid_kv_is_flat_where_the_window_takes_most():
    """Fewer tokens than the window, and fewer than the budget though more than twice what it leaves behind the window."""
    assert layer_budgets(10, 32, 20, 8, 20) == [10] * 8
    assert layer_budgets(40, 32, 20, 8, 36) == [40] * 8


def test_pyramid_kv_with_equal_budgets_is_snap_kv():
    for layer in range(3):
        flat, *_ = prompted(PyramidKv(20, window=4, beta=1), layer=(layer, 3))
        assert flat.held() == prompted(SnapKv(20, window=4))[0].held()


def allocated(scores, budget, **options):
    scores = torch.as_tensor(scores, dtype=torch.float64)[None]
    budgets = torch.full(scores.shape[:2], budget)
    return AdaKv(1, **options).shared(scores, torch.ones_like(scores, dtype=torch.bool), budgets)[0].tolist()


def test_ada_kv_mixes_or_assures():
    """Of the 80 best scores, 58 are of the first head and 22 of the second."""
    high = 10 + torch.rand(80, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(4, 100, generator=torch.Generator().manual_seed(1))
    scores[0, :58], scores[1, 20:42] = high[:58], high[58:]
    scores[1, 20:26] += 10  # so that what others are assured of displaces the first head's last, or the second's
    scores[0, :2] -= 8
    scores[1, 26:32] -= 8
    assert allocated(scores, 20, alpha=0.0) == [58, 22, 0, 0]
    assert allocated(scores, 20, alpha=0.2) == [50, 22, 4, 4]
    assert allocated(scores, 20, alpha=0.2, floor=True) == [56, 16, 4, 4]
    assert allocated(scores, 20, alpha=1.0) == allocated(scores, 20, alpha=1.0, floor=True) == [20] * 4


def test_ada_kv_without_evenness_keeps_the_most_that_any_allocation_keeps():
    """Brute force over all budgets of the same total."""
    scores = torch.rand(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ranked = scores.sort(-1, descending=True).values

    def kept(own):
        return sum(float(ranked[kv, :count].sum()) for kv, count in enumerate(own))

    every = [own for own in itertools.product(range(8), repeat=3) if sum(own) == 9]
    assert len(every) == 55 - 3 * 3  # all ways to share 9 among 3, less those that give one head 8 or 9
    most = max(every, key=kept)
    assert tuple(allocated(scores, 3, alpha=0.0)) == tuple(allocated(scores, 3, alpha=0.0, floor=True)) == most
    assert kept(allocated(scores, 3, alpha=0.5)) < kept(most)


def test_ada_kv_gives_equal_heads_equal_budgets():
    scores = torch.rand(1, 30, generator=torch.Generator().manual_seed(4)).expand(4, -1)
    for alpha, floor in itertools.product((0.0, 0.3, 1.0), (False, True)):
        assert allocated(scores, 7, alpha=alpha, floor=floor) == [7] * 4


def test_ada_kv_meets_its_total():
    for seed, alpha in itertools.product(range(5), (0.1, 0.2, 0.37)):
        scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(seed)) ** 4 * torch.arange(1, 6)[:, None]
        own = allocated(scores, 13, alpha=alpha)
        assert sum(own) == 65
        assert min(own) >= math.floor(alpha * 13)
        assert max(own) > 13


def test_ada_kv_normalized_counts_spread_votes_less():
    """Two heads of the same best scores, one with as much again among the rest: it loses what is even."""
    scores = torch.zeros(2, 20)
    scores[:, :4] = 1.0
    scores[0, 4:12] = 0.5  # its best four hold 1/2 of its votes, those of the other all
    scores[1, 4:8] = 0.4
    assert allocated(scores, 6, alpha=0.0) == [8, 4]
    assert allocated(scores, 6, alpha=0.0, normalize=True) == [4, 8]


def test_h2o_sums_the_columns_of_the_weights():
    seen, weights = random_seen()
    seen = Seen(**{**vars(seen), "carried": {"mass": torch.full((1, 2, 30), 0.5)}})
    mass = H2o(9).carry(seen)["mass"]
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), weights.sum(2) + 0.5, rtol=1e-6, atol=1e-6)
    shared = seen_of(torch.cat([seen.q[:, :1]] * 2, 1), seen.k[:, :1], carried={"mass": torch.zeros(1, 1, 30)})
    torch.testing.assert_close(H2o(9).carry(shared)["mass"] + 0.5, mass[:, :1], rtol=1e-6, atol=1e-6)  # a group's mean


def test_h2o_favours_old_tokens():
    """Even weights, 8 tokens: 2.72 for the first, 0.12 for the last."""
    seen = Seen(**{**vars(seen_of(*[torch.zeros(1, 1, 8, D)] * 2)), "carried": {"mass": torch.zeros(1, 1, 8)}})
    mass = H2o(4).carry(seen)["mass"][0, 0]
    wanted = [sum(1 / (i + 1) for i in range(j, 8)) for j in range(8)]
    torch.testing.assert_close(mass, torch.tensor(wanted))
    assert [round(float(x), 2) for x in mass[[0, -1]]] == [2.72, 0.12]


def test_tova_keeps_the_same_in_all_heads_and_loses_one_a_step():
    found = [set(prompted(Tova(12), steps=steps)[0].held()[0][0]) for steps in range(5)]
    for before, after, new in zip(found, found[1:], range(50, 54), strict=False):
        assert len(after) == 12
        assert len((before | {new}) - after) == 1
    for store in (prompted(Tova(12), steps=4)[0], prompted(Tova(12), heads=4, group=1)[0]):
        assert len({tuple(held) for held in store.held()[0]}) == 1


def test_tova_with_one_head_ranks_by_its_last_row():
    seen, weights = random_seen(heads=1)
    torch.testing.assert_close(Tova(5).score(seen), weights[:, :, -1], rtol=1e-12, atol=0)


def test_tova_may_lose_the_newest_token():
    """Which the option forbids: the newest query looks away from its own key."""
    q, k = torch.zeros(1, 1, 40, D), torch.zeros(1, 1, 40, D)
    q[..., -1, 0], k[..., -1, 0] = 3.0, -3.0
    for newest in (False, True):
        slots, _ = order_by(Tova(6, newest).score(seen_of(q, k)), torch.tensor([[6]]), torch.ones(1, 1, 40, dtype=torch.bool))
        assert slots[0, 0].tolist() == ([0, 1, 2, 3, 4, 39] if newest else [0, 1, 2, 3, 4, 5])


def test_key_norm_does_not_see_rotation_nor_scaling():
    module = torch.nn.Module()
    module.inv_freq, module.factor = torch.tensor([0.7, 0.05]), 1.3
    seen, _ = random_seen()
    turned = RotaryPositions(module, "inv_freq", "factor", False).turned(seen.k, torch.arange(30)[None])
    plain, scaled = (KeyNorm(5).score(Seen(**{**vars(seen), "k": k})) for k in (seen.k, turned))
    torch.testing.assert_close(scaled, 1.3 * plain, rtol=1e-6, atol=0)
    assert scaled.argsort(-1).equal(plain.argsort(-1))
    assert (plain < 0).all()


def test_of_equal_keys_the_first_are_kept():
    k = torch.ones(1, KV, 40, D)
    store = LayerStore([None] * KV, [((0, 1), KeyNorm(10))])
    store.extend(k, k)
    store.settle(torch.ones(1, H, 40, D), SCALE, ())
    assert store.held() == [[list(range(10))] * KV]


def test_half_precision_is_scored_in_float32():
    seen, _ = random_seen()
    half = Seen(**{**vars(seen), "q": seen.q.bfloat16(), "k": seen.k.bfloat16(), "carried": {"mass": torch.zeros(1, 2, 30)}})
    wide = Seen(**{**vars(half), "q": half.q.float(), "k": half.k.float()})
    for make in RULES.values():
        rule = make(10)
        assert rule.score(half).dtype == torch.float32
        assert torch.equal(rule.score(half), rule.score(wide))


def test_what_rules_refuse():
    for wrong, match in (({"window": 0}, "window of 0"), ({"kernel": 4}, "kernel of 4"), ({"pooling": "min"}, "'min'")):
        for make in (SnapKv, PyramidKv, AdaKv):
            with pytest.raises(PlanError, match=match):
                make(8, **wrong)
    with pytest.raises(PlanError, match="beta of 0"):
        PyramidKv(8, beta=0)
    for alpha in (-0.1, 1.1):
        with pytest.raises(PlanError, match="alpha of"):
            AdaKv(8, alpha=alpha)
    for recent in (-1, 1.5):
        with pytest.raises(PlanError, match="as recent"):
            H2o(8, recent)
    with pytest.raises(PlanError, match=r"layer 2 have budgets from 8 to 9 under Tova"):
        prompted(Tova(torch.tensor([8, 9])), layer=(2, 3))


# ---- in models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return open_model("tiny-gqa", dtype=torch.float64)


def text(n, seed=0):
    return torch.randint(3, 4096, (1, n), generator=torch.Generator().manual_seed(seed))


def held_after(subject, plan, ids, *more):
    with plan(subject), torch.no_grad():
        out = subject.model(input_ids=ids, use_cache=True)
        for extra in more:
            out = subject.model(input_ids=extra, **{cache_argument(subject.model): cache_of(out)})
    return [layer.store.held()[0] for layer in cache_of(out).layers]


def test_layers_and_heads_of_a_model_share_their_budget(subject):
    """PyramidKV over layers, AdaKV over the heads of each layer; both exactly."""
    ids, (layers, _), kv = text(150), subject.main.shape, subject.main.sites[0].key_value_heads
    sizes = [[len(own) for own in layer] for layer in held_after(subject, pyramid_kv(subject, budget=50, window=8), ids)]
    assert sum(map(sum, sizes)) == layers * kv * 50
    assert [own[0] for own in sizes] == sorted((own[0] for own in sizes), reverse=True)
    assert sizes[0][0] > 80
    sizes = [[len(own) for own in layer] for layer in held_after(subject, ada_kv(subject, budget=50, window=8), ids)]
    assert [sum(own) for own in sizes] == [kv * 50] * layers
    assert any(len(set(own)) > 1 for own in sizes)


def test_tova_in_a_model_keeps_the_same_in_all_heads_of_a_layer(subject):
    found = held_after(subject, tova(subject, budget=30), text(90), text(1, 1), text(1, 2))
    assert all(len({tuple(own) for own in layer}) == 1 for layer in found)
    assert len({tuple(layer[0]) for layer in found}) > 1
    assert {len(layer[0]) for layer in found} == {30}


def test_only_the_heads_that_are_named_evict(subject):
    """The others keep everything: rules of a share beside heads that need all."""
    for recipe in (snap_kv, pyramid_kv, ada_kv, h2o, key_norm):
        plan = recipe(subject, subject.heads("L1H0"), budget=40)
        assert plan.heads() == subject.main.key_value_groups(subject.heads("L1H0"))
        found = held_after(subject, plan, text(100))
        assert len(found[1][0]) < 100
        assert {len(own) for layer in (found[0], found[1][1:], *found[2:]) for own in layer} == {100}


def test_recipes_hand_their_options_on(subject):
    def rule(plan):
        return plan.entries[0].stage

    voting = {"budget": 7, "window": 3, "kernel": 5, "pooling": "mean"}
    for recipe, more in (
        (snap_kv, {}),
        (pyramid_kv, {"beta": 4}),
        (ada_kv, {"alpha": 0.4, "floor": True, "normalize": False}),
    ):
        options = {**voting, **more}
        assert {name: getattr(rule(recipe(subject, **options)), name) for name in options} == options
    assert (rule(h2o(subject, budget=7, recent=3)).budget, rule(h2o(subject, budget=7, recent=3)).recent) == (7, 3)
    assert (rule(tova(subject, budget=7, newest=True)).budget, rule(tova(subject, budget=7, newest=True)).newest) == (7, True)
    assert rule(key_norm(subject, budget=7)).budget == 7
    plan = key_norm(subject, budget=7, skip_layers=(0, 2))
    assert {layer for layer, _ in plan.heads().list()} == set(range(subject.main.shape[0])) - {0, 2}
    for recipe in (snap_kv, pyramid_kv, ada_kv, h2o, tova, key_norm):
        assert recipe(subject).heads() == subject.main.exists()
        assert recipe(subject).about["recipe"] == recipe.__name__


def test_defaults_are_the_published_ones(subject):
    """Of the rules, and the same ones of the recipes."""
    assert (SnapKv(1).window, SnapKv(1).kernel, SnapKv(1).pooling) == (32, 7, "max")
    assert (PyramidKv(1).beta, AdaKv(1).alpha, AdaKv(1).floor, AdaKv(1).normalize) == (20, 0.2, False, False)
    assert (H2o(1).recent, Tova(1).newest) == (0.5, False)
    made = [recipe(subject, budget=1).entries[0].stage for recipe in (snap_kv, pyramid_kv, ada_kv, h2o, tova, key_norm)]
    assert [vars(rule) for rule in made] == [vars(kind(1)) for kind in (SnapKv, PyramidKv, AdaKv, H2o, Tova, KeyNorm)]
    shares = {
        snap_kv: 0.25,
        pyramid_kv: 0.25,
        ada_kv: 0.25,
        h2o: 0.2,
        tova: 0.25,
        key_norm: 0.5,
    }  # h2o: a tenth heavy, a tenth recent
    for recipe, share in shares.items():
        assert recipe(subject).about["budget"] == recipe(subject).entries[0].stage.budget == share


def test_a_table_gives_each_head_its_budget(subject):
    values = torch.zeros(subject.main.shape, dtype=torch.float64) + 0.1
    group = subject.main.sites[0].groups
    values[1, 1], values[2, group] = 0.4, torch.nan
    values[2, group + 1] = 0.7  # beside a head without a number
    found = held_after(subject, snap_kv(subject, budget=HeadTable(values, "shares"), window=4), text(100))
    assert [len(own) for own in found[1]] == [40, *[10] * (len(found[1]) - 1)]
    assert len(found[2][1]) == 70
    tokens = HeadTable((values * 100).nan_to_num(5).round(), "tokens")
    assert held_after(subject, snap_kv(subject, budget=tokens, window=4), text(100)) == found
    assert snap_kv(subject, budget=tokens).about["budget"] == "by tokens"
    with pytest.raises(PlanError, match=r"12\.7 is neither"):
        snap_kv(subject, budget=HeadTable(torch.full(subject.main.shape, 12.7), "half"))
    with pytest.raises(PlanError, match="table of 1 layers x 2 heads"):
        snap_kv(subject, budget=HeadTable(torch.ones(1, 2), "other"))
    with pytest.raises(PlanError, match="heads of encoder"):
        snap_kv(subject, budget=HeadTable(values, "shares", "encoder"))
    values[3] = torch.nan
    with pytest.raises(PlanError, match="no number for L3H0"):
        snap_kv(subject, subject.main.exists(), budget=HeadTable(values, "shares"))
    assert not snap_kv(subject, budget=HeadTable(values, "shares")).heads().layer(3)


def test_what_recipes_refuse(subject):
    with pytest.raises(SelectionError, match=r"given 1 of the \d+ heads of layer 1"):
        tova(subject, subject.heads("L1H0"))
    assert tova(subject, subject.heads({1: range(subject.main.shape[1])})).heads().count() == subject.main.shape[1]
    for layer in (-1, 99):
        with pytest.raises(SelectionError, match=f"no layer {layer} to skip"):
            key_norm(subject, skip_layers=[layer])
    for recipe in (snap_kv, pyramid_kv, ada_kv, h2o, tova, key_norm):
        with pytest.raises(PlanError, match=r"budget of 1\.5"):
            recipe(subject, budget=1.5)


def cropped(subject, recipe, crop):
    """Logits of a token after a prompt and a draft that is taken back, and after the prompt alone."""
    name = cache_argument(subject.model)
    found = []
    with recipe(subject, budget=30)(subject), torch.no_grad():
        for drafts in (4, 0):
            cache = cache_of(subject.model(input_ids=text(90), use_cache=True))
            if drafts:
                subject.model(input_ids=text(drafts, 1), **{name: cache})
                crop(cache, drafts)
            found.append(subject.model(input_ids=text(1, 2), **{name: cache}).logits)
    return found


def crop_stores(cache, tokens):
    for layer in cache.layers:
        layer.store.crop(tokens)


@pytest.mark.parametrize("recipe", [snap_kv, pyramid_kv, ada_kv, key_norm])
def test_drafts_can_be_taken_back_after_a_prompt(subject, recipe):
    after, alone = cropped(subject, recipe, crop_stores)
    assert torch.equal(after, alone)


def test_transformers_takes_drafts_back(subject):
    after, alone = cropped(subject, snap_kv, lambda cache, tokens: cache.crop(-tokens))
    assert torch.equal(after, alone)


@pytest.mark.parametrize("recipe", [h2o, tova])
def test_rules_of_every_step_take_nothing_back(subject, recipe):
    """And assisted decoding says so before it starts."""
    with pytest.raises(PlanError, match="cannot take back 4 tokens"):
        cropped(subject, recipe, crop_stores)
    options = {"attention_mask": torch.ones(1, 90), "do_sample": False, "max_new_tokens": 4, "prompt_lookup_num_tokens": 2}
    with recipe(subject, budget=30)(subject), pytest.raises(ValueError, match="requires a cache that can be cropped"):
        subject.model.generate(text(90), **options)


def test_plans_of_rules_join(subject):
    first, rest = subject.heads({0: range(subject.main.shape[1])}), subject.main.exists()
    plan = tova(subject, first, budget=20) | snap_kv(subject, rest - first, budget=30)
    assert [len(own) for layer in held_after(subject, plan, text(80)) for own in layer] == [
        20 if layer == 0 else 30 for layer in range(subject.main.shape[0]) for _ in range(subject.main.sites[0].key_value_heads)
    ]
    assert isinstance(plan, Plan)
