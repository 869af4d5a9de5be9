"""A declared read: its stages in order, its tensors with their positions, and the row sweep that defines what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ShapeError
from .mask import And, Mask
from .stage import Bias, Block, Normalizer, Output, RowScore, Score, Stage, Weights, softmax

SWEEP_BYTES = 8 * 2**20  # of scores held at once: about what the caches of a CPU hold
GPU_SWEEP_BYTES = 64 * 2**20
BLOCK_COUNT_ROWS = 256  # rows a block when costs are counted


@dataclass(frozen=True)
class Read:
    """How queries read keys and values, in the order in which it happens."""

    scale: float
    scoring: tuple[Score | Bias | RowScore, ...] = ()
    mask: Mask | None = None
    normalizer: Normalizer | None = None
    weights: tuple[Weights, ...] = ()
    outputs: tuple[Output, ...] = ()

    @staticmethod
    def of(stages: tuple[Stage, ...], scale: float) -> Read:
        """Sorts stages by kind.

        Raises: ShapeError for an object that is no stage, or two normalizers.
        """
        scoring = tuple(s for s in stages if isinstance(s, Score | Bias | RowScore))
        masks = tuple(s for s in stages if isinstance(s, Mask))
        normalizers = [s for s in stages if isinstance(s, Normalizer)]
        weights = tuple(s for s in stages if isinstance(s, Weights))
        outputs = tuple(s for s in stages if isinstance(s, Output))
        if len(scoring) + len(masks) + len(normalizers) + len(weights) + len(outputs) != len(stages):
            strange = next(s for s in stages if not isinstance(s, Score | Bias | RowScore | Mask | Normalizer | Weights | Output))
            raise ShapeError(f"{strange!r} is no stage; give Mask, Bias, Score, RowScore, Normalizer, Weights or Output stages")
        if len(normalizers) > 1:
            names = ", ".join(type(n).__name__ for n in normalizers)
            raise ShapeError(f"a read has one normalizer, not {len(normalizers)}: {names}")
        mask = masks[0] if len(masks) == 1 else And(masks) if masks else None
        return Read(scale, scoring, mask, normalizers[0] if normalizers else None, weights, outputs)

    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        masks = (self.mask,) if self.mask else ()
        normalizers = (self.normalizer,) if self.normalizer else ()
        return (*self.scoring, *masks, *normalizers, *self.weights, *self.outputs)


@dataclass(frozen=True)
class Operands:
    """The tensors of a read. `aligned`: queries are the last n of keys 0..m-1, in order."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    query_position: Tensor
    key_position: Tensor
    aligned: bool

    @staticmethod
    def of(
        q: Float[Tensor, "b hq n d"],
        k: Float[Tensor, "b hk m d"],
        v: Float[Tensor, "b hk m dv"] | None,
        query_positions: Int[Tensor, "... n"] | None = None,
        key_positions: Int[Tensor, "... m"] | None = None,
    ) -> Operands:
        """Checks shapes and fills in positions.

        Raises: ShapeError with both numbers where shapes do not fit.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor is not None and tensor.dim() != 4:
                raise ShapeError(f"{name} has {tensor.dim()} dimensions; attention needs (batch, heads, tokens, size)")
        if q.shape[-1] != k.shape[-1]:
            raise ShapeError(f"q has head size {q.shape[-1]}, k has {k.shape[-1]}; they must agree")
        if q.shape[1] % k.shape[1]:
            raise ShapeError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads; merge or repeat heads first")
        if k.shape[0] not in (1, q.shape[0]):
            raise ShapeError(f"q has batch {q.shape[0]}, k has {k.shape[0]}")
        if v is not None and v.shape[:3] != k.shape[:3]:
            raise ShapeError(f"k is {tuple(k.shape)}, v is {tuple(v.shape)}; batch, heads and tokens must agree")
        n, m = q.shape[2], k.shape[2]
        aligned = query_positions is None and key_positions is None
        if key_positions is not None:  # what an empty slot holds must not reach anything, not even as 0 * NaN
            there = (torch.atleast_2d(key_positions) >= 0)[:, None, :, None]
            k, v = torch.where(there, k, 0), None if v is None else torch.where(there, v, 0)
        if query_positions is None:
            query_positions = torch.arange(m - n, m, device=q.device)
        if key_positions is None:
            key_positions = torch.arange(m, device=q.device)
        if query_positions.shape[-1] != n or key_positions.shape[-1] != m:
            given = f"{query_positions.shape[-1]} query and {key_positions.shape[-1]} key positions"
            raise ShapeError(f"{given} for {n} queries and {m} keys")
        return Operands(q, k, v, torch.atleast_2d(query_positions), torch.atleast_2d(key_positions), aligned)

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def of_row(self, row: int) -> Operands:
        """One row of the batch."""

        def one(tensor: Tensor) -> Tensor:
            return tensor[row : row + 1] if len(tensor) > 1 else tensor

        v = None if self.v is None else one(self.v)
        return Operands(self.q[row : row + 1], one(self.k), v, one(self.query_position), one(self.key_position), self.aligned)

    def of_queries(self, start: int, stop: int, aligned: bool = False) -> Operands:
        """Some of the queries. aligned: the keys after the last of them are left out, so that they stay the last ones."""
        last = self.k.shape[2] - self.q.shape[2] + stop if aligned else self.k.shape[2]
        k, v = self.k[:, :, :last], None if self.v is None else self.v[:, :, :last]
        return Operands(self.q[:, :, start:stop], k, v, self.query_position[:, start:stop], self.key_position[:, :last], aligned)

    def own_value(self) -> Tensor | None:
        """(b, h, n, dv): the value at each query's own place, where queries are the last keys; None elsewhere."""
        n, m = self.q.shape[2], self.k.shape[2]
        if self.v is None or not self.aligned or n > m:
            return None
        return repeat_heads(self.v[:, :, m - n :], self.groups)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """(b, hk, m, d) -> (b, hk * groups, m, d), each head `groups` times in a row."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


KeyIndex = slice | Tensor | None


def needed_keys(read: Read, x: Operands, start: int, stop: int) -> KeyIndex:
    """The keys that rows start..stop-1 can reach by the mask: a slice if they stand together, None for all of them."""
    if read.mask is None or not x.aligned:
        return None
    m, offset = x.k.shape[2], x.k.shape[2] - x.q.shape[2]
    intervals = [(max(0, a), min(m, b)) for a, b in read.mask.reach(offset + start, offset + stop)]
    intervals = [(a, b) for a, b in intervals if a < b] or [(0, 1)]
    sparse = stop - start == 1 and read.mask.pattern() is None and read.mask.given() is None  # places say what it shows
    if sum(b - a for a, b in intervals) >= m and not sparse:
        return None
    if any(stage.adjacent for stage in read.stages() if isinstance(stage, RowScore | Weights)):
        intervals = [(intervals[0][0], intervals[-1][1])]
    elif sparse:  # one query: just what it reads
        index = read.mask.keys(offset + start, m, x.q.shape[1], x.q.device)
        return index if len(index) else slice(0, 1)
    if len(intervals) == 1:
        return slice(*intervals[0])
    return torch.cat([torch.arange(a, b, device=x.q.device) for a, b in intervals])


def take_keys(tensor: Tensor, keys: KeyIndex) -> Tensor:
    """(b, h, m, ...) -> (b, h, needed, ...)."""
    return tensor if keys is None else tensor[:, :, keys]


def reachable_pairs(read: Read, x: Operands) -> int:
    """Query-key pairs that the mask can reach, counted a block of rows at a time."""
    n, m = x.q.shape[2], x.k.shape[2]
    total = 0
    for start in range(0, n, BLOCK_COUNT_ROWS):
        stop = min(start + BLOCK_COUNT_ROWS, n)
        keys = needed_keys(read, x, start, stop)
        count = m if keys is None else keys.stop - keys.start if isinstance(keys, slice) else len(keys)
        total += (stop - start) * count
    return total


def block_of(x: Operands, start: int, stop: int, keys: KeyIndex) -> Block:
    """Rows start..stop-1 against the given keys."""
    index = torch.arange(x.k.shape[2], device=x.k.device)
    position = x.key_position
    if keys is not None:
        index, position = index[keys], position[:, keys]
    rows = torch.arange(start, stop, device=x.k.device)
    key = repeat_heads(take_keys(x.k, keys), x.groups)
    return Block(x.q[:, :, start:stop], key, rows, index, x.query_position[:, start:stop], position)


def visibility(read: Read, block: Block) -> Tensor:
    """Booleans that broadcast to (b, h, c, m): the masks, and no empty slots."""
    visible = (block.key_position >= 0)[:, None, None, :]
    return visible if read.mask is None else visible & read.mask.visible(block.places)


def scores(read: Read, block: Block) -> Tensor:
    """(b, h, c, m) scores in compute dtype, after every score and bias stage, -inf where masked."""
    s = torch.matmul(block.query.to(block.dtype), block.key.to(block.dtype).transpose(-1, -2)) * read.scale
    visible = visibility(read, block) if block.visible is None else block.visible
    for stage in read.scoring:
        if isinstance(stage, Score):
            s = stage.score(s, block.places)
        elif isinstance(stage, Bias):
            s = s + stage.bias(block.places).to(block.dtype)
        else:
            s = stage.score_rows(s, block)
    return s.masked_fill(~visible, -torch.inf)


def weigh(read: Read, s: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Scores -> weights (b, h, c, m) after every weight edit, and the log-normalizer (b, h, c)."""
    weights, log_normalizer = read.normalizer.normalize(s) if read.normalizer else softmax(s)
    for stage in read.weights:
        weights = stage.edit(weights, block)
    return weights, log_normalizer


