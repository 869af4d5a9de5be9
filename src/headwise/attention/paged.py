"""Attention of a few new tokens over pages of keys and values: ragged sequences in one launch, shared pages read once.

A pool holds pages of P tokens; a sequence, what one key/value head of one batch row keeps, is a list of pages and a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, ShapeError
from .backends._launch import Launch, fitting, power, readable
from .kernels import interpreted, missing
from .paged_torch import PagedRead, by_each, by_gather, merge, wide
from .schedule import Schedule, Segment

__all__ = ["Schedule", "Segment", "merge", "paged_attention", "shared_attention"]
LOG2E = 1.4426950408889634
WIDEST = 256
TYPES = (torch.bfloat16, torch.float16, torch.float32)
MERGED = 4096  # numbers of parts that a program puts together at once
FEW_ROWS = 256  # query rows of all sequences, below which several programs put one together

# {kernel: {(largest head size, float32): launch}}; m: query rows at most. "wide": rows of many sequences that share pages.
LAUNCHES: dict[str, dict[tuple[int, bool], Launch]] = {
    "narrow": {
        (64, False): Launch(64, 64, 4, 4), (128, False): Launch(64, 64, 4, 3), (256, False): Launch(64, 32, 4, 3),
        (256, True): Launch(4, 64, 4, 1),
    },
    "wide": {
        (64, False): Launch(64, 64, 4, 3), (128, False): Launch(64, 64, 4, 3), (256, False): Launch(64, 32, 4, 2),
        (128, True): Launch(32, 16, 4, 1), (256, True): Launch(16, 16, 4, 1),
    },
}  # fmt: skip


def paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lengths: Tensor, *, scale: float, softcap: float | None = None,
    sinks: Tensor | None = None, lse: bool = False, schedule: Schedule | None = None, backend: str | None = None,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T) v (b, heads, n, dv) of the last n tokens that each sequence holds, which see no later ones.

    A sequence that holds nothing gives zeros. With `lse` (output, natural log-sum-exp (b, heads, n) float32 or float64).

    Args:
        q: (b, heads, n, d). k_pool: (pages, P, d). v_pool: (pages, P, dv). P is a power of two, at least 16.
        table: (b * kv heads, most pages) int32, pages of each sequence in order. lengths: (b * kv heads,) int32 tokens held.
            What is in a page behind the last token may be anything.
        softcap: scores s become softcap * tanh(s / softcap). sinks: (heads,), a logit each that takes weight and has no value.
        schedule: from lengths known on the host; without it the lengths are fetched from the device, which waits for it.
        backend: "kernel" (ours, on a GPU), "each" (a sequence at a time, in place where its pages follow each other), or
            "gather" (a copy, as wide as the longest sequence, differentiable). Default: the kernel on a GPU, else "each".

    Raises: ShapeError if shapes do not fit; BackendError if the backend cannot run this.
    """
    read = _checked(q, k_pool, v_pool, table, lengths, scale, softcap, sinks)
    chosen = backend or _choice(read)
    if chosen not in ("kernel", "each", "gather"):
        raise BackendError(f"there is no backend {chosen!r} for pages; there are: kernel, each, gather")
    if chosen == "kernel" and (reason := _refuses(read)) is not None:
        raise BackendError(f"the kernel for pages cannot run this: {reason}. Leave the backend out, or name 'each'")
    if schedule is not None and (schedule.sequences, schedule.page) != (len(table), k_pool.shape[1]):
        raise ShapeError(
            f"the schedule is for {schedule.sequences} sequences of pages of {schedule.page}, "
            f"here are {len(table)} of pages of {k_pool.shape[1]}"
        )
    if 0 in q.shape[:3]:
        found = q.new_zeros(*q.shape[:3], v_pool.shape[2]), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q))
    elif chosen == "kernel":
        found = _by_kernel(read, schedule)
    else:
        found = by_gather(read) if chosen == "gather" else by_each(read, schedule)
    return found if lse else found[0]


