"""Plain attention of a stack's block written out slowly, for oracles."""

from __future__ import annotations

from torch import Tensor

from ...mechanisms import Attention
from ..transformer import Transformer
from . import _slow


def attention(model: Transformer, at: int, x: Tensor) -> Tensor:
    """What the plain attention of a block gives for normed tokens x (n, width)."""
    mixer = _slow.mixer_of(model, at)
    assert isinstance(mixer, Attention)
    p, base = mixer.projections, _slow.base_of(mixer)
    q = _slow.turned(_slow.heads_of(x, p.q, p.heads), base)
    k = _slow.turned(_slow.heads_of(x, p.k, p.kv_heads), base)
    read = _slow.attention_rows(q, k, _slow.heads_of(x, p.v, p.kv_heads), _slow.visible_to(model, at, len(x)))
    return _slow.heads_of(read.flatten(1), p.out, 1).flatten(1)
