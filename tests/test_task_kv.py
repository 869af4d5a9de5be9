"""Task-KV: which heads keep everything, how many tokens that leaves the others, and what of it a model feels."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import open_model
from headwise.attention import attend
from headwise.caches import LayerStore
from headwise.caches.rule import Seen
from headwise.caches.rules.task_kv import TaskKv, distances
from headwise.errors import PlanError
from headwise.models.cache import cache_of
from headwise.plans.recipes.task_kv import task_kv
from headwise.stages.causal import Causal

B, H, KV, D, N = 2, 8, 4, 5, 60
PADS = (0, 7)


def seen_of(n=N, seed=0, pads=PADS, layer=0, layers=1, kv=KV, groups=2):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(pads), heads, n, D, generator=g, dtype=torch.float64) for heads in (kv * groups, kv, kv))
    number = torch.arange(n).expand(len(pads), kv, n)
    number = torch.where(number >= torch.tensor(pads)[:, None, None], number, -1)
    return Seen(q, k, v, number, torch.tensor(pads), n, 0.6, layer=layer, layers=layers)


def small(**options):
    return TaskKv(**{"budget": 30, "sinks": 3, "recent": 8, "window": 6, "top": 10, "kernel": 5, "share": 0.5, **options})


def oracle(rule, seen):
    """The tokens that each head keeps, by row and head, from loops over a table of weights."""
    n, kept = seen.total, []
    scores = seen.scale * seen.q @ seen.k.repeat_interleave(seen.groups, 1).transpose(2, 3)
    for b in range(len(seen.pads)):
        pad = int(seen.pads[b])
        votes, vectors = [], []
        for kv in range(seen.k.shape[1]):
            total = [0.0] * n
            for h in range(kv * seen.groups, (kv + 1) * seen.groups):
                for i in range(max(pad, n - rule.window), n):
                    row = [math.exp(float(scores[b, h, i, j])) for j in range(pad, i + 1)]
                    for j, x in enumerate(row, pad):
                        total[j] += x / sum(row) / seen.groups / rule.window
            votes.append(total)
            best = sorted(range(n), key=lambda j: -total[j])[: rule.top]
            vectors.append([sum(total[j] * float(seen.v[b, kv, j, e]) for j in best) for e in range(D)])
        heads = len(votes)
        centre = [sum(vector[e] for vector in vectors) / heads for e in range(D)]
        away = [math.dist(vector, centre) for vector in vectors]
        first = heads * rule.share
        number = math.floor(first - (first - min(rule.fewest, heads)) / max(seen.layers - 1, 1) * seen.layer + 0.5)
        order = sorted(range(heads), key=lambda head: -away[head])
        whole = order[: number - 1] + order[-1:] if number > 1 else order[:number]
        budget = rule.budget if isinstance(rule.budget, int) else math.floor(rule.budget * (n - pad))
        between = 0
        if len(whole) < heads:
            left = heads * budget - len(whole) * (n - pad)
            between = max(0, left // (heads - len(whole)) - rule.sinks - rule.recent)
        rows = []
        for head in range(heads):
            places = list(range(pad, n))
            if head in whole:
                rows.append(places)
                continue
            sure = [j for j in places if j - pad < rule.sinks or j >= n - rule.recent]
            half = rule.kernel // 2
            near = {j: votes[head][max(pad, j - half) : j + half + 1] for j in places}
            pooled = {j: sum(own) / len(own) for j, own in near.items()}
            middle = sorted((j for j in places if j not in sure), key=lambda j: -pooled[j])
            rows.append(sorted(sure + middle[:between]))
        kept.append(rows)
    return kept


def held(rule, seen, pads=PADS):
    store = LayerStore([None] * seen.k.shape[1], [(range(seen.k.shape[1]), rule)], (seen.layer, seen.layers))
    store.extend(seen.k, seen.v, pads)
    store.settle(seen.q, seen.scale, ())
    return store.held()


@pytest.mark.parametrize(
    "options",
    [{}, {"share": 0.3, "budget": 0.5}, {"kernel": 1, "top": 3}, {"budget": 2}, {"share": 0.0, "fewest": 0},
     {"window": 90, "top": 99}, {"share": 1.0, "fewest": 3}, {"recent": 40}, {"sinks": 0, "recent": 1, "kernel": 9}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("place", [{}, {"layer": 1, "layers": 3}, {"layer": 2, "layers": 3, "seed": 5}], ids=str)
def test_keeps_what_loops_keep(options, place):
    rule, seen = small(**options), seen_of(**place)
    assert held(rule, seen) == oracle(rule, seen)


def test_all_heads_heterogeneous_is_the_full_cache():
    seen = seen_of(layer=1, layers=2)
    full = [[list(range(pad, N))] * KV for pad in PADS]
    assert held(small(share=1.0, fewest=KV), seen) == full
    assert held(small(share=0.5, fewest=KV), seen) == full  # in the last layer
    assert held(small(budget=1.0), seen) == full
    assert held(small(share=0.5, fewest=KV - 1), seen) != full


def test_equal_heads_and_an_outlier_are_separated():
    """Seven equal heads and one other: distances are 1/8 and 7/8 of their difference; the other is chosen, and an equal one."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(1, 1, 20, D, generator=generator, dtype=torch.float64).expand(1, 8, 20, D).clone()
    v[:, 5] += torch.randn(D, generator=generator, dtype=torch.float64)
    weights = torch.rand(1, 1, 20, generator=generator, dtype=torch.float64).softmax(-1).expand(1, 8, 20)
    found = distances(weights, v, 20)[0]
    apart = float((weights[0, 0] @ (v[0, 5] - v[0, 0])).norm())
    wanted = torch.full((8,), apart / 8, dtype=torch.float64)
    wanted[5] = apart * 7 / 8
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert float(found[5] / found[0]) == pytest.approx(7.0)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, 1, 60, D, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, 60, D, generator=g, dtype=torch.float64)
    v = v.expand(1, 8, 60, D).clone()
    v[:, 5] = -v[:, 5]
    seen = Seen(q.expand(1, 8, 60, D), k.expand(1, 8, 60, D), v, torch.arange(60).expand(1, 8, 60), torch.tensor([0]), 60, 0.6)
    whole = [len(tokens) == 60 for tokens in held(small(budget=25, share=0.25), seen, (0,))[0]]
    assert whole[5]
    assert sum(whole) == 2
    assert [len(tokens) == 60 for tokens in held(small(budget=25, share=0.125), seen, (0,))[0]] == [head == 5 for head in range(8)]


