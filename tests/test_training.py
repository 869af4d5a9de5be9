"""Trainings: runs repeat, go on bit for bit after an interruption, and steps recorded as a CUDA graph are the plain ones."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from headwise.errors import InputError, ModelLoadError
from headwise.nn import Transformer
from headwise.training import (
    IGNORE,
    Settings,
    captured,
    checkpoint,
    judge,
    optimizer,
    problem_of,
    sizing,
    train,
    trainer,
)


def rows(problem, count=512, seed=0):
    return problem.batch(count, torch.Generator().manual_seed(seed), torch.device("cpu"))


# ---- training --------------------------------------------------------------------------------------------------------

SMALL = {"pairs": 2, "length": 16, "keys": 8, "values": 8, "offset": 4}
QUICK = Settings(steps=24, batch=8, rows=16, points=4)


def small_model(seed=0, drop=False, **options):
    problem = problem_of("associative_recall", SMALL)
    torch.manual_seed(seed)
    model = Transformer(problem.vocabulary, 16, 2, 2, context=problem.context, **options)
    if drop:  # something that draws random numbers while it trains
        model.blocks[1].feed_forward = nn.Sequential(model.blocks[1].feed_forward, nn.Dropout(0.2))
    return model, problem


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def without_times(trained):
    return {name: value for name, value in trained.to_dict().items() if name not in ("seconds", "tokens_per_second")}


def test_a_small_model_learns_to_recall():
    problem = problem_of("associative_recall", SMALL)
    model = sizing.equal(sizing.parse(["softmax"]), sizing.Sizes(problem.vocabulary, problem.context, 32, 2, 2))[0].build(0)
    found = train(model, problem, Settings(steps=240, batch=64, lr=5e-3, rows=64, points=4), show_progress=False)
    assert found.metrics["accuracy"] > 0.95 > problem.chance
    assert found.curve[-1]["train_loss"] < 0.3 < found.curve[0]["train_loss"]
    assert judge(model, problem, Settings(batch=64, rows=64)) == found.metrics
    assert not model.training


def test_runs_repeat_and_leave_the_caller_alone():
    one, problem = small_model(drop=True)
    two, _ = small_model(drop=True)
    before = torch.get_rng_state()
    first = train(one, problem, QUICK, show_progress=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    second = train(two, problem, QUICK, show_progress=False)
    assert same(one, two)
    assert without_times(first) == without_times(second)
    three, _ = small_model(drop=True)
    train(three, problem, replace(QUICK, seed=1), show_progress=False)
    assert not same(one, three)


@pytest.mark.parametrize("stop", [7, 12, 23])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, stop):
    whole, problem = small_model(drop=True)
    expected = train(whole, problem, QUICK, show_progress=False)
    stopped, _ = small_model(drop=True)
    file, steps = tmp_path / "run" / "checkpoint.safetensors", []

    def interrupt(count):
        steps.append(count)
        if sum(steps) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, problem, QUICK, file=file, advance=interrupt)
    assert checkpoint.peek(file)["run"]["step"] == (stop - 1) // 6 * 6
    assert [path.name for path in file.parent.iterdir()] == ["checkpoint.safetensors"]
    other, _ = small_model(seed=5, drop=True)  # everything comes from the file, nothing from the model given
    steps.clear()
    found = train(other, problem, QUICK, file=file, advance=steps.append)
    assert same(whole, other)
    assert without_times(found) == without_times(expected)
    assert sum(steps) == 24
    assert steps[0] == (stop - 1) // 6 * 6


def test_checkpoints_hold_tensors_and_words_only(tmp_path):
    model, problem = small_model()
    train(model, problem, QUICK, file=tmp_path / "c", show_progress=False)
    with safe_open(str(tmp_path / "c"), "pt") as opened:
        names = set(opened.keys())
    parameters = {name for name, _ in model.named_parameters()}
    assert {f"model.{name}" for name in parameters} <= names
    assert {f"optimizer.{part}.{name}" for name in parameters for part in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert "random.cpu" in names
    told = checkpoint.peek(tmp_path / "c")
    assert told["identity"]["problem"] == "associative_recall"
    assert told["run"]["step"] == 24


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, problem = small_model()
    made = optimizer.adamw(model, 1e-3)
    checkpoint.save(tmp_path / "c", model, made, {"number": 1})

    def dies(held, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "c", model, made, {"number": 2})
    assert checkpoint.peek(tmp_path / "c") == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    (tmp_path / "c").write_bytes(b"half")
    with pytest.raises(ModelLoadError, match="remove it to begin again"):
        train(model, problem, QUICK, file=tmp_path / "c", show_progress=False)


def test_checkpoints_of_other_runs_and_models_are_refused(tmp_path):
    model, problem = small_model()
    train(model, problem, QUICK, file=tmp_path / "c", show_progress=False)
    with pytest.raises(InputError, match=r"another run: lr 0\.003 there, 0\.01 here"):
        train(model, problem, replace(QUICK, lr=0.01), file=tmp_path / "c", show_progress=False)
    other, _ = small_model(hidden=8)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ModelLoadError, match="another model"):
        train(other, problem, QUICK, file=tmp_path / "c", show_progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_models_are_judged_by_rows_of_their_own(monkeypatch):
    """All by the same, however they are batched in time, and by none that training sees."""
    model, problem = small_model()
    seen, plain = [], type(problem).batch
    monkeypatch.setattr(type(problem), "batch", lambda *given: seen.append(plain(*given)) or seen[-1])
    for seed in (0, 3):
        judge(model, problem, Settings(rows=40, batch=16, seed=seed))
    generator = torch.Generator()
    trained = [trainer.batch_of(problem, 16, 0, number, generator).ids for number in range(3)]
    ids = [batch.ids for batch in seen]
    assert [len(batch) for batch in ids[:6]] == [16, 16, 8] * 2
    assert all(torch.equal(a, b) for a, b in zip(ids[:3], ids[3:6], strict=True))
    assert len(torch.cat([*ids[:3], *trained]).unique(dim=0)) == 40 + 48


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"dtype": "float8"}, {"seed": -1}, {"seed": 4095}):
        with pytest.raises(InputError):
            replace(QUICK, **wrong)
    problem = problem_of("associative_recall", SMALL)
    with pytest.raises(InputError, match="has 16 tokens, the model 8"):
        train(Transformer(8, 16, 1, 2), problem, QUICK)
    with pytest.raises(InputError, match="give more than 0"):
        train(small_model()[0], problem, QUICK, minutes=0.0, show_progress=False)


def test_minutes_become_steps():
    model, problem = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    few = trainer.steps_in(0.001, model, problem, QUICK)
    many = trainer.steps_in(10.0, model, problem, QUICK)
    assert few >= QUICK.points
    assert many > 10 * few
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rates_rise_to_the_highest_and_fall_to_a_tenth():
    rates = [optimizer.rate_at(step, 100, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.11
    assert optimizer.rate_at(0, 1, 1.0) == 1.0


def test_only_matrices_decay():
    model, _ = small_model()
    matrices, others = optimizer.adamw(model, 1e-3).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == (0.9, 0.95)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_a_step_clips_and_follows_the_formula():
    """One step of AdamW from zero moments moves each matrix by its rate times the sign of its gradient, after decay."""
    model, problem = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = rows(problem, 8)
    step = captured.PlainStep(model, optimizer.adamw(model, 1e-2), None)
    loss = step(batch)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(1.0, abs=1e-4)
    logits, targets = small_model()[0](batch.ids).detach(), batch.targets
    picked = logits.log_softmax(-1)[targets != IGNORE].gather(1, targets[targets != IGNORE][:, None])
    assert float(loss) == pytest.approx(float(-picked.mean()), abs=1e-6)
    for name, parameter in model.named_parameters():
        decay = 1 - 1e-2 * 0.1 if parameter.dim() == 2 else 1.0
        large = parameter.grad.abs() > 1e-5
        moved = before[name] * decay - 1e-2 * parameter.grad.sign()
        assert torch.allclose(parameter[large], moved[large], atol=2e-5)


# ---- recorded steps, with a stand-in for the GPU ---------------------------------------------------------------------


class Recording(captured.PlainStep):
    """A plain step that keeps still while it is recorded, as on a GPU."""

    recording = False

    def work(self, batch):
        if not self.recording:
            return super().work(batch)
        self.given, self.loss = batch, torch.zeros(())
        return self.loss


@pytest.fixture
def gpu(monkeypatch):
    """Streams and graphs that do on the CPU what they stand for; set `fails` for a mechanism that can't be recorded."""
    state = SimpleNamespace(step=None, fails=None, replays=0)

    class Graph:
        def replay(self):
            state.replays += 1
            state.step.optimizer.zero_grad(set_to_none=True)
            state.step.loss.copy_(captured.PlainStep.work(state.step, state.step.given))

    @contextlib.contextmanager
    def graph(made, stream):
        state.step.recording = True
        try:
            yield
            if state.fails is not None:
                raise state.fails
        finally:
            state.step.recording = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda given: contextlib.nullcontext(), "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def run_steps(step, problem, count=8):
    losses = [step(rows(problem, 8, seed)) for seed in range(count)]  # read later: each must be a tensor of its own
    return [float(loss) for loss in losses]


