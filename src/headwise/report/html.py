"""The report as one HTML file: no network, no library, all text escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from .. import registry
from ..errors import RegistryError
from ..models.subject import Subject
from .roles import NONE, ROLES

PAGE = Path(__file__).parent / "page"
METRICS = {  # what the plan's table shows: label, digits, and whether more is better
    "needle": ("exact needle recall", 2, True),
    "bits_per_byte": ("bits per byte", 4, False),
    "perplexity": ("perplexity", 2, False),
    "repeat_accuracy": ("repeat accuracy", 3, True),
    "recall_accuracy": ("associative recall", 3, True),
    "kv_bytes": ("key/value bytes", 0, False),
    "tokens_per_second": ("generated tokens a second", 0, True),
    "prompt_tokens_per_second": ("prompt tokens a second", 0, True),
}


def render(data: dict[str, Any], view: dict[str, Any], subject: Subject) -> str:
    """The page for what a scan found."""
    parameters = sum(p.numel() for p in subject.model.parameters())
    facts = {
        "class": type(subject.model).__name__,
        "parameters": f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} B",
        "context": f"{subject.max_length}" if subject.max_length < 1 << 30 else "",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": str(subject.device),
    }
    roles = [{"name": r.name, "color": r.color, "about": r.about, "probe": r.probe, "bound": r.bound} for r in (*ROLES, NONE)]
    page = {
        **{key: data[key] for key in ("model", "stack", "num_layers", "num_heads", "num_key_value_heads", "probes", "units")},
        **{key: data[key] for key in ("roles", "findings", "plan", "causality", "pruning", "skipped", "stacks")},
        "probe_notes": {name: _note(name) for name in data["probes"]},
        "role_names": roles,
        "metrics": {name: {"label": label, "digits": digits, "more": more} for name, (label, digits, more) in METRICS.items()},
        "view": view,
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html").render(
        data=data,
        facts=facts,
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=(PAGE / "report.js").read_text(encoding="utf-8"),
        embedded=_embed(page),
    )


def _note(name: str) -> dict[str, Any]:
    """What a probe measures and where it comes from; empty for a user's own."""
    try:
        card = registry.card("probe", name)
        about = (registry.load("probe", name).__doc__ or "").strip().splitlines()[0]
    except RegistryError:
        return {"about": "", "paper": "", "year": None, "status": ""}
    return {"about": about, "paper": card.paper, "year": card.year, "status": card.status}


def _embed(value: Any) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
