"""PyTorch's fused scaled_dot_product_attention, for reads that are a softmax of scores plus masks and biases.

Masks that reach few keys (windows, sinks) run a block of rows at a time against just those keys, so that their cost is
what they read and no n x m mask is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..read import Operands, Read, apply_outputs, block_of, needed_keys, reachable_pairs, repeat_heads, take_keys, visibility
from ..stage import Bias
from . import FEW, edits_weights, not_softmax

BLOCK_ROWS = 256
MASK_ELEMENTS = 2**25  # a larger mask is built a block of rows at a time
CUDNN_QUERIES = 1024  # on Hopper, from how many queries on cuDNN's kernel is the faster one
PREFERRED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def refuses(read: Read, x: Operands) -> str | None:
    """Why the fused kernel cannot run this read; None if it can."""
    for stage in read.scoring:
        if not isinstance(stage, Bias):
            return f"{type(stage).__name__} changes scores by more than adding to them"
    if (reason := not_softmax(read) or edits_weights(read)) is not None:
        return reason
    if x.q.is_cuda and rounds(read, x.q.dtype):
        return "on a GPU it would round biases to half precision"
    return None


def rounds(read: Read, dtype: torch.dtype) -> bool:
    """Whether biases and logits would lose digits in the dtype of the queries, in which GPU kernels take them."""
    logit = None if read.normalizer is None else read.normalizer.extra_logit()
    wide = [stage.given() for stage in read.scoring] + ([] if logit is None else [logit.dtype])
    return any(torch.promote_types(other or torch.float32, dtype) != dtype for other in wide)


def shuns(read: Read, x: Operands) -> str | None:
    """Why another backend is better: on a GPU, whatever needs a table of masks or biases that is not there yet."""
    there = any(stage.given() is not None for stage in read.stages())
    if x.q.is_cuda and not there and not _fused(read, x) and x.q.shape[2] >= FEW:
        what = "biases" if read.scoring else "masks" if read.mask is not None else "sinks"
        return f"it would build {what} for blocks of {BLOCK_ROWS} rows"
    return None


def kernel(x: Operands) -> str:
    """Which of PyTorch's kernels is asked for first."""
    return "cuDNN" if _cudnn(x) else "PyTorch's choice"


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv)."""
    assert x.v is not None
    n, m = x.q.shape[2], x.k.shape[2]
    if _fused(read, x):
        causal = read.mask is not None and n > 1
        with _kernels(x):
            out = _padded(x, causal, read.scale)
        return apply_outputs(read, out, x)
    narrow = reachable_pairs(read, x) <= 0.75 * n * m
    rows = BLOCK_ROWS if narrow or n * m > MASK_ELEMENTS else n
    blocks = [(start, min(start + rows, n)) for start in range(0, n, rows)]
    again = torch.is_grad_enabled() and len(blocks) > 1  # else every block's mask is kept for the backward pass
    parts = [checkpoint(_rows, read, x, *ends, use_reentrant=False) if again else _rows(read, x, *ends) for ends in blocks]
    return apply_outputs(read, torch.cat(parts, dim=2) if len(parts) > 1 else parts[0], x)


def _padded(x: Operands, causal: bool, scale: float) -> Tensor:
    """The fused call; values are made as wide as keys that have columns beside them where the kernel asks for it."""
    assert x.v is not None
    wide, dv = x.q.shape[-1], x.v.shape[-1]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v))
    v = F.pad(x.v, (0, wide - dv)) if dv < wide and (trains or not _cudnn(x)) else x.v
    return _attended(x.q, x.k, v, is_causal=causal, scale=scale, enable_gqa=x.groups > 1)[..., :dv]


def _attended(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """PyTorch's fused attention, with right gradients."""
    out = F.scaled_dot_product_attention(q, k, v, **options)
    if out.is_cuda and out.requires_grad:
        out = _GradientLaidOut.apply(out)  # type: ignore[no-untyped-call]
    return out


class _GradientLaidOut(torch.autograd.Function):
    """The same tensor; its gradient is laid out in memory as it is.

    cuDNN's attention, which PyTorch chooses by itself on Hopper, keeps the plan of its backward pass by shapes and by the
    layouts of q, k and v, not of the gradient: with one laid out otherwise than at the first call, gradients of q, k and v come
    out wrong without a word (torch 2.11, cuDNN 9.19).
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.layout = out.shape, out.stride()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shape, stride = ctx.layout
        if grad.stride() == stride:
            return grad
        return torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def _fused(read: Read, x: Operands) -> bool:
    """Whether the read is one call that needs no table."""
    plain = not read.scoring and read.normalizer is None and x.aligned
    return plain and (read.mask is None or (_is_causal(read) and x.q.shape[2] in (1, x.k.shape[2])))


def _is_causal(read: Read) -> bool:
    return getattr(read.mask, "is_causal", False)


def _cudnn(x: Operands) -> bool:
    """Whether cuDNN's kernel is the faster one here: half precision on Hopper, and enough queries."""
    return x.q.is_cuda and _half(x) and x.q.shape[2] >= CUDNN_QUERIES and _capability(x.q.device)[0] == 9


def _half(x: Operands) -> bool:
    return x.q.dtype in (torch.bfloat16, torch.float16)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@contextmanager
def _kernels(x: Operands) -> Iterator[None]:
    with sdpa_kernel(PREFERRED, set_priority=True) if _cudnn(x) else nullcontext():
        yield


def _rows(read: Read, x: Operands, start: int, stop: int) -> Tensor:
    assert x.v is not None
    keys = needed_keys(read, x, start, stop)
    block = block_of(x, start, stop, keys)
    value = repeat_heads(take_keys(x.v, keys), x.groups)
    key, visible = block.key, visibility(read, block)
    attn_mask = visible
    if read.scoring:
        dtype = x.q.dtype if x.q.is_cuda else block.dtype  # kernels of a GPU read biases as if they were of q's dtype
        bias = sum(stage.bias(block.places).to(dtype) for stage in read.scoring if isinstance(stage, Bias))
        attn_mask = torch.where(visible, bias, -torch.inf)  # type: ignore[arg-type]
    if read.normalizer is not None:  # a logit of its own in the denominator = one more key, with a value of zero
        logit = read.normalizer.extra_logit()
        assert logit is not None
        b, h, c, m = x.q.shape[0], x.q.shape[1], stop - start, key.shape[2]
        if not read.scoring:
            dtype = x.q.dtype if x.q.is_cuda else block.dtype
            attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~visible, -torch.inf)
        extra = logit.to(attn_mask.dtype).view(1, -1, 1, 1).expand(b, h, c, 1)
        attn_mask = torch.cat([attn_mask.expand(b, h, c, m), extra], dim=-1)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    if attn_mask.dim() < 4 or attn_mask.shape[-1] != key.shape[2]:
        attn_mask = attn_mask.expand(-1, -1, -1, key.shape[2])
    out = _attended(block.query, key, value, attn_mask=attn_mask, scale=read.scale)
    if attn_mask.dtype != torch.bool:  # a row of nothing but -inf is defined as zero, whatever the kernel makes of it
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0.0) if read.normalizer is None else out
    return out
