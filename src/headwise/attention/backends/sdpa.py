"""PyTorch's fused scaled_dot_product_attention, for reads that are a softmax of scores plus masks and biases.

Masks that reach few keys (windows, sinks) run a block of rows at a time against just those keys, so that their cost is
what they read and no n x m mask is built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..read import Operands, Read, apply_outputs, block_of, needed_keys, reachable_pairs, repeat_heads, take_keys, visibility
from ..stage import Bias

BLOCK_ROWS = 256
MASK_ELEMENTS = 2**25  # a larger mask is built a block of rows at a time


def refuses(read: Read, x: Operands) -> str | None:
    """Why the fused kernel cannot run this read; None if it can."""
    for stage in read.scoring:
        if not isinstance(stage, Bias):
            return f"{type(stage).__name__} changes scores by more than adding to them"
    if read.normalizer is not None and read.normalizer.extra_logit() is None:
        return f"{type(read.normalizer).__name__} is no softmax"
    if read.weights:
        names = ", ".join(type(stage).__name__ for stage in read.weights)
        return f"{names} edits weights and has no fold"
    return None


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv)."""
    assert x.v is not None
    n, m = x.q.shape[2], x.k.shape[2]
    plain = not read.scoring and read.normalizer is None
    if plain and x.aligned and (read.mask is None or (_is_causal(read) and n in (1, m))):
        causal = read.mask is not None and n > 1
        out = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=causal, scale=read.scale, enable_gqa=x.groups > 1)
        return apply_outputs(read, out, x)
    narrow = not _is_causal(read) and reachable_pairs(read, x) <= 0.75 * n * m
    rows = BLOCK_ROWS if narrow or n * m > MASK_ELEMENTS else n
    parts = [_rows(read, x, start, min(start + rows, n)) for start in range(0, n, rows)]
    return apply_outputs(read, torch.cat(parts, dim=2) if len(parts) > 1 else parts[0], x)


def _is_causal(read: Read) -> bool:
    return getattr(read.mask, "is_causal", False)


def _rows(read: Read, x: Operands, start: int, stop: int) -> Tensor:
    assert x.v is not None
    keys = needed_keys(read, x, start, stop)
    block = block_of(x, start, stop, keys)
    value = repeat_heads(take_keys(x.v, keys), x.groups)
    key, visible = block.key, visibility(read, block)
    attn_mask = visible
    if read.scoring:
        bias = sum(stage.bias(block).to(x.q.dtype) for stage in read.scoring if isinstance(stage, Bias))
        attn_mask = torch.where(visible, bias, -torch.inf)  # type: ignore[arg-type]
    if read.normalizer is not None:  # a logit of its own in the denominator = one more key, with a value of zero
        logit = read.normalizer.extra_logit()
        assert logit is not None
        b, h, c, m = x.q.shape[0], x.q.shape[1], stop - start, key.shape[2]
        if not read.scoring:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.q.dtype).masked_fill(~visible, -torch.inf)
        extra = logit.to(x.q.dtype).view(1, -1, 1, 1).expand(b, h, c, 1)
        attn_mask = torch.cat([attn_mask.expand(b, h, c, m), extra], dim=-1)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    if attn_mask.shape[-1] != key.shape[2] or attn_mask.dim() < 4:
        attn_mask = attn_mask.expand(-1, -1, -1, key.shape[2])
    out = F.scaled_dot_product_attention(block.query, key, value, attn_mask=attn_mask, scale=read.scale)
    if attn_mask.dtype != torch.bool:  # a row of nothing but -inf is defined as zero, whatever the kernel makes of it
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0) if read.normalizer is None else out
    return out
