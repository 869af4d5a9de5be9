"""Any Hugging Face model: what headwise finds, and that an empty plan is the model itself, bit for bit."""

from __future__ import annotations

import families
import pytest
import torch
from families import ALL, DECODERS, UNSUPPORTED, Family, inputs, outputs

from headwise import Gate, Plan, Sink, Window, capture, measure
from headwise.errors import UnsupportedModelError
from headwise.models.cache import cache_of
from headwise.models.subject import Subject

named = pytest.mark.parametrize("family", ALL, ids=lambda f: f.name)
decoders = pytest.mark.parametrize("family", DECODERS, ids=lambda f: f.name)


def doubled(family: Family):
    """The model in float64, where its experts (if any) can compute."""
    model = family.model().double()
    if hasattr(model.config, "num_local_experts") or hasattr(model.config, "n_routed_experts"):
        model.set_experts_implementation("eager")
    return model


def generated(model, **given):
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)


def padded(given, side):
    """The second row is short: padded on one side."""
    ids = given["input_ids"].clone()
    mask = torch.ones_like(ids)
    part = slice(0, 7) if side == "left" else slice(-7, None)
    ids[1, part], mask[1, part] = 0, 0
    return {**given, "input_ids": ids, "attention_mask": mask}


@named
def test_stacks_are_found(family: Family):
    subject = Subject(family.model())
    assert tuple(subject.layout.stacks) == family.stacks
    for stack in subject.layout.stacks.values():
        assert stack.shape == (2, 4)
        assert stack.exists().count() == 8


@named
def test_watched_model_gives_its_own_outputs_bit_for_bit(family: Family):
    model = family.model()
    subject, given = Subject(model), inputs(family.kind)
    before = outputs(model, given)
    calls = []
    with Plan.empty(subject)(subject), subject.tap(lambda call, out: calls.append((call.site.stack, out.shape))):
        during = outputs(model, given)
    assert torch.equal(before, during)
    reached = {stack for stack, _ in calls}
    assert reached == set(family.stacks) - ({"vision"} if family.kind == "vlm" else set())
    assert torch.equal(before, outputs(model, given))
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("side", ["left", "right"])
@named
def test_padding_is_the_models_own_bit_for_bit(family: Family, side: str):
    if family.kind in ("vision", "speech"):
        pytest.skip("its rows are not padded")
    model = family.model()
    given = padded(inputs(family.kind), side)
    before = outputs(model, given)
    with Plan.empty(model)(model):
        assert torch.equal(before, outputs(model, given))


@decoders
def test_generate_is_the_models_own(family: Family):
    model = family.model()
    given = inputs(family.kind)
    variants = [given, {k: v[:1] for k, v in given.items()}, padded(given, "left")]
    before = [generated(model, **variant) for variant in variants]
    beams = generated(model, **given, num_beams=3)
    with Plan.empty(model)(model), Subject(model).tap(lambda call, out: None):
        for variant, own in zip(variants, before, strict=True):
            assert torch.equal(own, generated(model, **variant))
        assert torch.equal(beams, generated(model, **given, num_beams=3))


@named
def test_statistics_equal_eager_weights(family: Family):
    """Entropy and distance of every head, from the model's own eager weights."""
    model = doubled(family)
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs(family.kind).items()}
    found = capture(model, ["entropy", "max_weight", "key_mass"], inputs=given)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        result = model(**given, output_attentions=True)
    names = {
        "decoder": ("decoder_attentions", "attentions"),
        "encoder": ("encoder_attentions", "attentions"),
        "cross": ("cross_attentions",),
    }
    checked = 0
    for stack, statistics in found.items():
        weights = next((getattr(result, n) for n in names.get(stack, ("attentions",)) if getattr(result, n, None)), None)
        if weights is None or len(weights) != 2:
            continue
        weights = torch.stack(list(weights))[..., : statistics["key_mass"].shape[-1]]  # gpt-oss returns no column for its sink
        assert torch.allclose(statistics["entropy"], -torch.xlogy(weights, weights).sum(-1), atol=1e-6)
        assert torch.allclose(statistics["max_weight"], weights.amax(-1), atol=1e-6)
        assert torch.allclose(statistics["key_mass"], weights.sum(-2), atol=1e-5)
        checked += 1
    assert checked or family.kind in ("dual", "vision"), "no stack could be compared"


