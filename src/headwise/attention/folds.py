"""Rewrites of a declared read into one that a faster backend can run, each exact in the dtype at hand; what was done, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .read import Operands, Read, repeat_heads
from .stage import Bias, Block, Columns, Output, Score

HALF = (torch.bfloat16, torch.float16)
ALLOWED = 2.0**-17  # what rounding may add to a score when a position becomes a column: that of q . k is of this size too


@dataclass(frozen=True)
class Folded:
    """A read after folding, its tensors, and what was folded; `kept`: folds that would not be exact here, and why."""

    read: Read
    x: Operands
    folds: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def fold(read: Read, x: Operands) -> Folded:
    """Folds what can be folded: weight edits into the output, then factors and low-rank biases into q and k."""
    read, folds = fold_weights(read, x)
    read, x, more, kept = _fold_scores(read, x)
    return Folded(read, x, tuple(folds + more), tuple(kept))


def fold_weights(read: Read, x: Operands) -> tuple[Read, list[str]]:
    """Turns weight edits into output stages where they are exactly that; returns the read and what was folded, in words."""
    folds: list[str] = []
    outputs: list[Output] = []
    if not x.aligned or x.q.shape[2] > x.k.shape[2]:
        return read, folds  # queries have no place among the keys, which a fold may need
    for stage in read.weights:
        folded = stage.fold()
        if folded is None:
            return read, []  # order matters: fold all or none
        outputs.append(folded)
        folds.append(f"{type(stage).__name__} on the weights = {type(folded).__name__} on the output")
    return replace(read, weights=(), outputs=(*outputs, *read.outputs)), folds


def _fold_scores(read: Read, x: Operands) -> tuple[Read, Operands, list[str], list[str]]:
    """The leading factors go into q, then biases of low rank into columns of q and k, if nothing else is left that scores."""
    folds: list[str] = []
    left = list(read.scoring)
    q = x.q
    while left and isinstance(left[0], Score) and (factor := left[0].factor()) is not None:
        name = type(left[0]).__name__
        if q.dtype in HALF and bool((torch.frexp(factor)[0].abs() != 0.5).logical_and(factor != 0).any()):
            return read, x, [], [f"{name} = a factor on q, but q would be rounded again to {_name(q.dtype)}"]
        q = q * factor.to(q).view(-1, 1, 1)
        folds.append(f"{name} = a factor on q")
        left.pop(0)
    if folds:
        read, x = replace(read, scoring=tuple(left)), replace(x, q=q)
    pattern = read.mask.pattern() if read.mask is not None else None
    causal = pattern is not None and pattern.causal
    if not left or not all(isinstance(stage, Bias) for stage in left):
        return read, x, folds, []
    found: list[Columns] = []
    said: list[str] = []
    rows, keys = (torch.arange(t.shape[2], device=t.device) for t in (x.q, x.k))
    block = Block(x.q, x.k, rows, keys, x.query_position, x.key_position)  # columns ask for places: heads stay grouped
    for stage in left:  # all of them, or none: what stays a bias needs another backend anyway
        columns = stage.columns(block, causal)  # type: ignore[union-attr]
        if columns is None:
            return read, x, folds, []
        if (reason := _inexact(columns, x.q.dtype)) is not None:
            return read, x, folds, [f"{type(stage).__name__} = columns of q and k, but {reason}"]
        found.append(columns)
        rank = columns.query.shape[-1]
        said.append(f"{type(stage).__name__} = {rank} column{'s' if rank > 1 else ''} of q and k")
    scale = 1.0 if _scales(read.scale, x.q.dtype) else read.scale
    return replace(read, scoring=(), scale=scale), _widen(x, read.scale, found), [*folds, *said], []


def _widen(x: Operands, scale: float, found: list[Columns]) -> Operands:
    """q and k with the columns beside them; keys are repeated for each query head where columns differ between those."""
    k = x.k if all(part.key.shape[1] == 1 for part in found) else repeat_heads(x.k, x.groups)
    queries, keys = [part.query for part in found], [part.key for part in found]
    q, v = x.q, x.v
    if any(len(part) > len(k) for part in keys):  # keys that all rows of the batch share, with columns of their own
        k = k.expand(len(q), -1, -1, -1)
        v = None if v is None else v.expand(len(q), -1, -1, -1)
    if _scales(scale, q.dtype):
        q = q * scale
    else:  # a half-precision q would be rounded by the scale, so the columns are divided by it, in two parts that add up
        wide = [part.float() / scale for part in queries]
        queries = [high for part in wide for high in (part.to(q.dtype), (part - part.to(q.dtype).float()).to(q.dtype))]
        keys = [part for part in keys for _ in range(2)]
    width = sum(part.shape[-1] for part in queries)
    spare = -(q.shape[-1] + width) % 16  # fused kernels want head sizes in eights, and are faster by sixteens
    q = torch.cat([q, *(_fit(part, q) for part in queries), q.new_zeros(1).expand(*q.shape[:3], spare)], -1)
    k = torch.cat([k, *(_fit(part, k) for part in keys), k.new_zeros(1).expand(*k.shape[:3], spare)], -1)
    v = v if v is None or k.shape[1] == v.shape[1] else repeat_heads(v, x.groups)
    return replace(x, q=q, k=k, v=v)


def _scales(scale: float, dtype: torch.dtype) -> bool:
    """Whether q takes this factor without a loss that matters: in half precision a power of two."""
    return dtype not in HALF or abs(math.frexp(scale)[0]) == 0.5


def _fit(columns: Tensor, beside: Tensor) -> Tensor:
    return columns.to(beside).expand(*beside.shape[:3], -1)


def _inexact(columns: Columns, dtype: torch.dtype) -> str | None:
    """Why these columns would change scores by more than q k^T is rounded; None if they do not."""
    wide = torch.promote_types(columns.query.dtype, columns.key.dtype)
    if dtype in HALF and (columns.computed or wide != dtype):
        what = "they are" if columns.computed else f"its factors are {_name(wide)} and are"
        return f"{what} rounded to {_name(dtype)}" + ("" if columns.computed else "; cast the factors yourself to accept that")
    if columns.computed and dtype == torch.float32:
        largest = float(columns.query.abs().amax() * columns.key.abs().amax()) * columns.query.shape[-1]
        rounding = largest * torch.finfo(dtype).eps / 2
        if rounding > ALLOWED:
            return f"products up to {largest:.3g} are off by up to {rounding:.1g} in {_name(dtype)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
