"""The benchmark command: rows with their peers beside them, in text and in JSON."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from headwise import cli, registry
from headwise.benchmarks import _measure, attention
from headwise.benchmarks import statistics as module


@pytest.fixture
def small(monkeypatch):
    """The CPU layer at a length that takes no time."""
    layer = module._layer_cpu
    monkeypatch.setattr(module, "_layer_cpu", lambda device, tokens: layer(device, 128))
    monkeypatch.setattr(_measure, "milliseconds", lambda run, device, seconds: run() is None or 2.0)


def bench(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["headwise", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0, *capsys.readouterr()


def test_bench_prints_rows_and_json(small, monkeypatch, capsys):
    code, out, err = bench(monkeypatch, capsys, "statistics", "--quick", "--json")
    data = json.loads(out)
    assert code == 0
    assert [row["what"] for row in data["rows"]] == [
        "fused attention alone", "output + 5 statistics", "5 statistics", "key mass", "peer: eager weights",
    ]  # fmt: skip
    assert [row["ratio"] for row in data["rows"]] == [None, 1.0, 1.0, 1.0, 1.0]
    assert data["machine"]["torch"] == torch.__version__
    assert "goal 1.8 x" in err
    code, out, _ = bench(monkeypatch, capsys, "--quick")
    assert code == 0
    assert "peer: eager weights" in out


def test_bench_says_what_is_wrong(monkeypatch, capsys):
    code, _, err = bench(monkeypatch, capsys, "speedy")
    assert code == 2
    assert "there is no benchmark 'speedy'; there are: attention, cache, conversions, linear, retention, statistics" in err
    if not torch.cuda.is_available():
        code, _, err = bench(monkeypatch, capsys, "statistics", "--device", "cuda")
        assert code == 2
        assert "no such NVIDIA GPU" in err


def test_what_runs_out_of_memory_is_a_row():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = _measure.measured("layer", "greedy", 8, greedy, torch.device("cpu"), note="as said")
    assert row.milliseconds is None
    assert row.note == "out of memory; as said"
    with pytest.raises(ValueError, match="other"):
        _measure.measured("layer", "broken", 8, lambda: (_ for _ in ()).throw(ValueError("other")), torch.device("cpu"))


def test_the_median_of_repeats():
    counted = []
    took = _measure.milliseconds(lambda: counted.append(1), torch.device("cpu"), seconds=0.0)
    assert len(counted) == 5
    assert took >= 0


def test_every_mechanism_has_its_rows(monkeypatch, capsys):
    """A new file in the room of mechanisms is measured without a word more; peers that cannot run are rows too."""
    for name in ("_edited", "_relative", "_low_rank", "_sparse", "_mechanisms"):
        group = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda device, tokens, group=group: group(device, 64))
    monkeypatch.setattr(_measure, "milliseconds", lambda run, device, seconds: run() is None or 2.0)

    def no_flex(x, score_mod, options=None):
        raise NotImplementedError("not here")

    monkeypatch.setattr(attention, "_flexed", no_flex)
    code, out, _ = bench(monkeypatch, capsys, "attention", "--quick", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    for kind in ("forward", "training"):
        measured = [row["what"] for row in rows if row["measure"] == f"mechanism, {kind}"]
        assert measured == ["softmax attention", *registry.names("mechanism")]
    assert all(row["milliseconds"] == 2.0 for row in rows if not row["what"].startswith("peer"))
    refused = [row for row in rows if "Flex" in row["what"]]
    assert [row["note"] for row in refused] == ["does not run: not here"] * 2
    trained = next(row for row in rows if row["measure"] == "relative bias, training" and row["what"] == "relative bias")
    assert trained["note"] == "gradients the same bits twice"


def test_conversions_say_what_they_cost_and_free():
    run = registry.load("benchmark", "conversions")
    rows = {row.what: row.note for row in run(torch.device("cpu"), quick=True, report=print).rows}
    assert len(rows) == 19
    kept = {what: int(note.split(" KV bytes")[0].split(" ")[-1].replace(",", "")) for what, note in rows.items()}
    loss = {what: float(note.split(" ")[1]) for what, note in rows.items()}
    plain = "as it was trained"
    assert kept[plain] == 2 * 8 * 8 * 32 * 4  # keys and values, layers, heads, size, bytes
    assert kept["GQA: 2 key/value heads, means"] * 4 == kept[plain]
    assert kept["MLKV: 4 of 8 layers have keys and values"] * 2 == kept[plain]
    assert kept["CHAI: 4 clusters of heads"] * 4 == kept[plain] * 3
    assert min(loss, key=loss.get) == plain
    assert loss["MoH: 4 heads and 2 of 4 by token"] < loss["GQA: 4 key/value heads, means"]
    assert loss["MASA: 4, and a rest of rank 32 each"] < loss["MASA: 4 matrices for 8 layers"]