@named
def test_a_gate_closes_just_its_head(family: Family):
    subject = Subject(family.model())
    heads = subject.heads("L1H2")
    given, seen = inputs(family.kind), {}

    def tap(call, out):
        if call.site.stack == subject.main.name and call.site.layer == 1:
            seen[len(seen)] = out.clone()

    with subject.tap(tap):
        outputs(subject.model, given)
        with Plan.empty(subject).use(heads, Gate(torch.zeros(1)))(subject):
            changed = outputs(subject.model, given)
    assert changed.isfinite().all()
    assert (seen[1][:, :, 2] == 0).all()
    others = [0, 1, 3]
    assert torch.equal(seen[0][:, :, others], seen[1][:, :, others])


@pytest.mark.filterwarnings("ignore:.*caches one latent")
@decoders
def test_masked_heads_equal_an_explicit_mask_and_free_bytes(family: Family):
    """A streaming plan: with the cache as without it, and heads outside the plan unchanged in the first layer."""
    model = doubled(family)
    subject = Subject(model)
    group = subject.main.key_value_groups(subject.heads("L0H0" if family.name == "gemma" else "L0H0,L1H3"))
    plan = Plan.empty(subject).use(subject.main.exists() - group, Window(6) | Sink(2))
    given = inputs(family.kind, length=30)
    with plan(subject), torch.no_grad():
        made = generated(model, **given)
        slow = given["input_ids"]
        for _ in range(8):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(made, slow)
        left = padded(given, "left")
        alone = generated(model, input_ids=given["input_ids"][1:, 7:])
        assert torch.equal(generated(model, **left)[1, 7:], alone[0])
        assert torch.equal(generated(model, **given, num_beams=2)[:, :30], given["input_ids"])
        cache = cache_of(model(**given, use_cache=True))
    if family.name == "deepseek_v3":
        assert type(cache).__name__ == "DynamicCache"
        return
    assert type(cache).__name__ == "HeadCache"
    assert cache.bytes() < 2 * 2 * 2 * 256 * 32 * 8  # two growing heads would take that much alone


@named
def test_probes_run_or_say_why_not(family: Family):
    subject = Subject(family.model())
    names = [
        "entropy",
        "sink_mass",
        "mean_distance",
        "previous_token",
        "induction",
        "retrieval",
        "massive_activations",
        "gate_importance",
    ]
    found = measure(subject, names, show_progress=False)
    for (name, stack), table in found.tables.items():
        assert table.shape == subject.layout.stacks[stack].shape, name
        if stack == subject.main.name or family.kind != "vlm":
            assert table.values.isfinite().all(), name
    for name in names:
        for stack in subject.layout.stacks:
            assert ((name, stack) in found.tables) != ((name, stack) in found.skipped)
    assert all(len(reason) > 10 for reason in found.skipped.values())
    if family.kind == "decoder":
        assert {name for name, _ in found.skipped} <= {"retrieval"}
    if family.kind in ("vision", "seq2seq", "speech"):
        assert ("induction", subject.main.name) in found.skipped


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_class_that_cannot_work_is_named(name: str):
    with pytest.raises(UnsupportedModelError, match=name) as error:
        Subject(UNSUPPORTED[name]())
    assert "attention" in str(error.value)


def test_there_are_enough_families():
    assert len(ALL) >= 30
    assert {family.kind for family in ALL} == {"decoder", "encoder", "seq2seq", "speech", "vision", "dual", "vlm"}
    assert len({families.inputs(f.kind).keys().__str__() for f in ALL}) >= 5
