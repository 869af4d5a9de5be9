"""DuoAttention's gates: the two streams against dense formulas, the training, what is kept of it, and its passkeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel, StableLmConfig, StableLmForCausalLM

from headwise import Plan, Sink, Window
from headwise.errors import InputError, ModelLoadError, PlanError, UnsupportedModelError
from headwise.models.subject import Subject, as_subject
from headwise.plans import gates
from headwise.plans.gates import (
    GateTraining,
    distillation_loss,
    final_states,
    mixed_states,
    passkey_rows,
    train_gates,
)
from headwise.testing.planted import PlantedConfig, PlantedModel

SINK, RECENT = 2, 3
VIEW = Window(RECENT) | Sink(SINK)
RETRIEVAL = [(6, 5), (6, 6), (7, 1), (7, 2), (7, 3), (7, 6)]  # of the embedded model, by its probe
QUICK = {"length": 320, "passkeys": 4, "sink": 8, "recent": 48, "show_progress": False}


@pytest.fixture(scope="module")
def small() -> Subject:
    """Two layers of four heads, two share keys; random, in float64, without a tokenizer."""
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.3, hidden_dropout=0.4,
    )  # fmt: skip
    return as_subject(StableLmForCausalLM(config).double().eval())


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(1))


def constant(value: float) -> list[torch.Tensor]:
    return [torch.full((2,), value, dtype=torch.float64)] * 2


def mixed_gates() -> list[torch.Tensor]:
    return [torch.tensor([0.3, 0.9], dtype=torch.float64), torch.tensor([0.6, 0.1], dtype=torch.float64)]


def whole_outs(subject: Subject, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each layer's heads read in the model itself."""
    outs = {}
    with torch.no_grad(), subject.tap(lambda call, out: outs.__setitem__(call.site.layer, out)):
        subject.run({"input_ids": ids})
    return outs


# ---- the two streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_gates_of_one_are_the_model_itself(small, ids, full):
    theirs = whole_outs(small, ids) if full == "teacher" else None
    with torch.no_grad():
        assert torch.equal(mixed_states(small, ids, constant(1.0), VIEW, theirs), final_states(small, ids))


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_gates_of_zero_are_the_streaming_plan(small, ids, full):
    theirs = whole_outs(small, ids) if full == "teacher" else None
    with torch.no_grad():
        mixed = mixed_states(small, ids, constant(0.0), VIEW, theirs)
        with Plan.empty(small).use(small.main.exists(), VIEW)(small):
            assert torch.equal(mixed, final_states(small, ids))
        assert not torch.allclose(mixed, final_states(small, ids))