def test_a_recorded_step_does_what_the_plain_one_does(gpu):
    plain, problem = small_model()
    expected = run_steps(captured.PlainStep(plain, optimizer.adamw(plain, 1e-2), None), problem)
    model, _ = small_model()
    gpu.step = Recording(model, optimizer.adamw(model, 1e-2), None)
    step = captured.CapturedStep(gpu.step)
    assert captured.told(step) == (False, "fewer steps than it takes to record them")
    assert run_steps(step, problem) == expected
    assert same(plain, model)
    assert gpu.replays == 8 - captured.WARM_UP
    assert captured.told(step) == (True, "")


def test_what_can_not_be_recorded_runs_as_written_and_says_why(gpu):
    plain, problem = small_model()
    expected = run_steps(captured.PlainStep(plain, optimizer.adamw(plain, 1e-2), None), problem)
    model, _ = small_model()
    gpu.step, gpu.fails = Recording(model, optimizer.adamw(model, 1e-2), None), RuntimeError("operation not permitted\nmore")
    step = captured.CapturedStep(gpu.step)
    assert run_steps(step, problem) == expected
    assert same(plain, model)
    assert gpu.replays == 0
    assert captured.told(step) == (False, "RuntimeError: operation not permitted")


def test_on_the_cpu_steps_are_plain():
    model, _ = small_model()
    step = captured.step_for(model, optimizer.adamw(model, 1e-2), None, capture=True)
    assert type(step) is captured.PlainStep
    assert captured.told(step)[0] is False


def test_public_names_stay_functions_however_often_they_are_imported():
    """A module of the same name would take their place once it is loaded."""
    from headwise import training

    assert all(not isinstance(getattr(training, name), type(training)) for name in [*training.__all__, *training.__all__])
