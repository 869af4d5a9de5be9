"""Our own Triton kernels, for what PyTorch's lack: distance biases, learned biases that train without atomics, soft caps,
sink logits, sparse normalizers, under masks of simple form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import interpreted, missing
from ..mask import Pattern, documents_at
from ..read import Operands, Read, apply_outputs
from ..stage import Bias, Score
from . import FEW, edits_weights

LONG = 16384  # few queries against so many keys leave most of the GPU idle: one program a head
WIDEST = 256  # head size


@dataclass(frozen=True)
class Scoring:
    """The scoring stages in the form that the kernel knows: capped first, then biased."""

    softcap: float | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None


def refuses(read: Read, x: Operands) -> str | None:
    """Why it cannot run this read; None if it can."""
    if not x.q.is_cuda and not interpreted():
        return f"Triton kernels run on an NVIDIA GPU, the tensors are on {x.q.device}"
    if (reason := missing()) is not None:
        return reason
    if x.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it knows bfloat16, float16 and float32, not {str(x.q.dtype).removeprefix('torch.')}"
    if read.mask is not None and read.mask.pattern() is None:
        return f"the mask {read.mask} has no simple form"
    if (reason := edits_weights(read)) is not None:
        return reason
    if x.v is not None and max(x.q.shape[-1], x.v.shape[-1]) > WIDEST:
        return f"heads of {max(x.q.shape[-1], x.v.shape[-1])} numbers are too wide; it takes up to {WIDEST}"
    scoring = _scoring(read)
    if isinstance(scoring, str):
        return scoring
    alpha = None if read.normalizer is None else read.normalizer.entmax_alpha()
    if alpha is not None:
        return _refuses_entmax(read, x, alpha)
    if read.normalizer is not None and read.normalizer.extra_logit() is None:
        return f"{type(read.normalizer).__name__} is neither a softmax nor a sparse one that it knows"
    if scoring.table is not None and scoring.table.requires_grad and torch.is_grad_enabled() and not x.aligned:
        return "it sums the gradient of a table of distances only where queries are the last keys"
    return None


def _refuses_entmax(read: Read, x: Operands, alpha: float) -> str | None:
    pattern = read.mask.pattern() if read.mask is not None else None
    if alpha not in (1.5, 2.0):
        return f"it knows entmax of 1.5 and 2, not {alpha:g}"
    if read.scoring or not x.aligned or (pattern is not None and pattern.documents is not None):
        return "its sparse normalizers take plain scores, in order, without documents"
    if x.v is not None and max(x.q.shape[-1], x.v.shape[-1]) > 128:
        return "its sparse normalizers take heads of up to 128 numbers"
    return None


def shuns(read: Read, x: Operands) -> str | None:
    """Why the planner passes it over."""
    if not x.q.is_cuda:
        return "on a CPU it is interpreted, for tests"
    if x.q.shape[2] < FEW and x.k.shape[2] > LONG:
        return f"{x.q.shape[2]} queries against {x.k.shape[2]} keys would keep one program a head busy, and no more"
    return None


def run(read: Read, x: Operands) -> Tensor:
    """(b, h, n, dv)."""
    assert x.v is not None
    pattern = (read.mask.pattern() if read.mask is not None else None) or Pattern()
    k, v = x.k.expand(x.q.shape[0], -1, -1, -1), x.v.expand(x.q.shape[0], -1, -1, -1)
    alpha = None if read.normalizer is None else read.normalizer.entmax_alpha()
    if alpha is not None:
        from ._entmax import entmax_attention

        out = entmax_attention(
            x.q, k, v, alpha=alpha, scale=read.scale, causal=pattern.causal, window=pattern.window, sink=pattern.sink
        )
        return apply_outputs(read, out, x)
    from ._biased import Terms, biased_attention

    scoring = _scoring(read)
    assert isinstance(scoring, Scoring)
    logit = None if read.normalizer is None else read.normalizer.extra_logit()
    documents = None if pattern.documents is None else pattern.documents.to(x.q.device)
    terms = Terms(
        scale=read.scale,
        causal=pattern.causal,
        window=pattern.window,
        sink=pattern.sink,
        query_documents=None if documents is None else documents_at(documents, x.query_position),
        key_documents=None if documents is None else documents_at(documents, x.key_position),
        softcap=scoring.softcap,
        slopes=_on(scoring.slopes, x),
        table=_on(scoring.table, x),
        logit=_on(logit, x),
    )
    positions = (None, None) if x.aligned else (x.query_position, x.key_position)
    return apply_outputs(read, biased_attention(x.q, k, v, terms, *positions)[0], x)


def _scoring(read: Read) -> Scoring | str:
    """What the kernel does to scores; or why it cannot."""
    softcap, slopes, table = None, None, None
    for stage in read.scoring:
        name = type(stage).__name__
        if isinstance(stage, Score) and stage.softcap() is not None:
            if softcap is not None or slopes is not None or table is not None:
                return f"it caps scores before it biases them, {name} comes after"
            softcap = stage.softcap()
        elif isinstance(stage, Bias) and stage.distance_slopes() is not None and slopes is None:
            slopes = stage.distance_slopes()
        elif isinstance(stage, Bias) and stage.relative_table() is not None and table is None:
            table = stage.relative_table()
        else:
            return f"it does not know {name}"
    return Scoring(softcap, slopes, table)


def _on(tensor: Tensor | None, x: Operands) -> Tensor | None:
    return None if tensor is None else tensor.to(device=x.q.device, dtype=torch.float32)
