"""Plans: made, joined, applied, saved, refused; and generation under them."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from headwise import Alibi, Gate, Heads, IdentityMix, KeyBias, Offset, Plan, Sink, SinkLogit, Softcap, Temperature, Uniform, Window
from headwise.caches import PAGE
from headwise.errors import GeometryError, PlanError, SelectionError, ShapeError
from headwise.models.cache import CACHE_NAMES, HeadCache, cache_argument, cache_bytes, cache_of
from headwise.models.session import session_of


def prompt(rows=2, length=120, seed=0):
    ids = torch.randint(3, 4096, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def logits(subject, ids, **options):
    with torch.no_grad():
        return subject.model(input_ids=ids, **{"use_cache": False, **options}).logits


def generate(subject, ids, **options):
    with torch.no_grad():
        return subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=2,
            **{"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, **options},
        )


def taking(subject, cache):
    """A cache as the argument that this release of transformers calls it."""
    return {cache_argument(subject.model): cache}


@pytest.fixture
def streaming(exact):
    heads = exact.main.exists() - exact.heads("L6H5,L7H3,L2H5")
    return Plan.empty(exact).use(heads, Window(32) | Sink(4))


def test_gates_compose_and_zero_is_the_same_twice(exact):
    ids, a, b = prompt(), exact.heads("L2H1"), exact.heads("L2H1,L3H0")
    half = Plan.empty(exact).use(b, Gate(torch.full((1,), 0.5)))
    both = Plan.empty(exact).use(a, Gate(torch.full((1,), 0.5))) | half
    with both(exact):
        joined = logits(exact, ids)
    with Plan.empty(exact).use(b, Gate(torch.tensor([0.25, 0.5])))(exact):
        product = logits(exact, ids)
    assert torch.equal(joined, product)
    with half(exact), Plan.empty(exact).use(a, Gate(torch.full((1,), 0.5)))(exact):
        nested = logits(exact, ids)
    assert torch.equal(nested, product)


def test_per_head_fields_follow_the_selection(exact):
    ids = prompt()
    heads = exact.heads("L2H1,L2H3,L4H0")
    values = torch.tensor([0.0, 0.5, 2.0])
    one = Plan.empty(exact)
    for name, value in zip(heads.names(), values, strict=True):
        one = one.use(exact.heads(name), Gate(value[None]))
    with one(exact):
        apart = logits(exact, ids)
    with Plan.empty(exact).use(heads, Gate(values))(exact):
        together = logits(exact, ids)
    assert torch.equal(apart, together)


def test_every_stage_runs_in_a_model_and_equals_the_reference(exact):
    """One head gets a stage; its output is that of `attend` with the stage, on the q, k, v that the model made."""
    from headwise import Causal, attend

    ids = prompt(1, 60)
    head = exact.heads("L3H2")
    stages = [
        Window(9), Sink(3), Window(9) | Sink(3), Uniform(), Temperature(torch.tensor([2.0])), Softcap(1.0),
        Alibi(torch.tensor([0.1])), KeyBias(5, 20, 4.0), SinkLogit(torch.tensor([1.0])), IdentityMix(0.3),
    ]  # fmt: skip
    for stage in stages:
        seen = {}

        def tap(call, out, seen=seen):
            if call.site.layer == 3:
                expected = attend(call.q[:, 2:3], call.k[:, 2:3], call.v[:, 2:3], Causal(), stage, backend="reference")  # noqa: B023
                seen["error"] = float((out[:, :, 2] - expected[:, 0]).abs().max())

        with Plan.empty(exact).use(head, stage)(exact), exact.tap(tap):
            logits(exact, ids)
        assert seen["error"] < 1e-12, stage


def test_offsets_are_added(exact):
    head, vector = exact.heads("L7H0"), torch.linspace(-1, 1, 32)[None]
    outs = []
    with exact.tap(lambda call, out: outs.append(out.clone()) if call.site.layer == 7 else None):
        logits(exact, prompt(1, 20))
        with Plan.empty(exact).use(head, Offset(vector))(exact):
            logits(exact, prompt(1, 20))
    torch.testing.assert_close(outs[1][:, :, 0] - outs[0][:, :, 0], vector.double().expand(1, 20, 32))
    assert torch.equal(outs[0][:, :, 1:], outs[1][:, :, 1:])


def test_heads_of_a_broken_group_are_masked_apart(tiny_gqa):
    """A plan on one query head of a group: the others of its group read on, and the group keeps everything."""
    ids = prompt()
    plan = Plan.empty(tiny_gqa).use(tiny_gqa.heads("L3H1"), Window(4))
    outs = []
    with tiny_gqa.tap(lambda call, out: outs.append(out.clone()) if call.site.layer == 3 else None):
        logits(tiny_gqa, ids)
        with plan(tiny_gqa):
            logits(tiny_gqa, ids)
    others = [0, 2, 3, 4, 5, 6, 7]
    assert torch.equal(outs[0][:, :, others], outs[1][:, :, others])
    assert not torch.allclose(outs[0][:, :, 1], outs[1][:, :, 1])
    with plan(tiny_gqa), torch.no_grad():
        assert type(cache_of(tiny_gqa.model(ids, use_cache=True))) is DynamicCache  # nothing could be freed


def test_apply_and_remove(exact):
    ids, plan = prompt(), Plan.empty(exact).use(exact.heads("L1H1"), Gate(torch.zeros(1)))
    before = logits(exact, ids)
    assert plan.apply(exact) is exact
    changed = logits(exact, ids)
    with pytest.raises(PlanError, match="already applied"):
        plan.apply(exact)
    plan.remove(exact.model)
    assert torch.equal(logits(exact, ids), before)
    assert not torch.equal(changed, before)
    with pytest.raises(PlanError, match="not applied"):
        plan.remove(exact)


def test_an_error_inside_the_model_leaves_nothing_behind(exact):
    ids, plan = prompt(), Plan.empty(exact).use(exact.heads("L1H1"), Gate(torch.zeros(1)))
    before = logits(exact, ids)
    with pytest.raises(IndexError), plan(exact):
        exact.model(torch.tensor([[10**6]]))
    with pytest.raises((TypeError, ValueError)), plan(exact):
        exact.model(nonsense=1)
    assert torch.equal(logits(exact, ids), before)
    assert exact.model.config._attn_implementation == "sdpa"
    assert not exact.model._forward_pre_hooks


def test_two_models_of_one_class_do_not_meet(exact, tiny):
    ids = prompt()
    before = logits(tiny, ids)
    with Plan.empty(exact).use(exact.main.exists(), Gate(torch.zeros(1)))(exact):
        assert torch.equal(logits(tiny, ids), before)


def test_a_copy_made_under_a_plan_says_so(tiny):
    plan = Plan.empty(tiny).use(tiny.heads("L0H0"), Gate(torch.zeros(1)))
    with plan(tiny):
        twin = copy.deepcopy(tiny.model)
    with pytest.raises(PlanError, match="copied while a plan was applied"):
        twin(prompt())
    twin.set_attn_implementation("sdpa")
    assert torch.equal(twin(prompt()).logits, tiny.model(prompt()).logits)


def test_gradients_flow_through_a_plan(exact):
    """Along its own gradient the loss changes by the gradient's norm (Llama's norms compute in float32, hence 1 %)."""
    plan = Plan.empty(exact).use(exact.heads("L5H0,L6H2"), Window(8)).use(exact.heads("L5H1"), Gate(torch.full((1,), 0.5)))
    weight = exact.model.model.layers[5].self_attn.q_proj.weight
    ids = prompt(2, 60)
    with plan(exact):
        (grad,) = torch.autograd.grad(exact.token_losses(ids).mean(), weight)
        own, step = weight.detach().clone(), 1e-3 * grad / grad.norm()
        with torch.no_grad():
            weight.copy_(own + step)
            up = exact.token_losses(ids).mean()
            weight.copy_(own - step)
            down = exact.token_losses(ids).mean()
            weight.copy_(own)
    assert float(up - down) / 2e-3 == pytest.approx(float(grad.norm()), rel=1e-2)
    assert float(grad[:32].norm()) > 0  # the rows of L5H0, which reads through a window


# ---- generation ------------------------------------------------------------------------------------------------------


def test_prompt_in_parts_and_calls_that_go_on(exact, streaming):
    """A cache filled in three calls reads as one prompt does; so does a second generate on the first one's cache."""
    ids = prompt(2, 100)
    with streaming(exact), torch.no_grad():
        whole = exact.model(ids, use_cache=True)
        cache = cache_of(exact.model(ids[:, :41], use_cache=True))
        exact.model(ids[:, 41:77], **taking(exact, cache))
        parts = exact.model(ids[:, 77:], **taking(exact, cache))
        torch.testing.assert_close(parts.logits, whole.logits[:, 77:], rtol=1e-10, atol=1e-10)
        assert cache.get_seq_length() == 100
        first = exact.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=2,
        )
        more = torch.cat([first.sequences, prompt(2, 9, seed=5)[:, 1:]], 1)
        going_on = generate(exact, more, **taking(exact, cache_of(first)))
        assert torch.equal(going_on, generate(exact, more))


