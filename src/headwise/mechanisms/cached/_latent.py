"""Latents: one vector a token of which layers make keys and values, kept whole or as four bits a channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Output, Stage
from ...errors import InputError, ShapeError
from .._caches import Cache, KeyValues, Seen
from .._mixer import Mixer, Positions, Real, Tokens
from ..following import ALONE, Followed, root_of

LEVELS = 7  # of each sign


@dataclass(frozen=True)
class FourBits:
    """Integers from -7 to 7 times a scale for each group of channels, its largest magnitude / 7; two to a byte.

    Off by half a scale at most. group: channels that share a scale; the last group may be smaller.
    """

    group: int = 64

    def encode(self, x: Float[Tensor, "... c"]) -> tuple[UInt8[Tensor, "... bytes"], Float[Tensor, "... groups"]]:
        """Bytes, ceil(c / 2) a vector, the even channel in the lower half; and scales, in the dtype of x."""
        spare = -x.shape[-1] % self.group
        largest = F.pad(x.abs(), (0, spare)).unflatten(-1, (-1, self.group)).amax(-1)
        scales = largest / LEVELS
        wide = torch.promote_types(x.dtype, torch.float32)  # by the scales that are kept: they are rounded in half precision
        steps = self._of_channels(scales, x.shape[-1]).to(wide)
        codes = (x.to(wide) / steps.where(steps > 0, 1.0)).round().clamp(-LEVELS, LEVELS) + LEVELS + 1
        codes = F.pad(codes.to(torch.uint8), (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2))
        return codes[..., 0] | (codes[..., 1] << 4), scales

    def decode(self, packed: UInt8[Tensor, "... bytes"], scales: Float[Tensor, "... groups"], size: int) -> Float[Tensor, "... c"]:
        """What is left of vectors of `size` channels."""
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :size]
        return (codes.to(scales.dtype) - (LEVELS + 1)) * self._of_channels(scales, size)

    def _of_channels(self, scales: Float[Tensor, "... groups"], size: int) -> Float[Tensor, "... c"]:
        return scales.repeat_interleave(self.group, -1)[..., :size]


class _Through(torch.autograd.Function):
    """What is left after rounding, with the gradient of what was there before."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, left: Tensor) -> Tensor:
        return left.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class Latents(KeyValues):
    """Latents and the rotated keys beside them, of the first layer of a group; the others follow it.

    k: (b, 1, slots, rank) latents, or their bytes. v: (b, 1, slots, rotary_dim) keys, after the scales of four bits.
    """

    def __init__(self, codec: FourBits | None) -> None:
        super().__init__()
        self.codec = codec

    def add(self, q: Tensor, latent: Float[Tensor, "b 1 n r"], turned: Float[Tensor, "b 1 n dr"], mask: Real | None) -> Seen:
        """Keeps new tokens, and gives all: latents as they are kept for k, rotated keys for v; also to those that follow."""
        if self.codec is None:
            return self.extend(q, latent, turned, mask)
        size, n = latent.shape[-1], latent.shape[2]
        packed, scales = self.codec.encode(latent.detach())
        seen = self.extend(q, packed, torch.cat([scales, turned], -1), mask)
        groups = scales.shape[-1]
        left = self.codec.decode(seen.k, seen.v[..., :groups].detach(), size)
        if latent.requires_grad:
            new: Tensor = _Through.apply(latent, left[:, :, -n:])  # type: ignore[no-untyped-call]
            left = torch.cat([left[:, :, :-n], new], 2)
        seen = seen._replace(k=left, v=seen.v[..., groups:])
        self.seen = seen if self.followed else None
        return seen


