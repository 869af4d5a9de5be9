"""PyTorch's FlexAttention, for scores edited one by one under any mask, on a GPU: block masks come from the mask's tiles.

Nothing is evaluated pair by pair to build a block mask, it is kept for the next call, and one compilation serves all lengths.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..mask import Mask, Tiles
from ..read import Operands, Read, apply_outputs
from ..stage import Bias, Places, RowScore, Score, Stage
from . import FEW, edits_weights, not_softmax

TILE = 128
KEPT = 64  # block masks
COMPILED = 256  # kinds of read, in one process
_masks: OrderedDict[tuple[Any, ...], BlockMask] = OrderedDict()


def refuses(read: Read, x: Operands) -> str | None:
    """Why FlexAttention cannot run this read; None if it can."""
    for stage in read.scoring:
        if isinstance(stage, RowScore):
            return f"{type(stage).__name__} needs whole rows of scores"
    if (reason := not_softmax(read) or edits_weights(read)) is not None:
        return reason
    if x.q.dtype == torch.float64:
        return "it knows no float64"
    if x.v is not None and min(x.q.shape[-1], x.v.shape[-1]) < 16:
        return f"it needs heads of at least 16 numbers, these have {min(x.q.shape[-1], x.v.shape[-1])}"
    if not x.q.is_cuda and _trains(read, x):
        return "it has no backward pass on a CPU"
    if not x.q.is_cuda and read.normalizer is not None:
        return "it gives no log-sum-exp on a CPU"
    return None


def shuns(read: Read, x: Operands) -> str | None:
    """Why the planner passes it over."""
    if not x.q.is_cuda:
        return "on a CPU it compiles for many seconds at first use"
    if torch.is_grad_enabled() and any(tensor.requires_grad for stage in read.stages() for tensor in _tensors(stage)):
        return "it sums gradients of biases by atomics: other bits each time"
    if x.q.shape[2] < FEW:
        return f"{x.q.shape[2]} queries fill too little of its tiles"
    return None


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv)."""
    assert x.v is not None
    n, m = x.q.shape[2], x.k.shape[2]
    where = None if x.aligned else (x.query_position, x.key_position)
    offset = torch.tensor(m - n, device=x.q.device)
    scoring = tuple(_moved(stage, x.q.device) for stage in read.scoring)
    logit = None if read.normalizer is None else read.normalizer.extra_logit()
    blocks = block_mask(read.mask, x)
    arguments: dict[str, Any] = {
        "tiles": None if blocks is None else tuple(getattr(blocks, name) for name in TENSORS),
        "mask_mod": None if blocks is None else blocks.mask_mod,
        "score_mod": _score_mod(scoring, offset, where) if scoring else None,
        "scale": read.scale,
        "enable_gqa": x.groups > 1,
    }
    k, v = x.k.expand(x.q.shape[0], -1, -1, -1), x.v.expand(x.q.shape[0], -1, -1, -1)
    if logit is None:
        out = _compiled()(x.q, k, v, **arguments)
    else:
        out, aux = _compiled()(x.q, k, v, return_aux=AuxRequest(lse=True), **arguments)
        log_sum_exp = aux.lse
        share = torch.sigmoid(log_sum_exp - logit.to(log_sum_exp).view(1, -1, 1))  # what the extra key leaves
        out = (out * share[..., None]).to(out.dtype)
    return apply_outputs(read, out, x)


TENSORS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tensor, ...] | None, mask_mod: Any, **options: Any) -> Any:
    """FlexAttention, with a block mask that takes its lengths from the tensors: as numbers of its own they would be constants."""
    block_mask = None
    if tiles is not None:
        fields: dict[str, Any] = dict(zip(TENSORS, tiles, strict=True))
        block_mask = BlockMask(seq_lengths=(q.shape[2], k.shape[2]), **fields, BLOCK_SIZE=(TILE, TILE), mask_mod=mask_mod)
    return flex_attention(q, k, v, block_mask=block_mask, **options)


