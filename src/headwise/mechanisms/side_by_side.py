"""Several mixers in one layer, each with some of its heads: linear, window and full attention side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.stage import Stage
from ..errors import ShapeError
from ._caches import Cache
from ._mixer import Mixer, Real, Tokens


class Several(Cache):
    """The caches of the parts."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = list(caches)

    def __len__(self) -> int:
        return len(self.caches[0])

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (tensor for cache in self.caches for tensor in cache.tensors())


class SideBySide(Mixer):
    """Tokens are mapped once, each part mixes channels of its own, and what they give stands side by side.

    Args:
        parts: mixers, the first channels for the first; their widths add up to the layer's. stages: what each part is given
            besides the layer's own, such as [(), (Window(64),)]; none by default.
    """

    def __init__(self, parts: Sequence[Mixer], stages: Sequence[Sequence[Stage]] | None = None) -> None:
        super().__init__()
        if not parts or any(part.follows for part in parts):
            raise ShapeError("give one mixer at least, and none that follows another layer")
        self.stages = [tuple(each) for each in stages] if stages is not None else [()] * len(parts)
        if len(self.stages) != len(parts):
            raise ShapeError(f"stages for {len(self.stages)} parts; there are {len(parts)}")
        self.widths = [part.width for part in parts]
        self.width = sum(self.widths)
        self.inward = nn.Linear(self.width, self.width, bias=False)
        self.parts = nn.ModuleList(parts)
        self.rotates = any(part.rotates for part in parts)
        self.bounded = all(part.bounded for part in parts)
        self.cannot = {what: why for part in parts for what, why in part.cannot.items()}

    def forward(self, x: Tokens, *stages: Stage, cache: Several | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        outs = []
        for number, (part, own) in enumerate(zip(self.turning(), self.inward(x).split(self.widths, -1), strict=True)):
            kept = None if cache is None else cache.caches[number]
            outs.append(part(own, *stages, *self.stages[number], cache=kept, attention_mask=attention_mask))
        return torch.cat(outs, -1)

    def turning(self) -> list[Mixer]:
        """The parts, those that rotate with the layer's rotary embedding."""
        parts: Any = self.parts
        for part in parts:
            part.rotary = self.rotary if part.rotates else None
        return list(parts)

    def new_cache(self, owner: Cache | None = None) -> Several:
        """An empty cache of each part."""
        parts: Any = self.parts
        return Several([part.new_cache() for part in parts])
