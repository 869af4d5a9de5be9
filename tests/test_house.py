"""The house's own rules: tests assert something, imports go down, files stay short, importing headwise stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwise

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "headwise"
PYTHON = sorted([*SOURCE.rglob("*.py"), *TESTS.glob("*.py"), *(ROOT / "training").glob("*.py")])
# What each room may import from. Rooms further down know nothing of those above.
FLOORS = (
    {"types", "errors", "card", "version", "registry", "progress", "prompts"},
    {"attention", "recurrence"},
    {"stages"},
    {"mechanisms", "caches", "zoo"},
    {"nn"},
    {"models"},
    {"probes", "plans", "conversions"},
    {"tasks", "parallel", "training"},
    {"report", "testing", "benchmarks"},
    {"cli"},
)
ASSERTING = re.compile(r"^_?(assert|check|close|require)")


def asserts(node: ast.AST) -> bool:
    """Whether a piece of code holds an assertion, or calls something that is named as one."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            called = inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", "")
            if ASSERTING.match(called) or ast.unparse(inner.func) == "pytest.raises":
                return True
    return False


def without_assertion(source: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [n.name for n in functions if n.name.startswith("test_") and not asserts(n)]


@pytest.mark.parametrize("file", sorted(TESTS.glob("test_*.py")), ids=lambda file: file.stem)
def test_every_test_asserts_something(file):
    assert without_assertion(file.read_text(encoding="utf-8")) == []


def test_a_test_that_asserts_nothing_is_found():
    source = "def test_a():\n    f(1)\n\ndef test_b():\n    assert f(1)\n\ndef test_c():\n    check_shape(1)\n\n"
    source += "def test_d():\n    with pytest.raises(ValueError):\n        f()\n\ndef helper():\n    pass\n"
    assert without_assertion(source) == ["test_a"]


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file):
    lines = file.read_text(encoding="utf-8").count("\n")
    assert lines <= 500, f"{file.name} has {lines} lines; split it"


def imported_rooms(file: Path) -> set[str]:
    """The rooms (folders or modules below headwise/) that a file imports when it is imported, not inside functions."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    rooms = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    typing_only = {n for b in tree.body if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test) for n in ast.walk(b)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in inner or node in typing_only or not node.level:
            continue
        base = parts[: len(parts) - node.level]
        path = [*base, *(node.module or "").split(".")] if node.module else [*base]
        rooms |= {path[0]} if path else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_down(file):
    own = file.relative_to(SOURCE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        assert imported_rooms(file) <= {"version", "cli"}
        return
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    above = {room for room in imported_rooms(file) if floor[room] > floor[own]}
    assert not above, f"{own} imports {', '.join(sorted(above))}, which stand above it"


def test_public_names_are_lazy_and_all_there():
    """Importing headwise loads neither torch nor transformers; each public name is there when it is asked for."""
    code = "import sys, headwise; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    assert set(headwise.__all__) == {"__version__", *headwise._PLACES}
    assert sorted(dir(headwise)) == sorted(headwise.__all__)
    for name in headwise.__all__:
        assert getattr(headwise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        headwise.nonsense  # noqa: B018


def test_functions_and_rooms_of_like_names_do_not_hide_each_other():
    """`headwise.scan` and `headwise.probe` stay functions, whatever was imported before them and in which way."""
    code = (
        "import headwise.report.scan, headwise.probes.retrieval, headwise.plans.recipes.duo, headwise.models.capture\n"
        "import inspect, headwise\n"
        "assert all(inspect.isfunction(getattr(headwise, n)) for n in ('scan', 'probe', 'duo', 'capture', 'measure')), 'hidden'\n"
        "assert inspect.ismodule(headwise.report) and inspect.ismodule(headwise.probes)\n"
        "print('fine')"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "fine", told.stderr
