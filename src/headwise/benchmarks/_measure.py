"""Clocks and memory for benchmarks: medians after a warm-up, peers that run out of memory, rows of a table."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ..version import __version__


@dataclass(frozen=True)
class Row:
    """One line: what ran, on what shape, how long, beside which peer; extra_mib: peak memory beyond what was there before.

    ratio: milliseconds over those of the first peer of the same measure; goal: what the ratio should be at most. figures: what
    is no time, by name.
    """

    measure: str
    what: str
    tokens: int
    milliseconds: float | None
    ratio: float | None = None
    goal: float | None = None
    extra_mib: float | None = None
    note: str = ""
    figures: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Table:
    """A benchmark's result, with where it was measured."""

    name: str
    machine: dict[str, Any]
    shapes: str
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"name": self.name, "machine": self.machine, "shapes": self.shapes, "rows": [asdict(row) for row in self.rows]}


def collected(name: str, device: torch.device, shapes: str, rows: Iterable[Row], report: Callable[[Row], None]) -> Table:
    """Measures row after row; `report` is given each when it is there."""
    found = []
    for row in rows:
        report(row)
        found.append(row)
    return Table(name, machine(device), shapes, tuple(found))


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found: dict[str, Any] = {"device": name}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    else:
        import triton

        found["triton"] = triton.__version__
    return found | {"torch": torch.__version__, "transformers": transformers.__version__, "headwise": __version__}


def milliseconds(run: Callable[[], Any], device: torch.device, seconds: float = 1.0, least: int = 3) -> float:
    """The median of repeated runs that fill about `seconds`, after one or two to warm up."""
    run()
    first = _once(run, device)
    repeats = max(least, min(50, int(seconds * 1000 / max(first, 1e-3))))
    return median(_once(run, device) for _ in range(repeats))


def _once(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def extra_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory during one run beyond what was there before, results included; None where the system does not tell.

    On a GPU what PyTorch allocated, on a CPU the resident memory of the process (Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        held = _resident("VmRSS")
        run()
        return max(0.0, _resident("VmHWM") - held)
    except OSError:
        return None


def _resident(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measured(
    measure: str, what: str, tokens: int, run: Callable[[], Any], device: torch.device, *, base: float | None = None,
    goal: float | None = None, note: str = "", seconds: float = 1.0,
) -> Row:  # fmt: skip
    """A row; one that runs out of memory says so."""
    try:
        took = milliseconds(run, device, seconds)
        extra = extra_mib(run, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Row(measure, what, tokens, None, note=f"out of memory{'; ' if note else ''}{note}")
    return Row(measure, what, tokens, took, None if base is None else took / base, goal, extra, note)
