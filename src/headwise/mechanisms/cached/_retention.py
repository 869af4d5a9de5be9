"""Tokens that leave a window: scores of which are worth keeping, a bank of the best, and the mask that this makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention.mask import FAR, Mask
from ...attention.stage import Places
from ...errors import ShapeError
from .._caches import Cache

TAPS = 3


class Router(nn.Module):
    """How much each token is worth keeping to a key/value head: a small network over the keys and values around it.

    Convolutions of three taps halve the channels each time, SiLU after each, then a linear map to one number; heads do not mix.
    What is no token counts as zeros in every layer.

    Args:
        channels: of keys and values together. dilations: of each convolution. dropout: of its inputs. start: of the last bias.
    """

    def __init__(
        self, heads: int, channels: int, dilations: Sequence[int] = (2, 2, 2), dropout: float = 0.0, start: float = 0.5
    ) -> None:
        super().__init__()
        sizes = [channels >> layer for layer in range(len(dilations) + 1)]
        if not dilations or min(dilations) < 1 or sizes[-1] < 1:
            raise ShapeError(f"{channels} channels halved {len(dilations)} times; give one dilation at least, and wider heads")
        self.dilations, self.dropout = tuple(dilations), nn.Dropout(dropout)
        self.weights = nn.ParameterList(torch.empty(heads, out, into, TAPS) for into, out in pairwise(sizes))
        self.biases = nn.ParameterList(torch.empty(heads, out) for out in sizes[1:])
        self.last = nn.Parameter(torch.empty(heads, sizes[-1]))
        self.bias = nn.Parameter(torch.full((heads,), start))
        for weight, bias in zip(self.weights, self.biases, strict=True):
            into = weight.shape[2] * TAPS
            nn.init.normal_(weight, std=(2 / into) ** 0.5)
            nn.init.uniform_(bias, -(into**-0.5), into**-0.5)
        nn.init.normal_(self.last, std=(2 / sizes[-1]) ** 0.5)

    @property
    def margin(self) -> int:
        """How many tokens to each side a score depends on."""
        return sum(self.dilations) * (TAPS - 1) // 2

    def forward(self, u: Float[Tensor, "b h n c"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b h inner"]:
        """Scores before the sigmoid of all tokens but the first and the last `margin`."""
        x = u.where(real[:, None, :, None], 0.0).mT  # (b, h, c, n)
        heads = x.shape[1]
        for weight, bias, dilation in zip(self.weights, self.biases, self.dilations, strict=True):
            x = self.dropout(x).flatten(1, 2)
            x = F.conv1d(x, weight.flatten(0, 1), bias.flatten(), dilation=dilation, groups=heads).unflatten(1, (heads, -1))
            real = real[:, dilation:-dilation]
            x = F.silu(x * real[:, None, None])
        return (x * self.last[..., None]).sum(2) + self.bias[:, None]


class Scored(torch.autograd.Function):
    """Values as they are; backwards, they were values times 1 + score, so that a score learns what its value was worth."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], (grads[0] * ctx.saved_tensors[0]).sum(-1)


@dataclass(frozen=True, eq=False)
class Until(Mask):
    """Shows a key from its own place on, to queries before place `until`.

    at, until: (b, key/value heads, slots). group: query heads of a key/value head.
    """

    at: Tensor
    until: Tensor
    group: int

    def visible(self, places: Places) -> Tensor:
        """See `Mask.visible`."""
        slot = places.batch, places.head // self.group, places.column
        return (self.at[slot] <= places.i) & (places.i < self.until[slot])


class Bank(NamedTuple):
    """Tokens that were kept, for each key/value head, the best first; -inf in `score` marks an empty place.

    score, place: (b, h, size). slot: (b, h, size) where they lie among the keys of a call.
    """

    score: Tensor
    place: Tensor
    slot: Tensor

    @staticmethod
    def empty(b: int, heads: int, size: int, like: Tensor) -> Bank:
        """Of `size` places."""
        none = torch.zeros(b, heads, size, dtype=torch.long, device=like.device)
        return Bank(torch.full((b, heads, size), -torch.inf, dtype=like.dtype, device=like.device), none - 1, none)

    def admit(
        self, score: Float[Tensor, "b h c"], place: Int[Tensor, "b h c"], slot: Int[Tensor, "b h c"], arrival: Int[Tensor, "b h c"]
    ) -> tuple[Bank, Tensor]:
        """After tokens came one after another, each in the place of the one with the least score, if its own is more.

        score: -inf for those that do not come in. arrival: when they come, in order. Of equal scores, the older one is better.
        Returns the bank, and (b, h, size + c) when each of those before and of the new ones went: FAR for those that are in.
        """
        size = self.score.shape[-1]
        scores, places = torch.cat([self.score, score], -1), torch.cat([self.place, place], -1)
        arrivals = torch.cat([torch.zeros_like(self.place), arrival], -1)
        ahead = torch.arange(size, device=score.device).expand_as(self.place)
        before = torch.cat([ahead, (self.score[..., None, :] >= score[..., None]).sum(-1)], -1)  # better ones, at the start
        mine, theirs = scores[..., :, None], score[..., None, :]
        better = (theirs > mine) | ((theirs == mine) & (place[..., None, :] < places[..., :, None]))
        out = before[..., None] + better.cumsum(-1) >= size
        inside = ~out.any(-1) & (scores > -torch.inf)
        went = torch.maximum(arrival.gather(-1, out.int().argmax(-1)), arrivals)
        went = torch.where(inside, FAR, torch.where(scores > -torch.inf, went, arrivals))

        order = places.argsort(dim=-1, stable=True)
        left = scores.masked_fill(~inside, -torch.inf).gather(-1, order)
        best = left.argsort(dim=-1, descending=True, stable=True)[..., :size]
        order = order.gather(-1, best)
        slots = torch.cat([self.slot, slot], -1)
        return Bank(left.gather(-1, best), places.gather(-1, order), slots.gather(-1, order)), went


class Retained(Cache):
    """The last tokens, and the bank: bytes do not grow with the tokens read.

    k, v: (b, h, last, d) of the last tokens, not rotated; score: (b, h, last) theirs, as far as they are known. bank_k, bank_v:
    (b, h, size, d), keys rotated. counted: (b,) tokens read, padding not counted.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.score: Tensor | None = None
        self.bank_k: Tensor | None = None
        self.bank_v: Tensor | None = None
        self.bank: Bank | None = None
        self.counted: Tensor | None = None
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        of_bank = () if self.bank is None else (self.bank.score, self.bank.place)
        return (self.k, self.v, self.score, self.bank_k, self.bank_v, *of_bank)


def rows(x: Float[Tensor, "b h n *rest"], index: Int[Tensor, "b r"]) -> Tensor:
    """Rows of each batch entry, the same for all heads: (b, h, r, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], :, index].transpose(1, 2)


def slots(x: Float[Tensor, "b h n d"], index: Int[Tensor, "b h r"]) -> Float[Tensor, "b h r d"]:
    """Rows of each head."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
