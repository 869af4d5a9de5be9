"""Functions of q, k and v, and modules called in other ways, each broken in one way; see broken_attentions."""

from __future__ import annotations

from typing import Any

import torch
from correct_attentions import Careful, Case, function_oracle, softmax_of
from torch import nn

from headwise import attend
from headwise.mechanisms import Attention


def top_left(q, k, v, is_causal=False):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return softmax_of(q @ k.mT * q.shape[-1] ** -0.5, is_causal, aligned_right=False) @ v


def tiled(q, k, v, causal=True):
    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
    return softmax_of(q @ k.mT * q.shape[-1] ** -0.5, causal) @ v


def unscaled(q, k, v, causal=True):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return softmax_of(q @ k.mT, causal) @ v


class Careless(Careful):
    def cleared(self, v, there):
        return v


class HalfCareful(Careful):
    def cleared_keys(self, k, there):
        return k


class Restarting(Attention):
    """Rotates each piece of a text as if it began there."""

    def forward(self, x, *stages, cache=None, attention_mask=None):
        q, k, v = self.projections.split(x)
        if self.rotary is not None:
            places = torch.arange(x.shape[1])
            q, k = self.rotary(q, places), self.rotary(k, places)
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask)
        return self.projections.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))


class DeafToPadding(nn.MultiheadAttention):
    def __init__(self, embed_dim, num_heads, batch_first=True):
        super().__init__(embed_dim, num_heads, batch_first=batch_first)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None):
        return super().forward(query, key, value, need_weights=need_weights, attn_mask=attn_mask)


ALONE: dict[str, Any] = {"examples": None, "oracle": None}
BROKEN = [
    Case("a function masked top left", "decode", "differs from the full pass from token 1,", top_left, ALONE),
    Case(
        "a function of tiled heads", "groups", "grouped heads are tiled (head i reads i mod kv_heads), not repeated", tiled, ALONE
    ),
    Case("a function without scale", "oracle", "differs from its oracle by", unscaled, {**ALONE, "oracle": function_oracle}),
    Case(
        "empty slots weighed by zero",
        "left_padding",
        "NaN in keys and values of empty slots changes the output to NaN",
        Careless,
        ALONE,
    ),
    Case("keys of empty slots not cleared", "left_padding", "empty slots reaches gradients", HalfCareful, ALONE),
    Case(
        "rotates from the start in each piece",
        "rotary",
        "with a rotary embedding cached decode is off by",
        Restarting,
        {"examples": lambda heads, size: [Restarting(heads * size, heads)], "oracle": None},
    ),
    Case("a MultiheadAttention deaf to padding", "left_padding", "left padding of 0.7 changes the output", DeafToPadding, ALONE),
]
