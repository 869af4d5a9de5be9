"""Expected attention against plain loops, and the cases in which it is something known."""

from __future__ import annotations

import math

import pytest
import torch

from headwise import Plan, open_model
from headwise.caches import LayerStore
from headwise.caches.rule import Seen
from headwise.caches.rules.expected_attention import ExpectedAttention
from headwise.models.rotary import RotaryPositions
from headwise.plans.recipes.expected_attention import expected_attention

B, H, KV, D = 2, 4, 2, 6
PADS = (0, 3)


def turning(pairs=False, factor=1.3):
    """Two of three pairs turn, and are scaled."""
    module = torch.nn.Module()
    module.inv_freq, module.factor = torch.tensor([0.7, 0.05]), factor
    return RotaryPositions(module, "inv_freq", "factor", pairs)


def turned_by_hand(x, place, factor=1.3):
    """One vector, entries (0, 2) and (1, 3) turned by 0.7 and 0.05 a place."""
    x = [float(entry) for entry in x]
    out = list(x)
    for i, rate in enumerate((0.7, 0.05)):
        cos, sin = factor * math.cos(place * rate), factor * math.sin(place * rate)
        out[i], out[i + 2] = x[i] * cos - x[i + 2] * sin, x[i + 2] * cos + x[i] * sin
    return out


def seen_of(n=9, m=None, seed=0, rotary=None, pads=PADS, scale=0.4, start=0):
    """A prompt of n tokens; m > n: behind m - n tokens that are held already, the numbers up to `start` having gaps."""
    g = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    q, k, v = (torch.randn(B, heads, c, D, generator=g, dtype=torch.float64) for heads, c in ((H, n), (KV, m), (KV, m)))
    number = torch.arange(m).expand(B, KV, m).clone()
    number[..., m - n :] += start
    number[number < torch.tensor(pads)[:, None, None]] = -1
    return Seen(q, k, v, number, torch.tensor(pads), m + start, scale, rotary=rotary), q


def oracle(rule, seen, before):
    """before: (b, h, n, d) queries before they were turned."""
    scores = torch.zeros(seen.k.shape[:3], dtype=torch.float64)
    n, m = before.shape[2], seen.k.shape[2]
    for b in range(B):
        pad = int(seen.pads[b])
        own = [i for i in range(n) if seen.total - n + i - pad >= rule.sinks]
        behind = [j for j in range(m) if seen.number[b, 0, j] - pad >= rule.sinks and seen.number[b, 0, j] >= 0]
        for kv in range(KV):
            total = [0.0] * m
            for h in range(kv * 2, kv * 2 + 2):
                turn = [[0.0] * D for _ in range(D)]
                for place in range(seen.total - pad, seen.total - pad + rule.future):
                    for c in range(D):
                        unit = [float(c == e) for e in range(D)]
                        column = unit if seen.rotary is None else turned_by_hand(unit, place)
                        for e in range(D):
                            turn[e][c] += column[e] / rule.future
                mean = [sum(float(before[b, h, i, e]) for i in own) / len(own) for e in range(D)]
                mu = [sum(turn[e][c] * mean[c] for c in range(D)) for e in range(D)]
                logits = []
                for j in behind:
                    key = [float(x) for x in seen.k[b, kv, j]]
                    logit = seen.scale * sum(x * y for x, y in zip(mu, key, strict=True))
                    if rule.covariance:
                        back = [sum(turn[e][c] * key[e] for e in range(D)) for c in range(D)]
                        away = [sum((float(before[b, h, i, c]) - mean[c]) * back[c] for c in range(D)) for i in own]
                        logit += seen.scale**2 * sum(x * x for x in away) / len(own) / 2
                    logits.append(logit)
                normal = sum(math.exp(x) for x in logits)
                for j, logit in zip(behind, logits, strict=True):
                    total[j] += math.exp(logit) / normal / 2
            for j in range(m):
                length = math.sqrt(sum(float(x) ** 2 for x in seen.v[b, kv, j])) if rule.values else 1.0
                share = (total[j] + rule.epsilon) if rule.values else total[j]
                scores[b, kv, j] = share * length if j in behind else math.inf
    return scores


