"""What tests of rules that evict share."""

from __future__ import annotations

import pytest
import torch

from headwise.caches import LayerStore
from headwise.caches.rules.ada_kv import AdaKv
from headwise.caches.rules.h2o import H2o
from headwise.caches.rules.key_norm import KeyNorm
from headwise.caches.rules.pyramid_kv import PyramidKv
from headwise.caches.rules.snap_kv import SnapKv
from headwise.caches.rules.tova import Tova

B, H, KV, D, SCALE = 2, 4, 2, 4, 0.8

RULES = {
    "snap_kv": lambda budget: SnapKv(budget, window=4, kernel=3),
    "pyramid_kv": lambda budget: PyramidKv(budget, window=4, kernel=3),
    "ada_kv": lambda budget: AdaKv(budget, window=4, kernel=3),
    "h2o": H2o,
    "tova": Tova,
    "key_norm": KeyNorm,
}
all_rules = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


def prompted(rule, n=50, steps=0, seed=1, layer=(0, 1), heads=KV, group=2):
    """A store after a prompt of n tokens and some more, of a text that goes on: (store, q, k, v), one row."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, c, 64, D, generator=g, dtype=torch.float64) for c in (heads * group, heads, heads))
    store = LayerStore([None] * heads, [(tuple(range(heads)), rule)], layer)
    for start, stop in [(0, n), *((i, i + 1) for i in range(n, n + steps))]:
        store.extend(k[:, :, start:stop], v[:, :, start:stop])
        store.settle(q[:, :, start:stop], SCALE, ())
    return store, q, k, v
