"""Rotary positions found in models of many families: exactly what the model itself does to its queries and keys, and back."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as t
from families import ALL, GROUPED, IDS, SMALL, Family, inputs

from headwise.caches.rule import Seen
from headwise.errors import UnsupportedModelError
from headwise.models.rotary import rotary_of
from headwise.models.session import session_of

NONE = {"gpt2", "opt", "bert", "roberta", "electra", "distilbert", "t5", "bart", "whisper", "vit", "dinov2", "clip", "siglip"}
UNCERTAIN = {"deepseek_v3": "part of its keys", "qwen2_vl": "several coordinates"}
LONG = dict(GROUPED, max_position_embeddings=64, head_dim=8, **IDS)


def llama(**rope):
    return lambda: t.LlamaForCausalLM(t.LlamaConfig(**LONG, rope_parameters={"rope_theta": 100.0, **rope}))


def types(name, **rope):
    return lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **IDS,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_theta": 1000.0, "rope_type": name, **rope},
            },
        )
    )  # fmt: skip


SCALED = {
    "linear": llama(rope_type="linear", factor=3.0),
    "dynamic": llama(rope_type="dynamic", factor=2.0),
    "yarn": llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "llama3": llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "longrope": llama(
        rope_type="longrope", factor=4.0, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
        original_max_position_embeddings=48,
    ),
    "local and global": types("linear", factor=8.0),
    "some layers without": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0], **IDS)),
    "glm": lambda: t.GlmForCausalLM(t.GlmConfig(**GROUPED, head_dim=8, partial_rotary_factor=0.5, **IDS)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=99, n_positions=64)),
}  # fmt: skip
FAMILIES = [family for family in ALL if family.name not in NONE | set(UNCERTAIN)]
FAMILIES += [Family(name, build, "decoder", ("decoder",)) for name, build in SCALED.items() if name != "gptj"]


def model_of(family):
    model = family.model().double()
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    for module in model.modules():  # weights are drawn small; larger ones, so that a wrong angle shows
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(20)
    return model


def calls(model, given):
    """For each layer of the main stack: its keys and queries, and what they would be if cosines were 1 and sines 0."""
    session, found, kept = session_of(model), {}, {}

    def before(module, args, kwargs):
        kept[id(module)] = (args, kwargs)

    def tap(call, out):
        found.setdefault(call.site.path, []).append((call.q, call.k))

    sites = session.layout.main.sites
    hooks = [model.get_submodule(site.path).register_forward_pre_hook(before, with_kwargs=True) for site in sites]
    remove = session.install(tap=tap)
    try:
        with torch.no_grad():
            model(**given, **({"use_cache": False} if "position_ids" in given else {}))
            for hook in hooks:
                hook.remove()
            for site in sites:
                module = model.get_submodule(site.path)
                args, kwargs = kept[id(module)]
                cos, sin = kwargs["position_embeddings"]
                module.forward(*args, **{**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
    finally:
        remove()
    return {site: found[site.path] for site in sites}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_turns_as_the_model_does_and_back(family):
    model = model_of(family)
    given = inputs("decoder", rows=2, length=24)
    if family.kind == "encoder":
        positions = torch.arange(24).expand(2, 24)
    else:
        positions = given["position_ids"] = torch.stack([torch.arange(24), torch.arange(24) + 9])
    turning = 0
    for site, ((q, k), (q0, k0)) in calls(model, given).items():
        rotary = rotary_of(model, site)
        if family.name == "some layers without" and site.layer == 1:
            assert rotary is None
            assert torch.equal(k, k0)
            continue
        for turned, start in ((q, q0), (k, k0)):
            size = float(start.abs().max())
            assert float((turned - start).abs().max()) > 0.1 * size
            assert torch.equal(rotary.turned(start, positions), turned)  # the same operations: to the last bit
            assert float((rotary.turned_back(turned, positions) - start).abs().max()) < 1e-14 * size
            each = positions[:, None].expand(*start.shape[:3])
            assert torch.equal(rotary.turned(start, each), turned)
            assert torch.equal(rotary.turned_back(turned, each), rotary.turned_back(turned, positions))
        turning += 1
    assert turning


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_those_of_the_last_call(name):
    family = Family(name, SCALED[name], "decoder", ("decoder",))
    model, short, long = model_of(family), inputs("decoder", 1, 10), inputs("decoder", 1, 90)
    site = session_of(model).layout.main.sites[0]
    before = rotary_of(model, site)
    for given in (short, long, short):
        places = given["position_ids"] = torch.arange(given["input_ids"].shape[1])[None]
        (_, k), (_, k0) = calls(model, given)[site]
        for rotary in (before, rotary_of(model, site)):  # found before or now
            assert torch.equal(rotary.turned(k0, places), k)
        source = model.model.rotary_emb
        frequencies = source.inv_freq.clone()
        rotary_of(model, site)
        rotary.turned(k0, places + 1000)
        assert torch.equal(source.inv_freq, frequencies)  # asking changes nothing in the model


@pytest.mark.parametrize("family", [family for family in ALL if family.name in NONE], ids=lambda family: family.name)
def test_no_rotary_positions(family):
    model = family.model()
    for stack in session_of(model).layout.stacks.values():
        assert all(rotary_of(model, site) is None for site in stack.sites)


@pytest.mark.parametrize("name", [*UNCERTAIN, "gptj"])
def test_what_cannot_be_told_is_said(name):
    build = SCALED.get(name) or next(family for family in ALL if family.name == name).build
    model = build()
    site = session_of(model).layout.main.sites[1]
    with pytest.raises(UnsupportedModelError, match=UNCERTAIN.get(name, "inverse frequencies")) as caught:
        rotary_of(model, site)
    assert site.path in str(caught.value)


def test_pairs_that_are_neither_halves_nor_neighbours_are_not_guessed(monkeypatch):
    model = t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, **IDS))
    site = session_of(model).layout.main.sites[0]
    own = rotary_of(model, site)
    module = model.get_submodule(site.path)
    scope = inspect.unwrap(type(module).forward).__globals__
    apply = scope["apply_rotary_pos_emb"]
    order = torch.tensor([3, 1, 2, 0, 4, 7, 6, 5])

    def other(q, k, cos, sin, **options):
        return tuple(x[..., order] for x in apply(q, k, cos, sin, **options))

    monkeypatch.setitem(scope, "apply_rotary_pos_emb", other)
    with pytest.raises(UnsupportedModelError, match="other pairs"):
        rotary_of(model, site)
    monkeypatch.setitem(scope, "apply_rotary_pos_emb", lambda q, k, cos, sin: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="a call of it failed") as caught:
        rotary_of(model, site)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert model.config._attn_implementation == "sdpa"  # nothing stays changed
    assert not [name for name in t.modeling_utils.ALL_ATTENTION_FUNCTIONS if "probe" in name]
    monkeypatch.undo()
    assert rotary_of(model, site) is not None
    assert own.pairs is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_found_in_every_precision_also_while_plans_are_in_force(dtype):
    model = t.CohereForCausalLM(t.CohereConfig(**SMALL, **IDS)).to(dtype)
    session = session_of(model)
    remove = session.install(tap=lambda call, out: None)
    state = torch.random.get_rng_state()
    found = session.rotary(session.layout.main.sites[0])
    assert found.pairs
    assert session.rotary(session.layout.main.sites[0]) is found
    assert model.config._attn_implementation == "headwise"
    assert torch.equal(torch.random.get_rng_state(), state)
    remove()


def test_the_nearest_frequencies_count():
    """Those around the attention module, not those of another part of the model."""
    model = SCALED["linear"]()
    model.other = t.models.llama.modeling_llama.LlamaRotaryEmbedding(t.LlamaConfig(**LONG))
    assert rotary_of(model, session_of(model).layout.main.sites[0]).module is model.model.rotary_emb
    model.model.other = model.other
    with pytest.raises(UnsupportedModelError, match="2 modules"):
        rotary_of(model, session_of(model).layout.main.sites[0])


def test_rules_without_rotary_see_none():
    nothing = torch.zeros(1, 1, 1, 2)
    assert Seen(nothing, nothing, nothing, torch.zeros(1, 1, 1), torch.zeros(1), 1, 1.0).rotary is None
