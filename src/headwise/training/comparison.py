"""Comparing mechanisms on a problem: equal parameters, the same batches, several seeds; what is done stays done."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from .. import registry
from ..errors import HeadwiseError, InputError, ModelLoadError
from ..models.subject import check_device
from ..nn import LanguageModel
from ..progress import bar
from ..version import __version__
from .problems import Problem
from .sizing import Sized, Sizes, equal, parse
from .trainer import Settings, judge, kv_bytes, steps_in, train

RUN, CHECKPOINT, WEIGHTS, SUMMARY = "run.json", "checkpoint.safetensors", "model.safetensors", "comparison.json"


@dataclass(frozen=True)
class Spread:
    """A number over several seeds. deviation: of the sample, None for one seed."""

    mean: float
    least: float
    most: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), min(values), max(values), deviation)


@dataclass(frozen=True)
class Entry:
    """One mechanism's result.

    metric: at the end. solved_after: for each seed, the first point at which the metric reached the threshold, None where it
    never did. kv_bytes: for each token of a prompt of the problem's length, float32, counted; None where why_no_cache says why.
    elsewhere: {name of an option: the metric there}, or why it could not be judged there. captured: whether all runs were
    replayed from a CUDA graph, and if not, why.
    """

    mechanism: str
    parameters: int
    hidden: tuple[int, ...] | None
    metric: Spread
    solved_after: tuple[int | None, ...]
    tokens_per_second: float
    kv_bytes: float | None
    why_no_cache: str
    peak_bytes: int | None
    elsewhere: Mapping[str, Spread | str]
    captured: bool
    why_not_captured: str
    curves: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Comparison:
    """What came out, with what it was asked for."""

    problem: Mapping[str, Any]
    metric: str
    higher: bool
    chance: float
    ceiling: float | None
    threshold: float
    sizes: Sizes
    settings: Settings
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    """One mechanism with one seed."""

    sized: Sized
    settings: Settings
    folder: Path | None

    @property
    def done(self) -> dict[str, Any] | None:
        """What its file says, if it has finished."""
        if self.folder is None or not (self.folder / RUN).is_file():
            return None
        try:
            return json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelLoadError(f"{self.folder / RUN} can't be read ({error}); remove it to train again") from error


def problem_of(name: str, options: Mapping[str, Any] | None = None) -> Problem:
    """A problem by its name, with options.

    Raises: RegistryError for an unknown name. InputError for options that it does not have, or values of another kind.
    """
    kind = registry.load("problem", name)
    fields = kind.__dataclass_fields__
    for option, value in (options or {}).items():
        if option not in fields:
            raise InputError(f"{name} has no {option!r}; it has {', '.join(f'{n}={f.default}' for n, f in fields.items())}")
        default = fields[option].default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, bool):
            fits = isinstance(value, bool)
        else:
            fits = (
                number and (isinstance(default, float) or float(value).is_integer()) if isinstance(default, int | float) else True
            )
        if not fits or (isinstance(default, str | None) and not isinstance(value, str | None)):
            raise InputError(f"{option} of {name} is {value!r}; give a value such as {default!r}")
    given = {n: int(v) if type(fields[n].default) is int else v for n, v in (options or {}).items()}
    return kind(**given)


def compare(
    problem: Problem,
    mechanisms: Sequence[str] = ("softmax",),
    *,
    seeds: int = 3,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    settings: Settings | None = None,
    minutes: float | None = None,
    evaluate_at: Sequence[Mapping[str, Any]] = (),
    threshold: float | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    show_progress: bool = True,
) -> Comparison:
    """Trains each mechanism with each seed and says how they compare.

    All have as many parameters as plain softmax attention, within half a unit of feed-forward width, and see the same batches
    in the same order. Everything that is wrong with a mechanism or an option is said before the first step.

    Args:
        mechanisms: names, "softmax" for plain attention, or names of architectures, with options as `name:option=value`.
        seeds: how many; 0, 1, ... settings: of each run; its seed is not used. minutes: of each run; steps are set by timing plain
            attention, so that all get as many. evaluate_at: options of the problem to be judged at besides, such as
            {"length": 256}. threshold: of the metric, for the steps it takes; the problem's own by default.
        out: a folder; runs that are finished there are not run again, unless `fresh`, and those that were interrupted go on.
    """
    settings = settings or Settings()
    device = check_device(settings.device)
    if seeds < 1:
        raise InputError(f"{seeds} seeds; give 1 at least")
    sizes = Sizes(problem.vocabulary, problem.context, width, layers, heads)
    elsewhere = {_told(options): _elsewhere(problem, options) for options in evaluate_at}
    contenders = equal(parse(mechanisms), sizes)
    home = None if out is None else Path(out)
    if minutes is not None:
        settings = replace(settings, steps=_timed(problem, sizes, settings, minutes, home, fresh))
    runs = [
        _Run(sized, replace(settings, seed=seed), _folder(home, problem, sized, replace(settings, seed=seed), device))
        for seed in range(seeds)
        for sized in contenders
    ]
    results: dict[str, list[dict[str, Any]]] = {str(sized.contender): [] for sized in contenders}
    with bar(len(runs) * settings.steps, problem.name, show_progress) as advance:
        for run in runs:
            found = None if fresh else run.done
            if found is None or set(elsewhere) - set(found["elsewhere"]):
                found = _finished(run, problem, elsewhere, found, device, fresh, advance)
            else:
                advance(settings.steps)
            results[str(run.sized.contender)].append(found)
    limit = problem.solved if threshold is None else threshold
    entries = tuple(_entry(sized, results[str(sized.contender)], problem, limit, list(elsewhere)) for sized in contenders)
    found_all = Comparison(
        problem.to_dict(), problem.metric, problem.higher, problem.chance, problem.ceiling, limit, sizes, settings,
        tuple(range(seeds)), entries,
    )  # fmt: skip
    if home is not None:
        _write(home / SUMMARY, found_all.to_dict())
    return found_all


def _finished(
    run: _Run, problem: Problem, elsewhere: Mapping[str, Problem], known: dict[str, Any] | None, device: torch.device,
    fresh: bool, advance: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains what is not trained yet, judges it where it has not been judged, and writes that down."""
    model = run.sized.build(run.settings.seed)
    checkpoint = None if run.folder is None else run.folder / CHECKPOINT
    if known is None:
        if fresh and checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        trained = train(model, problem, run.settings, file=checkpoint, advance=advance)
        per_token, why = _cache(model, problem)
        known = {
            "headwise": __version__, "torch": torch.__version__, "mechanism": str(run.sized.contender), **problem.to_dict(),
            "sizes": asdict(run.sized.sizes), "hidden": run.sized.hidden, "parameters": run.sized.parameters,
            "settings": asdict(run.settings), **trained.to_dict(), "kv_bytes": per_token, "why_no_cache": why, "elsewhere": {},
        }  # fmt: skip
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            save_model(model, str(run.folder / WEIGHTS))
    else:
        assert run.folder is not None
        load_model(model, str(run.folder / WEIGHTS))
        model.to(device)
        advance(run.settings.steps)
    for name, other in elsewhere.items():
        if name not in known["elsewhere"]:
            known["elsewhere"][name] = _judged(model, other, run.settings)
    if run.folder is not None and checkpoint is not None:
        _write(run.folder / RUN, known)
        checkpoint.unlink(missing_ok=True)
    return known