@dataclass(frozen=True)
class Rows:
    """Some rows of a read, worked out: which keys they were read against, their places, scores and weights.

    scores, weights: (b, h, c, keys); log_normalizer (b, h, c).
    """

    keys: KeyIndex
    block: Block
    scores: Tensor
    weights: Tensor
    log_normalizer: Tensor


def rows_of(read: Read, x: Operands, start: int, stop: int, whole: bool = False) -> Rows:
    """Rows start..stop-1 against the keys that they can reach (all of them: whole), with the earlier rows that they depend on."""
    first = max(0, start - past_rows(read))
    keys = None if whole else needed_keys(read, x, first, stop)
    block = block_of(x, first, stop, keys)
    block = replace(block, visible=visibility(read, block))
    s = scores(read, block)
    weights, log_normalizer = weigh(read, s, block)
    if first < start:
        extra = start - first
        s, weights, log_normalizer = s[:, :, extra:], weights[:, :, extra:], log_normalizer[:, :, extra:]
        block = block_of(x, start, stop, keys)
    return Rows(keys, block, s, weights, log_normalizer)


def past_rows(read: Read) -> int:
    """How many rows before its own a row depends on: scores on some, edits of weights on some more."""
    return sum(stage.past_rows for stage in read.stages() if isinstance(stage, RowScore | Weights))


def sweep_bytes(x: Operands) -> int:
    """Of scores held at once, on the device at hand."""
    return GPU_SWEEP_BYTES if x.q.is_cuda else SWEEP_BYTES


def row_blocks(x: Operands, rows: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks whose scores fit `sweep_bytes`, or of `rows` rows each."""
    b, h, n, _ = x.q.shape
    if rows is None:
        rows = max(16, sweep_bytes(x) // max(1, b * h * x.k.shape[2] * max(4, x.q.dtype.itemsize)))
    for start in range(0, n, rows):
        yield start, min(start + rows, n)


def apply_outputs(read: Read, out: Tensor, x: Operands) -> Tensor:
    """The output stages, in order."""
    own = x.own_value() if read.outputs else None
    for stage in read.outputs:
        out = stage.output(out, own)
    return out


def check_stages(read: Read, heads: int) -> None:
    """Raises: ShapeError if a stage carries another number of heads."""
    for stage in read.stages():
        stage.check_heads(heads)
