"""Streaming heads whose positions are those in the cache."""

from __future__ import annotations

import pytest
import torch
from families import DECODERS

from headwise import Plan, open_model
from headwise.attention import attend
from headwise.caches.rules.renumbered import Renumbered
from headwise.errors import PlanError, UnsupportedModelError
from headwise.models.cache import cache_argument, cache_of
from headwise.models.subject import as_subject
from headwise.plans.recipes.streaming import streaming
from headwise.stages.causal import Causal
from headwise.stages.sink import Sink
from headwise.stages.window import Window

SINK, RECENT, N = 3, 9, 40
FAMILIES = [family for family in DECODERS if family.name in ("llama", "gpt_neox", "cohere", "gemma2", "gpt_oss", "qwen3")]


def prompt(subject, n=N, rows=1, seed=0):
    return torch.randint(3, min(4096, subject.vocabulary_size - 4), (rows, n), generator=torch.Generator().manual_seed(seed))


def logits(subject, ids, **options):
    with torch.no_grad():
        return subject.model(input_ids=ids, **{"use_cache": False, **options}).logits


def by_hand(subject):
    """Reads every query alone: the keys it has, before their rotation, turned by their slot, the query by the last slot."""

    def tap(call, out):
        rotary = subject.session.rotary(call.site)
        b, _, n, _ = call.q.shape
        places = torch.arange(n).expand(b, n)
        q, k = rotary.turned_back(call.q, places), rotary.turned_back(call.k, places)
        rows = []
        for i in range(n):
            held = [j for j in range(i + 1) if j < SINK or j > i - RECENT]
            slots = torch.arange(len(held)).expand(b, -1)
            own_k, own_q = rotary.turned(k[:, :, held], slots), rotary.turned(q[:, :, i : i + 1], slots[:, -1:])
            rows.append(attend(own_q, own_k, call.v[:, :, held], Causal(), scale=call.readings[0].scale, backend="reference"))
        return torch.cat(rows, 2).transpose(1, 2)

    return tap


@pytest.mark.parametrize("name", ["tiny", "tiny-gqa"])
def test_reads_are_those_of_keys_turned_by_their_slots(name):
    subject = open_model(name, dtype=torch.float64)
    ids = prompt(subject, rows=2)
    with subject.tap(by_hand(subject)):
        wanted = logits(subject, ids)
    with streaming(subject, sink=SINK, recent=RECENT, positions="cache")(subject):
        found = logits(subject, ids)
    assert float((found - wanted).abs().max()) < 1e-4  # models round angles to float32; the next but one test has none of that
    with streaming(subject, sink=SINK, recent=RECENT)(subject):
        assert float((logits(subject, ids) - wanted).abs().max()) > 0.1  # true positions are something else


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_generation_is_the_pass_over_the_whole_text(family):
    """A prompt, tokens, another prompt, a draft: from the ring as in one pass, and with padding as without."""
    model = family.model().double()
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(8)
    subject = as_subject(model)
    ids, plan = prompt(subject, 80), streaming(subject, sink=SINK, recent=RECENT, positions="cache")
    with plan(subject), torch.no_grad():
        whole = logits(subject, ids)
        rows, start, cache = [], 0, {}
        for count in (20, 1, 1, 33, 5, 1, 19):
            out = model(input_ids=ids[:, start : start + count], use_cache=True, **cache)
            rows, start, cache = [*rows, out.logits], start + count, {cache_argument(model): cache_of(out)}
        assert float((torch.cat(rows, 1) - whole).abs().max()) < 1e-9 * float(whole.abs().max())
        assert max(len(held) for layer in cache_of(out).layers for held in layer.store.held()[0]) == SINK + RECENT
        padded = torch.cat([torch.full((1, 7), 0), ids], 1)
        mask = (torch.arange(87) >= 7).long()[None]
        behind = logits(subject, padded, attention_mask=mask, position_ids=(torch.arange(87) - 7).clamp(min=0)[None])
        assert float((behind[:, 7:] - whole).abs().max()) < 1e-9 * float(whole.abs().max())
    with streaming(subject, sink=SINK, recent=RECENT)(subject):
        assert not torch.allclose(logits(subject, ids), whole, rtol=1e-3, atol=1e-3)


