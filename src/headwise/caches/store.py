"""The keys and values of one attention layer, each key/value head keeping only what its queries can still read.

Tokens are numbered by when they came, pads included; a row's position is that number less its left padding. A store takes
new tokens and returns views to read them with: all that the new queries may need, with each key's number. After the read it
may be told what was read, and evict. What is kept is in pages of one arena; left padding is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..attention.paged import Schedule, paged_attention
from ..attention.stage import Stage
from ..errors import PlanError
from .arena import Arena, Sequences
from .groups import Evicting, Group, Keep, Ring, View
from .joining import join
from .rule import PLAIN, Codec, Evict, Rotary, Rule, Seen
from .rules.staircase import Staircase
from .sharing import Sharing, Split, of_heads
from .staircase import Stairs


class LayerStore:
    """One layer: its key/value heads grouped by what they keep and as what.

    Args:
        keeps: one entry a key/value head, for those that masks bound; None keeps everything.
        rules: key/value heads with the rule they have; a head may have one that evicts and one that encodes.
        layer: this layer's number, and how many there are.
    """

    def __init__(
        self, keeps: Sequence[Keep | None], rules: Sequence[tuple[Sequence[int], Rule]] = (), layer: tuple[int, int] = (0, 1)
    ) -> None:
        self.keeps, self.rules, self.layer = tuple(keeps), tuple(rules), layer
        asked: dict[tuple[object, ...], list[int]] = {}
        which = {head: [(rule, tuple(heads)) for heads, rule in rules if head in heads] for head in range(len(keeps))}
        for head, keep in enumerate(keeps):
            asked.setdefault((keep, *(id(rule) for rule, _ in which[head])), []).append(head)
        self.groups: list[Group] = []
        self.sequences: dict[int, Sequences] = {}
        alike: dict[int, tuple[Rule, list[tuple[int, ...]]]] = {}  # groups whose tokens are kept as the same rule says
        self.reads = [(heads, rule.layer) for heads, rule in rules if isinstance(rule, Sharing) and not rule.segments]
        for heads in asked.values():
            kept_as = next((rule for rule, _ in which[heads[0]] if not isinstance(rule, Evict)), PLAIN)
            if kept_as.segments:
                alike.setdefault(id(kept_as), (kept_as, []))[1].append(tuple(heads))
        for kept_as, groups in alike.values():
            heads_here = sorted(head for heads in groups for head in heads)
            segments = [Sequences(Arena(), len(heads_here)) for _ in kept_as.segments]
            self.sequences |= {len(self.sequences) + i: own for i, own in enumerate(segments)}
            layout = [[heads_here.index(head) for head in heads] for heads in groups]
            for own, places in zip(groups, layout, strict=True):
                asked_of = {type(rule): [among.index(head) for head in own] for rule, among in which[own[0]]}
                evict = next((rule.select(asked_of[type(rule)]) for rule, _ in which[own[0]] if isinstance(rule, Evict)), None)
                group = _group(own, segments, places, kept_as.select(asked_of.get(type(kept_as), [])), evict, keeps[own[0]], layer)
                group.layout = layout
                self.groups.append(group)
        self.seen = 0
        self.pads: list[int] = []
        self.broken = False
        self._schedule: Schedule | None = None

    def extend(
        self, k: Tensor, v: Tensor, pads: Sequence[int] | None = None, *, read: bool = True,
        sources: Mapping[int, Sequence[View]] | None = None,
    ) -> list[View]:  # fmt: skip
        """Takes the new tokens (b, kv heads, c, d) and returns a view for each group of heads.

        Args:
            pads: left padding of each row; read once, when the store is empty.
            read: False for a single token that `attend` will read with; then there are no views.
            sources: by layer, the views of those whose heads this one's read.
        """
        if not self.seen:
            self.pads = list(pads) if pads is not None else [0] * k.shape[0]
            for sequences in self.sequences.values():
                sequences.begin(k.shape[0])
            for group in self.groups:
                group.pads = np.array(self.pads, dtype=np.int64)
        views = []
        for group in self.groups:
            if isinstance(group, Split):
                group.source = sources or {}
            own = list(group.heads)
            own_k, own_v = (k, v) if own == list(range(k.shape[1])) else (k[:, own], v[:, own])
            view = group.extend(own_k, own_v, self.seen, read)
            if view is not None:
                views.append(view)
        for heads, layer in self.reads:
            found = of_heads((sources or {}).get(layer, ()), heads)
            if sum(len(view.heads) for view in found) != len(heads):
                raise PlanError(f"layer {self.layer[0]} reads what layer {layer} holds, which has not been read in this call")
            views += found
        self.seen += k.shape[2]
        return views

    @property
    def in_place(self) -> bool:
        """Whether a single new token may read all that is held where it is; on a CPU that pays where lengths differ."""
        if len(self.sequences) != 1 or self.reads or not all(group.in_place and group.codec is PLAIN for group in self.groups):
            return False
        (sequences,) = self.sequences.values()
        pools = sequences.arena.pools
        return bool(pools) and (pools["k"].is_cuda or [type(group) for group in self.groups] != [Group])

    def attend(self, q: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """(b, h, 1, dv): the newest token's queries q (b, h, 1, d) read all that each head holds, however much that is, at once."""
        (sequences,) = self.sequences.values()
        arena, heads = sequences.arena, len(self.keeps)
        if self._schedule is None or self._schedule.stale(sequences.lengths):
            self._schedule = Schedule.of(sequences.lengths, heads, page=arena.page, device=q.device)
        table, lengths = sequences.on_device()
        found: Tensor = paged_attention(
            q, arena.pools["k"], arena.pools["v"], table, lengths, scale=scale, softcap=softcap, sinks=sinks,
            schedule=self._schedule,
        )  # fmt: skip
        return found

    def settle(self, q: Tensor, scale: float, stages: Sequence[Stage], rotary: Rotary | None = None) -> None:
        """After the read of q (b, h, n, d), scores of which the model's own `stages` change: evicts."""
        ratio = q.shape[1] // len(self.keeps)
        for group in self.groups:
            own = [head for kv in group.heads for head in range(kv * ratio, (kv + 1) * ratio)]

            def read(own: list[int] = own) -> Seen:
                pads = torch.tensor(self.pads, device=q.device)
                nothing = q[:, :0]
                chosen = tuple(stage.select(own) for stage in stages)
                return Seen(q[:, own], nothing, nothing, nothing[..., 0], pads, self.seen, scale, chosen, rotary=rotary)

            group.settle(read)

    def rollback(self, seen: int) -> None:
        """Takes back what came after `seen` tokens, after an error; a store that can't do so refuses to go on."""
        if self.seen == seen:
            return
        self.seen = seen
        for group in self.groups:
            if group.undo is not None:
                group.undo()
            elif seen:
                self.broken = True
        if not seen:
            for sequences in self.sequences.values():
                sequences.clear()

    def bytes(self) -> int:
        """Bytes allocated for this layer where the model computes."""
        return sum(sequences.arena.nbytes for sequences in self.sequences.values()) - self.host_bytes()

    def host_bytes(self) -> int:
        """Bytes allocated for this layer in the host's memory, for what codecs offload."""
        away = {id(s): s.arena for group in self.groups for s, codec in group.segments if codec.offloads}
        return sum(
            pool.untyped_storage().nbytes()
            for arena in away.values()
            for name, pool in arena.pools.items()
            if name != "number" and not name.startswith("carried.")
        )

    def select(self, rows: Tensor) -> None:
        """Keeps these batch rows, in this order (beam search, dropping finished rows). A row named twice is held once."""
        chosen = rows.tolist()
        for sequences in self.sequences.values():
            if sequences.rows:
                sequences.select(chosen)
        for group in self.groups:
            if len(group.pads):
                group.select(chosen)
        if self.pads:
            self.pads = [self.pads[row] for row in chosen]

    @property
    def joinable(self) -> bool:
        """Whether rows can be joined: if all heads keep everything, as it is."""
        return all(type(group) is Group and group.codec is PLAIN for group in self.groups)

    def join(self, before: int, counts: Sequence[int]) -> None:
        """Makes one row of all: the first row's first `before` tokens, then each row's next ones, so many of each.

        Raises: PlanError if some head does not keep everything.
        """
        if not self.joinable or any(self.pads):
            raise PlanError("rows can be joined where every head keeps everything, and nothing is padded")
        self.seen, self.pads = before + sum(counts), [0]
        for key, sequences in self.sequences.items():
            made = sequences.fork([0])
            made.crop(range(made.heads), int(made.lengths.max()) - before - counts[0])
            for row, count in enumerate(counts[1:], 1):
                join(made, sequences, [row], before, before + count)
            sequences.clear()
            number = torch.arange(self.seen, dtype=torch.int32, device=made.arena.pools["number"].device)
            slots = np.broadcast_to(np.arange(self.seen), (1, made.heads, self.seen))
            made.write(range(made.heads), slots, {"number": number.expand(slots.shape)})
            self.sequences[key] = made
            for group in self.groups:
                if group.sequences is sequences:
                    group.sequences = made
                    group.select([0])
        self._schedule = None

    def held(self) -> list[list[list[int]]]:
        """By row and key/value head: the numbers of the tokens that are held, sorted."""
        found: list[list[list[int]]] = [[[] for _ in self.keeps] for _ in self.pads]
        for group in self.groups:
            for sequences, _ in group.segments:
                if not sequences.longest(group.places):
                    continue
                number = sequences.read("number", group.places).tolist()
                for row, heads in enumerate(number):
                    for place, head in enumerate(group.heads):
                        length = int(sequences.lengths[row, group.places[place]])
                        found[row][head] = sorted({*found[row][head], *heads[place][:length]})
        return found

    @property
    def croppable(self) -> bool:
        """Whether the last tokens can be forgotten: not if a ring has already overwritten older ones."""
        return all(group.croppable for group in self.groups)

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`.

        Raises: PlanError if some head has already freed what it would have to read then.
        """
        if tokens <= 0:
            return
        if not self.croppable:
            raise PlanError(
                f"cannot take back {tokens} tokens: streaming heads have already freed older keys. "
                "Assisted decoding needs a plan whose heads keep everything"
            )
        for group in self.groups:
            group.crop(tokens)
        self.seen -= tokens


def _group(
    heads: tuple[int, ...], segments: Sequence[Sequences], places: Sequence[int], kept_as: Rule, evict: Evict | None,
    keep: Keep | None, layer: tuple[int, int],
) -> Group:  # fmt: skip
    """Heads that keep alike."""
    if isinstance(kept_as, Sharing):
        return Split(heads, segments, places, kept_as)
    if isinstance(kept_as, Staircase):
        return Stairs(heads, segments, places, kept_as.codecs, kept_as.ages)
    assert isinstance(kept_as, Codec)
    if evict is not None:
        return Evicting(heads, segments[0], places, kept_as, evict, layer)
    if keep is not None:
        return Ring(heads, segments[0], places, kept_as, keep)
    return Group(heads, segments[0], places, kept_as)
