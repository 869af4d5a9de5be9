"""Names for what heads do, from their tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..types import Heads, HeadTable


@dataclass(frozen=True)
class Role:
    """A role and the bound above which a head has it. color: of its cell in the head map."""

    name: str
    probe: str
    bound: float
    color: str
    about: str


# The first role that a head has is its main one: what is rarer and says more comes first.
ROLES = (
    Role("retrieval", "retrieval", 0.1, "#c2410c", "points at a fact while the model copies it"),
    Role("induction", "induction", 0.3, "#e08a8a", "looks after an earlier copy of the present token"),
    Role("previous token", "previous_token", 0.5, "#1d6fb8", "looks one token back"),
    Role("duplicate token", "duplicate_token", 0.3, "#7a4fb5", "looks at an earlier copy of the present token"),
    Role("sink", "sink_mass", 0.5, "#8a8f98", "rests on the first token"),
    Role("broad", "entropy", 4.0, "#c9a227", "spreads its weight over more than fifty tokens (exp of its entropy)"),
    Role("local", "local_mass", 0.9, "#3f9e6e", "reads the last few dozen tokens"),
)
NONE = Role("mixed", "", 0.0, "#d8d4c8", "none of these")


def roles_of(tables: Mapping[str, HeadTable], heads: Heads) -> dict[str, list[str]]:
    """{"L5H3": ["retrieval", "induction"]} for every head, its main role first; an empty list where it has none."""
    found: dict[str, list[str]] = {}
    for name, head in zip(heads.names(), heads.list(), strict=True):
        found[name] = [role.name for role in ROLES if role.probe in tables and float(tables[role.probe].values[head]) > role.bound]
    return found
