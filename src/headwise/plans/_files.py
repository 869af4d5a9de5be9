"""Plans on disk: plan.json and plan.safetensors. Stages are named by the inventory, so reading a plan runs no foreign code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import transformers
from torch import Tensor

from .. import registry
from ..attention.mask import And, Not, Or
from ..attention.stage import Stage
from ..errors import HeadwiseError, PlanError
from ..types import Heads
from ..version import __version__

if TYPE_CHECKING:
    from .plan import Plan

FORMAT = 1
KINDS = {"stage": "headwise.stages.", "rule": "headwise.caches.rules."}
COMBINED: dict[str, type[Stage]] = {"and": And, "or": Or, "not": Not}


def save(plan: Plan, folder: Path) -> Path:
    """Writes a plan into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    entries = []
    for number, entry in enumerate(plan.entries):
        stage = _encode(entry.stage, f"entries.{number}", tensors)
        entries.append({"stack": entry.heads.stack, "heads": entry.heads.list(), "stage": stage})
    data = {
        "format": FORMAT,
        "headwise": __version__,
        "transformers": transformers.__version__,
        "model": plan.model,
        "geometry": {name: dict(geometry) for name, geometry in plan.geometry.items()},
        "entries": entries,
        "about": dict(plan.about),
    }
    (folder / "plan.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    place = folder / "plan.safetensors"
    if tensors:
        safetensors.torch.save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, place)
    else:
        place.unlink(missing_ok=True)
    return folder


def read(source: str | Path, revision: str | None) -> tuple[dict[str, Any], list[tuple[Heads, Stage]], str, dict[str, Any]]:
    """(geometry, entries, model, about) of a plan folder."""
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source), revision)
    file = folder / "plan.json"
    if not file.is_file():
        raise PlanError(f"{folder} is no plan: it holds no plan.json. Give a folder written by save_pretrained or `headwise plan`")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise PlanError(f"{file} has format {data['format']}, this version of headwise reads {FORMAT}")
        tensors = safetensors.torch.load_file(folder / "plan.safetensors") if (folder / "plan.safetensors").exists() else {}
        entries = []
        for entry in data["entries"]:
            own = data["geometry"][entry["stack"]]
            heads = Heads.of([tuple(h) for h in entry["heads"]], (own["layers"], max(own["heads"])), entry["stack"])
            entries.append((heads, _decode(entry["stage"], tensors)))
        return data["geometry"], entries, data.get("model", ""), data.get("about", {})
    except HeadwiseError:
        raise
    except Exception as error:  # whatever is wrong inside the file, the user needs to know just which file
        raise PlanError(f"{file} cannot be read as a plan: {type(error).__name__}: {error}") from error


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["plan.json", "plan.safetensors"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanError(f"there is no plan {repository!r}, neither a folder nor on the hub: {reason}") from error


def _encode(stage: Stage, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = {kind: name for name, kind in COMBINED.items()}
    name = names.get(type(stage))
    if name is None:
        module = type(stage).__module__
        name = module.rsplit(".", 1)[-1]
        if not any(module.startswith(place) and registry.load(kind, name) is type(stage) for kind, place in KINDS.items()):
            raise PlanError(
                f"{type(stage).__name__} is not in headwise's inventory of stages, so a saved plan could not find it again"
            )
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(stage):  # type: ignore[arg-type]
        value = getattr(stage, item.name)
        fields[item.name] = _encode_value(value, f"{key}.{item.name}", tensors)
    return {"name": name, "fields": fields}


def _encode_value(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Stage):
        return {"stage": _encode(value, key, tensors)}
    if isinstance(value, tuple):
        return [_encode_value(item, f"{key}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _decode(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stage:
    known = next((kind for kind in KINDS if data["name"] in registry.names(kind)), "stage")
    kind = COMBINED.get(data["name"]) or registry.load(known, data["name"])
    return kind(**{name: _decode_value(value, tensors) for name, value in data["fields"].items()})


def _decode_value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, Mapping) and "stage" in value:
        return _decode(value["stage"], tensors)
    if isinstance(value, list):
        return tuple(_decode_value(item, tensors) for item in value)
    return value
