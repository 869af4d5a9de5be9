"""Functions of q, k and v, and modules called in other ways, each broken in one way; see broken_attentions."""

from __future__ import annotations

from typing import Any

from correct_attentions import Careful, Case, function_oracle, softmax_of
from torch import nn


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
    Case("a MultiheadAttention deaf to padding", "left_padding", "left padding of 0.7 changes the output", DeafToPadding, ALONE),
]
