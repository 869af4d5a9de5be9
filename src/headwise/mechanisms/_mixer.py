"""What every mechanism and mixer is, and the parts that mixers are built from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention import attend
from ..attention.stage import Stage
from ..errors import ShapeError
from ._caches import Cache, KeyValues
from ._rotary import Rotary

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


def shake(parameters: Iterable[Tensor], seed: int, by: float = 0.3) -> None:
    """Adds noise to parameters, one generator for all of them: what starts at zero or one is then off its start in examples."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


class Mechanism(nn.Module, ABC):
    """How queries read keys and values.

    past_queries: how many queries before the first new one its reading needs (0 for all that read row by row); a mixer
        then keeps them and gives them along, as the first rows of q.
    positional: tells places apart itself, so that queries and keys are not rotated for it.
    cannot: what it can't do, each with the reason in words: "causal", "full" (reading both sides), "padding", "decode".
    """

    past_queries: int = 0
    positional: bool = False
    cannot: Mapping[str, str] = {}

    @abstractmethod
    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """Reads as `headwise.attend` does, with the same conventions; `stages` are the caller's, such as Causal()."""


class Mixer(nn.Module, ABC):
    """A token-mixing module with its own projections: x (b, n, width) -> (b, n, width).

    rotary: rotates queries and keys by their places, if its reading is a product of queries and keys and `rotates`; None for
        no rotation, as it is built.
    follows: reads what another layer has kept; its caches are made of that layer's.
    bounded: the bytes of its cache do not grow with the tokens read.
    cannot: what it can't do, each with the reason in words: "causal", "full" (reading both sides), "padding", "decode".
    """

    width: int
    rotates: bool = False
    rotary: Rotary | None = None
    follows: bool = False
    bounded: bool = False
    cannot: Mapping[str, str] = {}

    @abstractmethod
    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """Mixes tokens.

        stages: masks and the like, such as Causal(). cache: what was kept of earlier tokens, from `new_cache`; it is
        extended. attention_mask: of the given tokens, 1 for tokens and 0 for padding, as in transformers.
        """

    @abstractmethod
    def new_cache(self, owner: Cache | None = None) -> Cache:
        """An empty cache for decoding. owner: the cache of the layer that it follows, if it `follows` one."""


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
        mechanism: a `Mechanism`, or any function called as `headwise.attend` is. rotary: rotates queries and keys.
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
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim, bias)
        self.mechanism = mechanism
        self.rotary = rotary
        self.rotates = not getattr(mechanism, "positional", False)
        self.cannot = getattr(mechanism, "cannot", self.cannot)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        seen = (self.new_cache() if cache is None else cache).extend(*self.projections.split(x), attention_mask, self.rotary)
        read: Callable[..., Tensor] = self.mechanism or attend
        out = read(seen.q, seen.k, seen.v, *stages, **seen.places)
        return self.projections.merge(out[:, :, -x.shape[1] :])

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding."""
        return KeyValues(getattr(self.mechanism, "past_queries", 0))
