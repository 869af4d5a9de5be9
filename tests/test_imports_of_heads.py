"""Published head lists as tables: each format, written small here; geometry; and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import json
import math
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headwise import cli, duo
from headwise.errors import GeometryError, HeadwiseError, InputError
from headwise.models.subject import Subject, as_subject
from headwise.plans.imports import HeadPattern, import_heads, import_patterns
from headwise.types import HeadTable

GATES = "0.25\t1.0\n-1.5e-04\t7.500000000000000000e-01\n1\t0\n"


@pytest.fixture(scope="module")
def small() -> Subject:
    """Three layers of four heads, two share keys."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    return Subject(LlamaForCausalLM(config).eval(), name="small")


@pytest.fixture
def write(tmp_path):
    def write(content, name="heads.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


def scores() -> dict[str, list[float]]:
    """Published files hold ints and floats, in any order."""
    return {f"{layer}-{head}": [0, (4 * layer + head) / 11, 1] for layer in (2, 0, 1) for head in range(4)}


def patterns() -> list[dict[str, list]]:
    data = [{str(head): ["vertical_and_slash", 1000, 6096, 0.5 + head] for head in range(4)} for _ in range(3)]
    data[1]["2"] = ["stream_llm", 100, 800, 7]
    data[2]["0"] = ["block_sparse", 100, 1, 0.1]
    return data


# ---- each format -----------------------------------------------------------------------------------------------------


def test_gates_of_duo_attention(small, write):
    write({"sink_size": 128, "recent_size": 256, "deploy_sink_size": None, "lr": 0.02}, "config.json")
    table = import_heads(write(GATES, "full_attention_heads.tsv"), small)
    wanted = [[0.25, 0.25, 1.0, 1.0], [0.0, 0.0, 0.75, 0.75], [1.0, 1.0, 0.0, 0.0]]
    assert table.values.tolist() == wanted
    assert (table.name, table.stack) == ("duo_gates", "decoder")
    assert table.about == {"file": "full_attention_heads.tsv", "sink": 128, "recent": 256}
    plan = duo(small, table, sparsity=0.5, sink=table.about["sink"], recent=table.about["recent"])
    assert plan.about["full"] == ["L0H2", "L0H3", "L1H2", "L1H3", "L2H0", "L2H1"]
    assert duo(small, table, threshold=0.8).about["full"] == ["L0H2", "L0H3", "L2H0", "L2H1"]


def test_gates_need_no_config_and_may_have_windows_line_ends(small, write):
    table = import_heads(write(GATES.replace("\n", "\r\n") + "\r\n", "gates.txt"), small)
    assert table["L1H2"] == 0.75
    assert table.about == {"file": "gates.txt"}
    write({"model_type": "llama"}, "config.json")  # of a model
    assert import_heads(write(GATES, "gates.txt"), small).about == {"file": "gates.txt"}


def test_gates_just_outside_are_taken_as_zero_and_one(small, write):
    table = import_heads(write("1.5\t-0.5\n0\t0\n0\t0\n"), small)
    assert table.values[0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_scores_of_retrieval_heads_are_means(small, write):
    table = import_heads(write(scores()), small)
    for layer in range(3):
        for head in range(4):
            assert table[layer, head] == pytest.approx(((4 * layer + head) / 11 + 1) / 3, abs=1e-15)
    assert (table.name, table.about) == ("retrieval_scores", {"file": "heads.json", "scores": 3})
    assert duo(small, table, threshold=0.95).about["full"] == ["L2H2", "L2H3"]


def test_patterns_of_minference(small, write):
    file = write(patterns())
    found = import_patterns(file, small)
    assert found[1, 2] == HeadPattern("stream_llm", 100, 800, 7.0)
    assert found[0, 3] == HeadPattern("vertical_and_slash", 1000, 6096, 3.5)
    assert found.counts() == {"vertical_and_slash": 10, "stream_llm": 1, "block_sparse": 1}
    assert found.heads("stream_llm").names() == ["L1H2"]
    assert found.heads("block_sparse").names() == ["L2H0"]
    with pytest.raises(InputError, match="there is no pattern 'dense'; there are: vertical_and_slash"):
        found.heads("dense")
    table = import_heads(file, small)
    assert (table < 0.5).names() == ["L1H2"]
    assert (table >= 1).count() == 11
    assert table.about["stream_llm"] == 1
    assert duo(small, ~found.heads("stream_llm")).about["streaming"] == 0  # L1H3 shares its keys


def test_our_own_tables(small, write, tmp_path):
    values = torch.arange(12.0).view(3, 4)
    HeadTable(values, "mine", unit="nats", about={"a": 1}).save(tmp_path / "own.json")
    table = import_heads(tmp_path / "own.json", small)
    assert torch.equal(table.values, values.double())
    assert (table.name, table.unit, table.about) == ("mine", "nats", {"a": 1})


# ---- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GATES + "0\t0\n", r"heads.json is for 4 layers x 2 key/value heads, small has 3 layers x 2 key/value heads"),
        ("0\t0\t0\n" * 3, r"is for 3 layers x 3 key/value heads, small has 3 layers x 2"),
        ("0\t0\t0\t0\n" * 3, r"is for 3 layers x 4 key/value heads, small has 3 layers x 2"),
        ({**scores(), "3-0": [1]}, r"is for 4 layers x 4 heads, small has 3 layers x 4 heads"),
        ({**scores(), "0-4": [1]}, r"is for 3 layers x 5 heads, small has 3 layers x 4 heads"),
        ({k: v for k, v in scores().items() if k != "1-2"}, r"is for 3 layers x 4 heads, .*; L1H2 is missing"),
        ({k: v for k, v in scores().items() if k[0] != "2"}, r"is for 2 layers x 4 heads, small has 3 layers x 4 heads$"),
        (patterns()[:2], r"is for 2 layers x 4 heads"),
        ([*patterns(), {}], r"is for 4 layers x 4 heads"),
        ([*patterns()[:2], {"0": ["stream_llm", 1, 1, 1]}], r"L2H1 is missing"),
        ({"name": "x", "values": [[1.0] * 4] * 4}, r"is for 4 layers x 4 heads"),
        ({"name": "x", "values": [[1.0, 1.0, 1.0, None]] * 3}, r"is for 3 layers x 3 heads"),
        ({"name": "x", "stack": "vision", "values": [[1.0] * 4] * 3}, r"stack 'vision'; the main stack of small is 'decoder'"),
    ],
)
def test_files_of_other_models_are_refused(small, write, content, message):
    with pytest.raises(GeometryError, match=message):
        import_heads(write(content), small)