def test_beams_samples_and_returned_sequences(exact, streaming):
    """Beam search reorders the stores; sampling draws the same tokens as without a cache."""
    ids = prompt(2, 90)
    with streaming(exact):
        for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
            assert torch.equal(generate(exact, ids, **options), generate(exact, ids, use_cache=False, **options))
        torch.manual_seed(0)
        drawn = generate(exact, ids, do_sample=True, temperature=1.5)
        torch.manual_seed(0)
        assert torch.equal(drawn, generate(exact, ids, do_sample=True, temperature=1.5, use_cache=False))


def test_bytes_fall_and_stay_down(exact, streaming):
    with torch.no_grad():
        full = cache_bytes(cache_of(exact.model(prompt(1, 1500), use_cache=True)))
        with streaming(exact):
            cache = cache_of(exact.model(prompt(1, 1500), use_cache=True))
    heads, size = 64, 2 * 32 * 8
    assert full == heads * 1500 * size
    pages = 3 * 24 + 61  # 1500 tokens take 24 pages, 36 take one
    assert cache.bytes() == pages * PAGE * (size + 4)  # and the numbers of the tokens
    assert cache.bytes() < 0.1 * full


def test_generation_fills_the_per_head_cache(exact, streaming):
    """`generate` hands an empty default cache in; it must not be the one that is filled, whatever name it comes by."""
    ids = prompt(1, 300)
    options = {"return_dict_in_generate": True, "max_new_tokens": 4, "min_new_tokens": 4}
    with streaming(exact):
        cache = cache_of(generate(exact, ids, **options))
        assert type(cache) is HeadCache
        assert cache.get_seq_length() == 303  # the last token is not read any more
        assert cache.bytes() < 0.3 * 64 * 303 * 2 * 32 * 8
        for name in CACHE_NAMES[CACHE_NAMES.index(cache_argument(exact.model)) :]:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", FutureWarning)  # transformers' word on the older name
                out = exact.model(ids, use_cache=True, **{name: DynamicCache(config=exact.model.config)})
            assert type(cache_of(out)) is HeadCache, name
            assert cache_of(out).get_seq_length() == 300