@cache
def _compiled() -> Callable[..., Any]:
    compiled = torch.compile(_attend, dynamic=True)

    def call(*arguments: Any, **options: Any) -> Any:
        # settings of stages are constants, lengths are not; each kind of read is compiled once
        with torch._dynamo.config.patch(specialize_float=True, specialize_int=True, recompile_limit=COMPILED):
            return compiled(*arguments, **options)

    return call


def block_mask(mask: Mask | None, x: Operands) -> BlockMask | None:
    """The mask in FlexAttention's form, made from its tiles and kept; None if everything is visible."""
    if mask is None and x.aligned:
        return None
    n, m, device = x.q.shape[2], x.k.shape[2], x.q.device
    offset = torch.tensor(m - n, device=device)
    where = None if x.aligned else (x.query_position, x.key_position)
    if mask is None or not x.aligned:  # places are not those of rows and columns: every tile is asked
        everything = torch.ones(1, 1, -(-n // TILE), -(-m // TILE), dtype=torch.bool, device=device)
        tiles = Tiles(TILE, everything, ~everything)
        return _of_tiles(tiles, _mask_mod(None if mask is None else _moved(mask, device), offset, where), n, m)
    name = (mask, n, m, x.q.shape[1], device, *((id(t), t._version) for t in _tensors(mask)))
    if name not in _masks:
        tiles = mask.tiles(n, m, TILE, x.q.shape[1], device)
        _masks[name] = _of_tiles(tiles, _mask_mod(_moved(mask, device), offset, None), n, m)
        if len(_masks) > KEPT:
            _masks.popitem(last=False)
    _masks.move_to_end(name)
    return _masks[name]


def _of_tiles(tiles: Tiles, mask_mod: Callable[..., Tensor], n: int, m: int) -> BlockMask:
    def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)

    some, every = lists(tiles.some & ~tiles.all), lists(tiles.some & tiles.all)
    made: BlockMask = BlockMask.from_kv_blocks(*some, *every, BLOCK_SIZE=tiles.size, mask_mod=mask_mod, seq_lengths=(n, m))
    return made


Where = tuple[Tensor, Tensor] | None


def _places(b: Tensor, h: Tensor, row: Tensor, column: Tensor, offset: Tensor, where: Where) -> Places:
    if where is None:
        return Places(b, h, row, column, row + offset, column, torch.float32)
    query, key = where
    i = query[b if query.shape[0] > 1 else b * 0, row]
    return Places(b, h, row, column, i, key[b if key.shape[0] > 1 else b * 0, column], torch.float32)


def _score_mod(scoring: tuple[Stage, ...], offset: Tensor, where: Where) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        places = _places(b, h, row, column, offset, where)
        for stage in scoring:
            if isinstance(stage, Score):
                score = stage.score(score, places)
            elif isinstance(stage, Bias):
                score = score + stage.bias(places)
        return score

    return score_mod


def _mask_mod(mask: Mask | None, offset: Tensor, where: Where) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        places = _places(b, h, row, column, offset, where)
        there = places.j >= 0
        return there if mask is None else there & mask.visible(places)

    return mask_mod


def _moved(stage: Any, device: torch.device) -> Any:
    """The stage with its tensors on a device."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(device)
        elif isinstance(value, Stage):
            changes[field.name] = _moved(value, device)
        elif isinstance(value, tuple) and value and all(isinstance(part, Stage) for part in value):
            changes[field.name] = tuple(_moved(part, device) for part in value)
    return dataclasses.replace(stage, **changes) if changes else stage


def _tensors(stage: Any) -> Iterator[Tensor]:
    """The tensors that a stage holds."""
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, Stage):
                yield from _tensors(part)


def _trains(read: Read, x: Operands) -> bool:
    tensors = [x.q, x.k, *([] if x.v is None else [x.v]), *(t for stage in read.stages() for t in _tensors(stage))]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
