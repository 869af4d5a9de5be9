"""What every mechanism and mixer is, and the parts that mixers are built from: projections, and what is kept of past tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention import attend
from ..attention.stage import Stage
from ..errors import ShapeError

Queries: TypeAlias = Float[Tensor, "b hq n d"]
Keys: TypeAlias = Float[Tensor, "b hk m d"]
Values: TypeAlias = Float[Tensor, "b hk m dv"]
Outputs: TypeAlias = Float[Tensor, "b hq n dv"]
Tokens: TypeAlias = Float[Tensor, "b n width"]
Real: TypeAlias = Bool[Tensor, "b n"]


class Positions(TypedDict, total=False):
    """Where queries and keys stand, as in `headwise.attend`; in order where they are not given."""

    query_positions: Int[Tensor, "... n"] | None
    key_positions: Int[Tensor, "... m"] | None


def largest(difference: Tensor) -> float:
    """The largest magnitude in a tensor: how far off something is."""
    return float(difference.detach().abs().max())


class Mechanism(nn.Module, ABC):
    """How queries read keys and values.

    past_queries: how many queries before the first new one its reading needs (0 for all that read row by row); a mixer
    then keeps them and gives them along, as the first rows of q.
    """

    past_queries: int = 0

    @abstractmethod
    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """Reads as `headwise.attend` does, with the same conventions; `stages` are the caller's, such as Causal()."""


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
        return Positions(query_positions=self.query_positions, key_positions=self.key_positions)


class KeyValues:
    """What a mixer keeps of the tokens it has read: keys, values, places, and the last queries if its mechanism asks.

    Padding keeps its slot, with a place of -1 that nobody reads; places count tokens only.
    """

    def __init__(self, past_queries: int = 0) -> None:
        self.past_queries = past_queries
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.positions: Tensor | None = None  # (b, m); None while there was no padding

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.q, self.k, self.v) if t is not None)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Real | None = None) -> Seen:
        """Adds new tokens and returns what they may read. attention_mask: 0 at those that are padding."""
        places = self._places(k, attention_mask)
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        if self.past_queries and self.q is not None:
            q = torch.cat([self.q, q], 2)
        self.k, self.v, self.positions = k, v, places
        if self.past_queries:
            self.q = q[:, :, -self.past_queries :]
        own = None if places is None else places[:, places.shape[1] - q.shape[2] :]
        return Seen(q, k, v, own, places)

    def _places(self, k: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """(b, m) places after the new tokens; None while nothing is padding."""
        if attention_mask is None and self.positions is None:
            return None
        b, n, before = k.shape[0], k.shape[2], len(self)
        if attention_mask is None:
            attention_mask = torch.ones(b, n, dtype=torch.bool, device=k.device)
        if attention_mask.shape != (b, n):
            raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}, the new tokens are (batch, tokens) = {(b, n)}")
        there = attention_mask.bool()
        past = torch.arange(before, device=k.device).expand(b, -1) if self.positions is None else self.positions
        counted = (past >= 0).sum(1, keepdim=True) + there.cumsum(1) - 1
        return torch.cat([past, torch.where(there, counted, -1)], 1)


class Mixer(nn.Module, ABC):
    """A token-mixing module with its own projections: x (b, n, width) -> (b, n, width)."""

    width: int

    @abstractmethod
    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """Mixes tokens.

        stages: masks and the like, such as Causal(). cache: what was kept of earlier tokens, from `new_cache`; it is
        extended. attention_mask: of the given tokens, 1 for tokens and 0 for padding, as in transformers.
        """

    @abstractmethod
    def new_cache(self) -> KeyValues:
        """An empty cache for decoding."""


class Projections(nn.Module):
    """The four linear maps around attention: to queries, keys and values, and back."""

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError(f"{heads} query heads are no multiple of {self.kv_heads} key/value heads")
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        self.head_dim = width // heads if head_dim is None else head_dim
        self.q = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, width, bias=bias)

    def split(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, n, d), keys and values (b, hk, n, d)."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def merge(self, out: Float[Tensor, "b h n d"]) -> Tokens:
        """What the heads read, mapped back."""
        merged: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return merged


class Attention(Mixer):
    """Multi-head attention around any mechanism: plain softmax attention without one.

    Args:
        heads: query heads. kv_heads: key/value heads; fewer than `heads` are shared by groups. head_dim: default width / heads.
        mechanism: a `Mechanism`, or any function called as `headwise.attend` is.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mechanism: Mechanism | None = None,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim, bias)
        self.mechanism = mechanism

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        seen = (self.new_cache() if cache is None else cache).extend(*self.projections.split(x), attention_mask)
        read: Callable[..., Tensor] = self.mechanism or attend
        out = read(seen.q, seen.k, seen.v, *stages, **seen.places)
        return self.projections.merge(out[:, :, -x.shape[1] :])

    def new_cache(self) -> KeyValues:
        """An empty cache for decoding."""
        return KeyValues(self.mechanism.past_queries if self.mechanism is not None else 0)
