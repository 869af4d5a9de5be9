"""The main job: every probe on a model, what the heads are for, which of them matter, and a plan with its measured cost."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..models.subject import Subject, as_subject
from ..plans import Plan
from ..plans.recipes.duo import duo
from ..probes import Measurement, Probe, measure
from ..probes._material import Material
from ..probes._probe import CallProbe
from ..tasks import Evaluation, evaluate
from ..types import HeadTable
from ..version import __version__
from . import experiments, findings
from .html import render
from .roles import roles_of
from .viewer import capture_view

Parts = Callable[[str, Callable[[], Any]], Any]  # (key, make) -> JSON-able: what was made before, or is made now and kept


@dataclass(eq=False)
class Scan:
    """What a scan found. `save(folder)` writes report.html, heads.json and plan/."""

    subject: Subject
    measurement: Measurement
    roles: dict[str, list[str]]
    findings: list[findings.Finding]
    plan: Plan | None
    evaluation: Evaluation | None
    causality: experiments.Causality | None
    curve: experiments.PruningCurve | None
    view: dict[str, Any]
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, HeadTable]:
        """The main stack's tables, by probe."""
        return self.measurement.of(self.measurement.main)

    def to_dict(self) -> dict[str, Any]:
        """What heads.json holds: the main stack at the top, the others below "stacks"."""
        stack = self.subject.main
        others = {
            name: {
                "num_layers": s.shape[0],
                "num_heads": s.shape[1],
                "probes": {n: t.rows() for n, t in self.measurement.of(name).items()},
            }
            for name, s in self.subject.layout.stacks.items()
            if name != stack.name
        }
        plan = None
        if self.plan is not None and self.evaluation is not None:
            plan = {"folder": "plan", **self.plan.about, "without": self.evaluation.without, "with": self.evaluation.under_plan}
        return {
            "model": self.subject.name,
            "headwise": __version__,
            "stack": stack.name,
            "num_layers": stack.shape[0],
            "num_heads": stack.shape[1],
            "num_key_value_heads": stack.sites[0].key_value_heads,
            "probes": {name: table.rows() for name, table in self.tables.items()},
            "units": {name: table.unit for name, table in self.tables.items()},
            "about": {name: dict(table.about) for name, table in self.tables.items() if table.about},
            "roles": self.roles,
            "findings": self.findings,
            "plan": plan,
            "causality": self.causality.to_dict() if self.causality else None,
            "pruning": self.curve.to_dict() if self.curve else None,
            "skipped": [{"probe": name, "stack": stack, "why": why} for (name, stack), why in self.measurement.skipped.items()],
            "stacks": others,
            "seconds": round(self.seconds, 1),
            **self.notes,
        }

    def html(self) -> str:
        """The report as one self-contained page."""
        return render(self.to_dict(), self.view, self.subject)

    def save(self, folder: str | Path) -> Path:
        """Writes report.html, heads.json and, if there is a plan, plan/. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "heads.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(self.html(), encoding="utf-8")
        if self.plan is not None:
            self.plan.save_pretrained(folder / "plan")
        return folder


def scan(
    model: Any = None,
    out: str | Path | None = None,
    *,
    probes: Iterable[str | Probe] | None = None,
    text: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    seed: int = 0,
    draws: int = 20,
    length: int | None = None,
    quick: bool = False,
    show_progress: bool = True,
) -> Scan:
    """Measures every head of a model and, for a language model, what its heads cause and what a plan would free.

    Args:
        model: a transformers model, a Subject, a path or hub id; None is the embedded model.
        out: a folder to save to. What is finished is kept there as the scan goes; if it is interrupted, the same call goes on.
        probes: names or Probe objects; None for all. text: what to read; inputs: instead, a dict for the model's forward.
        draws: random controls for the retrieval heads. quick: probes and viewer only.
        length: tokens of a row of running text for the probes that read it (512 unless said), up to the model's context.

    Raises: UnsupportedModelError, ModelLoadError, InputError: each names what is wrong and what to do.
    """
    started = time.perf_counter()
    subject = as_subject(model, tokenizer)
    if length is not None:
        subject.check_length(length)
    if text is not None:
        subject.encode(text)  # an empty or unreadable text is an error now, not after minutes
    chosen = [
        p if isinstance(p, Probe) else registry.load("probe", p)() for p in (registry.names("probe") if probes is None else probes)
    ]
    folder = None if out is None else Path(out)
    parts = _parts(folder, _fingerprint(subject, chosen, text, inputs, seed, draws, length))
    material = Material(subject, text, inputs, seed, tokens=length)
    measurement = _measure(subject, chosen, material, parts, show_progress)
    tables = measurement.of(measurement.main)
    heads = subject.main.exists()
    found = findings.role_findings(tables)
    result = Scan(
        subject, measurement, roles_of(tables, heads), found, None, None, None, None,
        capture_view(subject), 0.0,
    )  # fmt: skip
    if subject.is_language_model and not quick and "retrieval" in tables and "duo_gate" in tables:
        _experiments(result, tables, text, seed, draws, parts, show_progress)
    elif "retrieval" in tables:
        found.insert(0, findings.retrieval_finding(tables["retrieval"], None))
    if "gate_importance" in tables and "ablation_importance" in tables:
        found.append(findings.agreement_finding(tables["gate_importance"], tables["ablation_importance"]))
    if "massive_activations" in tables:
        found.append(findings.massive_finding(tables["massive_activations"]))
    result.seconds = time.perf_counter() - started
    if folder is not None:
        result.save(folder)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    return result


def _measure(subject: Subject, chosen: list[Probe], material: Material, parts: Parts, show_progress: bool) -> Measurement:
    """All probes; those that share forward passes in one part, the others each in one."""
    groups: dict[Any, list[Probe]] = {}
    for probe in chosen:
        groups.setdefault(probe.request() if isinstance(probe, CallProbe) else probe, []).append(probe)
    tables: dict[tuple[str, str], HeadTable] = {}
    skipped: dict[tuple[str, str], str] = {}
    for group in groups.values():

        def make(group: list[Probe] = group) -> dict[str, Any]:
            measured = measure(subject, group, material=material, show_progress=show_progress)
            return {
                "tables": [[probe, stack, table.to_dict()] for (probe, stack), table in measured.tables.items()],
                "skipped": [[probe, stack, why] for (probe, stack), why in measured.skipped.items()],
            }

        data = parts("probes." + ".".join(probe.name for probe in group), make)
        tables |= {(probe, stack): HeadTable.from_dict(table) for probe, stack, table in data["tables"]}
        skipped |= {(probe, stack): why for probe, stack, why in data["skipped"]}
    order = [probe.name for probe in chosen]
    tables = dict(sorted(tables.items(), key=lambda item: order.index(item[0][0])))
    return Measurement(subject.main.name, tables, skipped)


def _experiments(
    result: Scan, tables: Mapping[str, HeadTable], text: str | None, seed: int, draws: int, parts: Parts, show_progress: bool
) -> None:
    """What retrieval heads cause, how many heads can go, and the recommended plan with its measured cost."""
    subject, found = result.subject, result.findings
    retrieval = tables["retrieval"] > 0.1
    if 0 < retrieval.count() < subject.main.exists().count():
        made = parts(
            "causality",
            lambda: experiments.retrieval_causality(
                subject, retrieval, draws=draws, text=text, seed=seed, show_progress=show_progress
            ).to_dict(),
        )
        result.causality = experiments.Causality(tuple(made["heads"]), made["base"], made["closed"], tuple(made["random"]))
    found.insert(0, findings.retrieval_finding(tables["retrieval"], result.causality))
    context = subject.max_length
    plan = duo(
        subject, tables["duo_gate"], sink=min(64, max(4, context // 32)), recent=min(256, max(8, context // 8)), show_progress=False
    )
    made = parts("plan", lambda: evaluate(subject, plan, text=text, show_progress=show_progress).to_dict())
    result.plan, result.evaluation = plan, Evaluation(subject.name, made["without"], made["with"], made["skipped"])
    random = []
    if made["without"].get("needle", 0.0) > 0.5:
        random = parts("random", lambda: experiments.random_duo(subject, plan, text=text, seed=seed, show_progress=show_progress))
    result.notes["random_plan_needle"] = random
    full = list(plan.about["full"])
    found.insert(1, findings.plan_finding("duo", made["without"], made["with"], full, subject.main.exists().count(), random))
    if "ablation_importance" in tables:
        made = parts(
            "pruning",
            lambda: experiments.pruning_curve(
                subject, tables["ablation_importance"], text=text, seed=seed, show_progress=show_progress
            ).to_dict(),
        )
        result.curve = experiments.PruningCurve(
            made["by"], tuple(made["counts"]), tuple(made["greedy"]), tuple(map(tuple, made["random"]))
        )
        unit = "the text's bits per byte" if subject.tokenizer is not None else "the loss"
        found.insert(2, findings.pruning_finding(result.curve, unit))


def _fingerprint(
    subject: Subject,
    probes: list[Probe],
    text: str | None,
    inputs: Mapping[str, Any] | None,
    seed: int,
    draws: int,
    length: int | None,
) -> str:
    """Tells scans apart whose parts must not be mixed."""
    weights = [float(p.detach().float().sum()) for p in list(subject.model.parameters())[:4]]
    count = sum(p.numel() for p in subject.model.parameters())
    shapes = {k: (tuple(v.shape), float(v.float().sum())) for k, v in (inputs or {}).items() if isinstance(v, torch.Tensor)}
    geometry = {name: stack.geometry() for name, stack in subject.layout.stacks.items()}
    what = [
        __version__,
        subject.name,
        geometry,
        weights,
        count,
        str(subject.model.dtype),
        [repr(p) for p in probes],
        text,
        shapes,
        seed,
        draws,
        length,
    ]
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


def _parts(folder: Path | None, fingerprint: str) -> Parts:
    """Keeps finished parts in folder/parts, and finds them again if they are of the same scan."""
    if folder is None:
        return lambda key, make: make()
    place = folder / "parts"

    def part(key: str, make: Callable[[], Any]) -> Any:
        file = place / f"{hashlib.sha256(f'{fingerprint}.{key}'.encode()).hexdigest()[:16]}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        made = make()
        place.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(made), encoding="utf-8")
        unfinished.replace(file)
        return json.loads(file.read_text(encoding="utf-8"))

    return part
