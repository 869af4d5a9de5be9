"""What a plan asks of one attention module: its heads grouped by how they read, and what is done to their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.mask import And, Mask
from ..attention.stage import Output, Stage
from ..caches import Evict, Keep, Rule
from ..caches.rules.shared_keys import SharedKeys
from ..errors import PlanError
from ..stages.window import Window
from ..types import Heads
from .layout import Site


@dataclass(frozen=True)
class Entry:
    """Heads of one stack that get one stage. A stage's per-head fields follow `heads.list()`, or serve all with one entry."""

    heads: Heads
    stage: Stage


@dataclass(frozen=True)
class Group:
    """Heads of one module that read alike."""

    heads: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def mask(self) -> Mask | None:
        """All masks of the group together."""
        masks = tuple(stage for stage in self.stages if isinstance(stage, Mask))
        return And(masks) if masks else None


@dataclass(frozen=True)
class Program:
    """A module's groups (together all of its heads) and output edits, in the order in which they were asked for."""

    groups: tuple[Group, ...]
    outputs: tuple[tuple[tuple[int, ...], Output], ...]
    rules: tuple[tuple[tuple[int, ...], Rule], ...] = ()  # key/value heads, and how they are cached

    @property
    def plain(self) -> bool:
        """Whether every head reads as the model has it."""
        return len(self.groups) == 1 and not self.groups[0].stages and not any(isinstance(r, SharedKeys) for _, r in self.rules)

    def keeps(self, site: Site, window: int | None) -> list[Keep | None]:
        """For each key/value head, what its query heads can still read of the past; `window`: the layer's own window."""
        own = (Window(window),) if window else ()
        by_head: dict[int, Keep | None] = {}
        for group in self.groups:
            masks = (*own, *((group.mask,) if group.mask else ()))
            keep = Keep.of(And(masks)) if masks else None
            by_head.update(dict.fromkeys(group.heads, keep))
        result: list[Keep | None] = []
        for kv in range(site.key_value_heads):
            wants = [by_head[head] for head in range(kv * site.groups, (kv + 1) * site.groups)]
            if any(want is None for want in wants):
                result.append(None)
            else:
                result.append(Keep(max(w.sink for w in wants if w), max(w.recent for w in wants if w)))
        return result


def compile_site(site: Site, entries: Sequence[Entry]) -> Program:
    """The program of one module, from all entries in force."""
    asked: dict[int, Stage] = {}  # by number of the entry
    reads: list[list[tuple[int, int]]] = [[] for _ in range(site.heads)]  # by head: (number, the head's place in that stage)
    outputs: list[tuple[tuple[int, ...], Output]] = []
    rules: list[tuple[tuple[int, ...], Rule]] = []
    for number, entry in enumerate(entries):
        if entry.heads.stack != site.stack:
            continue
        order = entry.heads.list()
        places = [i for i, (layer, _) in enumerate(order) if layer == site.layer]
        if not places:
            continue
        stage = entry.stage.select(places)
        own = tuple(order[i][1] for i in places)
        if isinstance(stage, Output):
            outputs.append((own, stage))
            continue
        if isinstance(stage, Rule):
            rules.append(_of_groups(site, own, stage))
            continue
        asked[number] = stage
        for place, head in enumerate(own):
            reads[head].append((number, place))
    alike: dict[tuple[int, ...], list[int]] = {}
    for head, read in enumerate(reads):
        alike.setdefault(tuple(number for number, _ in read), []).append(head)
    groups = []
    for numbers, heads in alike.items():
        stages = [asked[number].select([reads[head][i][1] for head in heads]) for i, number in enumerate(numbers)]
        groups.append(Group(tuple(heads), tuple(stages)))
    program = Program(tuple(groups), tuple(outputs), tuple(rules))
    _check_rules(site, program)
    return program


def _of_groups(site: Site, heads: tuple[int, ...], rule: Rule) -> tuple[tuple[int, ...], Rule]:
    """Key/value heads of these query heads, and the rule for those: its per-head fields are of the first of each group.

    Raises: PlanError if heads that share keys and values are not all there.
    """
    kv = tuple(dict.fromkeys(head // site.groups for head in sorted(heads)))
    alone = [k for k in kv if not set(range(k * site.groups, (k + 1) * site.groups)) <= set(heads)]
    if alone:
        raise PlanError(
            f"{type(rule).__name__} is asked of only some of the heads of layer {site.layer} that share key/value head {alone[0]}; "
            "keys and values are kept or freed for all of them: select with key_value_groups(heads)"
        )
    return kv, rule.select([heads.index(k * site.groups) for k in kv])


def _check_rules(site: Site, program: Program) -> None:
    """Raises: PlanError if a head has two rules of a kind, or a mask that frees tokens beside a rule that evicts them."""
    for i, (heads, rule) in enumerate(program.rules):
        for others, other in program.rules[:i]:
            both_kinds = isinstance(rule, Evict) != isinstance(other, Evict) and not (rule.alone or other.alone)
            if not both_kinds and set(heads) & set(others):
                head = min(set(heads) & set(others))
                raise PlanError(
                    f"key/value head {head} of layer {site.layer} has both {type(other).__name__} and {type(rule).__name__}; "
                    "one rule that evicts and one codec are all that a head can have"
                )
        if not rule.masked:
            masked = {head // site.groups for group in program.groups if group.mask is not None for head in group.heads}
            if masked & set(heads):
                raise PlanError(
                    f"key/value head {min(masked & set(heads))} of layer {site.layer} has both a mask and {type(rule).__name__}; "
                    "leave the mask out, or let the rule keep what it shows"
                )
