"""Memories that learn at test time: small networks of each row and head, whose weights tokens change by gradients.

Within a chunk all gradients are taken at the weights before it; all else is exact. A token's gradient of a layer's weights is
an outer product, so that what a chunk has changed is read like attention, and weights of each token need not be made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...attention.stage import Stage
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Real, Tokens
from .._states import Pass, StateCache, begin

Held: TypeAlias = tuple[Tensor, ...]
# What a block of tokens (b, r, c) reads, given what is held before it, and how to get what is held after it
Run: TypeAlias = Callable[[Tensor, Held], tuple[Tensor, Callable[[], Held]]]
EPSILON = 1e-5  # of the layer norm in a memory


class MemoryCache(StateCache):
    """What is held at the start of the block of tokens that has begun, and the rows of that block.

    ahead: tokens of the mixer's own that it reads before the text, which `len` does not count. attention: of the mixer's
    attention, if it has one.
    """

    def __init__(self, ahead: int = 0, attention: Cache | None = None) -> None:
        super().__init__()
        self.ahead, self.attention = ahead, attention
        self.held: dict[str, Held] = {}
        self.pending: dict[str, Tensor] = {}  # (b, size of a block, channels)

    def __len__(self) -> int:
        return max(0, self.total - self.ahead)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        inner = () if self.attention is None else self.attention.tensors()
        return (*super().tensors(), *itertools.chain(*self.held.values()), *self.pending.values(), *inner)


def begin_causal(cache: MemoryCache, x: Tokens, stages: tuple[Stage, ...], attention_mask: Real | None) -> Pass:
    """What a call knows; the cache counts its tokens.

    Raises: ShapeError for other stages than Causal, or a mask of another shape.
    """
    other = [stage for stage in stages if not isinstance(stage, Causal)]
    if other or not stages:
        raise ShapeError(f"a memory learns from what came before: give it Causal() alone, not {other or 'nothing'}")
    return begin(cache, x, stages, attention_mask)


def in_blocks(x: Float[Tensor, "b n c"], now: Pass, size: int, start: Held, run: Run, name: str = "") -> Float[Tensor, "b n c2"]:
    """What tokens read, in blocks of `size` counted from each row's first token; padding is no token.

    start: what is held before the first block. The block that has begun is run again when it goes on: the cache holds its rows.
    name: of what is held in the cache, where a mixer reads several in blocks.
    """
    cache = now.cache
    assert isinstance(cache, MemoryCache)
    b, n, width = x.shape
    held = cache.held[name] if name in cache.held else tuple(t.clone() for t in start)
    pending = cache.pending[name] if name in cache.pending else x.new_zeros(b, size, width)
    there = torch.ones(b, n, dtype=torch.bool, device=x.device) if now.real is None else now.real
    before = (now.count % size)[:, None]
    ends = before + there.sum(1, keepdim=True)
    longest = max(1, int(ends.max()))
    slots = torch.arange((longest // size + 2) * size, device=x.device)[None]
    order = (~there).int().argsort(dim=1, stable=True)  # tokens, then padding
    new = _rows(_rows(x, order), (slots - before).clamp(0, n - 1))
    laid = new.where(((slots >= before) & (slots < ends))[..., None], 0.0)
    laid = torch.cat([pending.where((slots[:, :size] < before)[..., None], laid[:, :size]), laid[:, size:]], 1)
    outs = []
    for at in range(0, longest, size):
        out, after = run(laid[:, at : min(at + size, longest)], held)
        outs.append(out)
        if at + size <= longest:
            full = (ends >= at + size)[:, 0]
            held = tuple(
                t.where(full.view(-1, *[1] * (t.dim() - 1)), old).contiguous() for t, old in zip(after(), held, strict=True)
            )
    cache.held[name] = held
    cache.pending[name] = _rows(laid, ends // size * size + torch.arange(size, device=x.device))
    return _rows(torch.cat(outs, 1), (before + there.cumsum(1) - 1).clamp(min=0))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (b, r) of (b, n, c): (b, r, c)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def spans(logs: Float[Tensor, "b h n o"]) -> Float[Tensor, "b h n n o"]:
    """[t, j]: exp of the sum of logs after j, up to t; 0 for j after t. Sums are made one by one, so that nothing cancels."""
    at = torch.arange(logs.shape[2], device=logs.device)
    after = at[:, None] > at
    sums = logs[:, :, :, None].where(after[..., None], 0.0).cumsum(2)
    return sums.exp().where((at[:, None] >= at)[..., None], 0.0)


class Layer(NamedTuple):
    """The weights of one layer in a chunk of n tokens: kept_t * start + carried_t * momentum - sum over j of past_tj a_j g_j^T.

    start, momentum: (b, h, i, o). a: (b, h, n, i) what the layer was given at each key; g: (b, h, n, o) the gradient at what it
    gave. kept: (b, h, n, o), carried: (b, h, n, 1), past: (b, h, n, n, o); o may be one number for all channels.
    """

    start: Tensor
    a: Tensor
    g: Tensor
    kept: Tensor
    past: Tensor
    momentum: Tensor | None = None
    carried: Tensor | None = None

    def times(self, z: Float[Tensor, "b h n i"]) -> Float[Tensor, "b h n o"]:
        """z_t W_t, without making W_t."""
        out = self.kept * (z @ self.start)
        if self.momentum is not None:
            assert self.carried is not None
            out = out + self.carried * (z @ self.momentum)
        near = z @ self.a.mT
        if self.past.shape[-1] == 1:
            return out - (near * self.past[..., 0]) @ self.g
        return out - torch.einsum("bhtjo,bhjo->bhto", near[..., None] * self.past, self.g)

    def each(self) -> Float[Tensor, "b h n i o"]:
        """W_t of every token; without momentum."""
        learned = torch.einsum("bhtjo,bhji->bhtio", self.past * self.g[:, :, None], self.a)
        return self.kept[..., None, :] * self.start[:, :, None] - learned

    def last(self) -> Float[Tensor, "b h i o"]:
        """W_t of the last token."""
        out = self.kept[:, :, -1:] * self.start - self.a.mT @ (self.past[:, :, -1] * self.g)
        if self.momentum is not None:
            assert self.carried is not None
            out = out + self.carried[:, :, -1:] * self.momentum
        return out


@dataclass(frozen=True)
class Network:
    """A memory: x W_1, or GELU between more layers, W_1 (size, expand * size) to W_L (expand * size, size).

    residual: x + layer norm of that, without weights of its own.
    """

    size: int
    depth: int = 2
    expand: int = 4
    residual: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1 or self.expand < 1:
            raise ShapeError(
                f"a memory of depth {self.depth} that expands {self.expand} times has no weights; both must be 1 or more"
            )

    def start(self, heads: int) -> nn.ParameterList:
        """Weights to begin with, which are learned outside. Keys are of length one, so the first are not made smaller."""
        inner = self.expand * self.size
        sizes = [self.size, *[inner] * (self.depth - 1), self.size]
        scales = [1.0, *[inner**-0.5] * (self.depth - 1)]
        pairs = zip(scales, sizes, sizes[1:], strict=False)
        return nn.ParameterList([nn.Parameter(torch.randn(heads, i, o) * scale) for scale, i, o in pairs])

    def run(self, x: Tensor, products: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """What it gives for x, (..., size). products: of each layer, z to z W."""
        z = x
        for number, product in enumerate(products):
            z = product(F.gelu(z) if number else z)
        return x + _normed(z)[0] if self.residual else z

    def signals(self, weights: Sequence[Tensor], k: Tensor, slope: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each layer what it was given and the gradient at what it gave, a and g: the gradient of its weights is a g^T.

        slope: from what the memory gives at k to the loss's gradient there.
        """
        given, before, z = [], [], k
        for number, weight in enumerate(weights):
            before.append(z)
            given.append(F.gelu(z) if number else z)
            z = given[-1] @ weight
        if self.residual:
            normed, scale = _normed(z)
            g = slope(k + normed)
            g = (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * scale
        else:
            g = slope(z)
        found = []
        for number in reversed(range(len(weights))):
            found.append((given[number], g))
            if number:
                z = before[number]
                bell = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
                g = (g @ weights[number].mT) * (0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * bell)
        return found[::-1]


def clipped(a: Float[Tensor, "b h n i"], g: Float[Tensor, "b h n o"], largest: float) -> Float[Tensor, "b h n o"]:
    """g, made smaller where the norm of a g^T is more than the largest."""
    norms = a.square().sum(-1, keepdim=True) * g.square().sum(-1, keepdim=True)
    return g * (largest * norms.clamp(min=largest**2).rsqrt())


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / deviation, and one over the deviation."""
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)
    return centred * scale, scale
