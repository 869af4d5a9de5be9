"""Linear statistics as attention with other values: one fused call, and its fused backward, on any device.

The weights times a factor of the key is attention whose value is that factor: mass on a span is P @ indicator, the mean
place P @ place, and with the keys themselves as values the entropy is log-sum-exp - scale * q . (P @ k). Fused kernels hand
out no differentiable log-sum-exp, so the entropy is not here; `chunked` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import sdpa
from ..read import Operands, Read
from ..statistic import Distance, PositionMass, SegmentMass, SpanMass, Statistic


def refuses(read: Read, x: Operands, statistic: Statistic) -> str | None:
    """Why it cannot run this read; None if it can."""
    reason = sdpa.refuses(read, x)
    if reason is not None:
        return reason
    if x.q.dtype not in (torch.float32, torch.float64):
        return "half-precision values cannot hold places of tokens"
    if isinstance(statistic, PositionMass | SpanMass | SegmentMass):
        return None
    pattern = None if read.mask is None else read.mask.pattern()
    if isinstance(statistic, Distance) and statistic.window is None and pattern is not None and pattern.causal:
        return None
    return f"{type(statistic).__name__} is no fixed factor of each key"


def run(read: Read, x: Operands, statistics: Sequence[Statistic], output: bool) -> tuple[Tensor | None, list[Tensor]]:
    """The output (b, h, n, dv) before output stages, or None, and every statistic, from one fused call."""
    b, kv = x.k.shape[:2]
    tables = [_factors(statistic, x) for statistic in statistics]
    values = [table.to(x.q.dtype)[:, None].expand(b, kv, -1, -1) for table in tables]
    if output:
        assert x.v is not None
        values.append(x.v)
    widths = [value.shape[-1] for value in values]
    q, k, v = x.q, x.k, torch.cat(values, dim=-1)
    size = max(q.shape[-1], v.shape[-1])  # fused kernels want one size for all
    read = Read(read.scale, read.scoring, read.mask, read.normalizer)
    padded = Operands(_pad(q, size), _pad(k, size), _pad(v, size), x.query_position, x.key_position, x.aligned)
    parts = list(sdpa.run(read, padded)[..., : sum(widths)].split(widths, dim=-1))
    out = parts.pop() if output else None
    return out, [_finish(statistic, part, x) for statistic, part in zip(statistics, parts, strict=True)]


def _pad(tensor: Tensor, size: int) -> Tensor:
    return tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))


def _factors(statistic: Statistic, x: Operands) -> Tensor:
    """(b or 1, m, columns)."""
    place = x.key_position
    match statistic:
        case PositionMass():
            return ((place >= statistic.start) & (place < statistic.stop))[..., None]
        case SpanMass():
            return statistic.spans.to(place.device).reshape(-1, *statistic.spans.shape[-2:]).transpose(1, 2)
        case SegmentMass():
            own = torch.atleast_2d(statistic.segments).to(place.device)
            return own[..., None] == torch.arange(statistic.count, device=place.device)
    return torch.stack([torch.ones_like(place), place], dim=-1)


def _finish(statistic: Statistic, part: Tensor, x: Operands) -> Tensor:
    match statistic:
        case PositionMass():
            return part[..., 0]
        case Distance():
            return x.query_position[:, None] * part[..., 0] - part[..., 1]
    return part