def dense_mix(small, ids, teacher: bool, gate_of: list[torch.Tensor]) -> torch.Tensor:
    """The same from tables of weights: query i sees key j if j <= i and (i - j < RECENT or j < SINK)."""
    n = ids.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    views = {"whole": j <= i, "streaming": (j <= i) & ((i - j < RECENT) | (j < SINK))}
    theirs = whole_outs(small, ids)

    def tap(call, out):
        k, v = (x.repeat_interleave(2, dim=1) for x in (call.k, call.v))
        scores = call.q @ k.transpose(-1, -2) / call.q.shape[-1] ** 0.5
        read = {name: (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2) for name, seen in views.items()}
        whole = theirs[call.site.layer] if teacher else read["whole"]
        rows = [gate_of[call.site.layer][head // 2] for head in range(4)]
        return torch.stack([a * whole[:, :, h] + (1 - a) * read["streaming"][:, :, h] for h, a in enumerate(rows)], dim=2)

    with torch.no_grad(), small.tap(tap):
        return final_states(small, ids)


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_mixing_agrees_with_tables_of_weights(small, ids, full):
    teacher = full == "teacher"
    with torch.no_grad():
        found = mixed_states(small, ids, mixed_gates(), VIEW, whole_outs(small, ids) if teacher else None)
    assert torch.allclose(found, dense_mix(small, ids, teacher, mixed_gates()), rtol=0, atol=1e-10)
    assert not torch.allclose(found, dense_mix(small, ids, not teacher, mixed_gates()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("full", ["teacher", "student"])
def test_the_loss_counts_labelled_tokens_and_its_gradient_is_true(small, ids, full):
    labels = torch.zeros_like(ids, dtype=torch.bool)
    labels[0, 9:], labels[1, 12:] = True, True
    made = [gate.requires_grad_() for gate in mixed_gates()]
    loss = distillation_loss(small, ids, labels, made, VIEW, full=full)
    with torch.no_grad():
        difference = final_states(small, ids) - dense_mix(small, ids, full == "teacher", mixed_gates())
    by_token = difference.square().mean(-1)
    assert loss.item() == pytest.approx(by_token[labels].mean().item(), rel=1e-9)
    assert loss.item() != pytest.approx(by_token.mean().item(), rel=1e-3)
    grads = torch.autograd.grad(loss, made)
    for layer in range(2):
        for head in range(2):
            ends = []
            for step in (1e-5, -1e-5):
                moved = mixed_gates()
                moved[layer][head] += step
                ends.append(distillation_loss(small, ids, labels, moved, VIEW, full=full).item())
            assert grads[layer][head].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5), (layer, head)


def test_half_precision_mixes_in_single(small, ids):
    half = as_subject(StableLmForCausalLM(small.model.config).bfloat16().eval())
    ones = [torch.ones(2)] * 2
    with torch.no_grad():
        states = mixed_states(half, ids, ones, VIEW, whole_outs(half, ids))
        assert states.dtype == torch.bfloat16
        assert torch.equal(states, final_states(half, ids))


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_rate_is_a_trapezoid():
    rates = [GateTraining(steps=10, rate=1.0).rate_at(step) for step in range(10)]
    assert rates == [0.5, *[1.0] * 8, 0.5]
    long = GateTraining(steps=100)
    assert [long.rate_at(step) for step in (0, 1, 9, 19, 80, 81, 98, 99)] == pytest.approx(
        [0.002, 0.002, 0.01, 0.02, 0.02, 0.019, 0.002, 0.002]
    )
    assert GateTraining(steps=2).rate_at(0) == 0.02


def test_gates_follow_the_rate(small, monkeypatch):
    """Under a constant gradient AdamW moves each gate by the rate of the step."""
    monkeypatch.setattr(gates, "distillation_loss", lambda _, __, ___, parts, ____, full: sum(part.sum() for part in parts))
    table = train_gates(small, **{**SHORT, "steps": 10})
    assert torch.allclose(table.values, torch.full((2, 4), 1 - 0.02 * 9, dtype=torch.float64), rtol=0, atol=1e-6)


def test_streaming_heads_see_sinks_and_the_last_tokens():
    assert GateTraining(sink=3, recent=5).view == Window(5) | Sink(3)


def test_the_first_step_only_pays_the_penalty(small):
    """All gates are 1, so there is nothing to distil; AdamW without decay moves each by the rate."""
    for penalty, moved in ((0.05, 0.02), (0.0, 0.0)):
        table = train_gates(small, steps=1, length=60, passkeys=2, words=2, sink=2, recent=3, penalty=penalty, show_progress=False)
        assert table.about["distillation"] == [0.0]
        assert table.about["losses"] == pytest.approx([penalty])
        assert torch.allclose(table.values, torch.full((2, 4), 1.0 - moved, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("sign", "end"), [(-1.0, 1.0), (1.0, 0.0)])
def test_gates_stay_between_zero_and_one(small, monkeypatch, sign, end):
    monkeypatch.setattr(gates, "distillation_loss", lambda _, __, ___, parts, ____, full: sign * sum(part.sum() for part in parts))
    table = train_gates(small, **{**SHORT, "steps": 3}, rate=0.9)
    assert table.values.unique().tolist() == [end]


def test_local_gates_fall_and_retrieval_gates_stay(tiny):
    before = {name: parameter.detach().clone() for name, parameter in tiny.model.named_parameters()}
    table = train_gates(tiny, steps=5, **QUICK)
    losses = table.about["losses"]
    assert losses[-1] < losses[0] == pytest.approx(0.05)
    assert len(losses) == 5
    kept = min(table.values[head].item() for head in RETRIEVAL)
    local = table.values[0].max().item()
    assert local < 0.95 < kept
    assert table.name == "duo_gates"
    assert table.unit == "share"
    assert table.about["full"] == "teacher"
    assert all(torch.equal(parameter, before[name]) for name, parameter in tiny.model.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.model.parameters())
    assert tiny.session.installed == 0


def test_training_repeats_and_takes_its_seed(tiny_gqa):
    first, again, other, paper = (
        train_gates(tiny_gqa, steps=2, **QUICK, **more) for more in ({}, {}, {"seed": 1}, {"full": "student"})
    )
    assert torch.equal(first.values, again.values)
    assert first.about["losses"] == again.about["losses"]
    assert not torch.equal(first.values, other.values)
    assert not torch.equal(first.values, paper.values)
    groups = first.values.view(8, 2, 4)
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    assert len(first.values.unique()) > 4


class Stopped:
    """Passkeys until the `at`-th row is asked for; then the user interrupts."""

    def __init__(self, at: int) -> None:
        self.at, self.asked = at, []

    def __call__(self, subject, training, step, haystack):
        self.asked.append(step)
        if step == self.at:
            raise KeyboardInterrupt
        return passkey_rows(subject, training, step, haystack)


SHORT = {"steps": 13, "length": 60, "passkeys": 2, "words": 2, "sink": 2, "recent": 3, "show_progress": False}


def test_an_interrupted_training_goes_on_to_the_same_gates(small, tmp_path, monkeypatch):
    whole = train_gates(small, **SHORT)
    file = tmp_path / "runs" / "gates.safetensors"
    small.model.train()
    for at in (4, 11):
        monkeypatch.setattr(gates, "passkey_rows", Stopped(at))
        with pytest.raises(KeyboardInterrupt):
            train_gates(small, file=file, **SHORT)
    assert small.session.installed == 0
    assert all(parameter.requires_grad for parameter in small.model.parameters())
    assert all(module.training for module in small.model.modules())
    small.model.eval()
    last = Stopped(99)
    monkeypatch.setattr(gates, "passkey_rows", last)
    resumed = train_gates(small, file=file, **SHORT)
    assert last.asked == [11, 12]
    assert torch.equal(resumed.values, whole.values)
    assert resumed.about == whole.about
    assert torch.equal(train_gates(small, file=file, **SHORT).values, whole.values)
    assert last.asked == [11, 12]
    assert [path.name for path in file.parent.iterdir()] == ["gates.safetensors"]


def test_a_step_that_was_cut_off_is_not_kept(small, tmp_path, monkeypatch):
    """The optimizer has moved the gates, but the step is not whole: its row is read again."""
    file, clamps = tmp_path / "gates.safetensors", []
    step = torch.optim.AdamW.step

    def cut(self, *args, **kwargs):
        step(self, *args, **kwargs)
        clamps.append(1)
        if len(clamps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train_gates(small, file=file, **SHORT)
    watch = Stopped(99)
    monkeypatch.setattr(gates, "passkey_rows", watch)
    assert torch.equal(train_gates(small, file=file, **SHORT).values, train_gates(small, **SHORT).values)
    assert watch.asked[:11] == list(range(2, 13))


def test_a_file_of_something_else_is_refused(small, tmp_path):
    file = tmp_path / "gates.safetensors"
    train_gates(small, file=file, **{**SHORT, "steps": 1})
    with pytest.raises(InputError, match=r"another training: steps 1 there, 13 here"):
        train_gates(small, file=file, **SHORT)
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelLoadError, match=r"gates.safetensors can't be read"):
        train_gates(small, file=file, **SHORT)
    from safetensors.torch import save_file

    save_file({"gates": torch.ones(4)}, file)
    with pytest.raises(ModelLoadError, match="not of the format"):
        train_gates(small, file=file, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"recent": 0}, "recent is 0"),
        ({"sink": -1}, "sink -1"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"penalty": -1.0}, "penalty -1.0"),
        ({"full": "both"}, "full is 'both'"),
        ({"shortest": 2000}, "shortest is 2000"),
        ({"passkeys": 9999}, "9999 passkeys"),
        ({"length": 120, "passkeys": 9}, "leave no room for 9 passkeys"),
        ({"colour": 1}, "unexpected keyword argument 'colour'; train_gates takes steps"),
    ],
)
def test_options_that_cannot_be(small, options, message):
    with pytest.raises(InputError, match=message):
        train_gates(small, show_progress=False, **options)
    assert small.session.installed == 0