# ---- files that are wrong --------------------------------------------------------------------------------------------


def changed(layer: int, head: str, entry: object) -> list:
    data = patterns()
    data[layer][head] = entry
    return data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "heads.json is empty"),
        ("\n \n", "heads.json is empty"),
        ("0\t0\nnan\t0\n0\t0", "line 2, column 1: 'nan' is no gate"),
        ("0\t0\n0\tinf\n0\t0", "line 2, column 2: 'inf' is no gate"),
        ("0\t0\n0\t0\n0\t1.51", "line 3, column 2: '1.51' is no gate"),
        ("0\t-0.51\n", "line 1, column 2: '-0.51' is no gate"),
        ("0\t0\n0\t\n0\t0", "line 2, column 2: '' is no gate"),
        ("0 0\n0 0\n", "line 1, column 1: '0 0' is no gate; numbers from 0 to 1 are due, with tabs"),
        ("# heads\n0\t0\n", "line 1, column 1: '# heads' is no gate"),
        ("0\t0\n\n0\n", "line 3: 1 numbers, the lines before have 2"),
        ("{", "line 1: no JSON"),
        ('{"0-0":\n [1,}', "line 2: no JSON"),
        ("[" * 100_000, "can't be read as JSON: RecursionError"),
        ("{}", "heads.json has no heads"),
        ("[]", "heads.json has no heads"),
        ("[{}, {}, {}]", "heads.json has no heads"),
        ({**scores(), "a-1": [1]}, "'a-1': no head; keys are layer-head"),
        ({**scores(), "-1-1": [1]}, "'-1-1': no head"),
        ({**scores(), "0-1-2": [1]}, "'0-1-2': no head"),
        ({**scores(), "00-1": [1]}, "'00-1': this head is there twice"),
        ({**scores(), "1-1": []}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": 1.0}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": [math.nan]}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": [math.inf]}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": [True]}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": [10**400]}, "'1-1': a list of finite scores is due"),
        ({**scores(), "1-1": ["1"]}, "'1-1': a list of finite scores is due"),
        ('{"0-0": [1], "0-0": [2]}', "'0-0': this key is there twice"),
        ('{"0-0": [' + "9" * 5000 + "]}", "can't be read as JSON: ValueError"),
        ([1, 2, 3], "layer 0: {head: "),
        (
            changed(1, "3", ["dense", 1, 1, 1]),
            "layer 1, head '3': unknown pattern 'dense'; known are vertical_and_slash, stream_llm",
        ),
        (changed(1, "3", [["stream_llm"], 1, 1, 1]), "layer 1, head '3': unknown pattern"),
        (changed(1, "3", ["stream_llm", 1, 1]), "layer 1, head '3': [pattern, number, number, score] is due"),
        (changed(1, "3", "stream_llm"), "layer 1, head '3': [pattern, number, number, score] is due"),
        (changed(1, "3", ["stream_llm", 0, 1, 1]), "layer 1, head '3': two sizes above 0"),
        (changed(1, "3", ["stream_llm", 1, 1.5, 1]), "layer 1, head '3': two sizes above 0"),
        (changed(1, "3", ["stream_llm", 1, True, 1]), "layer 1, head '3': two sizes above 0"),
        (changed(1, "3", ["stream_llm", 1, 1, math.nan]), "layer 1, head '3': two sizes above 0 and a finite score"),
        (changed(1, "L3", ["stream_llm", 1, 1, 1]), "layer 1, head 'L3': heads are named by their number"),
        (changed(1, "03", ["stream_llm", 1, 1, 1]), "layer 1, head '03': this head is there twice"),
        ({"name": "x", "values": 3}, "'values': a list of equal rows"),
        ({"name": "x", "values": []}, "'values': a list of equal rows"),
        ({"name": "x", "values": [[1.0], [1.0, 2.0]]}, "'values': a list of equal rows"),
        ({"name": "x", "values": [[1.0, "a"]]}, "'values', L0H1: 'a' is no finite number"),
        ({"name": "x", "values": [[1.0, math.nan]]}, "'values', L0H1: nan is no finite number"),
        ({"name": 3, "values": [[1.0] * 4] * 3}, "'name': 3 is none"),
        ({"values": [[1.0] * 4] * 3}, "'name': None is none"),
        ({"name": "x", "values": [[1.0] * 4] * 3, "about": 1}, "'about': 1 is none"),
        ({"name": "x", "values": [[1.0] * 4] * 3, "unit": 1}, "'unit': 1 is none"),
    ],
)
def test_files_that_are_wrong_say_where(small, write, content, message):
    file = write(content)
    with pytest.raises(InputError) as caught:
        import_heads(file, small)
    assert message in str(caught.value)
    assert str(caught.value).startswith("heads.json")
    assert len(str(caught.value)) < 300


