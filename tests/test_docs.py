"""The documentation runs: its Python blocks, its commands, its printed results; and everything in the inventory has its place.

In a page, a block may be preceded by a comment that says what is done with it:
    <!-- not run: reason -->   skipped
    <!-- file: name.py -->     written to a file first, so that other blocks can import it and commands can name it
    <!-- run: 1 -->            the commands of a ```sh block are run, not only parsed; they end with this exit code (0 unless said)
A ```text block after a block that was run is what that printed; numbers may differ by 2 %.
"""

from __future__ import annotations

import inspect
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

import headwise
from headwise import cli, registry, zoo
from headwise.attention import statistic
from headwise.attention.statistic import NAMED, Statistic
from headwise.testing import _check, checks_for

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md"]
PAGE_OF = {
    "stage": "stages.md",
    "rule": "caches.md",
    "cache": "caches.md",
    "mechanism": "mechanisms.md",
    "architecture": "nn.md",
    "problem": "training.md",
    "probe": "probes.md",
    "recipe": "plans.md",
    "task": "tasks.md",
    "benchmark": "cli.md",
}
COMMANDS = typer.main.get_command(cli.app)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page. note: the comment just before it."""

    language: str
    text: str
    line: int
    note: str = ""

    def says(self, word: str) -> str | None:
        """What the note says after a word and a colon; None if it does not begin with that word."""
        start, _, rest = self.note.partition(":")
        return rest.strip() if start.strip() == word else None


def fences(page: Path) -> Iterator[Fence]:
    note, inside, start, language = "", None, 0, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is None and line.startswith("```"):
            inside, start, language = [], number, line[3:].strip()
        elif inside is not None and line.startswith("```"):
            yield Fence(language, "\n".join(inside) + "\n", start, note)
            inside, note = None, ""
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            comment = re.fullmatch(r"<!--(.*)-->", line.strip())
            note = comment[1].strip() if comment else ""
    assert inside is None, f"{page.name}: the block of line {start} does not end"


def commands(fence: Fence) -> list[list[str]]:
    """The words of each `headwise ...` line of a block, without the first."""
    lines = fence.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("headwise")]


def alike(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for white space, with numbers within 2 %."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=2e-3) for a, b in pairs)


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next of its level."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^{heading.split()[0]} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {heading!r}"
    return found[1]


def run_command(words: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["headwise", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@every_page
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, capsys):
    """Every ```python block runs, those of a page one after another in one namespace, and prints what the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, space.__name__, space)  # where dataclasses look for their module
    monkeypatch.setattr("webbrowser.open", lambda *_: True)
    known, printed = set(sys.modules), None
    try:
        for fence in fences(page):
            where = f"{page.name}, line {fence.line}"
            if fence.says("not run") is not None:
                assert fence.says("not run"), f"{where}: say why it is not run"
                printed = None
            elif fence.language == "python":
                name = fence.says("file")
                if name:
                    Path(name).write_text(fence.text, encoding="utf-8")
                else:
                    exec(compile(fence.text, where, "exec"), vars(space))
                printed = capsys.readouterr().out
            elif fence.language == "text" and printed is not None:
                assert alike(fence.text, printed), f"{where}: what is shown is not what was printed:\n{printed}"
                printed = None
            elif fence.language == "sh" and fence.says("run") is not None:
                printed = ""
                for words in commands(fence):
                    code = run_command(words, monkeypatch)
                    told = capsys.readouterr()
                    printed += told.out
                    wanted = int(fence.says("run") or 0)
                    assert code == wanted, f"{where}: headwise {' '.join(words)} ends with {code}: {told.err}{told.out}"
            else:
                printed = None
    finally:
        for name in [n for n in sys.modules if n not in known and (tmp_path / f"{n}.py").exists()]:
            del sys.modules[name]


@every_page
def test_commands_exist_with_their_options(page):
    """Every `headwise ...` line parses as the command would parse it."""
    root = COMMANDS.make_context("headwise", ["list"], resilient_parsing=True)
    for fence in fences(page):
        if fence.language != "sh":
            continue
        for words in commands(fence):
            try:
                if words and not words[0].startswith("-"):
                    name, command, rest = COMMANDS.resolve_command(root, words)
                    assert command.make_context(name, rest).command is command
                else:
                    assert {"--version", "--help"} >= set(words)
            except Exception as error:
                pytest.fail(f"{page.name}, line {fence.line}: headwise {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, f"{page.name}: {target}"


@pytest.mark.parametrize("kind", registry.kinds())
def test_everything_in_the_inventory_is_on_its_page(kind):
    """A new item must be documented: its registered name stands on the page of its kind."""
    pages = [PAGE_OF[kind], "linear.md"] if kind == "mechanism" else [PAGE_OF[kind]]
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    missing = [name for name in registry.names(kind) if not re.search(rf"`{name}[`(]", text)]
    assert missing == [], f"docs/{PAGE_OF[kind]} says nothing of them"


def statistics_there_are() -> list[str]:
    kinds = [k for k in vars(statistic).values() if inspect.isclass(k) and issubclass(k, Statistic) and k is not Statistic]
    return [k.__name__ for k in kinds]


def test_every_statistic_is_on_its_page():
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert [n for n in [*NAMED, *statistics_there_are()] if not re.search(rf"`{n}[`(]", text)] == []


def test_every_option_and_check_is_on_its_page():
    for name, command in COMMANDS.commands.items():
        text = section("cli.md", f"## headwise {name}")
        shared = section("cli.md", "## Options that several commands share")
        options = [option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("--")]
        assert [o for o in options if f"`{o}" not in text + shared and o != "--no-" + o[5:].replace("no-", "", 1)] == [], name
    text = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    checks = {f.__name__.removeprefix("check_") for kind in _check.MODULES for f in checks_for(kind)}
    assert sorted(c for c in checks if f"`{c}`" not in text) == []


def test_every_public_name_is_somewhere():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in headwise.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_counts_in_the_readme():
    """`| probes | 15 | ... |` and the like."""
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    kinds = [kind for kind in registry.kinds() if kind != "benchmark"]
    counts = {f"{kind}s": len(registry.names(kind)) for kind in kinds}
    counts |= {"statistics": len(statistics_there_are()), "embedded models": len(zoo.names())}
    counts["conformance checks"] = sum(len(checks_for(kind)) for kind in kinds)
    assert {name: int(rows[name]) for name in counts} == counts
