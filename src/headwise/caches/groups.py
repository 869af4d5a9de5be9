"""Groups of a layer's heads that keep the same way: everything, sinks and a ring, or what a rule chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention.mask import FAR, Mask
from ..errors import PlanError
from .arena import Sequences
from .rule import Codec, Evict, Parts, Seen, order_by

PROMPT = 32  # a later call of so many tokens is a prompt too, after which heads evict; fewer may be drafts that are taken back
_LATE = 1 << 40  # a position later than any: what a mask still reaches from there is what it keeps


@dataclass(frozen=True)
class Keep:
    """What a head keeps: the first `sink` positions and the last `recent`, the one being read included."""

    sink: int
    recent: int

    @staticmethod
    def of(mask: Mask | None) -> Keep | None:
        """What a mask can still read from far ahead; None if that is everything, or nothing that a ring can hold."""
        if mask is None:
            return None
        intervals = mask.reach(_LATE, _LATE + 1)
        sink = recent = 0
        for start, stop in intervals:
            if start == 0 and stop < _LATE:
                sink = stop
            elif start > _LATE // 2 and stop > _LATE:
                recent = _LATE + 1 - start
            else:
                return None
        return Keep(sink, recent) if recent > 0 else None


@dataclass(frozen=True)
class View:
    """What the queries of some key/value heads read now.

    k, v: (b, len(heads), slots, d). number: (1 or b, slots), when each key came, or (b, len(heads), slots) where heads keep
    different tokens; -1 marks an empty slot. ordered: slot i holds token i. exact: the store holds what a single new query
    may read by the mask it was made for, and no more. far: other keys, (b, len(heads), slots, d), by which tokens are read that
    are not `near`, a rule that shares keys; None where k serves for all.
    """

    heads: tuple[int, ...]
    keep: Keep | None
    k: Tensor
    v: Tensor
    number: Tensor
    ordered: bool
    exact: bool
    far: Tensor | None = None
    near: Any = None

    def split(self) -> list[View]:
        """Views in which all heads keep the same tokens."""
        if self.number.dim() < 3:
            return [self]
        return [
            replace(self, heads=(head,), k=self.k[:, i : i + 1], v=self.v[:, i : i + 1], number=self.number[:, i])
            for i, head in enumerate(self.heads)
        ]


class Group:
    """Heads of a layer that keep alike. Keeps everything, unless a subclass says otherwise."""

    def __init__(self, heads: tuple[int, ...], sequences: Sequences, places: Sequence[int], codec: Codec) -> None:
        self.heads, self.sequences, self.places, self.codec = heads, sequences, tuple(places), codec
        self.layout: Sequence[Sequence[int]] = ()  # the groups of all heads in these sequences
        self.undo: Callable[[], None] | None = None  # takes the last call back, if that can be done
        self.pads = np.zeros(0, dtype=np.int64)

    @property
    def segments(self) -> list[tuple[Sequences, Codec]]:
        """All sequences of this group, and what their tokens are kept as."""
        return [(self.sequences, self.codec)]

    croppable = True
    in_place = True  # whether a single new token may read what is in the pages, all of it, as it is

    def extend(self, k: Tensor, v: Tensor, seen: int, read: bool = True) -> View | None:
        """Takes (b, heads, c, d) tokens number seen..seen+c-1; returns what to read them with.

        read: False for a single token that is read in place, see `LayerStore.attend`.
        """
        before = self.sequences.lengths.copy()
        self.undo = lambda: self._restore(before)
        count = k.shape[2]
        parts = self._parts(k, v, seen)
        if seen == 0 and count > 1:  # nothing is held yet: what came is read as it is
            self._append(parts, seen)
            return View(self.heads, None, k, v, torch.arange(count, device=k.device)[None], ordered=True, exact=False)
        self._append(parts, seen)
        if not read:
            return None
        ordered = not self.pads.any()
        held_k, held_v, number = self._read(k)
        return View(self.heads, None, held_k, held_v, number[0, :1] if ordered else number[:, 0], ordered=ordered, exact=False)

    def settle(self, read: Callable[[], Seen]) -> None:
        """After the read: evicts. `read` tells what was read, which may cost something."""

    def _restore(self, lengths: np.ndarray) -> None:
        self.sequences.lengths[:, list(self.places)] = lengths[:, list(self.places)]

    def _parts(self, k: Tensor, v: Tensor, seen: int) -> Parts:
        number = torch.arange(seen, seen + k.shape[2], dtype=torch.int32, device=k.device)
        return {**self.codec.encode(k, v), "number": number.expand(*k.shape[:2], -1)}

    def _append(self, parts: Parts, seen: int) -> None:
        """Adds new tokens, without left padding."""
        skip = np.maximum(self.pads - seen, 0)
        c = parts["number"].shape[2]
        if not skip.any():
            self.sequences.append(self.places, parts, self.layout)
            return
        counts = np.maximum(c - skip, 0)
        index = torch.from_numpy(np.minimum(np.arange(c) + skip[:, None], c - 1))
        shifted = {
            name: part.gather(2, index.view(len(index), 1, c, *[1] * (part.dim() - 3)).expand(part.shape).to(part.device))
            for name, part in parts.items()
        }
        each = np.broadcast_to(counts[:, None], (len(counts), len(self.places)))
        self.sequences.append(self.places, shifted, self.layout, each)

    def _read(self, like: Tensor, sequences: Sequences | None = None, codec: Codec | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and numbers (b, heads, slots) of what is held, where new keys `like` these are; -1 where there is nothing.

        sequences, codec: one of `segments`, by default the first.
        """
        held = sequences or self.sequences
        parts = {name: held.read(name, self.places).to(like.device) for name in held.arena.pools if not name.startswith("carried.")}
        number = parts.pop("number").long()
        there = held.there(self.places, like.device)
        if there is not None:
            number = torch.where(there, number, -1)
        return *(codec or self.codec).decode(parts, like.dtype), number

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`."""
        self.sequences.crop(self.places, tokens)

    def select(self, rows: Sequence[int]) -> None:
        """What of this group is not in its sequences, for these batch rows."""
        self.undo = None
        self.pads = self.pads[list(rows)]


class Ring(Group):
    """Keeps the first `sink` positions of each row in place, and the last `recent` in a ring behind them.

    Slots fill from the first on, so what is allocated grows with the text until the ring is whole.
    """

    croppable = False

    def __init__(self, heads: tuple[int, ...], sequences: Sequences, places: Sequence[int], codec: Codec, keep: Keep) -> None:
        super().__init__(heads, sequences, places, codec)
        self.keep = keep

    def extend(self, k: Tensor, v: Tensor, seen: int, read: bool = True) -> View | None:
        count, parts = k.shape[2], self._parts(k, v, seen)
        new = torch.arange(seen, seen + count, device=k.device)[None]
        if count == 1:
            self._write(parts, seen)
            if not read:
                return None
            held_k, held_v, number = self._read(k)
            same = not self.pads.any()
            return View(self.heads, self.keep, held_k, held_v, number[0, :1] if same else number[:, 0], ordered=False, exact=same)
        if self.sequences.longest(self.places):
            held_k, held_v, held = self._read(k)
            number = torch.cat([held[:, 0], new.expand(len(held), -1)], 1)
            if not self.pads.any():
                number = number[:1]
            view = View(
                self.heads, self.keep, torch.cat([held_k, k], 2), torch.cat([held_v, v], 2), number, ordered=False, exact=False
            )
        else:
            view = View(self.heads, self.keep, k, v, new, ordered=seen == 0, exact=False)
        self._write(parts, seen)
        return view

    def _write(self, parts: Parts, seen: int) -> None:
        """Puts new tokens in their slots; of several that share one, only the last is written."""
        sink, recent = self.keep.sink, self.keep.recent
        count = parts["number"].shape[2]
        position = np.arange(seen, seen + count) - self.pads[:, None]  # (b, c)
        last = seen + count - self.pads[:, None]  # positions so far
        kept = (position >= 0) & ((position < sink) | (position >= last - recent))
        slots = np.where(position < sink, position, sink + (position - sink) % recent)
        lengths = self.sequences.lengths.copy()
        lengths[:, list(self.places)] = np.minimum(np.maximum(last, 0), sink + recent)
        columns = np.flatnonzero(kept.any(0))
        if len(columns) < count:
            chosen = torch.from_numpy(columns)
            parts = {name: part.index_select(2, chosen.to(part.device)) for name, part in parts.items()}
        shape = (len(kept), len(self.places), len(columns))
        slots, kept = (np.broadcast_to(x[:, None, columns], shape) for x in (np.maximum(slots, 0), kept))
        self.sequences.arena.prepare(parts)
        self.sequences.reserve(lengths, self.layout)
        self._remember(slots, kept)
        self.sequences.write(self.places, slots, parts, kept)
        self.sequences.lengths = lengths

    def _remember(self, slots: np.ndarray, kept: np.ndarray) -> None:
        """What the slots hold now, to put it back if the call fails."""
        before = self.sequences.lengths.copy()
        held = kept & (slots < before[:, list(self.places), None])
        old = self.sequences.taken(self.places, slots) if held.any() else {}

        def undo() -> None:
            self._restore(before)
            if old:
                self.sequences.write(self.places, slots, old, held)

        self.undo = undo

    def crop(self, tokens: int) -> None:
        raise NotImplementedError


class Evicting(Group):
    """Keeps what a rule chooses, head by head."""

    def __init__(
        self, heads: tuple[int, ...], sequences: Sequences, places: Sequence[int], codec: Codec, rule: Evict, layer: tuple[int, int]
    ) -> None:
        super().__init__(heads, sequences, places, codec)
        self.rule, self.layer = rule, layer
        self.since = 0  # tokens taken since the last eviction: those can be taken back
        self._call: tuple[Parts, Tensor, Tensor, Tensor, Parts, int, bool] | None = None

    @property
    def croppable(self) -> bool:  # type: ignore[override]
        return not self.rule.every

    def extend(self, k: Tensor, v: Tensor, seen: int, read: bool = True) -> View | None:
        count, parts = k.shape[2], self._parts(k, v, seen)
        carried = {name: k.new_zeros(*k.shape[:3], dtype=torch.float32) for name in self.rule.carries}
        parts |= {f"carried.{name}": value for name, value in carried.items()}
        first = not self.sequences.longest(self.places)
        if count == 1 and not first:
            before = self.sequences.lengths.copy()
            self.undo = None if self.rule.every else lambda: self._restore(before)
            self._append(parts, seen)
            if not (read or self.rule.every):
                self.since += 1
                return None
            k, v, number = self._read(k)
            if self.rule.every:
                kept = {name: self._carried(name) for name in self.rule.carries}
                self._call = parts, k, v, number, kept, seen, False
            else:
                self.since += 1
            return View(self.heads, None, k, v, number, ordered=False, exact=True)
        new = torch.arange(seen, seen + count, device=k.device)
        if first:
            self.undo = self.sequences_cleared
            number = new.expand(*k.shape[:2], -1)
            view = View(self.heads, None, k, v, new[None], ordered=seen == 0, exact=False)
        else:
            self.undo = None
            held_k, held_v, held = self._read(k)
            number = torch.cat([held, new.expand(*held.shape[:2], -1)], 2)
            carried = {name: torch.cat([self._carried(name), value], 2) for name, value in carried.items()}
            k, v = torch.cat([held_k, k], 2), torch.cat([held_v, v], 2)
            view = View(self.heads, None, k, v, number, ordered=False, exact=False)
        number = torch.where(number >= torch.from_numpy(self.pads).to(k.device)[:, None, None], number, -1)
        self._call = parts, k, v, number, carried, seen, first or count >= PROMPT or self.rule.every
        return view

    def sequences_cleared(self) -> None:
        """Takes the first call back."""
        self.sequences.lengths[:, list(self.places)] = 0
        self._call = None

    def _carried(self, name: str) -> Tensor:
        return self.sequences.read(f"carried.{name}", self.places)

    def settle(self, read: Callable[[], Seen]) -> None:
        if self._call is None:
            return
        parts, k, v, number, carried, seen, prompt = self._call
        self._call = None
        if parts["number"].shape[2] > 1 and not prompt:
            self._append(parts, seen)
            self.since += parts["number"].shape[2]
            return
        order = number.sort(stable=True, dim=-1).indices if not prompt or self.sequences.longest(self.places) else None
        if order is not None:
            k, v = (t.gather(2, order[..., None].expand(t.shape)) for t in (k, v))
            number = number.gather(-1, order)
            carried = {name: value.gather(-1, order) for name, value in carried.items()}
        what = replace(
            read(), k=k, v=v, number=number, carried=carried, layer=self.layer[0], layers=self.layer[1], heads=self.heads
        )
        if self.rule.carries:
            what = replace(what, carried=self.rule.carry(what))
        scores = self.rule.score(what)
        slots, counts = order_by(scores, self.rule.counts(what, scores), what.there)
        kept = counts.cpu().numpy()
        if not prompt:
            self._drop(what, slots, kept, order)
            return
        chosen = {"k": k, "v": v, "number": number.to(torch.int32)}
        chosen = {
            name: t.gather(2, slots.view(*slots.shape, *[1] * (t.dim() - 3)).expand(*slots.shape, *t.shape[3:]))
            for name, t in chosen.items()
        }
        held: Parts = {**self.codec.encode(chosen["k"], chosen["v"]), "number": chosen["number"]}
        held |= {f"carried.{name}": value.gather(-1, slots) for name, value in what.carried.items()}
        self.sequences.lengths[:, list(self.places)] = 0
        self.sequences.append(self.places, held, self.layout, kept)
        self.sequences.trim(self.layout)
        self.since = 0

    def _drop(self, what: Seen, slots: Tensor, kept: np.ndarray, order: Tensor | None) -> None:
        """After a single new token: what is carried changes, and all but the chosen tokens go."""
        assert order is not None
        for name, value in what.carried.items():
            places = np.broadcast_to(np.arange(value.shape[2]), value.shape)
            there = self.sequences.there(self.places, torch.device("cpu"))
            back = torch.empty_like(value).scatter_(-1, order, value)
            self.sequences.write(self.places, places, {f"carried.{name}": back}, None if there is None else there.numpy())
        own = self.sequences.lengths[:, list(self.places)]
        if (kept == own).all():
            return
        chosen = order.gather(-1, slots).cpu().numpy()
        if (own - kept == 1).all():
            gone = np.ones((*own.shape, int(own.max())), dtype=bool)
            gone &= np.arange(gone.shape[-1]) < own[..., None]
            np.put_along_axis(gone, np.where(np.arange(chosen.shape[-1]) < kept[..., None], chosen, chosen[..., :1]), False, -1)
            self.sequences.drop(self.places, gone.argmax(-1))
        else:
            self.sequences.keep(self.places, torch.from_numpy(chosen), kept, self.layout)

    def crop(self, tokens: int) -> None:
        if tokens > self.since:
            raise PlanError(
                f"cannot take back {tokens} tokens: heads have evicted others since, only the last {self.since} can go. "
                "Assisted decoding needs drafts shorter than what is kept since the prompt"
            )
        super().crop(tokens)
        self.since -= tokens


assert FAR > 2 * _LATE