def test_the_vector_of_one_query_over_all_tokens_is_its_attention_output():
    seen = seen_of(pads=(0, 0), groups=1)
    weights = seen.weights(1).mean(2)
    out = attend(seen.q[:, :, -1:], seen.k, seen.v, Causal(), scale=seen.scale)[:, :, 0]
    apart = (out - out.mean(1, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close(distances(weights, seen.v, N), apart, rtol=1e-12, atol=0)
    gram = out @ out.transpose(1, 2)  # the same from products of pairs
    squares = gram.diagonal(dim1=1, dim2=2) - 2 * gram.mean(2) + gram.mean((1, 2))[:, None]
    torch.testing.assert_close(distances(weights, seen.v, N) ** 2, squares, rtol=1e-10, atol=0)


@pytest.mark.parametrize("budget", [30, 45, 0.6])
def test_the_budget_is_spent_up_to_rounding(budget):
    seen = seen_of(seed=3)
    rule = small(budget=budget, share=0.25)
    spent = [sum(len(tokens) for tokens in row) for row in held(rule, seen)]
    for total, pad in zip(spent, PADS, strict=True):
        asked = KV * (budget if isinstance(budget, int) else math.floor(budget * (N - pad)))
        assert asked - KV < total <= asked
    poor = [sum(len(tokens) for tokens in row) for row in held(small(budget=10, share=0.25), seen)]
    assert poor == [N - pad + 3 * (3 + 8) for pad in PADS]  # what cannot be less


def test_heads_in_another_order_keep_the_same():
    seen, rule = seen_of(), small()
    order = [2, 0, 3, 1]
    queries = [2 * head + i for head in order for i in range(2)]
    moved = Seen(
        **{**vars(seen), "q": seen.q[:, queries], "k": seen.k[:, order], "v": seen.v[:, order], "number": seen.number[:, order]}
    )
    first, second = held(rule, seen), held(rule, moved)
    assert second == [[row[head] for head in order] for row in first]
    lengths = [[len(tokens) for tokens in row] for row in first]
    assert lengths[0] != lengths[1]  # other rows, other heads


@pytest.mark.parametrize(
    ("share", "fewest", "numbers"), [(0.25, 4, [8, 7, 5, 4]), (0.3, 1, [10, 7, 4, 1]), (0.0, 0, [0] * 4), (1.0, 40, [32] * 4)]
)
def test_fewer_heads_from_layer_to_layer(share, fewest, numbers):
    assert [TaskKv(1, share=share, fewest=fewest).number(32, layer, 4) for layer in range(4)] == numbers
    assert TaskKv(1, share=0.5).number(8, 0, 1) == 4


def test_the_choice_of_the_first_prompt_stays():
    """A second prompt that would choose other heads: those that have lost tokens cannot be whole, and those that are stay so."""
    rule = small(budget=30, share=0.5)
    first, second = seen_of(pads=(0, 0)), seen_of(n=40, seed=9, pads=(0, 0))
    second.v[:] *= 100 * torch.tensor([1.0, 0.0, 3.0, 0.5])[:, None, None]
    store = LayerStore([None] * KV, [(range(KV), rule)])
    whole = []
    for seen in (first, second):
        store.extend(seen.k, seen.v, (0, 0))
        store.settle(seen.q, seen.scale, ())
        whole.append([[len(tokens) == store.seen for tokens in row] for row in store.held()])
    assert whole[0] == whole[1]
    assert [[sum(row)] for row in whole[0]] == [[2], [2]]
    fresh = held(rule, Seen(**vars(second)), (0, 0))
    assert [[len(tokens) == 40 for tokens in row] for row in fresh] != whole[0]


def test_one_lost_token_is_enough_to_be_no_longer_whole():
    rule = small(budget=torch.tensor([60, 60, 59, 59]), share=0.5)
    seen, store = seen_of(pads=(0, 0)), LayerStore([None] * KV, [(range(KV), rule)])
    for start in (0, 60):
        store.extend(seen.k, seen.v.flip(1) if start else seen.v, (0, 0))
        store.settle(seen.q, seen.scale, ())
        lengths = [sorted(len(tokens) for tokens in row) for row in store.held()]
        if not start:
            assert lengths == [[59, 59, 60, 60]] * 2
            first = store.held()
    assert [[len(own) == 60 for own in row] for row in first] == [[len(own) == 120 for own in row] for row in store.held()]


def test_a_short_prompt_is_kept():
    seen = seen_of(n=9)
    assert held(small(budget=4, share=0.0, fewest=0), seen) == [[list(range(pad, 9))] * KV for pad in PADS]


def test_bad_settings_are_refused():
    for options in ({"share": 1.5}, {"share": -0.1}, {"fewest": -1}):
        with pytest.raises(PlanError, match="share="):
            small(**options).check_heads(8)


def test_a_model_under_the_plan_holds_its_budget():
    """Layer by layer, and with all heads whole it generates as ever."""
    subject = open_model("tiny-gqa", dtype=torch.float64)
    ids = torch.randint(3, 4096, (1, 300), generator=torch.Generator().manual_seed(0))
    plan = task_kv(subject, budget=0.6, sinks=4, recent=24, share=0.5)
    with torch.no_grad(), plan(subject):
        cache = cache_of(subject.model(input_ids=ids, use_cache=True))
    for layer in cache.layers:
        lengths = [len(tokens) for tokens in layer.store.held()[0]]
        assert max(lengths) == 300
        assert 180 * len(lengths) - len(lengths) < sum(lengths) <= 180 * len(lengths)
    assert plan.entries[0].stage.share == 0.5
    assert plan.heads() == subject.main.exists()
    some = task_kv(subject, subject.heads("L2H0"), recent=7, sinks=5, window=3, top=9, kernel=1, fewest=2).entries[0]
    rule = some.stage
    assert some.heads == subject.main.key_value_groups(subject.heads("L2H0"))
    assert (rule.budget, rule.sinks, rule.recent, rule.window, rule.top, rule.kernel, rule.share, rule.fewest) == (
        0.4,
        5,
        7,
        3,
        9,
        1,
        0.3,
        2,
    )