def test_models_that_cannot_be_trained(small):
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50))
    with pytest.raises(UnsupportedModelError, match="predicts each next token"):
        train_gates(bert)
    planted = as_subject(PlantedModel(PlantedConfig()))
    with pytest.raises(UnsupportedModelError, match="gives no last_hidden_state"):
        train_gates(planted, steps=1, length=256, show_progress=False)
    assert planted.session.installed == 0
    assert not planted.model._forward_hooks
    plan = Plan.empty(small).use(small.main.exists(), Window(4))
    with plan(small), pytest.raises(PlanError, match="take it off"):
        train_gates(small, **SHORT)


# ---- passkeys --------------------------------------------------------------------------------------------------------


def test_passkeys_are_hidden_and_asked_for(tiny):
    training = GateTraining(length=700, shortest=500, passkeys=4, rows=2)
    haystack = tiny.encode("x = 1\n" * 50)
    lengths = set()
    for step in range(6):
        ids, labels = passkey_rows(tiny, training, step, haystack)
        lengths.add(ids.shape[1])
        assert ids.shape == labels.shape
        assert len(ids) == 2
        assert not torch.equal(ids[0], ids[1])
        for row, own in zip(ids, labels, strict=True):
            first = int(own.long().argmax())
            assert bool(own[first:].all())
            assert not bool(own[:first].any())
            assert row[0].item() == tiny.begin[0]
            before, asked = tiny.tokenizer.decode(row[:first]), tiny.tokenizer.decode(row[first:])
            lines = [line for line in asked.splitlines() if line]
            assert len(set(lines)) == 4
            assert all(line.startswith("The password of the ") and line.endswith(".") for line in lines)
            assert all(len(line.split(" is ")[1].split()) == 5 for line in lines)
            places = [before.index(line) for line in lines]
            assert places == sorted(places)
            assert before.count("The password") == 4
            assert places[0] > 0.02 * len(before)
    assert len(lengths) > 3
    assert min(lengths) >= 500
    assert max(lengths) <= 700
    again = passkey_rows(tiny, training, 5, haystack)[0]
    assert torch.equal(ids, again)
    assert not torch.equal(ids[:, :400], passkey_rows(tiny, replace(training, seed=1), 5, haystack)[0][:, :400])


