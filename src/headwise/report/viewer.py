"""The attention that the report's viewer shows: every head of one stack on one short text, packed small."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from ..models.call import Call
from ..models.inputs import any_inputs
from ..models.subject import Subject

BYTES = 1_600_000  # of packed weights, before base64
TOKENS = 160
TEXT = (
    "The password of the amber falcon is river window copper table.\n"
    "A cache keeps the keys and values of every token, so that the model reads the past without computing it again. "
    "Most heads read only what is near, or rest on the first token; a few look far back.\n"
    "The password of the quiet garden is house money paper light.\n"
    "def push(stack, item):\n    stack.append(item)\n    return stack\n\ndef pop(stack):\n    return stack.pop()\n"
    "The password of the amber falcon is river window copper table.\n"
)


def capture_view(subject: Subject, stack_name: str | None = None, text: str | None = None, tokens: int = TOKENS) -> dict[str, Any]:
    """JSON-able: the tokens, and for every head its weights as bytes (square roots, 255 = 1), row by row, base64.

    Causal stacks keep the lower triangle only. The number of tokens is cut so that all heads stay within BYTES.
    """
    stack = subject.layout.stack(stack_name)
    heads = stack.exists().count()
    room = int(math.sqrt(BYTES * (2 if stack.causal else 1) / heads))
    tokens = max(8, min(tokens, room, subject.max_length))
    reads_text = (
        subject.tokenizer is not None and "input_ids" in subject.forward_names and stack.name in (subject.main.name, "encoder")
    )
    if reads_text and not subject.layout.encoder_decoder:
        ids = (list(subject.begin) + subject.encode(text or TEXT))[:tokens]
        given = {**any_inputs(subject, None, 1, len(ids)), "input_ids": torch.tensor([ids], device=subject.device)}
        labels = [subject.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]  # type: ignore[union-attr]
    else:
        given, labels = any_inputs(subject, None, 1, tokens), []
    found: dict[int, Tensor] = {}

    def tap(call: Call, out: Tensor) -> None:
        if call.site.stack == stack.name and call.site.layer not in found:
            found[call.site.layer] = call.weights(slice(0, tokens))[0, :, :, :tokens].float().cpu()

    with torch.no_grad(), subject.tap(tap):
        subject.run(given)
    rows, columns = next(iter(found.values())).shape[1:]
    if not labels:
        labels = [str(i) for i in range(max(rows, columns))]
    packed = {}
    for layer, weights in sorted(found.items()):
        for head, table in enumerate(weights):
            flat = table[tuple(torch.tril_indices(rows, columns))] if stack.causal else table.flatten()
            data = (flat.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).numpy().tobytes()
            packed[f"L{layer}H{head}"] = base64.b64encode(data).decode("ascii")
    return {"stack": stack.name, "tokens": labels, "rows": rows, "columns": columns, "causal": stack.causal, "weights": packed}
