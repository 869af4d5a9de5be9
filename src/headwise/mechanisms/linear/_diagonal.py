"""DiagAttention: attention within blocks of tokens that stand one after the other, whatever padding lies between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from ...attention.stage import Stage
from ...errors import ShapeError
from ...stages.documents import Documents
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens
from .._states import Pass, StateCache, begin
from ._lightning import NormMaps


class BlockCache(StateCache):
    """Keys and values of the block that has begun, with room for a whole one: bytes do not grow with the tokens read."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.k, self.v)


@dataclass
class Blocks:
    """The slots of the blocks that new tokens fall into, counting real tokens only; (b, slots), a multiple of a block.

    filled: whether a slot holds a token, an earlier one included. old: those that hold earlier ones. Slots (b, n): of each token.
    """

    size: int
    filled: Bool[Tensor, "b slots"]
    old: Bool[Tensor, "b slots"]
    source: Tensor  # (b, slots) the new token in each
    slots: Tensor
    kept: Tensor  # (b, size) the slots of the block that goes on after the last token

    @staticmethod
    def of(now: Pass, size: int) -> Blocks:
        """The blocks of a call's tokens."""
        b, n = now.places.shape
        device = now.places.device
        there = torch.ones(b, n, dtype=torch.bool, device=device) if now.real is None else now.real
        inside = now.count % size  # tokens of the first block that were read before
        count = -(-(n + size - 1) // size) * size
        slot = torch.arange(count, device=device)[None]
        order = (~there).int().argsort(dim=1, stable=True)  # tokens, then padding
        total = inside + there.sum(1)
        source = order.gather(1, (slot - inside[:, None]).clamp(0, n - 1))
        slots = (now.places - (now.count - inside)[:, None]).clamp(0, count - 1)
        kept = (total // size * size)[:, None] + torch.arange(size, device=device)
        return Blocks(size, slot < total[:, None], slot < inside[:, None], source, slots, kept)

    def cut(self, new: Tensor, earlier: Tensor | None) -> Tensor:
        """(b, h, n, d) and (b, h, size, d) of the first block -> (b, h, blocks, size, d), zeros where nothing is filled."""
        at = self.source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[-1])
        rows = new.gather(2, at)
        if earlier is not None:
            before = torch.cat([earlier, rows[:, :, self.size :]], 2)
            rows = before.where(self.old[:, None, :, None], rows)
        return rows.where(self.filled[:, None, :, None], 0.0).unflatten(2, (-1, self.size))

    def joined(self, cut: Tensor) -> Tensor:
        """What each new token has of (b, h, blocks, size, d): (b, h, n, d)."""
        flat = cut.flatten(2, 3)
        return flat.gather(2, self.slots[:, None, :, None].expand(-1, flat.shape[1], -1, flat.shape[-1]))

    def last(self, cut: Tensor) -> Tensor:
        """The block that goes on, (b, h, size, d), zeros in slots that are not filled yet."""
        flat = cut.flatten(2, 3)
        flat = torch.cat([flat, torch.zeros_like(flat[:, :, : self.size])], 2)
        return flat.gather(2, self.kept[:, None, :, None].expand(-1, flat.shape[1], -1, flat.shape[-1]))


class DiagAttention(Mixer):
    """Attention within blocks of so many tokens, one after the other. Its cost a token does not depend on how many there are."""

    bounded = True

    def __init__(self, width: int, heads: int, kind: str, block: int) -> None:
        super().__init__()
        self.width, self.heads, self.kind, self.block = width, heads, kind, block
        self.maps = NormMaps(width, heads, 1.0)

    def forward(self, x: Tokens, *stages: Stage, cache: BlockCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        if any(isinstance(stage, Documents) for stage in stages):
            raise ShapeError("blocks are cut from the first token on, so documents packed into a row are not told apart")
        cache = self.new_cache() if cache is None else cache
        now = begin(cache, x, stages, attention_mask)
        blocks = Blocks.of(now, self.block)
        q, k, v = self.maps.split(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(self.block, device=x.device)
        keys, values = blocks.cut(k, cache.k), blocks.cut(v, cache.v)
        cache.k, cache.v = blocks.last(keys), blocks.last(values)
        queries = blocks.cut(q, None)
        scores = q.shape[-1] ** -0.5 * self.maps.lrpe(queries, at) @ self.maps.lrpe(keys, at).mT
        seen = blocks.filled.unflatten(1, (-1, self.block))[:, None, :, None, :]
        if now.causal:
            seen = seen & (at[:, None] >= at)
        if self.kind == "T1":
            weights = F.relu(scores).masked_fill(~seen, 0.0)
        else:  # a block without any token reads all of its zeros
            weights = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf).softmax(-1)
        return self.maps.merge(blocks.joined(weights @ values.to(wide)), x, normed=self.kind == "T1")

    def new_cache(self, owner: Cache | None = None) -> BlockCache:
        """An empty cache for decoding."""
        return BlockCache(self.block)
