"""DiagAttention: attention within blocks of tokens that stand one after the other, whatever padding lies between."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...attention.stage import Stage
from ...errors import ShapeError
from ...stages.documents import Documents
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens
from .._states import begin
from ._carried import CarryCache, Pieces
from ._lightning import NormMaps


class DiagAttention(Mixer):
    """Attention within blocks of so many tokens, one after the other. Its cost a token does not depend on how many there are."""

    bounded = True

    def __init__(self, width: int, heads: int, kind: str, block: int) -> None:
        super().__init__()
        self.width, self.heads, self.kind, self.block = width, heads, kind, block
        self.maps = NormMaps(width, heads, 1.0)

    def forward(self, x: Tokens, *stages: Stage, cache: CarryCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        if any(isinstance(stage, Documents) for stage in stages):
            raise ShapeError("blocks are cut from the first token on, so documents packed into a row are not told apart")
        now = begin(self.new_cache() if cache is None else cache, x, stages, attention_mask)
        blocks = Pieces.of(now, self.block)
        q, k, v = self.maps.split(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(self.block, device=x.device)
        queries, keys, values = blocks.cut(q), blocks.cut(k, "k"), blocks.cut(v, "v")
        scores = q.shape[-1] ** -0.5 * self.maps.lrpe(queries, at) @ self.maps.lrpe(keys, at).mT
        seen = blocks.seen
        if now.causal:
            seen = seen & (at[:, None] >= at)
        if self.kind == "T1":
            weights = F.relu(scores).masked_fill(~seen, 0.0)
        else:  # a block without any token reads all of its zeros
            weights = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf).softmax(-1)
        return self.maps.merge(blocks.joined(weights @ values.to(wide)), x, normed=self.kind == "T1")

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding: keys and values of the block that has begun, with room for a whole one."""
        return CarryCache()