class LatentAttention(Mixer):
    """Attention whose heads make keys and values of a latent that a group of layers shares, each layer by maps of its own.

    k_h = [c W_UK^h, k^R], v_h = c W_UV^h, q_h = [q^C_h, q^R_h], scores q_h k_h / sqrt(head_dim + rotary_dim); q^R and k^R are
    rotated by their places, if the stack rotates, and k^R is one for all heads.

    Args:
        heads, head_dim: of queries, keys and values. rank: of the latent c. rotary_dim: of q^R and k^R, even; 0 for none.
    Attributes:
        absorbed: whether maps to keys and values act on queries and outputs instead of on all latents, which is the same
            up to rounding; None for what takes fewer multiply-adds: yes for few new tokens.
    """

    def __init__(self, width: int, heads: int, rank: int, *, head_dim: int | None = None, rotary_dim: int = 0) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        if rank < 1 or rotary_dim < 0 or rotary_dim % 2:
            raise ShapeError(f"a latent of {rank} channels, {rotary_dim} that are rotated; give 1 at least, and pairs")
        self.width, self.heads, self.rank, self.rotary_dim = width, heads, rank, rotary_dim
        self.head_dim = width // heads if head_dim is None else head_dim
        self.rotates = rotary_dim > 0
        self.absorbed: bool | None = None
        self.q = nn.Linear(width, heads * (self.head_dim + rotary_dim), bias=False)
        self.to_keys = nn.Linear(rank, heads * self.head_dim, bias=False)
        self.to_values = nn.Linear(rank, heads * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)

    def queries(self, x: Tokens, at: Tensor) -> Float[Tensor, "b h n d"]:
        """[q^C, q^R], the latter rotated by places (b or 1, n)."""
        q: Tensor = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return torch.cat([q[..., : self.head_dim], self.turned(q[..., self.head_dim :], at)], -1)

    def turned(self, x: Float[Tensor, "b h n dr"], at: Tensor) -> Float[Tensor, "b h n dr"]:
        """Rotated, if it is at all."""
        return x if self.rotary is None or not self.rotary_dim else self.rotary(x, at)

    def read(
        self, q: Float[Tensor, "b h n d"], c: Float[Tensor, "b 1 m r"], turned: Tensor, stages: tuple[Stage, ...], places: Positions
    ) -> Tokens:
        """What queries read of latents and rotated keys (b, 1, m, rotary_dim), mapped back."""
        d, n, m, scale = self.head_dim, q.shape[2], c.shape[2], q.shape[-1] ** -0.5
        to_keys, to_values = (f.weight.unflatten(0, (self.heads, d)) for f in (self.to_keys, self.to_values))
        if self._absorb(n, m, stages):
            q = torch.cat([q[..., :d] @ to_keys, q[..., d:]], -1)
            out = attend(q, torch.cat([c, turned], -1), c, *stages, scale=scale, **places) @ to_values.mT
        else:
            k, v = c @ to_keys.mT, c @ to_values.mT
            k = torch.cat([k, turned.expand(-1, self.heads, -1, -1)], -1)
            out = attend(q, k, v, *stages, scale=scale, **places)
        made: Tokens = self.out(out.transpose(1, 2).flatten(2))
        return made

    def _absorb(self, n: int, m: int, stages: tuple[Stage, ...]) -> bool:
        if any(isinstance(stage, Output) for stage in stages):
            return False  # they change what heads have read of values
        if self.absorbed is not None:
            return self.absorbed
        r, d = self.rank, self.head_dim
        return 2 * n * r * d + n * m * 2 * r < 2 * m * r * d + n * m * 2 * d


class LatentProducer(LatentAttention):
    """The first layer of a group: makes the latent and the rotated key, and keeps them.

    Args:
        codec: what the latent is kept as; also without a cache, with the gradient of the latent itself. norm: RMS-norms the
            latent. Others: as for `LatentAttention`.
    """

    def __init__(
        self, width: int, heads: int, rank: int, *, head_dim: int | None = None, rotary_dim: int = 0,
        codec: FourBits | None = None, norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, rank, head_dim=head_dim, rotary_dim=rotary_dim)
        self.codec = codec
        self.down = nn.Linear(width, rank + rotary_dim, bias=False)
        self.norm = nn.RMSNorm(rank, eps=1e-6) if norm else nn.Identity()

    def forward(self, x: Tokens, *stages: Stage, cache: Latents | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        at = cache.next_places(x, attention_mask).clamp(min=0)
        made = self.down(x)[:, None]
        q, turned = self.queries(x, at), self.turned(made[..., self.rank :], at)
        seen = cache.add(q, self.norm(made[..., : self.rank]), turned, attention_mask)
        return self.read(q, seen.k, seen.v, stages, seen.places)

    def new_cache(self, owner: Cache | None = None) -> Latents:
        """An empty cache for decoding."""
        return Latents(self.codec)


class LatentFollower(LatentAttention):
    """A later layer of a group: reads the latents of the first one by maps of its own, and keeps nothing."""

    follows = True

    def forward(self, x: Tokens, *stages: Stage, cache: Followed | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`.

        Raises: InputError without a cache of another layer.
        """
        if cache is None:
            raise InputError(f"{type(self).__name__} {ALONE}")
        seen, n = cache.read, x.shape[1]
        own = seen.query_positions
        at = torch.arange(len(cache) - n, len(cache), device=x.device)[None] if own is None else own.clamp(min=0)
        return self.read(self.queries(x, at), seen.k, seen.v, stages, seen.places)

    def new_cache(self, owner: Cache | None = None) -> Followed:
        """A view of another layer's cache.

        Raises: InputError if that keeps no latents.
        """
        root = root_of(owner, type(self).__name__)
        if not isinstance(root, Latents):
            raise InputError(f"{type(self).__name__} reads latents; the layer it follows keeps {type(root).__name__}")
        return Followed(root)