def test_a_cache_of_another_plan_is_refused(exact, streaming):
    with streaming(exact), torch.no_grad():
        cache = cache_of(exact.model(prompt(), use_cache=True))
    with pytest.raises(PlanError, match="under another plan"):
        exact.model(prompt()[:, :1], **taking(exact, cache))
    other = Plan.empty(exact).use(exact.main.exists(), Window(8))
    with other(exact), pytest.raises(PlanError, match="under another plan"):
        exact.model(prompt()[:, :1], **taking(exact, cache))


def test_static_caches_are_refused_and_filled_ones_kept(exact, streaming):
    ids = prompt(1, 60)
    with streaming(exact), torch.no_grad(), pytest.raises(PlanError, match="StaticCache"):
        exact.model(ids, **taking(exact, StaticCache(config=exact.model.config, max_cache_len=80)))
    with torch.no_grad():
        filled = cache_of(exact.model(ids, use_cache=True))
        with streaming(exact):
            after = exact.model(prompt(1, 5, seed=3), **taking(exact, filled))
    assert cache_of(after) is filled  # masks hold on it; it was not ours to free
    assert filled.get_seq_length() == 65


def test_windowed_layers_keep_their_own_window():
    """On a sliding-window model a plan's cache holds no more than the window for heads outside the plan."""
    import families

    model = next(f for f in families.ALL if f.name == "mistral").model().double()
    plan = Plan.empty(model).use(session_of(model).layout.heads("L0H0,L0H1"), Window(4))
    ids = torch.randint(3, 95, (1, 64))
    with plan(model), torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        assert all(layer.is_sliding for layer in cache.layers)
        assert cache.bytes() == 4 * PAGE * (2 * 8 * 8 + 4)  # a page for each of two heads in two layers
        held = [layer.store.held()[0] for layer in cache.layers]
        assert held == [[list(range(60, 64)), list(range(56, 64))], [list(range(56, 64))] * 2]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_geometry(tiny, tiny_gqa):
    plan = Plan.empty(tiny).use(tiny.heads("L0H0"), Gate(torch.zeros(1)))
    with pytest.raises(GeometryError, match=r"8 x|8 layers x 8 heads \(8 key/value\).*\(2 key/value\)"):
        plan.apply(tiny_gqa)
    with pytest.raises(GeometryError, match=r"4 layers x 4 heads, the decoder has 8 x 8"):
        Plan.empty(tiny).use(Heads.all((4, 4)), Gate(torch.zeros(1)))
    with pytest.raises(GeometryError, match="one plan is for"):
        Plan.empty(tiny) | Plan.empty(tiny_gqa)
    with pytest.raises(SelectionError, match="no stack 'vision'"):
        Plan.empty(tiny).use(Heads.all((8, 8), "vision"), Gate(torch.zeros(1)))
    with pytest.raises(ShapeError, match="3 entries for 2 heads"):
        Plan.empty(tiny).use(tiny.heads("L0H0,L0H1"), Gate(torch.zeros(3)))
    with pytest.raises(GeometryError, match="offset of size 5"):
        Plan.empty(tiny).use(tiny.heads("L0H0"), Offset(torch.zeros(1, 5)))
    with pytest.raises(SelectionError, match="selected 1 heads, expected 2"):
        Plan.empty(tiny).use(tiny.heads("L0H0"), Gate(torch.zeros(1)), expect=2)
    with pytest.raises(PlanError, match="is no stage"):
        Plan.empty(tiny).use(tiny.heads("L0H0"), "gate")
    with pytest.raises(PlanError, match="loaded model"):
        plan.apply("tiny")
    assert Plan.empty(tiny).use(Heads.none((8, 8)), Gate(torch.zeros(1))).entries == ()


