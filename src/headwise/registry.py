"""The inventory, read from the folders: a file's stem is its registered name. Lists and loads; never dispatches.

`names("probe")` lists without importing anything; `load("probe", "induction")` imports headwise/probes/induction.py and
returns its class `Induction`; `card("probe", "induction")` is that file's `CARD`. Files whose names start with an
underscore are not items.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from .card import Card
from .errors import RegistryError

# kind -> folders below headwise/. A file is one item; the class is its stem in CamelCase.
ROOMS = {
    "stage": ("stages",),
    "rule": ("caches/rules",),
    "cache": ("models/caches",),
    "mechanism": ("mechanisms/softmax", "mechanisms/heads", "mechanisms/cached", "mechanisms/linear"),
    "architecture": ("nn/architectures",),
    "probe": ("probes",),
    "recipe": ("plans/recipes",),
    "task": ("tasks",),
    "problem": ("training/problems",),
    "benchmark": ("benchmarks",),
}


def kinds() -> list[str]:
    """The kinds of things that the inventory holds."""
    return list(ROOMS)


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted; imports none of them."""
    return sorted(_found(kind))


def load(kind: str, name: str) -> Any:
    """The class or function registered under `name`.

    Raises: RegistryError with the names that exist, if there is none.
    """
    module = _module(kind, name)
    stem = module.__name__.rsplit(".", 1)[1]
    camel = "".join(part.capitalize() for part in stem.split("_"))
    both = (vars(module).get(name) for name in (camel, stem))
    found = next((item for item in both if getattr(item, "__module__", None) == module.__name__), None)  # not what it imports
    if found is None:
        raise RegistryError(f"{module.__name__} must define {camel} or {stem}, its registered name")
    return found


def card(kind: str, name: str) -> Card:
    """The card of an item: its paper, year, room, status and exemptions."""
    module = _module(kind, name)
    found = getattr(module, "CARD", None)
    if not isinstance(found, Card):
        raise RegistryError(f"{module.__name__} must define CARD, a headwise.card.Card")
    return found


def entries() -> list[dict[str, Any]]:
    """One row for each item: name, kind, room, paper, year, source, status and what it does. Imports all of them."""
    rows = []
    for kind in kinds():
        for name in names(kind):
            about = (load(kind, name).__doc__ or "").strip().splitlines()[0].rstrip(".")
            of = card(kind, name)
            rows.append(
                {
                    "name": name,
                    "kind": kind,
                    "room": of.room,
                    "paper": of.paper,
                    "year": of.year,
                    "status": of.status,
                    "source": of.source,
                    "about": about,
                }
            )
    return rows


def _module(kind: str, name: str) -> ModuleType:
    stem = name.replace("-", "_")
    if stem not in names(kind):
        raise RegistryError(f"there is no {kind} {name!r}; there are: {', '.join(names(kind))}")
    return importlib.import_module(f"headwise.{_found(kind)[stem].replace('/', '.')}.{stem}")


def _found(kind: str) -> dict[str, str]:
    """{name: its folder}, read from the folders."""
    if kind not in ROOMS:
        raise RegistryError(f"there is no kind {kind!r}; there are: {', '.join(ROOMS)}")
    home = Path(__file__).parent
    return {
        module.name: folder
        for folder in ROOMS[kind]
        for module in pkgutil.iter_modules([str(home / folder)])
        if not module.name.startswith("_")
    }
