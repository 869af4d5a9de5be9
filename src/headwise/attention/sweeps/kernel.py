"""Statistics by our Triton kernels: one sweep over the keys for sums of rows, one over the queries for sums of columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import missing
from ..mask import Pattern, documents_at
from ..read import Operands, Read
from ..stage import Score
from ..statistic import (
    Distance,
    DistanceSquare,
    Entropy,
    HorizonMass,
    KeyMass,
    LocalMass,
    LogSumExp,
    MaxWeight,
    PositionMass,
    RecentMass,
    SegmentMass,
    SpanMass,
    Statistic,
    WeightAt,
    WeightSquare,
)

LOG2E = 1.4426950408889634
# What the row kernel can sum besides the log-sum-exp, in the order of its output slots; slot 0 is the log-sum-exp.
SLOTS = ("MAXIMUM", "ENTROPY", "DISTANCE", "DISTANCE2", "SQUARE", "FIRST", "RECENT", "LOCAL", "NEAR")
ROW_KINDS = (LogSumExp, MaxWeight, Entropy, Distance, DistanceSquare, WeightSquare, PositionMass, RecentMass, LocalMass)
LATER_KINDS = (KeyMass, HorizonMass, SegmentMass, SpanMass, WeightAt)  # after the log-sum-exp is known
ROWS_IN_FLIGHT = 2048  # blocks of rows below which a row's keys are shared among several programs


def refuses(read: Read, x: Operands, statistic: Statistic) -> str | None:
    """Why it cannot run this read; None if it can."""
    if x.q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on an NVIDIA GPU, the tensors are on {x.q.device}"
    if (reason := missing()) is not None:
        return reason
    if x.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it knows bfloat16, float16 and float32, not {str(x.q.dtype).removeprefix('torch.')}"
    if x.q.shape[-1] > 256 or (x.v is not None and x.v.shape[-1] > 256):
        return f"heads of size {max(x.q.shape[-1], 0 if x.v is None else x.v.shape[-1])} are larger than 256"
    if read.weights or _softcap(read) is None:
        return "it knows masks, a softcap and a sink logit, no other stage"
    if read.normalizer is not None and read.normalizer.extra_logit() is None:
        return f"{type(read.normalizer).__name__} is no softmax"
    if read.scale <= 0:
        return f"a scale of {read.scale:g} turns the order of scores around"
    if read.mask is not None and read.mask.pattern() is None:
        return "the mask has no simple form"
    if not isinstance(statistic, ROW_KINDS + LATER_KINDS):
        return f"{type(statistic).__name__} has no kernel"
    return None


def _softcap(read: Read) -> float | None:
    """The cap of a read that only caps its scores, 0 for one that leaves them alone; None for any other."""
    if not read.scoring:
        return 0.0
    only = read.scoring[0] if len(read.scoring) == 1 else None
    return only.softcap() if isinstance(only, Score) else None


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows and keys of a tile, columns of its row sums, warps, loads in flight, and registers at most."""

    m: int
    n: int
    classes: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        return {"num_warps": self.warps} | ({} if self.registers is None else {"maxnreg": self.registers})


def row_tile(d: int, bits: int, output: bool) -> Tile:
    """Tiles of the row kernel, measured on Hopper (see benchmarks/): registers are capped so that two programs fit a processor."""
    classes = 1 if output else 8
    if bits == 32:
        return Tile(64, 32, classes, 4, 2) if d <= 128 else Tile(32, 32, classes, 4, 1)
    if d > 128:
        return Tile(128, 64, classes, 8, 2)
    return Tile(128, 128, 1, 8, 3) if output else Tile(128, 128, 8, 8, 2, 128)


def column_tile(d: int, bits: int) -> Tile:
    """Tiles of the column kernel (m queries, n keys)."""
    if bits == 32:
        return Tile(32, 64, 8, 4, 2) if d <= 128 else Tile(32, 32, 8, 4, 1)
    return Tile(64, 128, 8, 4, 2) if d <= 128 else Tile(64, 128, 8, 8, 2)


