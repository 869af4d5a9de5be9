"""The keys and values of one attention layer, each key/value head keeping only what its queries can still read.

Tokens are numbered by when they came, pads included; a row's position is that number less its left padding. A store
takes new tokens and returns views to read them with: all that the new queries may need, with each key's number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mask import FAR, Mask
from ..errors import PlanError

GROWTH = 64  # tokens that a store allocates at a time
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

    k, v: (b, len(heads), slots, d). number: (1 or b, slots), when each key came; -1 marks an empty slot. ordered: slot i
    holds token i. exact: the store holds what a single new query may read by the mask it was made for, and no more.
    """

    heads: tuple[int, ...]
    keep: Keep | None
    k: Tensor
    v: Tensor
    number: Tensor
    ordered: bool
    exact: bool


class _Store(ABC):
    """Keys and values of heads that keep the same."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @abstractmethod
    def extend(self, k: Tensor, v: Tensor, seen: int, pads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
        """Takes (b, h, c, d) tokens number seen..seen+c-1; returns the rest of a View for reading with them."""

    def tensors(self) -> list[Tensor]:
        """What is allocated."""
        return [t for t in (self.k, self.v) if t is not None]

    def select(self, rows: Tensor) -> None:
        """Keeps these batch rows, in this order."""
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows.to(self.k.device)], self.v[rows.to(self.v.device)]


class _Growing(_Store):
    """Keeps everything, in blocks of GROWTH tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def extend(self, k: Tensor, v: Tensor, seen: int, pads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
        length = self.length + k.shape[2]
        self.k = self._with(self.k, k, length)
        self.v = self._with(self.v, v, length)
        self.length = length
        return self.k[:, :, :length], self.v[:, :, :length], torch.arange(length, device=k.device)[None], True, False

    def _with(self, held: Tensor | None, new: Tensor, length: int) -> Tensor:
        if held is None or held.shape[2] < length:
            grown = new.new_empty(*new.shape[:2], _blocks(length), new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            held = grown
        held[:, :, self.length : length] = new
        return held

    def crop(self, tokens: int) -> None:
        """Forgets the last `tokens`."""
        self.length -= tokens


def _blocks(tokens: int) -> int:
    """Tokens to allocate for, in whole blocks."""
    return -(-tokens // GROWTH) * GROWTH


class _Ring(_Store):
    """Keeps the first `sink` positions of each row in place, and the last `recent` in a ring.

    Slots fill from the first on, so what is allocated grows with the text until the ring is whole.
    """

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self.keep = keep
        self.number: Tensor | None = None  # (1, slots), or (b, slots) where rows are padded differently
        self.ragged = False

    def slot(self, position: int) -> int:
        """Where a position is held."""
        sink, recent = self.keep.sink, self.keep.recent
        return position if position < sink else sink + (position - sink) % recent

    def extend(self, k: Tensor, v: Tensor, seen: int, pads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
        count, capacity = k.shape[2], self.keep.sink + self.keep.recent
        if self.k is None:
            self.ragged = any(pads)
        self._grow(k, v, min(capacity, _blocks(seen + count - min(pads, default=0))))
        assert self.k is not None
        assert self.v is not None
        assert self.number is not None
        if count == 1:
            self._write(k, v, seen, pads, range(1))
            filled = min(capacity, seen + 1 - min(pads, default=0))
            return self.k[:, :, :filled], self.v[:, :, :filled], self.number[:, :filled], False, not self.ragged
        new = torch.arange(seen, seen + count, device=k.device).expand(self.number.shape[0], -1)
        filled = min(capacity, seen - min(pads, default=0)) if seen else 0
        held_k, held_v, held = self.k[:, :, :filled], self.v[:, :, :filled], self.number[:, :filled]
        view = torch.cat([held_k, k], 2), torch.cat([held_v, v], 2), torch.cat([held, new], 1), filled == 0, False
        self._write(k, v, seen, pads, range(count))
        return view

    def _grow(self, k: Tensor, v: Tensor, slots: int) -> None:
        """Allocates at least so many slots, the new ones empty."""
        held = 0 if self.k is None else self.k.shape[2]
        if held >= slots:
            return
        b, h, missing = k.shape[0], k.shape[1], slots - held
        more_k, more_v = k.new_zeros(b, h, missing, k.shape[3]), v.new_zeros(b, h, missing, v.shape[3])
        empty = torch.full((b if self.ragged else 1, missing), -1, device=k.device)
        if self.k is None or self.v is None or self.number is None:
            self.k, self.v, self.number = more_k, more_v, empty
        else:
            self.k, self.v = torch.cat([self.k, more_k], 2), torch.cat([self.v, more_v], 2)
            self.number = torch.cat([self.number, empty], 1)

    def _write(self, k: Tensor, v: Tensor, seen: int, pads: Sequence[int], new: range) -> None:
        """Puts new tokens in their slots; of several that share one, only the last is written."""
        assert self.k is not None
        assert self.v is not None
        assert self.number is not None
        rows = range(len(pads)) if self.ragged else [None]
        for row in rows:
            pad = 0 if row is None else pads[row]
            last = seen + new.stop - pad  # positions so far, of this row
            places = {}
            for i in new if len(new) <= self.keep.sink + self.keep.recent else self._kept(seen, pad, new, last):
                position = seen + i - pad
                if position >= 0:
                    places[self.slot(position)] = i
            if not places:
                continue
            slots = torch.tensor(list(places), device=k.device)
            source = torch.tensor(list(places.values()), device=k.device)
            at = slice(None) if row is None else slice(row, row + 1)
            self.k[at, :, slots] = k[at, :, source]
            self.v[at, :, slots] = v[at, :, source]
            self.number[at, slots] = source + seen

    def _kept(self, seen: int, pad: int, new: range, last: int) -> list[int]:
        """Those of many new tokens that are kept: sinks and the last `recent`."""
        sinks = [i for i in new if 0 <= seen + i - pad < self.keep.sink]
        return sinks + list(range(max(0, new.stop - self.keep.recent), new.stop))

    def tensors(self) -> list[Tensor]:
        return super().tensors() + ([self.number] if self.number is not None else [])

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.number is not None and self.ragged:
            self.number = self.number[rows.to(self.number.device)]


class LayerStore:
    """One layer: its key/value heads grouped by what they keep (`keeps`, one entry a head; None keeps everything)."""

    def __init__(self, keeps: Sequence[Keep | None]) -> None:
        self.keeps = tuple(keeps)
        groups: dict[Keep | None, list[int]] = {}
        for head, keep in enumerate(keeps):
            groups.setdefault(keep, []).append(head)
        self.groups = [(tuple(heads), keep, _Growing() if keep is None else _Ring(keep)) for keep, heads in groups.items()]
        self.seen = 0
        self.pads: list[int] = []

    def extend(self, k: Tensor, v: Tensor, pads: Sequence[int] | None = None) -> list[View]:
        """Takes the new tokens (b, kv heads, c, d) and returns a view for each group of heads.

        Args:
            pads: left padding of each row; read once, when the store is empty.
        """
        if not self.seen:
            self.pads = list(pads) if pads is not None else [0] * k.shape[0]
        views = []
        for heads, keep, store in self.groups:
            own_k, own_v = (k, v) if len(heads) == k.shape[1] else (k[:, list(heads)], v[:, list(heads)])
            views.append(View(heads, keep, *store.extend(own_k, own_v, self.seen, self.pads)))
        self.seen += k.shape[2]
        return views

    def bytes(self) -> int:
        """Bytes allocated for this layer."""
        tensors = [tensor for _, _, store in self.groups for tensor in store.tensors()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def select(self, rows: Tensor) -> None:
        """Keeps these batch rows, in this order (beam search, or dropping finished rows)."""
        for _, _, store in self.groups:
            store.select(rows)
        if self.pads:
            self.pads = [self.pads[row] for row in rows.tolist()]

    @property
    def croppable(self) -> bool:
        """Whether the last tokens can be forgotten: not if a ring has already overwritten older ones."""
        return all(isinstance(store, _Growing) for _, _, store in self.groups)

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
        for _, _, store in self.groups:
            assert isinstance(store, _Growing)
            store.crop(tokens)
        self.seen -= tokens


assert FAR > 2 * _LATE