@pytest.mark.parametrize("rotary", [None, turning()], ids=["no rotary", "rotary"])
@pytest.mark.parametrize("options", [{}, {"covariance": False}, {"values": False}, {"epsilon": 0.3, "sinks": 2}], ids=str)
@pytest.mark.parametrize("place", [{}, {"m": 12, "start": 5}], ids=["prompt", "later prompt"])
def test_scores_are_those_of_plain_loops(rotary, options, place):
    rule = ExpectedAttention(5, **{"future": 40, **options})
    seen, before = seen_of(rotary=rotary, **place)
    if rotary is not None:
        places = torch.arange(seen.total - 9, seen.total) - seen.pads[:, None]
        seen = Seen(**{**vars(seen), "q": rotary.turned(before, places.clamp(min=0))})
    torch.testing.assert_close(rule.score(seen), oracle(rule, seen, before), rtol=1e-6, atol=1e-9)  # angles are float32


def test_without_spread_it_is_the_row_of_the_mean_query_one_place_on():
    """One position to come, no covariance, no values: a softmax over keys, exactly."""
    rotary = turning(pairs=True)
    rule = ExpectedAttention(5, sinks=2, future=1, covariance=False, values=False)
    seen, before = seen_of(rotary=rotary, pads=(0, 0))
    seen = Seen(**{**vars(seen), "q": rotary.turned(before, torch.arange(9).expand(B, 9))})
    mean = before[:, :, 2:].mean(2, keepdim=True)
    row = rotary.turned(mean, torch.full((B, 1), 9)) @ seen.k.repeat_interleave(2, 1)[:, :, 2:].transpose(2, 3) * seen.scale
    wanted = row.softmax(-1)[:, :, 0].unflatten(1, (KV, 2)).mean(2)
    torch.testing.assert_close(rule.score(seen)[..., 2:], wanted, rtol=1e-12, atol=1e-14)
    assert rule.score(seen)[..., :2].isinf().all()


def test_it_is_the_mean_exponential_score_of_normal_queries():
    """Monte Carlo: over queries drawn from the distribution that the rule found, up to a factor for all keys."""
    rule = ExpectedAttention(5, sinks=0, future=7, values=False)
    rotary = turning()
    seen, before = seen_of(rotary=rotary, pads=(0, 0), n=30)
    seen = Seen(**{**vars(seen), "q": rotary.turned(before, torch.arange(30).expand(B, 30))})
    mean, spread = rule.queries(seen)
    draws = torch.distributions.MultivariateNormal(mean[0, 0], spread[0, 0] + 1e-12 * torch.eye(D, dtype=torch.float64))
    torch.manual_seed(0)
    expected = (draws.sample((200_000,)) @ seen.k[0, 0].T * seen.scale).exp().mean(0)
    alone = Seen(**{**vars(seen), "q": seen.q[:, :1], "k": seen.k[:, :1], "v": seen.v[:, :1], "number": seen.number[:, :1]})
    torch.testing.assert_close(rule.score(alone)[0, 0], expected / expected.sum(), rtol=0.01, atol=0)


def test_keys_shifted_where_no_query_points_score_the_same():
    rule = ExpectedAttention(5, sinks=0, future=3)
    seen, _ = seen_of()
    seen.q[..., 1] = 0.0  # no mean and no spread along it
    shifted = Seen(**{**vars(seen), "k": seen.k + 7.0 * torch.eye(D, dtype=torch.float64)[1]})
    torch.testing.assert_close(rule.score(shifted), rule.score(seen), rtol=1e-12, atol=0)
    other = Seen(**{**vars(seen), "k": seen.k + 7.0 * torch.eye(D, dtype=torch.float64)[0]})
    assert not torch.allclose(rule.score(other), rule.score(seen), rtol=1e-3)