def test_files_that_cannot_be_read(small, write, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"there is no file .*missing\.tsv"):
        import_heads(tmp_path / "missing.tsv", small)
    with pytest.raises(InputError, match="there is no file"):
        import_heads(tmp_path, small)
    (tmp_path / "bytes.tsv").write_bytes(b"0\t0\n\xff")
    with pytest.raises(InputError, match=r"is no UTF-8 text: .* at byte 4"):
        import_heads(tmp_path / "bytes.tsv", small)
    monkeypatch.setattr("headwise.plans.imports.MOST_BYTES", len(GATES))
    assert import_heads(write(GATES), small)["L0H0"] == 0.25
    with pytest.raises(InputError, match="bytes; a head list has"):
        import_heads(write(GATES + "\n"), small)


@pytest.mark.parametrize("value", ["128", -1, 1.5, True])
def test_a_config_that_is_wrong_is_told(small, write, value):
    write({"sink_size": 128, "recent_size": value}, "config.json")
    with pytest.raises(InputError, match=r"config\.json, recent_size: .* is no number of tokens"):
        import_heads(write(GATES, "gates.tsv"), small)


def test_patterns_are_not_looked_for_in_scores(small, write):
    with pytest.raises(InputError, match=r"heads\.json is no list of MInference's patterns"):
        import_patterns(write(scores()), small)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["headwise", *arguments])
    with contextlib.suppress(SystemExit):
        cli.app(standalone_mode=False)


def test_the_command_reads_a_file(write, tmp_path, monkeypatch, capsys):
    rows = [["0"] * 8 for _ in range(8)]
    rows[6][5] = rows[7][1] = rows[7][2] = "1"
    file = write("\n".join("\t".join(row) for row in rows), "gates.tsv")
    options = ["--out", str(tmp_path / "plan"), "--json", "-q"]
    run(monkeypatch, "plan", "duo", "--heads", str(file), "--set", "sparsity=0.953", *options)
    made = json.loads(capsys.readouterr().out)
    assert made["about"]["full"][-3:] == ["L6H5", "L7H1", "L7H2"]
    assert made["about"]["streaming"] == 61
    run(monkeypatch, "plan", "duo", "--heads", "L6H5,7.3", *options)
    assert json.loads(capsys.readouterr().out)["about"]["full"] == ["L6H5", "L7H3"]


def test_the_command_says_what_it_cannot_read(write, tmp_path, monkeypatch):
    file = write(GATES, "gates.tsv")
    with pytest.raises(GeometryError, match=r"gates\.tsv is for 3 layers x 2 key/value heads, tiny has 8 layers x 8"):
        run(monkeypatch, "plan", "duo", "--heads", str(file), "--out", str(tmp_path / "plan"), "-q")
    with pytest.raises(InputError, match=r"there is no file .*gone\.tsv"):
        run(monkeypatch, "plan", "duo", "--heads", str(tmp_path / "gone.tsv"), "-q")
    with pytest.raises(HeadwiseError, match="the recipe streaming takes heads such as L5H3,L6H0"):
        run(monkeypatch, "plan", "streaming", "--heads", str(file), "-q")


def test_the_embedded_model_is_the_default(write):
    assert import_heads(write("\n".join(["\t".join(["0.5"] * 8)] * 8))).shape == (8, 8)
    assert as_subject(None).name == "tiny"
