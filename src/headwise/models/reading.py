"""From one attention call and a program to readings: for each group of heads, the keys it sees and the stages it reads with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.mask import Mask
from ..attention.stage import Stage
from ..caches import Keep, View
from .call import Reading
from .layout import Site
from .masks import DenseMask
from .program import Group, Program
from .sharing import SplitReading


def make_readings(
    site: Site, program: Program, q: Tensor, views: Sequence[View], own: Sequence[Stage], visible: Tensor | None,
    scale: float, total: int, pads: Sequence[int] | None,
) -> tuple[Reading, ...]:  # fmt: skip
    """A reading for each group of heads that read alike from the same view.

    Args:
        own: the model's own stages. visible: its boolean mask, (b or 1, h or 1, n, total), or None.
        total: tokens so far, of which queries are the last. pads: left padding of each row, or None.
    """
    n, ratio = q.shape[2], site.heads // sum(len(view.heads) for view in views)
    readings = []
    parts = [part for view in views for part in view.split()]
    for group in program.groups:
        for view in parts:
            heads = tuple(head for head in group.heads if head // ratio in view.heads)
            if not heads:
                continue
            stages = [*(stage.select(heads) for stage in own), *_group_stages(group, heads, view, n, visible, pads)]
            if visible is not None:
                stages.append(DenseMask(_columns(visible, view)).select(heads))
            k, v = _keys_of(view, heads, ratio)
            positions = _positions(view, n, total, pads, q.device)
            own_q = q if len(heads) == site.heads else q[:, list(heads)]
            reading = Reading(heads, own_q, k, v, tuple(stages), scale, *positions)
            if view.far is not None:
                reading = SplitReading.of(reading, _keys_of(replace(view, k=view.far), heads, ratio)[0], view.near)
            readings.append(reading)
    return tuple(readings)


def _group_stages(
    group: Group, heads: tuple[int, ...], view: View, n: int, visible: Tensor | None, pads: Sequence[int] | None
) -> tuple[Stage, ...]:
    """The group's stages for some of its heads; without its masks where the store holds just what they show."""
    stages = group.stages
    if heads != group.heads:
        places = [group.heads.index(head) for head in heads]
        stages = tuple(stage.select(places) for stage in stages)
    if view.exact and n == 1 and pads is None and Keep.of(group.mask) == view.keep:
        stages = tuple(stage for stage in stages if not isinstance(stage, Mask))
    return stages


def _columns(visible: Tensor, view: View) -> Tensor:
    """The columns of the model's mask that belong to a view's slots."""
    if view.ordered:
        return visible[..., : view.k.shape[2]]
    number = view.number.clamp(min=0)
    if number.shape[0] == 1:
        return visible[..., number[0]]
    index = number[:, None, None, :].expand(-1, *visible.shape[1:3], -1)
    return visible.expand(number.shape[0], -1, -1, -1).gather(-1, index)


def _keys_of(view: View, heads: tuple[int, ...], ratio: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some query heads: whole groups stay grouped, broken ones are repeated."""
    own = sorted({head // ratio for head in heads})
    if len(heads) == len(own) * ratio:
        if tuple(own) == view.heads:
            return view.k, view.v
        places = [view.heads.index(kv) for kv in own]
    else:
        places = [view.heads.index(head // ratio) for head in heads]
    return view.k[:, places], view.v[:, places]


def _positions(
    view: View, n: int, total: int, pads: Sequence[int] | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of queries and slots within their rows; None where queries are the last of keys 0..m-1."""
    if view.ordered and pads is None:
        return None, None
    queries = torch.arange(total - n, total, device=device)[None]
    keys = view.number
    if pads is not None:
        shift = torch.tensor(pads, device=device)[:, None]
        queries, keys = queries - shift, torch.where(keys >= 0, keys - shift, -1)
    return queries, keys
