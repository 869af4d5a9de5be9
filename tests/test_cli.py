"""The command: what it prints, what it writes, and one clear line with exit code 2 for each thing a user can get wrong."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from headwise import cli, registry
from headwise.errors import HeadwiseError


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["headwise", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans") / "streaming"
    from headwise import streaming as recipe

    recipe("tiny", sink=4, recent=32).save_pretrained(folder)
    return folder


def test_list_holds_everything_with_exact_titles(run):
    code, out, _ = run("list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {(row["kind"], row["name"]) for row in rows} == {
        (kind, name) for kind in registry.kinds() for name in registry.names(kind)
    }
    assert all({"name", "kind", "room", "paper", "year", "status"} <= row.keys() for row in rows)
    by_name = {(row["kind"], row["name"]): row for row in rows}
    assert by_name["probe", "retrieval"]["paper"] == "Retrieval Head Mechanistically Explains Long-Context Factuality"
    assert (
        by_name["recipe", "duo"]["paper"] == "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
    )
    assert by_name["probe", "sink_rate"]["paper"] == "When Attention Sink Emerges in Language Models: An Empirical View"
    assert by_name["probe", "gate_importance"]["paper"] == "Are Sixteen Heads Really Better than One?"
    code, out, _ = run("list", "--kind", "recipe")
    assert code == 0
    assert "streaming" in out
    assert "induction" not in out


def test_scan_writes_and_prints_json(run, tmp_path):
    code, out, err = run("scan", "--out", tmp_path / "s", "--probes", "entropy,induction", "--quick", "--json", "-q")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "s" / "heads.json").read_text())
    assert err == ""
    assert (tmp_path / "s" / "report.html").exists()


def test_scan_tells_what_it_found(run, tmp_path):
    code, out, _ = run("scan", "tiny-gqa", "--out", tmp_path, "--probes", "induction", "--quick", "-q")
    assert code == 0
    assert "induction heads" in out
    assert "report.html" in out


def test_scan_reads_a_text(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 40)
    code, out, _ = run("scan", "--text", text, "--out", tmp_path / "s", "--probes", "entropy", "--quick", "--json", "-q")
    other = json.loads(run("scan", "--out", tmp_path / "o", "--probes", "entropy", "--quick", "--json", "-q")[1])
    assert code == 0
    assert json.loads(out)["probes"] != other["probes"]


def test_plan_and_eval(run, tmp_path):
    code, out, _ = run("plan", "streaming", "--set", "recent=64", "--heads", "L0H0,L1H1", "--out", tmp_path / "p", "--json", "-q")
    assert code == 0
    told = json.loads(out)
    assert told["about"]["recent"] == 64
    assert told["entries"] == [{"stage": "Window(size=64) | Sink(size=4)", "stack": "decoder", "heads": ["L0H0", "L1H1"]}]
    code, out, _ = run("eval", "--plan", tmp_path / "p", "--tasks", "kv_bytes,repeat", "--json", "-q")
    result = json.loads(out)
    assert code == 0
    assert result["with"]["kv_bytes"] < result["without"]["kv_bytes"]
    assert result["without"]["repeat_accuracy"] > 0.98
    code, out, _ = run("eval", "--tasks", "recall", "-q")
    assert code == 0
    assert "recall_accuracy" in out


def test_generate(run, streaming):
    code, out, _ = run("generate", "--prompt", "def add(a, b):\n    return", "--max-new-tokens", "12", "--json")
    plain = json.loads(out)
    assert code == 0
    assert plain["new_tokens"] <= 12
    code, out, _ = run(
        "generate", "--prompt", "def add(a, b):\n    return", "--max-new-tokens", "40", "--plan", streaming, "--json"
    )
    assert json.loads(out)["kv_bytes"] == 64 * 64 * (2 * 32 * 4 + 4)  # a page of 64 tokens a head
    code, out, err = run("generate", "--prompt", "import ", "--max-new-tokens", "4", "--sample", "--seed", "3")
    assert out.startswith("import ")
    assert "tokens in" in err


def test_check(run, tmp_path, monkeypatch):
    code, out, _ = run("check", "gate", "streaming-nothing")
    assert code == 2
    code, out, _ = run("check", "gate", "--json")
    assert code == 0
    assert {row["outcome"] for row in json.loads(out)} == {"passed"}
    (tmp_path / "mine.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("check", "mine:Ahead")
    assert code == 1
    assert "leaks the future at position" in out
    assert "differs from its oracle" in out


BROKEN = '''
from dataclasses import dataclass
import torch
from headwise.attention.stage import Output

@dataclass(frozen=True)
class Ahead(Output):
    """Adds what later queries read."""
    def output(self, out, own_value):
        return out + out.mean(2, keepdim=True)

def examples(heads, size):
    return [Ahead()]

def oracle(stage, out, head):
    return out
'''

HELP = {
    "scan": "--quick", "view": "--port", "plan": "--set", "eval": "--tasks", "generate": "--max-new-tokens", "list": "--kind",
    "check": "--all",
}  # fmt: skip


@pytest.mark.parametrize("verb", HELP)
def test_help(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert HELP[verb] in re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert all(word in run("--help")[1] for word in HELP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "no-such-model"], "cannot open 'no-such-model'"),
        (["scan", "/nowhere/at/all"], "does not exist"),
        (["scan", "{tmp}"], "holds no config.json"),
        (["scan", "{tmp}/empty.txt"], "is a file"),
        (["scan", "--text", "{tmp}/empty.txt"], "is empty"),
        (["scan", "--text", "{tmp}/nowhere.txt"], "there is no file"),
        (["scan", "--text", "{tmp}/binary"], "no UTF-8 text"),
        (["scan", "--probes", "psychic"], "there is no probe 'psychic'; there are: ablation_importance"),
        (["scan", "--device", "cuda"], "no such NVIDIA GPU"),
        (["scan", "--device", "toaster"], "is no device"),
        (["scan", "--dtype", "float8"], "unknown dtype"),
        (["eval", "--plan", "{tmp}"], "is no plan"),
        (["eval", "tiny-gqa", "--plan", "{plan}"], "2 key/value"),
        (["eval", "--tasks", "chess"], "there is no task"),
        (["plan", "magic"], "there is no recipe 'magic'; there are: ada_kv, duo, expected_attention, h2o"),
        (["plan", "streaming", "--heads", "L9H9"], "L9H9 is out of range: decoder has layers 0-7 and heads 0-7"),
        (["plan", "streaming", "--heads", "nine"], "is no head; write it like L5H3"),
        (["plan", "streaming", "--set", "wings=2"], "the recipe streaming has sink=4, recent=256"),
        (["plan", "streaming", "--set", "sink=few"], "is no number"),
        (["generate", "--prompt", " "], "the text is empty"),
        (["generate", "--prompt", "word " * 3000], "do not fit the context of tiny, 2048 tokens"),
        (["generate", "--plan", "{tmp}"], "is no plan"),
        (["view", "{tmp}"], "holds no report.html"),
        (["list", "--kind", "fish"], "there is no kind 'fish'"),
        (["check"], "give names, or --all"),
        (["check", "nothing"], "nothing is registered as 'nothing'"),
        (["check", "os:path"], "checked can be subclasses of Stage"),
        (["check", "no.such.module:X"], "cannot import"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, streaming, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    filled = [a.format(tmp=tmp_path, plan=streaming) if len(a) < 100 else a for a in arguments]
    code, out, err = run(*filled)
    assert code == 2
    assert message in err
    assert err.startswith("headwise: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


def test_unknown_options_and_verbs(run):
    assert run("scan", "--nonsense")[0] == 2
    assert run("fly")[0] == 2
    assert run("--version")[1].strip() == registry.__dict__.get("__version__", __import__("headwise").__version__)


def test_interrupted(run, tmp_path, monkeypatch):
    import headwise.report

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(headwise.report, "scan", stopped)
    code, _, err = run("scan", "--out", tmp_path)
    assert code == 130
    assert "the same command goes on from there" in err


def test_view_serves_the_report_to_this_machine_only(tmp_path):
    (tmp_path / "report.html").write_text("<p>report</p>")
    (tmp_path / "heads.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    server = subprocess.Popen(
        [sys.executable, "-m", "headwise", "view", str(tmp_path), "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        address = server.stdout.readline().strip()
        host, port = re.fullmatch(r"http://(127\.0\.0\.1):(\d+)/report\.html", address).groups()

        def get(path, name="127.0.0.1"):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("GET", path, headers={"Host": f"{name}:{port}"})
            response = connection.getresponse()
            return response.status, response.read()

        assert get("/report.html") == (200, b"<p>report</p>")
        assert get("/heads.json")[0] == 200
        assert get("/secret.txt")[0] == 404
        assert get("/")[0] == 404
        assert get("/../../etc/passwd")[0] == 404
        assert get("/report.html", name="evil.example")[0] == 404
    finally:
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(20) == 0
        finally:
            server.kill()


def test_every_error_is_ours():
    from headwise import errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) >= 10
    assert all(issubclass(e, HeadwiseError) and e.__doc__ for e in kinds)