@dataclass(eq=False)
class Arguments:
    """A read as the kernels take it: base-2 scale, places as int32 where they are not those of rows and columns."""

    x: Operands
    pattern: Pattern
    scale: float
    softcap: float
    logit: Tensor | None
    q: Tensor
    k: Tensor
    places: tuple[Tensor, Tensor] | None = None
    documents: tuple[Tensor, Tensor] | None = None
    nothing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.nothing = self.q.new_empty(1, dtype=torch.int32)

    @staticmethod
    def of(read: Read, x: Operands) -> Arguments:
        """Checked by `refuses` before."""
        pattern = (read.mask.pattern() if read.mask is not None else None) or Pattern()
        logit = None
        if read.normalizer is not None:
            extra = read.normalizer.extra_logit()
            assert extra is not None
            logit = extra.detach().to(x.q.device, torch.float32).expand(x.q.shape[1]).contiguous()
        q, k = (_readable(t.detach()) for t in (x.q, x.k))
        k = k.expand(x.q.shape[0], -1, -1, -1)
        made = Arguments(x, pattern, read.scale * LOG2E, _softcap(read) or 0.0, logit, q, k)
        if not x.aligned:
            made.places = tuple(p.to(torch.int32).expand(q.shape[0], -1).contiguous() for p in (x.query_position, x.key_position))  # type: ignore[assignment]
        if pattern.documents is not None:
            made.documents = tuple(  # type: ignore[assignment]
                documents_at(pattern.documents, p).to(torch.int32).expand(q.shape[0], -1).contiguous()
                for p in (x.query_position, x.key_position)
            )
        return made

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "CAUSAL": self.pattern.causal, "WINDOWED": self.pattern.window is not None, "ALIGNED": self.places is None,
            "DOCUMENTS": self.documents is not None, "SOFTCAP": self.softcap,
        }  # fmt: skip

    @property
    def window(self) -> tuple[int, int]:
        """Window and sinks."""
        return self.pattern.window or 0, self.pattern.sink

    def pair(self, which: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Two tensors, or two that stand for none."""
        return which if which is not None else (self.nothing, self.nothing)

    def sees(self, keys: Tensor) -> Tensor:
        """(b, n): whether each query may read the key of that index."""
        query, key = self.x.query_position.expand(len(keys), -1), self.x.key_position.expand(len(keys), -1)
        there = key.gather(1, keys)
        away, seen = query - there, there >= 0
        if self.pattern.causal:
            seen &= away >= 0
        if self.pattern.window is not None:
            seen &= (away.abs() < self.pattern.window) | (there < self.pattern.sink)
        if self.documents is not None:
            seen &= self.documents[0] == self.documents[1].gather(1, keys)
        return seen

    def dimensions(self) -> tuple[int, int, int, int, int]:
        """Query heads, key/value heads, queries, keys, head size."""
        return self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2], self.q.shape[3]


def _readable(tensor: Tensor) -> Tensor:
    """With heads' numbers next to each other; Triton's interpreter, which has no bfloat16 products, gets the same in float32."""
    if tensor.device.type != "cuda" and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def rows(
    a: Arguments, want: frozenset[str], *, first: int = 0, recent: int = 1, near: int = 1, v: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor | None, dict[str, Tensor]]:  # fmt: skip
    """Sums of rows, {slot: (b, h, n)} with "LSE" always there; and the output where values are given.

    first, recent, near: what FIRST, RECENT, LOCAL and NEAR count as such.
    """
    from ..kernels.rows import rows_kernel

    heads, kv_heads, n, m, d = a.dimensions()
    b, bits = a.q.shape[0], a.q.dtype.itemsize * 8
    cut = tile or row_tile(d, bits, v is not None)
    blocks = -(-n // cut.m) * b * heads
    splits = 1 if v is not None else max(1, min(-(-m // cut.n), ROWS_IN_FLIGHT // blocks)) if blocks < ROWS_IN_FLIGHT // 8 else 1
    slots = 1 + len(SLOTS)
    stats = a.q.new_empty((splits, slots, b, heads, n), dtype=torch.float32)
    out = None if v is None else torch.empty(b, heads, n, v.shape[-1], dtype=v.dtype, device=v.device)
    value = v.expand(b, -1, -1, -1) if v is not None else a.k
    docs, places = a.pair(a.documents), a.pair(a.places)
    rows_kernel[(blocks, splits)](
        a.q, a.k, value, out if out is not None else stats, stats, *places, *docs,
        a.logit if a.logit is not None else stats,
        *a.q.stride()[:3], *a.k.stride()[:3], *value.stride()[:3], b * heads * n,
        *(t.stride(0) for t in (*places, *docs)),
        heads, kv_heads, n, m, d, value.shape[-1], a.scale, *a.window, first, recent, near,
        **a.constants, LOGIT=a.logit is not None, OUTPUT=v is not None,
        **{slot: slot in want for slot in SLOTS},
        M=cut.m, N=cut.n, BLOCK_D=_power(d), BLOCK_DV=_power(value.shape[-1]), WHOLE_D=_power(d) == d, CLASSES=cut.classes,
        EXACT=bits == 32, SPLITS=splits, STAGES=cut.stages, HALVES=2 if cut.n >= 32 else 1,
        **cut.launch,
    )  # fmt: skip
    found = stats[0] if splits == 1 else _merge(stats, a.logit)
    return out, {name: found[i] for i, name in enumerate(("LSE", *SLOTS)) if name == "LSE" or name in want}


def _merge(parts: Tensor, logit: Tensor | None) -> Tensor:
    """(splits, slots, b, h, n) raw sums of shares of the keys -> (slots, b, h, n) statistics."""
    tops, sums = parts[:, 0], parts[:, 1:].double()
    top = tops.amax(0)
    fall = (tops - top).clamp(min=-1e30).double()
    scale = fall.exp2()
    sums[:, 1] += fall * sums[:, 0]
    sums[:, 4] *= scale
    total, mean_z, *others = (sums * scale[:, None]).sum(0)
    some, whole, peak = total > 0, total, top.double()
    if logit is not None:
        extra = logit.double()[:, None] * LOG2E
        peak = torch.maximum(peak, extra)
        whole = total * (top - peak).exp2() + (extra - peak).exp2()
    log_total = torch.where(some, whole.log2() + peak, -torch.inf)
    inverse = torch.where(some, (top - log_total).exp2(), 0.0)
    entropy = (total * (log_total - top) - mean_z) * inverse
    found = [log_total / LOG2E, inverse, entropy.clamp(min=0.0) / LOG2E]
    found += [other * (inverse * inverse if i == 2 else inverse) for i, other in enumerate(others)]
    return torch.stack([torch.where(some, value, -torch.inf if i == 0 else 0.0) for i, value in enumerate(found)]).float()


def columns(
    a: Arguments,
    lse: Tensor,
    *,
    count: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    horizon: tuple[int, int] | None = None,
    per_key_value_head: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """(b, h, m), or (b, hk, m): weights summed over queries, or over the queries near..far places later."""
    from ..kernels.columns import columns_kernel

    heads, kv_heads, n, m, d = a.dimensions()
    b, bits = a.q.shape[0], a.q.dtype.itemsize * 8
    cut = tile or column_tile(d, bits)
    owners = kv_heads if per_key_value_head else heads
    out = a.q.new_empty((b, owners, m), dtype=torch.float32)
    docs, places = a.pair(a.documents), a.pair(a.places)
    counted = count.float().expand(b, -1).contiguous() if count is not None else lse
    near, far = horizon or (0, 0)
    start, stop = queries or (0, n)
    columns_kernel[(-(-m // cut.n) * b * owners,)](
        a.q, a.k, lse, out, *places, *docs, counted,
        *a.q.stride()[:3], *a.k.stride()[:3], *(t.stride(0) for t in (*places, *docs, counted)),
        heads, kv_heads, n, m, d, a.scale, *a.window, near, far, start, stop,
        **a.constants, HORIZON=horizon is not None, COUNTED=count is not None, PER_KV=per_key_value_head,
        M=cut.m, N=cut.n, BLOCK_D=_power(d), WHOLE_D=_power(d) == d, CLASSES=cut.classes, EXACT=bits == 32, STAGES=cut.stages,
        **cut.launch,
    )  # fmt: skip
    return out


def segments(a: Arguments, lse: Tensor, ids: Tensor, count: int) -> Tensor:
    """(b, h, n, count): weight on each segment of keys; ids: (b or 1, m) int32, -1 for none."""
    from ..kernels.segments import segments_kernel

    heads, kv_heads, n, m, d = a.dimensions()
    b, bits = a.q.shape[0], a.q.dtype.itemsize * 8
    size, tile_rows = (64, 64) if bits < 32 or d <= 128 else (32, 32)
    out = a.q.new_zeros((b, heads, n, count), dtype=torch.float32)
    distinct, counts = _distinct(ids, size)
    docs, places = a.pair(a.documents), a.pair(a.places)
    strides = [0 if len(t) == 1 else t.stride(0) for t in (ids, distinct, counts)]
    segments_kernel[(-(-n // tile_rows) * b * heads,)](
        a.q, a.k, lse, out, ids, distinct, counts, *places, *docs,
        *a.q.stride()[:3], *a.k.stride()[:3], *(t.stride(0) for t in (*places, *docs)), *strides,
        heads, kv_heads, n, m, d, a.scale, *a.window, count,
        **a.constants, M=tile_rows, N=size, BLOCK_D=_power(d), EXACT=bits == 32, num_warps=4,
    )  # fmt: skip
    return out


def _distinct(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distinct ids of each run of `size` keys, first in their row of (b, tiles, size), and how many there are."""
    short = -ids.shape[1] % size
    padded = torch.nn.functional.pad(ids, (0, short), value=-1).view(len(ids), -1, size)
    ordered = padded.sort(-1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    new &= ordered >= 0
    first = (~new).to(torch.int8).sort(dim=-1, stable=True).indices
    return ordered.gather(-1, first).to(torch.int32).contiguous(), new.sum(-1).to(torch.int32).contiguous()


@dataclass(eq=False)
class _Call:
    """One run of the row kernel: what it is to sum, what counts as first, recent and near, and what it found."""

    want: set[str] = field(default_factory=set)
    given: dict[str, int] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)

    def take(self, slot: str, given: dict[str, int]) -> bool:
        """Adds a slot if its numbers agree with those that are there."""
        if any(self.given.get(name, value) != value for name, value in given.items()):
            return False
        self.want.add(slot)
        self.given |= given
        return True


def _terms(statistic: Statistic) -> list[tuple[str, dict[str, int]]]:
    """The slots that a row statistic is made of, with their numbers: one, or one less another; none for other statistics."""
    match statistic:
        case LogSumExp():
            return [("LSE", {})]
        case MaxWeight():
            return [("MAXIMUM", {})]
        case Entropy():
            return [("ENTROPY", {})]
        case DistanceSquare():
            return [("DISTANCE2", {})]
        case WeightSquare():
            return [("SQUARE", {})]
        case Distance(window=None):
            return [("DISTANCE", {})]
        case Distance():
            return [("NEAR", {"near": statistic.window or 0})]
        case RecentMass():
            return [("RECENT", {"recent": statistic.window})]
        case LocalMass():
            return [("LOCAL", {"first": statistic.sink, "recent": statistic.window})]
        case PositionMass():
            bounds = [max(statistic.stop, 0), *([statistic.start] if statistic.start > 0 else [])]
            return [("FIRST", {"first": bound}) for bound in bounds]
    return []


def run(read: Read, x: Operands, statistics: Sequence[Statistic], output: bool) -> tuple[Tensor | None, list[Tensor]]:
    """The output (b, h, n, dv) before output stages, or None, and every statistic."""
    a = Arguments.of(read, x)
    calls = [_Call()]
    terms: list[list[tuple[str, _Call]]] = []
    for statistic in statistics:
        terms.append([])
        for slot, given in _terms(statistic):
            call = next((call for call in calls if call.take(slot, given)), None)
            if call is None:
                calls.append(call := _Call({slot}, dict(given)))
            terms[-1].append((slot, call))
    out: Tensor | None = None
    for call in calls:
        values = _readable(x.v.detach()) if output and out is None and x.v is not None else None
        first, recent, near = (call.given.get(name, 1) for name in ("first", "recent", "near"))
        made, call.found = rows(a, frozenset(call.want), first=first, recent=recent, near=near, v=values)
        out = made.to(x.q.dtype) if made is not None else out
    results = []
    for statistic, parts in zip(statistics, terms, strict=True):
        values_of = [call.found[slot] for slot, call in parts]
        if not values_of:
            total = _later(statistic, a, calls[0].found["LSE"])
        else:
            total = values_of[0] if len(values_of) == 1 else values_of[0] - values_of[1]
        results.append(statistic.finish(total, x))
    return out, results


def _later(statistic: Statistic, a: Arguments, lse: Tensor) -> Tensor:
    """What needs the log-sum-exps first."""
    match statistic:
        case KeyMass():
            counted = None if statistic.rows is None else statistic.rows.to(lse.device)
            return columns(
                a,
                lse,
                count=counted,
                queries=None if counted is None else _range(counted != 0),
                per_key_value_head=statistic.per == "key_value_head",
            )
        case HorizonMass():
            return columns(a, lse, horizon=(statistic.near, statistic.far))
        case SegmentMass():
            return segments(a, lse, torch.atleast_2d(statistic.segments).to(lse.device, torch.int32).contiguous(), statistic.count)
        case SpanMass():
            ids, patterns = _as_segments(statistic.spans.to(lse.device))
            return segments(a, lse, ids, len(patterns)) @ patterns
        case WeightAt():
            return _weight_at(a, lse, statistic.keys.to(lse.device))
    raise TypeError(f"{type(statistic).__name__} has no kernel")


def _range(counted: Tensor) -> tuple[int, int]:
    """From the first to the last of the queries that count: the others are not even read."""
    places = counted.any(0).nonzero().flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _as_segments(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Spans, which may overlap, as segments, which do not: (b or 1, m) ids, and (segments, spans) which segment is in which."""
    spans = spans if spans.dim() == 3 else spans[None]
    columns_ = spans.transpose(1, 2).reshape(-1, spans.shape[1])
    patterns, ids = columns_.unique(dim=0, return_inverse=True)
    return ids.view(len(spans), -1).to(torch.int32).contiguous(), patterns.float()


def _weight_at(a: Arguments, lse: Tensor, keys: Tensor, rows_at_once: int = 4096) -> Tensor:
    """(b, h, n): one weight of each row, from its own dot product."""
    b, _, n, d = a.q.shape
    index = keys.expand(b, -1).clamp(min=0)
    seen = (keys >= 0).expand(b, -1) & a.sees(index)
    parts = []
    for start in range(0, n, rows_at_once):
        at = index[:, start : start + rows_at_once]
        chosen = a.k.gather(2, at[:, None, :, None].expand(-1, a.k.shape[1], -1, d)).float()
        q = a.q[:, :, start : start + rows_at_once].float().unflatten(1, (a.k.shape[1], -1))
        s = (q * chosen[:, :, None]).sum(-1).flatten(1, 2) * (a.scale / LOG2E)
        if a.softcap:
            s = a.softcap * torch.tanh(s / a.softcap)
        parts.append((s - lse[:, :, start : start + rows_at_once]).exp())
    return torch.where(seen[:, None], torch.cat(parts, dim=2), 0.0)
