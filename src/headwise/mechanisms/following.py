"""Mixers that read what an earlier layer has kept: its keys and values, or its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..attention import attend
from ..attention.stage import Stage
from ..errors import InputError, ShapeError
from ._caches import Cache, KeyValues, Seen
from ._mixer import Mixer, Outputs, Queries, Real, Tokens
from ._rotary import Rotary

ALONE = "follows another layer's cache; run it in a stack, whose `follows` names that layer"


class Followed(Cache):
    """What a follower keeps: nothing, but where the other layer's cache is."""

    def __init__(self, owner: KeyValues) -> None:
        self.owner = owner
        owner.followed = True

    def __len__(self) -> int:
        return len(self.owner)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return ()

    @property
    def read(self) -> Seen:
        """What the owner has read in this pass.

        Raises: InputError if it has not read yet.
        """
        if self.owner.seen is None:
            raise InputError("a layer can follow another one only after that has read, in the same pass")
        return self.owner.seen

    def attend(self, q: Queries, stages: tuple[Stage, ...], rotary: Rotary | None) -> Outputs:
        """What new queries read of the owner's keys and values, at the places that it gave their tokens."""
        seen, n, total = self.read, q.shape[2], len(self)
        own = None if seen.query_positions is None else seen.query_positions[:, -n:]
        if rotary is not None:
            q = rotary(q, torch.arange(total - n, total, device=q.device) if own is None else own.clamp(min=0))
        return attend(q, seen.k, seen.v, *stages, query_positions=own, key_positions=seen.key_positions)


class FollowedWeights(Followed):
    """What a follower of weights keeps: its own values, slot for slot as the other layer's keys."""

    def __init__(self, owner: KeyValues) -> None:
        super().__init__(owner)
        self.v: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.v,)

    def extend(self, v: Tensor) -> Tensor:
        """All values, after new ones were added."""
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        return self.v


def root_of(owner: Cache | None, what: str) -> KeyValues:
    """The cache that holds the keys and values which followers of `owner` read."""
    if isinstance(owner, Followed):
        return owner.owner
    if not isinstance(owner, KeyValues):
        raise InputError(f"{what} {ALONE}")
    return owner


class KeyFollower(Mixer):
    """Attention with queries of its own on the keys and values that another layer has kept; it keeps none.

    Args:
        heads, head_dim: of the queries. The other layer's key/value heads may be fewer.
    """

    rotates = True
    follows = True

    def __init__(self, width: int, heads: int, *, head_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        self.width, self.heads = width, heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.q = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, width, bias=bias)

    def forward(self, x: Tokens, *stages: Stage, cache: Followed | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`.

        Raises: InputError without a cache of another layer.
        """
        if cache is None:
            raise InputError(f"{type(self).__name__} {ALONE}")
        out = cache.attend(self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), stages, self.rotary)
        made: Tokens = self.out(out.transpose(1, 2).flatten(2))
        return made

    def new_cache(self, owner: Cache | None = None) -> Followed:
        """A view of another layer's cache."""
        return Followed(root_of(owner, type(self).__name__))


class WeightFollower(Mixer):
    """Attention with values of its own by the weights of another layer, whose queries and keys it reads; it keeps values only.

    Args:
        heads: of the other layer's queries; its masks are its own, and must be given to this layer too. kv_heads: of its keys.
    """

    follows = True

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        self.width, self.heads, self.kv_heads = width, heads, heads if kv_heads is None else kv_heads
        self.head_dim = width // heads if head_dim is None else head_dim
        self.v = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, width, bias=bias)

    def forward(
        self, x: Tokens, *stages: Stage, cache: FollowedWeights | None = None, attention_mask: Real | None = None
    ) -> Tokens:
        """See `Mixer.forward`.

        Raises: InputError without a cache of another layer. ShapeError if that has other numbers of heads, or has let tokens go.
        """
        if cache is None:
            raise InputError(f"{type(self).__name__} {ALONE}")
        seen = cache.read
        v = cache.extend(self.v(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2))
        if seen.q.shape[1] != self.heads or seen.k.shape[1:3] != v.shape[1:3]:
            raise ShapeError(
                f"values {tuple(v.shape)} of {self.heads} heads do not fit the other layer's queries {tuple(seen.q.shape)} and "
                f"keys {tuple(seen.k.shape)}"
            )
        out = attend(seen.q, seen.k, v, *stages, **seen.places)[:, :, -x.shape[1] :]
        made: Tokens = self.out(out.transpose(1, 2).flatten(2))
        return made

    def new_cache(self, owner: Cache | None = None) -> FollowedWeights:
        """Values, beside another layer's cache."""
        return FollowedWeights(root_of(owner, type(self).__name__))