def shared_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, lengths: Tensor, segments: Sequence[Segment], *, scale: float,
    **options: Any,
) -> Any:  # fmt: skip
    """`paged_attention` that reads what rows share once for all of them: in products with the queries of all, and then merged.

    Args:
        segments: see `schedule.shared_pages`; for many calls make one `Schedule.of(..., segments=...)` and give it to
            `paged_attention` instead. options: of `paged_attention`.
    """
    heads = max(len(table) // max(len(q), 1), 1)
    schedule = Schedule.of(lengths, heads, page=k_pool.shape[1], segments=segments, device=q.device)
    return paged_attention(q, k_pool, v_pool, table, lengths, scale=scale, schedule=schedule, **options)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> PagedRead:
    if q.dim() != 4 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[3]:
        raise ShapeError(f"queries {tuple(q.shape)} and pools {tuple(k.shape)}, {tuple(v.shape)} do not fit together")
    page = k.shape[1]
    if page < 16 or page & (page - 1):
        raise ShapeError(f"pages hold a power of two of tokens, at least 16; here {page}")
    b, heads = q.shape[:2]
    if (
        table.dim() != 2
        or lengths.shape != table.shape[:1]
        or (b and (len(table) % b or not len(table) or heads % (len(table) // b)))
    ):
        raise ShapeError(
            f"table {tuple(table.shape)} and lengths {tuple(lengths.shape)} are not those of {b} rows of key/value heads "
            f"that {heads} heads share evenly: expected (rows * key/value heads, pages) and (rows * key/value heads,)"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"queries are {q.dtype}, the pools {k.dtype} and {v.dtype}; all must be the same")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ShapeError(f"sinks are {tuple(sinks.shape)}, expected ({heads},)")
    return PagedRead(q, k, v, table, lengths, scale, softcap, sinks)


def _refuses(read: PagedRead) -> str | None:
    """Why the kernel cannot run; None if it can."""
    if not read.q.is_cuda and not interpreted():
        return f"it runs on NVIDIA GPUs, the tensors are on {read.q.device}"
    if (reason := missing()) is not None:
        return reason
    if read.q.dtype not in TYPES:
        return f"it knows bfloat16, float16 and float32, not {str(read.q.dtype).removeprefix('torch.')}"
    if (widest := max(read.k.shape[2], read.v.shape[2])) > WIDEST:
        return f"heads of {widest} numbers are too wide; it takes up to {WIDEST}"
    if _trains(read):
        return "it has no backward pass"
    return None


def _trains(read: PagedRead) -> bool:
    tensors = (read.q, read.k, read.v, *(() if read.sinks is None else (read.sinks,)))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _choice(read: PagedRead) -> str:
    if _trains(read):
        return "gather"
    if not read.q.is_cuda:
        return "each"
    return "gather" if _refuses(read) is not None else "kernel"


# ---- the kernel ------------------------------------------------------------------------------------------------------


def _by_kernel(read: PagedRead, schedule: Schedule | None) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp)."""
    from .kernels.paged import merge_kernel

    b, kv_heads, group, n = read.sizes
    q, k, v = readable(read.q), readable(read.k), readable(read.v)
    given = [t if t.dtype == torch.int32 and t.stride(-1) == 1 else t.int().contiguous() for t in (read.table, read.lengths)]
    if schedule is None:
        schedule = Schedule.of(read.lengths, kv_heads, page=k.shape[1], device=q.device)
    dv, each = v.shape[2], group * n
    out = q.new_empty(*q.shape[:3], dv)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    sinks = lse  # not read; zeros would be one more launch
    if read.sinks is not None:
        sinks = read.sinks.detach().to(q.device, torch.float32).contiguous()
    if schedule.single:
        _launched("narrow", read, (q, k, v, *given, schedule.narrow, sinks, out, lse), 1, last=True)
        return out.to(read.q.dtype), lse
    parts = q.new_empty(schedule.parts * each, dv, dtype=torch.float32)
    sums = q.new_empty(schedule.parts * each, dtype=torch.float32)
    if len(schedule.wide):
        _launched("wide", read, (q, k, v, *given, schedule.wide, sinks, parts, sums), schedule.most_rows)
    early = _early(q.device)
    _launched("narrow", read, (q, k, v, *given, schedule.narrow, sinks, parts, sums), 1, early=early)
    rows = b * kv_heads * each
    columns = 32 if rows < FEW_ROWS else power(dv)
    blocks = -(-dv // columns)
    merge_kernel[(rows * blocks,)](
        parts, sums, schedule.offsets, schedule.starts, sinks, out, lse, blocks, kv_heads, group, n, dv,
        PARTS=min(power(schedule.most_parts), MERGED // columns), ORDERED=not len(schedule.wide), SINKS=read.sinks is not None,
        COLUMNS=columns, EARLY=early, num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out.to(read.q.dtype), lse


@cache
def _early(device: torch.device) -> bool:
    """Whether the GPU can launch a kernel before the last one has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launched(
    kernel: str, read: PagedRead, tensors: tuple[Tensor, ...], most_rows: int, *, last: bool = False, early: bool = False
) -> None:
    """One launch over items. most_rows: sequences that read one item, at most."""
    from .kernels.paged import paged_kernel

    q, k, v, table, _, items = tensors[:6]
    _, kv_heads, group, n = read.sizes
    d, dv = k.shape[2], v.shape[2]
    exact = q.dtype == torch.float32
    cut = fitting(LAUNCHES[kernel], max(d, dv), exact)
    rows = most_rows * group * n
    m = min(power(rows), cut.m)  # float32 has no tensor cores to fill: there, fewer rows than 16 are worth it
    blocks = -(-rows // m)
    paged_kernel[(len(items) * blocks,)](
        *tensors, *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *table.stride()[:1], table.shape[1], blocks, kv_heads, group,
        n, d, dv, read.scale * LOG2E, P=k.shape[1], M=m, N=min(cut.n, k.shape[1]), SOFTCAP=float(read.softcap or 0.0),
        SINKS=read.sinks is not None, LAST=last, BLOCK_D=power(d), BLOCK_DV=power(dv), WHOLE_D=power(d) == d,
        WHOLE_DV=power(dv) == dv, EXACT=exact, STAGES=cut.stages, EARLY=early, **cut.options,
    )  # fmt: skip