def test_a_text_no_longer_than_what_is_held_is_read_in_full():
    subject = open_model("tiny", dtype=torch.float64)
    ids = prompt(subject, SINK + RECENT)
    with streaming(subject, sink=SINK, recent=RECENT, positions="cache")(subject):
        assert float((logits(subject, ids) - logits(open_model("tiny", dtype=torch.float64), ids)).abs().max()) < 1e-11
        longer, plain = (logits(s, prompt(subject, SINK + RECENT + 1)) for s in (subject, open_model("tiny", dtype=torch.float64)))
    assert float((longer - plain).abs().max()) > 1e-6


def test_window_keys_keep_their_distances_and_sinks_move_on():
    """Turning keys by their slots is moving the sinks by what was evicted: the scores agree to the last bits, in float64."""
    rates, d = torch.tensor([0.9, 0.1], dtype=torch.float64), 4
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, d, generator=g, dtype=torch.float64), torch.randn(50, d, generator=g, dtype=torch.float64)

    def turned(x, places):
        angles = places[:, None] * rates
        first, second = x[..., :2], x[..., 2:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)

    held = torch.tensor([*range(SINK), *range(50 - RECENT, 50)])
    slots = torch.arange(SINK + RECENT)
    paper = turned(q, slots[-1:]) @ turned(k[held], slots).T
    evicted = 50 - SINK - RECENT
    moved = turned(q, torch.tensor([49])) @ turned(k[held], torch.where(held < SINK, held + evicted, held)).T
    assert float((paper - moved).abs().max()) < 1e-13
    assert float((paper - turned(q, torch.tensor([49])) @ turned(k[held], held).T).abs().max()) > 0.1


def test_only_the_heads_asked_for_move_and_whole_groups_of_them():
    subject = open_model("tiny-gqa", dtype=torch.float64)
    heads = subject.heads("L3H5")
    plan = streaming(subject, heads, sink=SINK, recent=RECENT, positions="cache")
    assert plan.heads() == subject.main.key_value_groups(heads)
    outs = []

    def tap(call, out):
        if call.site.layer == 3:
            outs.append(out)

    ids = prompt(subject)
    with subject.tap(tap):
        logits(subject, ids)
        for positions in ("text", "cache"):
            chosen = subject.main.key_value_groups(heads)
            with streaming(subject, chosen, sink=SINK, recent=RECENT, positions=positions)(subject):
                logits(subject, ids)
    changed = [[not torch.allclose(outs[i][:, :, h], outs[j][:, :, h], atol=1e-9) for h in range(8)] for i, j in ((0, 2), (1, 2))]
    asked = [(3, h) in subject.main.key_value_groups(heads) for h in range(8)]
    assert changed == [asked, asked]


def test_half_precision_and_broken_groups():
    """Query heads that share keys, of which some have a shorter window; in bfloat16 near what float32 gives."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        subject = open_model("tiny-gqa", dtype=dtype)
        plan = streaming(subject, sink=SINK, recent=RECENT, positions="cache").use(
            subject.heads("L0H1,L2H3"), Window(4) | Sink(SINK)
        )
        with plan(subject):
            found.append(logits(subject, prompt(subject)).float())
    assert found[1].isfinite().all()
    assert float((found[0] - found[1]).abs().mean() / found[0].std()) < 0.1


def test_what_has_no_rotary_positions_says_so():
    gpt2 = next(family for family in DECODERS if family.name == "gpt2").model()
    with pytest.raises(UnsupportedModelError, match="positions='text'"):
        streaming(gpt2, positions="cache")
    assert streaming(gpt2).heads()
    with pytest.raises(PlanError, match="'text' or 'cache'"):
        streaming("tiny", positions="slots")


def test_beside_another_mask_the_query_still_counts_what_it_could_hold():
    """A mask that is no sinks and window evicts nothing that is known, and moves nothing."""
    subject = open_model("tiny", dtype=torch.float64)
    ids, every = prompt(subject), subject.main.exists()
    table = Window(5) & ~Sink(2)
    results = []
    for stages in ((table,), (table, Renumbered())):
        with Plan.empty(subject).use(every, *stages)(subject):
            results.append(logits(subject, ids))
    assert torch.equal(*results)