def test_without_a_tokenizer_passkeys_are_ids(small):
    training = GateTraining(length=64, shortest=64, passkeys=3, words=4)
    ids, labels = passkey_rows(small, training, 0, [5] * 10)
    row, asked = ids[0].tolist(), int(labels.sum())
    assert asked == 18
    assert len(row) == 64
    assert row[0] == 1
    for start in range(46, 64, 6):
        fact = row[start : start + 6]
        assert sum(row[i : i + 6] == fact for i in range(46)) == 1
    assert row.count(5) >= 64 - 1 - 36
    crowded = passkey_rows(small, GateTraining(length=64, shortest=2, passkeys=3, words=4), 0, [5])[0]
    assert 1 + 36 + 3 <= crowded.shape[1] <= 64  # rows are at least as long as their passkeys need


def test_passkeys_stand_between_a_twentieth_and_the_rest(small):
    training = GateTraining(length=128, shortest=128, passkeys=3, words=2)
    room = 128 - 1 - 2 * 12
    first, last = [], []
    for step in range(80):
        hay = passkey_rows(small, training, step, [96] * 7)[0][0, 1:-12].tolist()
        hidden = [place for place, token in enumerate(hay) if token != 96]
        first.append(hidden[0])
        last.append(len(hay) - 1 - hidden[-1])
    assert int(0.05 * room) <= min(first) < 0.1 * room
    assert room - int(0.95 * room) <= min(last) < 0.1 * room
