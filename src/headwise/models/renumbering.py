"""Heads whose sinks move along behind their window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..caches import Keep
from ..caches.rule import Rotary
from ..caches.rules.renumbered import Renumbered
from .call import Reading
from .layout import Site
from .program import Program


def renumbers(program: Program) -> bool:
    """Whether some heads' positions are those in the cache."""
    return any(isinstance(rule, Renumbered) for _, rule in program.rules)


def renumbered(readings: Sequence[Reading], site: Site, program: Program, rotary: Rotary | None) -> tuple[Reading, ...]:
    """The readings, of which those of heads with the rule see their sinks as near as they are in the cache."""
    asked = {kv for own, rule in program.rules if isinstance(rule, Renumbered) for kv in own}
    found = []
    for reading in readings:
        group = next(group for group in program.groups if reading.heads[0] in group.heads)
        keep = Keep.of(group.mask) if reading.heads[0] // site.groups in asked else None
        found.append(reading if keep is None or rotary is None else _moved(reading, keep, rotary))
    return tuple(found)


def _moved(reading: Reading, keep: Keep, rotary: Rotary) -> Reading:
    """Sinks read by queries that are turned back by as many places as are evicted; a distance is all that scores depend on.

    Queries and keys are twice as long then: the first half is for window keys, whose second half is 0, the other for sinks.
    """
    n, m = reading.q.shape[2], reading.k.shape[2]
    device = reading.q.device
    queries = torch.arange(m - n, m, device=device) if reading.query_positions is None else reading.query_positions
    keys = torch.arange(m, device=device) if reading.key_positions is None else reading.key_positions
    evicted = (torch.atleast_2d(queries) + 1 - keep.sink - keep.recent).clamp(min=0)
    if not evicted.any():
        return reading
    places = torch.atleast_2d(queries).clamp(min=0)
    moved = _turned(reading.q, places, places - evicted, rotary)
    sink = (torch.atleast_2d(keys) < keep.sink)[:, None, :, None]  # empty slots are masked anyway
    q = torch.cat([reading.q, moved], -1)
    k = torch.cat([reading.k.masked_fill(sink, 0.0), reading.k.masked_fill(~sink, 0.0)], -1)
    return Reading(reading.heads, q, k, reading.v, reading.stages, reading.scale, torch.atleast_2d(queries), torch.atleast_2d(keys))


def _turned(x: Tensor, old: Tensor, new: Tensor, rotary: Rotary) -> Tensor:
    """x (b, h, n, d), turned at positions `old` (1 or b, n), as it would be at `new`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotary.turned(rotary.turned_back(wide, old), new).to(x.dtype)
