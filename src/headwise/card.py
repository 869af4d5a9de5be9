"""The card that every stage, probe, recipe, task and mechanism carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """Where an idea comes from and how faithful its implementation is.

    paper: the exact title. year: of first publication. room: its room in the catalogue (softmax, heads, probe, cache, ...).
    source: arXiv number or address. status: "exact" (equals the paper's formula), or what is approximated or left out.
    exempt: conformance checks that do not apply, each with its reason; an exemption is a strict expected failure, so it
    expires when the check begins to pass.
    """

    paper: str
    year: int
    room: str
    source: str
    status: str = "exact"
    exempt: Mapping[str, str] = field(default_factory=dict)