def test_saved_plans_round_trip(tmp_path, tiny):
    heads = tiny.heads("L1H1,L3H2")
    plan = (
        Plan.empty(tiny)
        .use(heads, Gate(torch.tensor([0.25, 0.75])), (Window(5) | Sink(2)) & ~Sink(1), KeyBias(0, 3, 2.0))
        .use(tiny.heads("L7H7"), Offset(torch.arange(32.0)[None]), Softcap(3.0))
        .noting(why="a test", numbers=[1, 2])
    )
    again = Plan.from_pretrained(plan.save_pretrained(tmp_path / "plan"))
    assert repr(again) == repr(plan)
    assert again.about == {"why": "a test", "numbers": [1, 2]}
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert data["model"] == "tiny"
    assert data["geometry"]["decoder"]["heads"] == [8] * 8
    assert {"headwise", "transformers", "format"} <= data.keys()
    with plan(tiny):
        first = logits(tiny, prompt())
    with again(tiny):
        assert torch.equal(first, logits(tiny, prompt()))
    plan.use(heads, Gate(torch.zeros(1)))
    assert len(plan.entries) == 5  # plans do not change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "plan.json").unlink(), "holds no plan.json"),
        (lambda d: (d / "plan.json").write_text("{"), "cannot be read as a plan"),
        (lambda d: (d / "plan.safetensors").unlink(), "KeyError"),
        (lambda d: (d / "plan.safetensors").write_bytes(b"nothing"), "cannot be read as a plan"),
        (
            lambda d: (d / "plan.json").write_text((d / "plan.json").read_text().replace('"format": 1', '"format": 9')),
            "format 9, this version",
        ),
        (
            lambda d: (d / "plan.json").write_text((d / "plan.json").read_text().replace('"gate"', '"os.system"')),
            "no stage 'os.system'",
        ),
        (
            lambda d: (d / "plan.json").write_text(
                (d / "plan.json").read_text().replace('"heads": [\n    [\n     1', '"heads": [\n    [\n     99')
            ),
            "L99H1 is out of range",
        ),
    ],
)
def test_damaged_plans(tmp_path, tiny, damage, message):
    folder = Plan.empty(tiny).use(tiny.heads("L1H1"), Gate(torch.zeros(1))).save_pretrained(tmp_path / "p")
    damage(folder)
    with pytest.raises((PlanError, SelectionError, LookupError), match=message):
        Plan.from_pretrained(folder)


def test_no_such_plan(tmp_path):
    with pytest.raises(PlanError, match="neither a folder nor on the hub"):
        Plan.from_pretrained(tmp_path / "nowhere")
