"""Retrieval heads read everything, the others stream."""

from __future__ import annotations

from typing import Any

import torch

from ...card import Card
from ...models.subject import Subject, as_subject
from ...probes import probe
from ...probes.duo_gate import DuoGate
from ...stages.sink import Sink
from ...stages.window import Window
from ...types import Heads, HeadTable
from ..plan import Plan

CARD = Card(
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.10819; sinks 64 and recent 256 as deployed. Heads are chosen by the duo_gate probe, the gradient of the "
        "paper's gates, above a share of the largest rather than by a quantile of trained gates. Streaming heads are masked in "
        "the prompt too, as in the paper's training; the authors' code lets all heads read a first prompt in full. `recent` "
        "counts the token being read"
    ),
    status="deployment, with heads chosen by gate gradients; the paper's training of gates is not here",
)


def duo(
    model: Any = None,
    heads: HeadTable | Heads | None = None,
    *,
    threshold: float = 0.03,
    sink: int = 64,
    recent: int = 256,
    show_progress: bool = True,
) -> Plan:
    """Full cache for heads that need the whole context (and heads that share keys with one), sinks and a window for the rest.

    Args:
        heads: those that keep everything; or a table such as duo_gate or retrieval; None measures duo_gate.
        threshold: heads of the table above this share of its largest value keep everything.
        sink, recent: tokens that the other heads keep.

    Raises: UnsupportedModelError if the gates have to be measured and cannot be.
    """
    subject = as_subject(model)
    if heads is None:
        heads = probe("duo_gate", subject, needed_for="duo", show_progress=show_progress)
    by = heads.name if isinstance(heads, HeadTable) else "given heads"
    if isinstance(heads, HeadTable):
        heads = heads > threshold * float(heads.values.nan_to_num(-torch.inf).max())
    kept = subject.main.key_value_groups(heads)
    rest = subject.main.exists() - kept
    about = {"recipe": "duo", "by": by, "sink": sink, "recent": recent, "full": kept.names(), "streaming": rest.count()}
    return Plan.empty(subject).use(rest, Window(recent) | Sink(sink)).noting(**about)


def example(subject: Subject) -> Plan:
    """A cheaper measurement, for the conformance checks."""
    return duo(subject, probe(DuoGate(prompts=2, length=384), subject, show_progress=False), sink=8, recent=64)
