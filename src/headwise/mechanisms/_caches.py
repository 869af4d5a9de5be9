"""What mixers keep of the tokens that they have read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError
from ._rotary import Rotary

if TYPE_CHECKING:
    from ._mixer import Positions, Real


class Cache(ABC):
    """What one mixer keeps of the tokens it has read. `len` is how many those were, padding included."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def tensors(self) -> Iterable[Tensor | None]:
        """All that it holds itself."""

    @property
    def nbytes(self) -> int:
        """Bytes held: of the storages behind its tensors, each once."""
        storages = [t.untyped_storage() for t in self.tensors() if t is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Seen(NamedTuple):
    """Tensors of a read: new queries (after the past ones that were asked for), all keys and values, and their places."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_positions: Tensor | None
    key_positions: Tensor | None

    @property
    def places(self) -> Positions:
        """The positions, as arguments."""
        return {"query_positions": self.query_positions, "key_positions": self.key_positions}

    def turned(self, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Queries and keys of a cache that was extended without rotation, rotated: so that it may keep tokens as they are."""
        if rotary is None:
            return self.q, self.k
        n, m = self.q.shape[2], self.k.shape[2]
        at = torch.arange(m, device=self.k.device) if self.key_positions is None else self.key_positions.clamp(min=0)
        return rotary(self.q, at[..., m - n :]), rotary(self.k, at)


class KeyValues(Cache):
    """Keys, values, places, and the last queries if a mechanism asks.

    Padding keeps its slot, with a place of -1 that nobody reads; places count tokens only.

    Args:
        past_queries: how many queries before the new ones are kept and given along.
        first, last: keep only so many tokens at the beginning and before the next one, which is all that masks of sinks and
            windows let it read. last is None to keep all.
    """

    def __init__(self, past_queries: int = 0, *, first: int = 0, last: int | None = None) -> None:
        self.past_queries, self.first, self.last = past_queries, first, last
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.positions: Tensor | None = None  # (b, slots) of the slots kept; None while a slot's place is its number
        self.total = 0
        self.followed = False  # whether other layers read what this one reads
        self.seen: Seen | None = None  # the last read, if so
        self._counted: Tensor | None = None  # (b, 1) tokens so far, without padding

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.q, self.k, self.v)

    def places_of_next(self, like: Tensor, attention_mask: Real | None = None) -> Tensor | None:
        """(b, n) places that the next tokens will have, for tensors (b, ..., n, d) like this one; -1 at padding.

        None while nothing was padding: they are then `len(self)`, `len(self)` + 1, ...
        """
        b, n = like.shape[0], like.shape[-2]
        if attention_mask is not None and attention_mask.shape != (b, n):
            raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}, the new tokens are (batch, tokens) = {(b, n)}")
        if attention_mask is None and self.positions is None:
            return None
        there = torch.ones(b, n, dtype=torch.bool, device=like.device) if attention_mask is None else attention_mask.bool()
        counted = torch.full((b, 1), self.total, device=like.device) if self._counted is None else self._counted
        return torch.where(there, counted + there.cumsum(1) - 1, -1)

    def next_places(self, like: Tensor, attention_mask: Real | None = None) -> Tensor:
        """The same, (b or 1, n), counted out where nothing was padding."""
        places = self.places_of_next(like, attention_mask)
        if places is None:
            places = torch.arange(self.total, self.total + like.shape[-2], device=like.device)[None]
        return places

    def extend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Real | None = None, rotary: Rotary | None = None) -> Seen:
        """Adds new tokens and returns what they may read.

        attention_mask (b, n): 0 at those that are padding. rotary: turns the new queries and keys by their places first.
        """
        n = k.shape[2]
        new_places = own = self.places_of_next(k, attention_mask)
        if rotary is not None:
            at = torch.arange(self.total, self.total + n, device=k.device) if own is None else own.clamp(min=0)
            q, k = rotary(q, at), rotary(k, at)
        places = own
        if self.k is not None and self.v is not None:
            if own is not None:
                places = torch.cat([self._kept_places(k), own], 1)
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        if self.past_queries and self.q is not None:
            q = torch.cat([self.q, q], 2)
        if own is not None and places is not None:
            own = places[:, places.shape[1] - q.shape[2] :]
        seen = Seen(q, k, v, own, places)
        self.total += n
        if new_places is not None:
            before = torch.full((len(k), 1), self.total - n, device=k.device) if self._counted is None else self._counted
            self._counted = torch.maximum(before, new_places.amax(1, keepdim=True) + 1)
        self._keep(seen)
        return seen

    def _kept_places(self, like: Tensor) -> Tensor:
        """(b, slots) places of what is kept."""
        assert self.k is not None
        if self.positions is not None:
            return self.positions
        kept = self.k.shape[2]
        return torch.arange(self.total - kept, self.total, device=like.device).expand(like.shape[0], -1)

    def _keep(self, seen: Seen) -> None:
        self.k, self.v, self.positions = _alone(seen.k), _alone(seen.v), seen.key_positions
        self.seen = seen if self.followed else None
        if self.past_queries:
            self.q = seen.q[:, :, -self.past_queries :].clone()
        slots = seen.k.shape[2]
        if self.last is None or slots <= max(self.first + self.last, self.past_queries):
            return
        if self.positions is None:
            self.positions = torch.arange(self.total - slots, self.total, device=seen.k.device).expand(len(seen.k), -1)
        ends = self.positions.amax(1, keepdim=True) if self._counted is None else self._counted - 1
        wanted = (self.positions > ends - self.last) | ((self.positions >= 0) & (self.positions < self.first))
        wanted = wanted.any(0)
        wanted[slots - self.past_queries :] = True
        self.k, self.v, self.positions = seen.k[:, :, wanted], seen.v[:, :, wanted], self.positions[:, wanted]


def _alone(x: Tensor) -> Tensor:
    """x, copied if it is a part of something larger that it would keep alive (a fused projection); not in training."""
    part = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone() if part and not x.requires_grad else x


class Recent:
    """Rows of the last `back` tokens that are no padding, zeros before the first: what a convolution needs of the past."""

    def __init__(self, back: int) -> None:
        self.back = back
        self.rows: Tensor | None = None

    def along(self, new: Tensor, attention_mask: Real | None, f: Callable[[Tensor], Tensor]) -> Tensor:
        """(b, n, ...): f of the rows before and the new ones, (b, back + n, c), padding left out; new rows are then kept.

        f gives (b, n, ...) for the new ones, each from its own row and those before. At padding it means nothing.
        """
        past = new.new_zeros(len(new), self.back, new.shape[-1]) if self.rows is None else self.rows
        if attention_mask is None:
            rows = torch.cat([past, new], 1)
            self.rows = rows[:, rows.shape[1] - self.back :].clone()  # so that the rest is freed
            return f(rows)
        real = attention_mask.bool()
        order = (~real).int().argsort(dim=1, stable=True)  # tokens, then padding: what is before a token is then its past
        rows = torch.cat([past, _taken(new, order)], 1)
        self.rows = _taken(rows, real.sum(1, keepdim=True) + torch.arange(self.back, device=new.device))
        return _taken(f(rows), order.argsort(1))


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (b, r) of (b, n, ...): (b, r, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], rows]