def _judged(model: LanguageModel, problem: Problem, settings: Settings) -> dict[str, float] | str:
    try:
        return judge(model, problem, settings)
    except HeadwiseError as error:  # such as one whose places are learned, and end
        return str(error)


def _cache(model: LanguageModel, problem: Problem) -> tuple[float | None, str]:
    try:
        return kv_bytes(model, problem.context), ""
    except InputError as error:
        return None, str(error)


def _elsewhere(problem: Problem, options: Mapping[str, Any]) -> Problem:
    """The problem with other options, to be judged at."""
    given = {name: value for name, value in problem.to_dict().items() if name != "problem"}
    made = problem_of(problem.name, {**given, **options})
    if made.vocabulary > problem.vocabulary or made.metric != problem.metric:
        raise InputError(
            f"{_told(options)} makes {made.vocabulary} tokens of {problem.vocabulary}, and models know no others; judge at "
            "options that leave its tokens as they are, or train with these"
        )
    return made


def _timed(problem: Problem, sizes: Sizes, settings: Settings, minutes: float, home: Path | None, fresh: bool) -> int:
    """Steps that fit into some minutes, measured once: a later call in the same folder takes as many."""
    told = {**problem.to_dict(), **asdict(sizes), **asdict(replace(settings, steps=1)), "minutes": minutes}
    file = None if home is None else home / f"steps-{_hash(told)}.json"
    if file is not None and file.is_file() and not fresh:
        return int(json.loads(file.read_text(encoding="utf-8"))["steps"])
    model = equal(parse(["softmax"]), sizes)[0].build(0)
    steps = steps_in(minutes, model, problem, settings)
    if file is not None:
        _write(file, {**told, "steps": steps})
    return steps


def _folder(home: Path | None, problem: Problem, sized: Sized, settings: Settings, device: torch.device) -> Path | None:
    """A run's own folder: another one wherever anything is different that changes its numbers."""
    if home is None:
        return None
    told = {
        **problem.to_dict(), **asdict(sized.sizes), **asdict(settings), "mechanism": str(sized.contender), "hidden": sized.hidden,
        "device": device.type, "headwise": __version__, "torch": torch.__version__,
    }  # fmt: skip
    plain = re.sub(r"[^\w.=-]+", "-", str(sized.contender))[:48]
    return home / f"{plain}-seed{settings.seed}-{_hash(told)}"


def _hash(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _write(file: Path, told: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")
    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def _entry(sized: Sized, runs: list[dict[str, Any]], problem: Problem, limit: float, elsewhere: list[str]) -> Entry:
    metric = problem.metric
    curves = tuple(tuple((int(point["step"]), float(point[metric])) for point in run["curve"]) for run in runs)
    reached = (next((step for step, value in curve if problem.better(value, limit)), None) for curve in curves)
    places: dict[str, Spread | str] = {}
    for name in elsewhere:
        found = [run["elsewhere"][name] for run in runs]
        wrong = next((value for value in found if isinstance(value, str)), None)
        places[name] = Spread.of([value[metric] for value in found]) if wrong is None else wrong
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return Entry(
        mechanism=str(sized.contender), parameters=sized.parameters, hidden=sized.hidden,
        metric=Spread.of([run["metrics"][metric] for run in runs]), solved_after=tuple(reached),
        tokens_per_second=statistics.median(run["tokens_per_second"] for run in runs),
        kv_bytes=runs[0]["kv_bytes"], why_no_cache=runs[0]["why_no_cache"], peak_bytes=max(peaks, default=None),
        elsewhere=places, captured=all(run["captured"] for run in runs),
        why_not_captured=next((run["why"] for run in runs if run["why"]), ""), curves=curves,
    )  # fmt: skip


def _told(options: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())
