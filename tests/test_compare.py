"""Comparisons are of equal parameters and the same batches, go on where they stopped, and are drawn and printed as measured."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
import typer

from headwise.errors import InputError, RegistryError
from headwise.training import Settings, plot, problem_of, sizing, trainer
from headwise.training.command import train_command

compare_module = importlib.import_module("headwise.training.comparison")
compare = compare_module.compare
SMALL = {"pairs": 2, "length": 16, "keys": 8, "values": 8, "offset": 4}
QUICK = Settings(steps=24, batch=8, rows=16, points=4)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---- equal parameters ------------------------------------------------------------------------------------------------

SIZES = sizing.Sizes(32, 48, 32, 3, 4)


def test_contenders_are_parsed():
    found = sizing.parse(["softmax, gqa:kv_heads=2,bias=true,memory-efficient", "cope:positions=8"])
    assert [str(one) for one in found] == ["softmax", "gqa:kv_heads=2,bias=true", "memory_efficient", "cope:positions=8"]
    assert found[1].options == {"kv_heads": 2, "bias": True}
    assert sizing.value_of("first") == "first"
    with pytest.raises(RegistryError, match="no mechanism or architecture 'nonsense'; there are: softmax, "):
        sizing.parse(["softmax,nonsense"])
    with pytest.raises(InputError, match="each may be given once"):
        sizing.parse(["gqa,gqa"])
    with pytest.raises(InputError, match="write gqa:option=value"):
        sizing.parse(["gqa:2"])
    with pytest.raises(RegistryError, match="no mechanism was given"):
        sizing.parse([" , "])


OWN = """
from headwise.mechanisms import Mechanism
from headwise import attend

class Halved(Mechanism):
    def __init__(self, part=0.5):
        super().__init__()
        self.part = part

    def forward(self, q, k, v, *stages, **places):
        return self.part * attend(q, k, v, *stages, **places)

def sized(heads, size, tokens, **options):
    return Halved(**options)
