"""Retrieval heads read everything, the others stream."""

from __future__ import annotations

from typing import Any

import torch

from ...card import Card
from ...errors import GeometryError, PlanError
from ...models.subject import Subject, as_subject
from ...probes import probe
from ...probes.duo_gate import DuoGate
from ...stages.sink import Sink
from ...stages.window import Window
from ...types import Heads, HeadTable
from ..gates import above_quantile, train_gates
from ..plan import Plan

CARD = Card(
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.10819; sinks 64 and recent 256 as deployed. With train=True gates are trained as published (plans/gates.py, "
        "full attention of the teacher's stream as in the authors' code) and heads chosen by a quantile over all layers; without "
        "it by the duo_gate probe, the gradient of those gates, above a share of the largest. Streaming heads are masked in the "
        "prompt too, as in the paper's training; the authors' code lets all heads read a first prompt in full. `recent` counts the "
        "token being read; the authors' decoding reads one more"
    ),
    status="training of gates and deployment; unless train=True, heads are chosen by the first order of the gates",
)
SPARSITY = 0.5  # of trained gates, unless another is given


def duo(
    model: Any = None,
    heads: HeadTable | Heads | None = None,
    *,
    threshold: float = 0.03,
    sparsity: float | None = None,
    sink: int = 64,
    recent: int = 256,
    train: bool = False,
    steps: int = 120,
    seed: int = 0,
    show_progress: bool = True,
) -> Plan:
    """Full cache for heads that need the whole context (and heads that share keys with one), sinks and a window for the rest.

    Args:
        heads: those that keep everything; or a table such as duo_gate, retrieval, trained gates or one that was imported; None
            measures duo_gate.
        threshold: heads of the table above this share of its largest value keep everything.
        sparsity: instead, the share of key/value heads that stream, those of the lowest values over all layers.
        sink, recent: tokens that the other heads keep.
        train: trains gates for `steps` instead of measuring duo_gate (`headwise.plans.gates.train_gates` has more options);
            sparsity is then 0.5 unless given. seed: of the training, and of the noise that breaks ties.

    Raises: UnsupportedModelError if the gates have to be measured and cannot be. GeometryError for a table of another model.
        PlanError for heads together with train, or heads together with sparsity that are no table.
    """
    subject = as_subject(model)
    if train and heads is not None:
        raise PlanError("duo either trains gates or is given heads; leave one of them out")
    if train:
        heads = train_gates(subject, steps=steps, seed=seed, show_progress=show_progress)
        sparsity = SPARSITY if sparsity is None else sparsity
    elif heads is None:
        heads = probe("duo_gate", subject, needed_for="duo", show_progress=show_progress)
    by = heads.name if isinstance(heads, HeadTable) else "given heads"
    about: dict[str, Any] = {"recipe": "duo", "by": by, "sink": sink, "recent": recent}
    if isinstance(heads, HeadTable):
        stack = subject.main
        if heads.shape != stack.shape or heads.stack != stack.name:
            raise GeometryError(
                f"the table {heads.name} is of {heads.shape[0]} layers x {heads.shape[1]} heads of {heads.stack}, the {stack.name} "
                f"of {subject.name} has {stack.shape[0]} x {stack.shape[1]}"
            )
        if sparsity is not None:
            about["sparsity"] = sparsity
            heads = above_quantile(heads, stack, sparsity, seed)
        else:
            heads = heads > threshold * float(heads.values.nan_to_num(-torch.inf).max())
    elif sparsity is not None:
        raise PlanError("sparsity chooses heads by the values of a table; leave it out where the heads themselves are given")
    kept = subject.main.key_value_groups(heads)
    rest = subject.main.exists() - kept
    about |= {"full": kept.names(), "streaming": rest.count()}
    return Plan.empty(subject).use(rest, Window(recent) | Sink(sink)).noting(**about)


def example(subject: Subject) -> Plan:
    """A cheaper measurement, for the conformance checks."""
    return duo(subject, probe(DuoGate(prompts=2, length=384), subject, show_progress=False), sink=8, recent=64)
