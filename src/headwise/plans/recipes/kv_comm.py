"""A context handed from one model to another in some of the layers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...caches.rules.withheld import Withheld
from ...card import Card
from ...models.handing import context_weight, send
from ...models.inputs import text_ids
from ...models.subject import Subject, as_subject
from ...progress import bar
from ...prompts import needle_prompts
from ..plan import Plan

CARD = Card(
    paper="KVComm: Enabling Efficient LLM Communication through Selective KV Sharing",
    year=2025,
    room="cache",
    source=(
        "arXiv:2510.03346, sec. 3, and the authors' code: layers by the weight that questions give to contexts, without the first "
        "token, min-max normalised, mixed with a Gaussian over depth; the code's default is no Gaussian, centre (L - 1) / 2, width "
        "10. The paper takes the ceiling of share x layers, the code rounds down and always sends the first layer; here as in the "
        "paper. Calibration on needles in text, where the paper uses a sample of each task"
    ),
)


def kv_comm(
    model: Any = None,
    layers: Sequence[int] | None = None,
    *,
    share: float = 0.3,
    sender: Any = None,
    samples: int = 2,
    weight: float = 1.0,
    centre: float | None = None,
    width: float = 10.0,
    sink: int = 1,
    show_progress: bool = True,
) -> Plan:
    """The plan under which a receiver reads a context that it is handed (`models.handing`): layers that are not sent keep only
    the first `sink` tokens of it, and all that follows.

    Args:
        layers: those that are sent; None chooses ceil(share * layers) of them.
        sender: whose contexts they are, for choosing; None is the receiver itself. samples: contexts with a question to choose by.
        weight: of what questions look at, against the Gaussian over depth of `centre` and `width`, in layers.

    Raises: SelectionError for a layer that does not exist; GeometryError if the sender is of another shape.
    """
    subject = as_subject(model)
    count = subject.main.shape[0]
    about: dict[str, Any] = {"recipe": "kv_comm", "sink": sink}
    if layers is None:
        scores = _looked_at(subject, subject if sender is None else as_subject(sender), samples, show_progress)
        depth = torch.arange(count, dtype=torch.float64)
        prior = torch.exp(-((depth - ((count - 1) / 2 if centre is None else centre)) ** 2) / (2 * width**2))
        total = weight * _spread(scores) + (1 - weight) * _spread(prior)
        layers = sorted(total.argsort(descending=True, stable=True)[: math.ceil(share * count)].tolist())
        about["scores"] = [round(score, 6) for score in scores.tolist()]
    sites = subject.main.sites
    sent = subject.heads([(layer, head) for layer in layers for head in range(sites[layer % count].heads)])
    about["sent"] = list(layers)
    return Plan.empty(subject).use(subject.main.exists() - sent, Withheld(sink)).noting(**about)


def _spread(scores: Tensor) -> Tensor:
    """From 0 for the least to 1 for the most; all 0 where all are the same."""
    return (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-300)


def _looked_at(receiver: Subject, sender: Subject, samples: int, show_progress: bool) -> Tensor:
    length = min(receiver.max_length, 1024)
    depths, haystack = tuple((i + 0.5) / samples for i in range(samples)), text_ids(receiver, None)
    prompts = needle_prompts(
        haystack * -(-length // len(haystack)), length, depths, vocabulary=receiver.vocabulary, begin=receiver.begin, seed=7,
        encode=receiver.encode_raw if receiver.tokenizer is not None else None,
    )  # fmt: skip
    total = torch.zeros(receiver.main.shape[0], dtype=torch.float64)
    with bar(len(prompts), "choosing layers", show_progress) as advance:
        for prompt in prompts:
            ids = torch.tensor([prompt.input_ids], device=receiver.device)
            asked = ids.shape[1] - _question(receiver, prompt.input_ids)
            total += context_weight(receiver, send(sender, ids[:, :asked]), ids[:, asked:])
            advance(1)
    return total / len(prompts)


def _question(subject: Subject, ids: Sequence[int]) -> int:
    """Tokens of the question at a prompt's end: its last line, or, of random tokens, a few."""
    if subject.tokenizer is None:
        return 8
    line = subject.tokenizer.decode(ids[-64:]).rstrip("\n").rsplit("\n", 1)[-1]
    return max(1, min(len(subject.encode_raw(line)), 63))


def example(subject: Subject) -> Plan:
    """Half of the layers, named."""
    return kv_comm(subject, list(range(0, subject.main.shape[0], 2)), show_progress=False)
