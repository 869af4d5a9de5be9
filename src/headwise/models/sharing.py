"""Heads that read what another layer reads: what is kept of a forward pass for them, and how they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import attend
from ..attention.mask import Mask
from ..attention.stage import Normalizer, Places, RowScore, Stage, Weights
from ..caches import Codec, Keep, View
from ..caches.rules.shared import Shared
from ..caches.rules.shared_keys import SharedKeys
from ..caches.sharing import Sharing
from ..errors import GeometryError, PlanError, UnsupportedModelError
from ..stages.sink import Sink
from ..stages.sink_logit import SinkLogit
from ..stages.window import Window
from .call import Reading
from .layout import Site
from .masks import DenseBias, DenseMask
from .program import Program


class SharedReads:
    """What later layers read of earlier ones, in one forward pass.

    views: by layer of the main stack, with a per-head cache.
    """

    def __init__(self) -> None:
        self.views: dict[int, list[View]] = {}
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}  # (stack, layer) -> keys and values, without such a cache

    def forget(self) -> None:
        """At the end of the pass."""
        self.views.clear()
        self._kept.clear()

    def given(self, site: Site, program: Program, k: Tensor, v: Tensor, source: bool) -> tuple[Tensor, Tensor]:
        """The keys and values that a call without a per-head cache reads; kept if it is a source of others."""
        for heads, rule in program.rules:
            if isinstance(rule, Shared):
                other_k, other_v = self._of(site, rule, k, v)
                columns = _columns(site, heads, k)
                if len(columns) == k.shape[1]:
                    k, v = other_k, other_v
                else:
                    k, v = k.clone(), v.clone()
                    k[:, columns], v[:, columns] = other_k[:, columns], other_v[:, columns]
        if source:
            self._kept[site.stack, site.layer] = k, v
        return k, v

    def _of(self, site: Site, rule: Sharing, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = self._kept.get((site.stack, rule.layer))
        if found is None or (found[0].shape, found[1].shape) != (k.shape, v.shape):
            raise UnsupportedModelError(
                f"{site.path} is to read what layer {rule.layer} of {site.stack} reads, which "
                f"{'was not called before it' if found is None else 'has other sizes in this call'}; leave this layer out"
            )
        return found

    def split(self, program: Program, view: View, site: Site) -> list[View]:
        """Without a per-head cache: a view for all heads, or apart for those that share keys."""
        rules = [(heads, rule) for heads, rule in program.rules if isinstance(rule, SharedKeys)]
        views, rest = [], set(view.heads)
        for heads, rule in rules:
            columns = _columns(site, heads, view.k)
            far = self._of(site, rule, view.k, view.v)[0]
            rest -= set(columns)
            views.append(
                replace(view, heads=tuple(columns), k=view.k[:, columns], v=view.v[:, columns], far=far[:, columns], near=rule)
            )
        if len(rest) == len(view.heads):
            return [view]
        columns = sorted(rest)
        return views + ([replace(view, heads=tuple(columns), k=view.k[:, columns], v=view.v[:, columns])] if columns else [])

    def note(self, site: Site, program: Program, views: Sequence[View]) -> None:
        """Keeps the views of a layer that is a source; as copies, if its store may change them before they are read."""
        moves = any(not isinstance(rule, Codec | Sharing) for _, rule in program.rules)
        self.views[site.layer] = [replace(view, k=view.k.clone(), v=view.v.clone()) if moves else view for view in views]


def _columns(site: Site, heads: Sequence[int], k: Tensor) -> list[int]:
    """Where key/value heads are in keys that a model may have repeated already."""
    times = k.shape[1] // site.key_value_heads
    return [column for head in heads for column in range(head * times, (head + 1) * times)]


def check_sharing(site: Site, program: Program, sites: Sequence[Site], program_of: Callable[[Site], Program]) -> None:
    """Raises: PlanError if a layer is to read one that does not come before it, or holds too little; GeometryError if its heads
    are not as large."""
    for heads, rule in program.rules:
        if not isinstance(rule, Sharing):
            continue
        if rule.layer >= site.layer:
            raise PlanError(f"layer {site.layer} cannot read layer {rule.layer}: heads share with a layer before their own")
        other = next(s for s in sites if s.layer == rule.layer)
        own, theirs = ((s.heads, s.key_value_heads, s.head_dim) for s in (site, other))
        if own[1:] != theirs[1:] or site.latent or other.latent:
            raise GeometryError(
                f"layer {site.layer} has {own[1]} key/value heads of size {own[2]}, layer {rule.layer} has {theirs[1]} of size "
                f"{theirs[2]}; heads share with a layer of the same"
            )
        theirs_too = program_of(other)
        for others, there in theirs_too.rules:
            fits = isinstance(there, Shared | Codec) or (isinstance(rule, Shared) and not isinstance(there, SharedKeys))
            if set(heads) & set(others) and not fits:
                raise PlanError(
                    f"layer {site.layer} is to read layer {rule.layer} by {type(rule).__name__}, whose heads have "
                    f"{type(there).__name__} themselves; share with a layer that holds all tokens and keys"
                )
        masked = {head // other.groups for group in theirs_too.groups if group.mask is not None for head in group.heads}
        if isinstance(rule, SharedKeys) and masked & set(heads):
            raise PlanError(f"layer {site.layer} is to read keys of layer {rule.layer}, which masks them; leave one of them out")


def check_keeps(
    site: Site, program: Program, keeps: Sequence[Keep | None], before: Mapping[int, Sequence[Keep | None]], window: int | None
) -> None:
    """Raises: PlanError if, with a per-head cache, heads would read less of another layer than their masks show."""
    for heads, rule in program.rules:
        if not isinstance(rule, Sharing):
            continue
        theirs = before.get(rule.layer)
        if theirs is None or any(theirs[head] not in (None, keeps[head]) for head in heads):
            raise PlanError(
                f"layer {site.layer} reads more tokens than layer {rule.layer} keeps, which it shares with; share between layers "
                "of the same window"
            )
        if isinstance(rule, SharedKeys) and (window is not None or any(theirs[head] is not None for head in heads)):
            raise PlanError(f"layer {site.layer} or layer {rule.layer} has a window of its own; SharedKeys is for layers without")


@dataclass(frozen=True)
class _Halves(Mask):
    """Of keys that are there twice, own ones and then others: the own ones that are near, the others that are not."""

    near: Mask
    size: int

    def visible(self, places: Places) -> Tensor:
        return self.near.visible(places) == (places.column < self.size)


@dataclass(frozen=True, eq=False)
class SplitReading(Reading):
    """Heads that read near tokens by keys k and all others by keys `far`, (b, kv, m, d).

    It is run as two reads, put together by their log-normalizers; as one read it has both keys of each token, m of each kind.
    """

    far: Tensor | None = None
    near: Mask | None = None
    skip: float | None = None

    @staticmethod
    def of(reading: Reading, far: Tensor, rule: SharedKeys) -> SplitReading:
        """What heads with this rule read.

        Raises: PlanError for stages that look at a whole row.
        """
        for stage in reading.stages:
            if isinstance(stage, RowScore | Weights):
                raise PlanError(
                    f"{type(stage).__name__} looks at a whole row, which SharedKeys splits in two; leave one of them out"
                )
        near = Window(rule.recent) | Sink(rule.sink) if rule.sink else Window(rule.recent)
        fields = (reading.heads, reading.q, reading.k, reading.v, reading.stages, reading.scale)
        return SplitReading(*fields, reading.query_positions, reading.key_positions, far, near, rule.skip)

    def run(self, backend: str | None = None) -> Tensor:
        """(b, len(heads), n, dv)."""
        assert self.far is not None
        assert self.near is not None
        others = [stage for stage in self.stages if isinstance(stage, Normalizer) and not isinstance(stage, SinkLogit)]
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v, self.far))
        if (others or learning) and self.skip is None:
            return self.joined().run(backend)
        if others:
            raise PlanError(
                f"{type(others[0]).__name__} has no share of near tokens that `skip` could ask for; leave one of them out"
            )
        distant = tuple(stage for stage in self.stages if not isinstance(stage, SinkLogit))  # a sink counts once
        own, own_log = self._part(self.k, (*self.stages, self.near), backend)
        other, other_log = self._part(self.far, (*distant, ~self.near), backend)
        total = torch.logaddexp(own_log, other_log)
        share = torch.exp(own_log - total.masked_fill(total.isinf(), 0.0))[..., None]
        if self.skip is not None:
            share = torch.where(share > self.skip, 1.0, share)
        return (share * own + (1 - share) * other).to(own.dtype)

    def _part(self, k: Tensor, stages: Sequence[Stage], backend: str | None) -> tuple[Tensor, Tensor]:
        """Output and log-normalizer (b, heads, n) of one of the reads."""
        out, found = attend(
            self.q, k, self.v, *stages, statistics=("log_sum_exp",), scale=self.scale, backend=backend,
            query_positions=self.query_positions, key_positions=self.key_positions,
        )  # fmt: skip
        return out, found["log_sum_exp"]

    def joined(self) -> Reading:
        """One read of own keys and then far ones, each token twice; of what is skipped it knows nothing."""
        assert self.far is not None
        assert self.near is not None
        n, m = self.q.shape[2], self.k.shape[2]
        device = self.q.device
        queries = torch.arange(m - n, m, device=device) if self.query_positions is None else self.query_positions
        keys = torch.arange(m, device=device) if self.key_positions is None else self.key_positions
        twice = [_twice(stage) for stage in self.stages]
        return Reading(
            self.heads, self.q, torch.cat([self.k, self.far], 2), torch.cat([self.v, self.v], 2),
            (*twice, _Halves(self.near, m)), self.scale, queries, torch.cat([keys, keys], -1),
        )  # fmt: skip


def _twice(stage: Stage) -> Stage:
    if isinstance(stage, DenseMask | DenseBias):
        return replace(stage, table=torch.cat([stage.table, stage.table], -1))
    return stage
