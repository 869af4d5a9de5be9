"""A small correct attention with its oracle, of which the broken ones are made; and how they are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from headwise.mechanisms import Mechanism
from headwise.testing import Item


class Correct(nn.Module):
    """Causal grouped attention with rotary positions, a window, a cache and padding. Each step is a method that may be broken."""

    def __init__(self, width=32, heads=4, kv_heads=2, window=None, rotary=True):
        super().__init__()
        self.width, self.heads, self.kv_heads, self.size = width, heads, kv_heads, width // heads
        self.window, self.rotary = window, rotary
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def new_cache(self):
        return {}

    def forward(self, x, attention_mask=None, cache=None, causal=True):
        """attention_mask (b, tokens so far): 1 at tokens."""
        b, n, _ = x.shape
        before = 0 if not cache else cache["k"].shape[2]
        there = torch.ones(b, before + n, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        places = self.places(there)[:, before:]
        q, k, v = self.project(self.prepare(x, places))
        if self.rotary:
            q, k = self.rotate(q, places), self.rotate(k, places)
        if cache is not None:
            k, v = self.keep(cache, k, v)
        k, v = self.repeat(k), self.repeat_values(v)
        weights = self.weigh(self.score(q, k), self.visible(there, n, k.shape[2], causal)[:, None])
        return self.finish(self.o_proj(self.mix(weights, v).transpose(1, 2).reshape(b, n, -1)))

    def prepare(self, x, places):
        return x

    def finish(self, y):
        return y

    def project(self, x):
        return (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))

    def places(self, there):
        return (there.cumsum(1) - 1).clamp(min=0)

    def rotate(self, t, places):
        angles = places[:, None, :, None] * 0.1 ** torch.arange(self.size // 2).to(t)
        a, b = t.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    def keep(self, cache, k, v):
        if cache:
            k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
        cache["k"], cache["v"] = k, v
        return k, v

    def repeat(self, k):
        return k.repeat_interleave(self.heads // self.kv_heads, 1)

    def repeat_values(self, v):
        return self.repeat(v)

    def score(self, q, k):
        return q @ k.transpose(-1, -2) / math.sqrt(self.size)

    def visible(self, there, n, m, causal):
        i, j = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
        seen = there[:, None, -m:].expand(-1, n, -1)
        if causal:
            seen = seen & (j <= i)
        return seen if self.window is None else seen & ((i - j).abs() < self.window)

    def weigh(self, scores, visible):
        return torch.softmax(scores.masked_fill(~visible, torch.finfo(scores.dtype).min), -1) * visible

    def mix(self, weights, v):
        return weights @ v


def oracle(module, x, visible):
    """The same, token by token."""
    size, group = module.size, module.heads // module.kv_heads
    rows = []
    for i in range(len(x)):
        read = []
        for head in range(module.heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            q = turned(module, module.q_proj.weight[own] @ x[i], i)
            seen = [j for j in range(len(x)) if visible[i, j] and (module.window is None or abs(i - j) < module.window)]
            scores = [q @ turned(module, module.k_proj.weight[shared] @ x[j], j) / size**0.5 for j in seen]
            weights = torch.stack(scores).softmax(0)
            read.append(sum(w * (module.v_proj.weight[shared] @ x[j]) for w, j in zip(weights, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(read))
    return torch.stack(rows)


def turned(module, t, place):
    if not module.rotary:
        return t
    half = module.size // 2
    pairs = []
    for c in range(half):
        angle = place * 0.1**c
        pairs.append(
            (t[c] * math.cos(angle) - t[c + half] * math.sin(angle), t[c] * math.sin(angle) + t[c + half] * math.cos(angle))
        )
    return torch.stack([a for a, _ in pairs] + [b for _, b in pairs])


def grouped(kind):
    return lambda heads, size: [kind(heads * size, heads, heads), kind(heads * size, heads, heads // 2)]


def softmax_of(scores, causal, aligned_right=True):
    n, m = scores.shape[-2:]
    ahead = torch.ones(n, m, dtype=torch.bool).tril(m - n if aligned_right else 0)
    return scores.masked_fill(~ahead, -torch.inf).softmax(-1) if causal else scores.softmax(-1)


def function(q, k, v, causal=True):
    """Correct, with a flag only."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return softmax_of(q @ k.mT * q.shape[-1] ** -0.5, causal) @ v


def function_oracle(function, q, k, v, visible):
    group = len(q) // len(k)
    rows = []
    for head in range(len(q)):
        scores = q[head] @ k[head // group].T / q.shape[-1] ** 0.5
        rows.append(torch.stack([row[seen].softmax(0) @ v[head // group][seen] for row, seen in zip(scores, visible, strict=True)]))
    return torch.stack(rows)


class Careful(Mechanism):
    """Plain softmax attention; what an empty slot holds is cleared before it is weighed."""

    def forward(self, q, k, v, *stages, query_positions=None, key_positions=None):
        n, m = q.shape[2], k.shape[2]
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        slots = torch.arange(m)[None] if key_positions is None else key_positions
        own = torch.arange(m - n, m)[None] if query_positions is None else query_positions
        there = (slots >= 0)[:, None, :, None]
        visible = (slots >= 0)[:, None, :].expand(-1, n, -1)
        if stages:
            visible = visible & (slots[:, None, :] <= own[:, :, None])
        k = self.cleared_keys(k, there)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible[:, None], torch.finfo(q.dtype).min)
        return (scores.softmax(-1) * visible[:, None]) @ self.cleared(v, there)

    def cleared_keys(self, k, there):
        return k.masked_fill(~there, 0.0)

    def cleared(self, v, there):
        return v.masked_fill(~there, 0.0)


@dataclass(frozen=True)
class Case:
    """A broken attention. more: what its module gives besides, or instead."""

    name: str
    check: str
    says: str
    kind: Any
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def item(self) -> Item:
        parts = {"examples": grouped(self.kind), "oracle": oracle, "__name__": "mine", **self.more}
        return Item("mixer", self.name, self.kind, SimpleNamespace(**{k: v for k, v in parts.items() if v is not None}))