"""


def test_ones_own_mechanism_is_trained_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "own_mechanism.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = sizing.parse(["own_mechanism:Halved", "own_mechanism:Halved:part=0.25"])
    models = [sized.build(0) for sized in sizing.equal(found, SIZES)]
    assert [type(model.blocks[0].mixer.mechanism).__name__ for model in models] == ["Halved", "Halved"]
    assert [model.blocks[0].mixer.mechanism.part for model in models] == [0.5, 0.25]
    for text, told in (("own_mechanism:Third", "has no Third"), ("nowhere_at_all:Third", "cannot import 'nowhere_at_all'")):
        with pytest.raises(RegistryError, match=told):
            sizing.equal(sizing.parse([text]), SIZES)


@pytest.mark.parametrize("text", ["gqa", "gqa:kv_heads=2", "cope", "mta", "rela", "selective_self_attention", "moh", "masa"])
def test_models_are_of_equal_parameters(text):
    reference, other = sizing.equal(sizing.parse(["softmax", text]), SIZES)
    assert reference.hidden is None
    assert 2 * abs(other.parameters - reference.parameters) <= 3 * SIZES.width  # a unit of hidden width is a row of three maps
    assert other.build(0).parameter_count == other.parameters
    if other.hidden is not None:
        assert max(other.hidden) - min(other.hidden) <= 1
    assert same(other.build(3), other.build(3))
    assert not same(other.build(3), other.build(4))


def test_what_can_not_be_made_equal_is_refused():
    with pytest.raises(InputError, match="has too many parameters"):
        sizing.equal(sizing.parse(["cope:positions=2000"]), SIZES)
    with pytest.raises(RegistryError, match="does not take the options"):
        sizing.equal(sizing.parse(["cope:nonsense=1"]), SIZES)
    with pytest.raises(InputError, match="mosaic_bert can't be trained to predict what comes next: it reads both sides"):
        sizing.equal(sizing.parse(["mosaic_bert"]), SIZES)
    with pytest.raises(InputError, match="a multiple of heads"):
        sizing.Sizes(32, 48, 30, 2, 4)


def test_layers_of_one_width_are_made_equal_within_half_a_unit_of_all(monkeypatch):
    plain = sizing._model

    def uniform(contender, sizes, hidden):
        if contender.name == "gqa" and hidden is not None and len(set(hidden)) > 1:
            raise InputError("one number is due")
        return plain(contender, sizes, hidden)

    monkeypatch.setattr(sizing, "_model", uniform)
    reference, other = sizing.equal(sizing.parse(["softmax", "gqa:kv_heads=2,bias=true"]), SIZES)
    assert len(set(other.hidden)) == 1
    assert 2 * abs(other.parameters - reference.parameters) <= 3 * SIZES.width * SIZES.layers


# ---- comparisons -----------------------------------------------------------------------------------------------------


def compared(out, mechanisms=("softmax", "gqa"), seeds=2, **options):
    problem = problem_of("associative_recall", SMALL)
    return compare(
        problem, mechanisms, seeds=seeds, width=16, layers=1, heads=4, settings=QUICK, out=out, show_progress=False, **options
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, compared(out, evaluate_at=[{"length": 32}])


def lasting(found):
    """All of a comparison but its clocks."""
    told = found.to_dict()
    for entry in told["entries"]:
        entry.pop("tokens_per_second")
    return json.loads(json.dumps(told))


def test_a_comparison_says_what_was_measured(finished):
    out, found = finished
    softmax, gqa = found.entries
    assert (softmax.mechanism, gqa.mechanism) == ("softmax", "gqa")
    assert softmax.kv_bytes == 1 * 2 * 16 * 4  # a layer's keys and values in float32
    assert gqa.kv_bytes == softmax.kv_bytes / 4
    assert 2 * abs(softmax.parameters - gqa.parameters) <= 3 * 16
    assert softmax.metric.least <= softmax.metric.mean <= softmax.metric.most
    assert len(softmax.curves) == 2
    assert [step for step, _ in softmax.curves[0]] == [6, 12, 18, 24]
    assert found.chance == 0.5
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert set(softmax.elsewhere) == {"length=32"}
    assert lasting(compared(None, evaluate_at=[{"length": 32}])) == lasting(found)


def test_finished_runs_are_not_run_again(finished, monkeypatch):
    out, found = finished
    trained = []
    monkeypatch.setattr(compare_module, "train", lambda model, problem, settings, **_: trained.append(settings.seed) or 1 / 0)
    with monkeypatch.context() as still:
        still.setattr(compare_module, "judge", lambda *_: 1 / 0)
        assert compared(out, evaluate_at=[{"length": 32}]).to_dict() == found.to_dict()
    again = compared(out, evaluate_at=[{"length": 24}, {"length": 16}])  # judged with the weights that were kept
    assert trained == []
    at_home = again.entries[1].elsewhere["length=16"]
    assert at_home == found.entries[1].metric
    assert again.entries[1].elsewhere["length=24"] != at_home
    with pytest.raises(ZeroDivisionError):
        compared(out, seeds=3)
    assert trained == [2]
    with pytest.raises(ZeroDivisionError):
        compared(out, fresh=True)
    assert trained == [2, 0]


def test_an_interrupted_comparison_goes_on(finished, tmp_path, monkeypatch):
    _, whole = finished
    plain, done, stopped = trainer.batch_of, [], []

    def stops(problem, count, seed, number, generator):
        done.append((seed, number))
        if len(done) == 24 + 13 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return plain(problem, count, seed, number, generator)

    monkeypatch.setattr(trainer, "batch_of", stops)
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, evaluate_at=[{"length": 32}])
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["checkpoint.safetensors", "model.safetensors", "run.json"]
    done.clear()
    found = compared(tmp_path, evaluate_at=[{"length": 32}])
    assert len(done) == 24 * 4 - 24 - 12  # what was done before is not done again
    assert lasting(found) == lasting(whole)
    assert not list(tmp_path.rglob("checkpoint.safetensors"))


def test_runs_whose_names_are_cut_off_have_folders_of_their_own(tmp_path):
    problem, long = problem_of("associative_recall", SMALL), {"a" * 60: 1}
    folders = {
        compare_module._folder(
            tmp_path,
            problem,
            sizing.Sized(sizing.Contender("gqa", {**long, "kv_heads": heads}), SIZES, None, 9),
            QUICK,
            torch.device("cpu"),
        )
        for heads in (1, 2)
    }
    assert len(folders) == 2
    assert all(len(folder.name) < 80 for folder in folders)


def test_all_see_the_same_batches(monkeypatch):
    seen, plain = [], trainer.batch_of

    def watched(*given):
        batch = plain(*given)
        seen.append((given[2], given[3], batch.ids))
        return batch

    monkeypatch.setattr(trainer, "batch_of", watched)
    compared(None)
    first, second, third, fourth = (seen[at : at + 24] for at in range(0, 96, 24))
    for one, other in ((first, second), (third, fourth)):
        assert [(seed, number) for seed, number, _ in one] == [(seed, number) for seed, number, _ in other]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
    assert not torch.equal(first[0][2], third[0][2])
    assert not torch.equal(first[0][2], first[1][2])


def test_what_is_wrong_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(RegistryError, match="nonsense"):
        compared(tmp_path, ["softmax", "nonsense"])
    with pytest.raises(InputError, match="makes 20 tokens of 16, and models know no others"):
        compared(tmp_path, evaluate_at=[{"keys": 12}])
    with pytest.raises(InputError, match="0 seeds"):
        compared(tmp_path, seeds=0)
    assert list(tmp_path.iterdir()) == []


def test_steps_to_a_threshold_and_spreads():
    assert compare_module.Spread.of([1.0, 2.0, 6.0]) == compare_module.Spread(3.0, 1.0, 6.0, pytest.approx(7**0.5))
    assert compare_module.Spread.of([2.0]).deviation is None
    found = compared(None, ["softmax"], threshold=0.0)
    assert found.entries[0].solved_after == (6, 6)
    assert compared(None, ["softmax"], threshold=1.1).entries[0].solved_after == (None, None)


def test_minutes_give_all_the_same_steps(tmp_path):
    one = compared(tmp_path, ["softmax"], seeds=1, minutes=0.005)
    two = compared(tmp_path, ["gqa", "softmax"], seeds=1, minutes=0.005)
    assert one.settings.steps == two.settings.steps >= QUICK.points


# ---- picture and command ---------------------------------------------------------------------------------------------


def test_the_picture_holds_every_name_as_text(finished, tmp_path):
    pytest.importorskip("matplotlib")
    _, found = finished
    odd = replace(found.entries[0], mechanism="a<b>&$x$\\y")
    file = plot.plot(replace(found, entries=(odd, found.entries[1])), tmp_path / "deep" / "curves.svg")
    texts = [text for node in ElementTree.parse(file).iter() for text in [node.text] if text and text.strip()]
    assert "a<b>&$x$\\y" in texts
    assert {"gqa", "chance", "steps"} <= set(texts)
    assert any("2 seeds" in text for text in texts)
    assert plot.plot(found, tmp_path / "a.svg").read_bytes() == plot.plot(found, tmp_path / "b.svg").read_bytes()


def test_without_matplotlib_it_says_how_to_get_it(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'headwise\[plots\]'"):
        plot.plot(finished[1], tmp_path / "curves.svg")


@pytest.fixture
def command(capsys):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_command)

    def call(*given):
        app([*map(str, given)], standalone_mode=False)
        return capsys.readouterr().out

    return call


TINY = [
    "--steps", "6", "--width", "16", "--heads", "4", "--layers", "1", "--batch", "4", "-q",
    "--set", "pairs=2", "--set", "length=16", "--set", "keys=8", "--set", "values=8", "--set", "offset=4",
]  # fmt: skip


def test_the_command_prints_json_and_a_table(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    given = ["associative_recall", *TINY, "--mechanism", "softmax,gqa:kv_heads=2", "--evaluate-at", "length=24,offset=8"]
    told = json.loads(command(*given, "--out", tmp_path, "--seeds", "2", "--json"))
    assert [entry["mechanism"] for entry in told["entries"]] == ["softmax", "gqa:kv_heads=2"]
    assert told["entries"][0]["kv_bytes"] == 128
    assert told["settings"]["steps"] == 6
    assert list(told["entries"][0]["elsewhere"]) == ["length=24,offset=8"]
    out = command(*given, "--out", tmp_path, "--seeds", "2")
    row = next(line for line in out.splitlines() if "gqa:kv_heads=2" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    entry = told["entries"][1]
    spread, there = entry["metric"], entry["elsewhere"]["length=24,offset=8"]
    assert cells[1] == f"{spread['mean']:.3f} ± {spread['deviation']:.3f}"
    assert cells[3] == f"{there['mean']:.3f} ± {there['deviation']:.3f}"
    assert cells[4:6] == [f"{entry['parameters']:,}", f"{entry['kv_bytes']:,.0f}"]
    assert "chance 0.500, ceiling 1; mean ± deviation of 2 seeds" in out
    assert ("curves.svg" in out) or ("pip install" in out)


def test_the_command_reads_a_text(command, tmp_path):
    (tmp_path / "text").write_text("words and words " * 40)
    given = ["byte_text", "--text", tmp_path / "text", "--set", "length=16", *TINY[:11], "--out", tmp_path / "out", "--json"]
    told = json.loads(command(*given))
    assert told["problem"]["text"] == str(tmp_path / "text")
    assert told["metric"] == "bits_per_byte"
    assert told["entries"][0]["metric"]["mean"] < 8.0


def test_the_command_refuses_in_words(command, tmp_path):
    with pytest.raises(RegistryError, match="there is no problem 'nonsense'"):
        command("nonsense", "--out", tmp_path)
    with pytest.raises(InputError, match="--set pairs: write field=value"):
        command("associative_recall", "--set", "pairs", "--out", tmp_path)
    with pytest.raises(InputError, match="has no 'text'"):
        command("copy", "--text", tmp_path / "t", "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_to_go_on(command, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command("copy", "--out", tmp_path, "-q")
    assert stopped.value.code == 130
    assert f"what was finished is in {tmp_path}, and the same command goes on from there" in capsys.readouterr().err


def test_what_is_learned_against_the_bytes_that_are_kept(tmp_path):
    from headwise.training.plot import plot_memory

    settings = Settings(steps=2, batch=2, rows=8, points=1)
    names = ["softmax", "delta_net", "hybrid:linear=delta_net,ratio=1", "hybrid:linear=delta_net,ratio=0"]
    found = compare(problem_of("copy"), names, seeds=2, width=16, layers=2, heads=2, settings=settings, show_progress=False)
    text = plot_memory(found, tmp_path / "memory.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in text for name in ("softmax", "delta_net", "hybrid, delta_net"))
    assert "bytes of all caches after" in text
    by_name = {entry.mechanism: entry.kv_bytes for entry in found.entries}
    assert by_name["hybrid:linear=delta_net,ratio=0"] == by_name["softmax"] > by_name["delta_net"]
    twice = replace(found, entries=found.entries[:1] * 2)  # as many bytes: no order between them
    assert plot_memory(twice, tmp_path / "twice.svg").is_file()
    with pytest.raises(InputError, match="1 of 1"):
        plot_memory(replace(found, entries=found.entries[:1]), tmp_path / "memory.svg")