def test_where_a_row_begins_does_not_matter():
    """Queries and keys all some places further on: the same scores."""
    rotary, rule = turning(), ExpectedAttention(5, sinks=0, future=20)
    found = []
    for shift in (0, 50):
        seen, before = seen_of(rotary=rotary, pads=(0, 0), start=0)
        places = torch.arange(9).expand(B, 9) + shift
        q, k = rotary.turned(before, places), rotary.turned(seen.k, places)
        moved = {"q": q, "k": k, "number": seen.number + shift, "total": seen.total + shift}
        found.append(rule.score(Seen(**{**vars(seen), **moved})))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_a_prompt_no_longer_than_the_sinks_is_kept():
    rule = ExpectedAttention(2, sinks=20)
    scores = rule.score(seen_of()[0])
    assert scores.isinf().all()
    assert not scores.isnan().any()


def test_half_precision_is_scored_in_float32():
    seen, _ = seen_of()
    half = Seen(**{name: x.bfloat16() if name in "qkv" else x for name, x in vars(seen).items()})
    wide = Seen(**{name: x.bfloat16().float() if name in "qkv" else x for name, x in vars(seen).items()})
    rule = ExpectedAttention(5)
    assert rule.score(half).dtype == torch.float32
    assert torch.equal(rule.score(half), rule.score(wide))


def test_the_store_hands_the_rotary_on():
    """To rules that ask for it, and it reaches the scores."""
    rule = ExpectedAttention(3, sinks=1, future=5)
    seen, before = seen_of(pads=(0, 0))
    rotary = turning()
    held = []
    for given in (None, rotary):
        store = LayerStore([None] * KV, [((0, 1), rule)])
        store.extend(seen.k, seen.v)
        store.settle(before, seen.scale, (), given)
        held.append(store.held())
        places = Seen(**{**vars(seen), "rotary": given})
        best = rule.score(places).topk(3, -1).indices.sort(-1).values
        assert held[-1] == best.tolist()
    assert held[0] != held[1]


def test_queries_of_a_model_are_turned_back():
    """What the rule takes for the mean query is the mean of the layer's projections, without rotation."""
    subject = open_model("tiny-gqa", dtype=torch.float64)
    attention = subject.model.get_submodule(subject.main.sites[0].path)
    ids, noted, projected = torch.randint(3, 4096, (1, 50), generator=torch.Generator().manual_seed(0)), [], []
    score = ExpectedAttention.score
    site = subject.main.sites[0]

    class Noting(ExpectedAttention):
        def score(self, seen):
            noted.append(seen)
            return score(self, seen)

    hook = attention.q_proj.register_forward_hook(lambda _, __, out: projected.append(out))
    plan = Plan.empty(subject).use(subject.main.exists(), Noting(10, sinks=3, future=1))
    try:
        with plan(subject), torch.no_grad():
            subject.model(input_ids=ids, use_cache=True)
    finally:
        hook.remove()
    q = next(out for out in projected if out.shape[1] == 50).unflatten(-1, (site.heads, -1)).transpose(1, 2)
    mean, _ = Noting(10, sinks=3, future=1).queries(noted[0])
    wanted = noted[0].rotary.turned(q[:, :, 3:].mean(2, keepdim=True), torch.tensor([[50]]))
    torch.testing.assert_close(mean, wanted[:, :, 0], rtol=1e-6, atol=1e-8)
    assert all(seen.rotary is not None for seen in noted)
    assert [seen.layer for seen in noted] == list(range(len(subject.main.sites)))


def test_the_recipe_gives_whole_groups_its_rule():
    subject = open_model("tiny-gqa")
    plan = expected_attention(subject, subject.heads("L1H0"), budget=7, sinks=2, future=9, covariance=False, values=False)
    assert plan.heads() == subject.main.key_value_groups(subject.heads("L1H0"))
    rule = plan.entries[0].stage
    assert (rule.budget, rule.sinks, rule.future, rule.covariance, rule.values, rule.epsilon) == (7, 2, 9, False, False, 0.0)
    assert expected_attention(subject).heads() == subject.main.exists()
