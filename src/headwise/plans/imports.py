"""Reading head lists that others published: gates of DuoAttention, scores of retrieval heads, patterns of MInference.

Formats (files are only read, nothing in them is run):

- DuoAttention's full_attention_heads.tsv: a line for each layer, a number for each key/value head, with tabs; beside it a
  config.json with sink_size and recent_size. (mit-han-lab/duo-attention; arXiv:2410.10819)
- Scores of retrieval heads: {"layer-head": [scores, ...]} for every query head. (nightdessert/Retrieval_Head, arXiv:2404.15574;
  HeadKV writes the same, FYYFU/HeadKV, arXiv:2410.19258)
- MInference's patterns: a list with, for each layer, {"head": [pattern, first number, second number, score]}.
  (microsoft/MInference, arXiv:2407.02490)
- Our own `HeadTable.save`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import GeometryError, InputError
from ..models.subject import Subject, as_subject
from ..types import Heads, HeadTable, head_name
from .gates import spread

PATTERNS = ("vertical_and_slash", "stream_llm", "block_sparse")
MOST_BYTES = 1 << 26  # a file larger than that is no head list
FARTHEST = 0.5  # how far from [0, 1] a trained gate may have stepped; it is taken as 0 or 1, as its authors do
_KEY = re.compile(r"(\d{1,6})-(\d{1,6})")


@dataclass(frozen=True)
class HeadPattern:
    """How MInference reads a prompt with one head. first, second: keys and diagonals of vertical_and_slash; first tokens and
    window of stream_llm; blocks and 1 of block_sparse. score: of the search, whose kind differs from file to file."""

    kind: str
    first: int
    second: int
    score: float


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    """A table of kinds: the pattern of every head of one stack, by (layer, head)."""

    of: Mapping[tuple[int, int], HeadPattern]
    shape: tuple[int, int]
    stack: str = "decoder"

    def __getitem__(self, address: tuple[int, int]) -> HeadPattern:
        return self.of[address]

    def heads(self, kind: str) -> Heads:
        """The heads of one kind.

        Raises: InputError for a kind that MInference does not have.
        """
        if kind not in PATTERNS:
            raise InputError(f"there is no pattern {kind!r}; there are: {', '.join(PATTERNS)}")
        return Heads.of([head for head, pattern in self.of.items() if pattern.kind == kind], self.shape, self.stack)

    def counts(self) -> dict[str, int]:
        """How many heads are of each kind."""
        return {kind: self.heads(kind).count() for kind in PATTERNS}


def import_heads(file: str | Path, model: Any = None) -> HeadTable:
    """A published head list as a table for this model; which format it is, its contents say.

    Gates of DuoAttention are one a key/value head, given to all query heads that share it, within [0, 1]; `about` has the sink
    and recent sizes of the config.json beside the file. Scores of retrieval heads are means. Of MInference's patterns, heads
    that stream are 0 and the others 1; `import_patterns` tells more.

    Raises: InputError, naming file and line or key, if the file can't be read; GeometryError, with both geometries, if it is of
        another model.
    """
    path, subject = Path(file), as_subject(model)
    text = _read(path)
    if text.lstrip()[:1] not in ("[", "{"):
        return _gates(path, text, subject)
    data = _json(path, text)
    if isinstance(data, list):
        patterns = _patterns(path, data, subject)
        values = torch.full(patterns.shape, torch.nan, dtype=torch.float64)
        for head, pattern in patterns.of.items():
            values[head] = float(pattern.kind != "stream_llm")
        return HeadTable(values, "minference", patterns.stack, "reads everything", {"file": path.name, **patterns.counts()})
    if "values" in data:
        return _own(path, data, subject)
    return _scores(path, data, subject)


def import_patterns(file: str | Path, model: Any = None) -> HeadPatterns:
    """MInference's patterns as a table of kinds for this model.

    Raises: InputError, naming file and layer, if the file can't be read or is no such list; GeometryError as `import_heads`.
    """
    path, subject = Path(file), as_subject(model)
    data = _json(path, _read(path))
    if not isinstance(data, list):
        raise InputError(f"{path.name} is no list of MInference's patterns, one of {{head: [pattern, ...]}} for each layer")
    return _patterns(path, data, subject)


# ---- the formats -----------------------------------------------------------------------------------------------------


def _gates(path: Path, text: str, subject: Subject) -> HeadTable:
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = []
        for column, cell in enumerate(line.split("\t"), 1):
            try:
                value = float(cell)
            except ValueError:
                value = math.nan
            if not -FARTHEST <= value <= 1 + FARTHEST:
                where = f"{path.name}, line {number}, column {column}"
                raise InputError(f"{where}: {cell.strip()[:24]!r} is no gate; numbers from 0 to 1 are due, with tabs between")
            row.append(min(max(value, 0.0), 1.0))
        if rows and len(row) != len(rows[0]):
            raise InputError(f"{path.name}, line {number}: {len(row)} numbers, the lines before have {len(rows[0])}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path.name} is empty; a line of gates for each layer is due")
    stack = subject.main
    has = {site.key_value_heads for site in stack.sites}
    if (len(rows), {len(rows[0])}) != (len(stack.sites), has):
        raise _other(path, f"{len(rows)} layers x {len(rows[0])} key/value heads", subject, "key/value heads", has)
    about = {"file": path.name, **_sizes(path.with_name("config.json"))}
    return spread(stack, [torch.tensor(row, dtype=torch.float64) for row in rows], "duo_gates", "share", about)


def _sizes(config: Path) -> dict[str, int]:
    """What a config.json beside gates says of sinks and window; nothing if there is none."""
    if not config.is_file():
        return {}
    data = _json(config, _read(config))
    found = {}
    for key, name in (("sink_size", "sink"), ("recent_size", "recent")):
        if isinstance(data, Mapping) and data.get(key) is not None:
            if type(data[key]) is not int or data[key] < 0:
                raise InputError(f"{config.name}, {key}: {data[key]!r} is no number of tokens")
            found[name] = data[key]
    return found


def _scores(path: Path, data: Mapping[str, Any], subject: Subject) -> HeadTable:
    means: dict[tuple[int, int], float] = {}
    for key, scores in data.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{path.name}, {key[:24]!r}: no head; keys are layer-head, such as 5-3")
        if not isinstance(scores, list) or not scores or not all(_is_number(score) for score in scores):
            raise InputError(f"{path.name}, {key!r}: a list of finite scores is due")
        head = int(match[1]), int(match[2])
        if head in means:
            raise InputError(f"{path.name}, {key!r}: this head is there twice")
        means[head] = math.fsum(scores) / len(scores)
    if not means:
        raise InputError(f"{path.name} has no heads")
    _check_heads(path, set(means), subject)
    stack = subject.main
    values = torch.full(stack.shape, torch.nan, dtype=torch.float64)
    for head, mean in means.items():
        values[head] = mean
    lengths = [len(scores) for scores in data.values()]
    about = {"file": path.name, "scores": min(lengths)}
    return HeadTable(values, "retrieval_scores", stack.name, "mean score", about)


def _patterns(path: Path, data: list[Any], subject: Subject) -> HeadPatterns:
    of: dict[tuple[int, int], HeadPattern] = {}
    for layer, heads in enumerate(data):
        if not isinstance(heads, Mapping):
            raise InputError(f"{path.name}, layer {layer}: {{head: [pattern, ...]}} is due, not {_short(heads)}")
        for key, entry in heads.items():
            where = f"{path.name}, layer {layer}, head {key[:24]!r}"
            if not re.fullmatch(r"\d{1,6}", key):
                raise InputError(f"{where}: heads are named by their number")
            if not isinstance(entry, list) or len(entry) != 4:
                raise InputError(f"{where}: [pattern, number, number, score] is due, not {_short(entry)}")
            kind, first, second, score = entry
            if kind not in PATTERNS:
                raise InputError(f"{where}: unknown pattern {_short(kind)}; known are {', '.join(PATTERNS)}")
            if not all(type(size) is int and size > 0 for size in (first, second)) or not _is_number(score):
                raise InputError(f"{where}: two sizes above 0 and a finite score are due, not {_short(entry[1:])}")
            if (layer, int(key)) in of:
                raise InputError(f"{where}: this head is there twice")
            of[layer, int(key)] = HeadPattern(kind, first, second, float(score))
    if not of:
        raise InputError(f"{path.name} has no heads")
    _check_heads(path, set(of), subject, len(data))
    return HeadPatterns(of, subject.main.shape, subject.main.name)


def _own(path: Path, data: Mapping[str, Any], subject: Subject) -> HeadTable:
    rows = data["values"]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise InputError(f"{path.name}, 'values': a list of equal rows, one for each layer, is due")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if value is not None and not _is_number(value):
                raise InputError(f"{path.name}, 'values', {head_name(layer, head)}: {_short(value)} is no finite number")
    for key, kind in (("name", str), ("stack", str), ("unit", str), ("about", Mapping)):
        if not isinstance(data.get(key, "" if key != "about" else {}), kind) or (key == "name" and key not in data):
            raise InputError(f"{path.name}, {key!r}: {_short(data.get(key))} is none; give a file written by HeadTable.save")
    table = HeadTable.from_dict(data)
    _check_heads(path, set(table.heads().list()), subject, len(rows))
    if table.stack != subject.main.name:
        raise GeometryError(
            f"{path.name} is of the stack {table.stack!r}; the main stack of {subject.name} is {subject.main.name!r}"
        )
    return HeadTable(table.values[:, : subject.main.shape[1]], table.name, table.stack, table.unit, table.about)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _check_heads(path: Path, found: set[tuple[int, int]], subject: Subject, layers: int = 0) -> None:
    """All of the model's heads must be there and no others."""
    stack = subject.main
    wanted = set(stack.exists().list())
    layers = max(layers, 1 + max((layer for layer, _ in found), default=-1))
    if found == wanted and layers == len(stack.sites):
        return
    heads = 1 + max((head for _, head in found), default=-1)
    error = _other(path, f"{layers} layers x {heads} heads", subject, "heads", {site.heads for site in stack.sites})
    missing = sorted(wanted - found)
    if missing and layers == len(stack.sites) and heads == stack.shape[1]:
        error = GeometryError(f"{error}; {head_name(*missing[0])} is missing")
    raise error


def _other(path: Path, there: str, subject: Subject, what: str, counts: set[int]) -> GeometryError:
    here = "-".join(str(count) for count in sorted({min(counts), max(counts)}))
    return GeometryError(f"{path.name} is for {there}, {subject.name} has {len(subject.main.sites)} layers x {here} {what}")


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a head list, such as full_attention_heads.tsv")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path.name} has {path.stat().st_size:,} bytes; a head list has {MOST_BYTES:,} at most")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path.name} can't be read: {error.strerror}") from error


def _json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:i]])
            raise InputError(f"{path.name}, {twice[:24]!r}: this key is there twice")
        return data

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{path.name}, line {error.lineno}: no JSON ({error.msg}, column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path.name} can't be read as JSON: {type(error).__name__}") from error


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e300 < value < 1e300


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
