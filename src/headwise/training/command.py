"""The command `headwise train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Column, Table

from ..errors import InputError


def train_command(
    task: Annotated[str, typer.Argument(help="A problem, such as associative_recall; see `headwise list --kind problem`.")],
    mechanism: Annotated[
        list[str] | None,
        typer.Option(
            help="What to train: mechanisms or architectures, with commas or given again; options as name:option=value. "
            "Default: softmax, which is plain attention.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; mean and spread are over them.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 600,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Minutes of a run of plain attention, instead of steps; all get as many steps.", show_default=False),
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of a layer.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 32,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the problem, such as pairs=16.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file, for problems that read one. Default: embedded text.", show_default=False)
    ] = None,
    evaluate_at: Annotated[
        list[str] | None,
        typer.Option(help="Options to be judged at besides, such as length=256, or two with a comma.", show_default=False),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="The metric whose first reaching is told. Default: the problem's own.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of runs, comparison.json and curves.svg. Default: train/TASK.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Train again what is there already.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16, of products. Default: bfloat16 on a GPU, else float32.", show_default=False),
    ] = None,
    capture: Annotated[bool, typer.Option(help="Record steps as a CUDA graph where that can be.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Trains small models of equal parameters on a problem, and says what each mechanism buys."""
    from .comparison import compare, problem_of
    from .plot import plot, plot_memory
    from .trainer import Settings

    options = dict(_pair(given, "--set") for given in set_ or [])
    if text is not None:
        options["text"] = str(text)
    problem = problem_of(task, options)
    places = [dict(_pair(pair, "--evaluate-at") for pair in given.split(",")) for given in evaluate_at or []]
    settings = Settings(steps=steps, batch=batch, lr=lr, device=device, dtype=dtype, capture=capture)
    folder = Path("train") / problem.name if out is None else out
    sys.path.insert(0, "")  # so that module:object finds a file beside the user
    try:
        found = compare(
            problem, mechanism or ["softmax"], seeds=seeds, width=width, layers=layers, heads=heads, settings=settings,
            minutes=minutes, evaluate_at=places, threshold=threshold, out=folder, fresh=fresh, show_progress=not quiet,
        )  # fmt: skip
    except KeyboardInterrupt:
        how = "the same command without --fresh" if fresh else "the same command"
        print(f"headwise: interrupted; what was finished is in {folder}, and {how} goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    picture = memory = None
    try:
        picture = plot(found, folder / "curves.svg")
        note = f"The curves: {picture.resolve()}"
        if sum(entry.kv_bytes is not None for entry in found.entries) > 1:
            memory = plot_memory(found, folder / "memory.svg")
            note += f"\nThe metric against the bytes of caches: {memory.resolve()}"
    except InputError as error:
        note = f"No picture: {error}"
    if json_:
        pictures = {"picture": picture, "memory_picture": memory}
        print(json.dumps({**found.to_dict(), **{k: v if v is None else str(v) for k, v in pictures.items()}}, indent=1))
        return
    _print(found, note)


def _print(found: Any, note: str) -> None:
    from .plot import about

    console = Console()
    several = len(found.seeds) > 1
    points = found.settings.every
    limit = f"{found.threshold:.3g}"
    places = list(dict.fromkeys(name for entry in found.entries for name in entry.elsewhere))
    with_peaks = any(entry.peak_bytes is not None for entry in found.entries)
    table = Table(
        Column("mechanism", overflow="fold"), found.metric.replace("_", " "), f"steps to {limit}", *places, "parameters",
        "KV bytes / token", "tokens / s",
        *(["peak MiB"] if with_peaks else []),
    )  # fmt: skip
    for entry in found.entries:
        elsewhere = [entry.elsewhere[name] for name in places]
        table.add_row(
            _escape(entry.mechanism),
            about(entry.metric),
            _reached(entry.solved_after),
            *("-" if isinstance(spread, str) else about(spread) for spread in elsewhere),
            f"{entry.parameters:,}",
            "-" if entry.kv_bytes is None else f"{entry.kv_bytes:,.0f}",
            f"{entry.tokens_per_second:,.0f}",
            *([f"{(entry.peak_bytes or 0) / 2**20:,.0f}"] if with_peaks else []),
        )
    console.print(table)
    seeds = f"mean ± deviation of {len(found.seeds)} seeds" if several else "one seed"
    ceiling = "" if found.ceiling is None else f", ceiling {found.ceiling:g}"
    console.print(
        f"{found.problem['problem']}: chance {found.chance:.3f}{ceiling}; {seeds}, {found.settings.steps:,} steps of "
        f"{found.settings.batch} rows, judged every {points}.",
        highlight=False,
    )
    for entry in found.entries:
        for name, told in entry.elsewhere.items():
            if isinstance(told, str):
                console.print(f"[dim]{_escape(entry.mechanism)} was not judged at {name}: {_escape(told)}[/dim]", highlight=False)
        if entry.why_no_cache:
            why = f"[dim]{_escape(entry.mechanism)} has no cache to count: {_escape(entry.why_no_cache)}[/dim]"
            console.print(why, highlight=False)
        if entry.why_not_captured and with_peaks:
            why = f"[dim]{_escape(entry.mechanism)} ran without a CUDA graph: {_escape(entry.why_not_captured)}[/dim]"
            console.print(why, highlight=False)
    console.print(note, highlight=False, soft_wrap=True, markup=False)


def _reached(steps: Sequence[int | None]) -> str:
    there = [step for step in steps if step is not None]
    if not there:
        return "never"
    mean = f"{sum(there) / len(there):,.0f}"
    return mean if len(there) == len(steps) else f"{mean} ({len(there)} of {len(steps)} seeds)"


def _pair(given: str, option: str) -> tuple[str, Any]:
    from .sizing import value_of

    name, equals, value = given.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{option} {given}: write field=value")
    return name.strip(), value_of(value)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
