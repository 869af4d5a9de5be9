"""What probes measure on: text, repeated random tokens, needles; made once and shared by all probes that ask alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.inputs import any_inputs, text_ids, text_rows
from ..models.subject import Subject
from ..prompts import NeedlePrompt, needle_prompts, repeated_rows


@dataclass(frozen=True)
class Request:
    """kind: "any" (whatever the model reads), "text", "repeats" or "needles"; rows of `length` tokens each."""

    kind: str
    rows: int
    length: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows to run together. periods: (rows,) of repeats. prompts: of needles."""

    inputs: Mapping[str, Any]
    periods: Tensor | None = None
    prompts: tuple[NeedlePrompt, ...] = ()

    @property
    def ids(self) -> Tensor:
        """(b, n) token ids."""
        return self.inputs["input_ids"]


@dataclass(eq=False)
class Material:
    """Rows for a subject: its text (None: the embedded held-out text), or inputs of the user's own; seeded.

    tokens: how many of a row of running text ("any"), instead of what the probe asks for; rows so long go fewer at a time.
    """

    subject: Subject
    text: str | None = None
    inputs: Mapping[str, Any] | None = None
    seed: int = 0
    batch_rows: int = 4
    tokens: int | None = None
    _made: dict[Request, list[Batch]] = field(default_factory=dict)

    def batches(self, request: Request) -> list[Batch]:
        """The batches of a request, at most `batch_rows` rows each; made when first asked for.

        Raises: InputError if the model has no room for rows of that length.
        """
        if request not in self._made:
            self._made[request] = self._make(request)
        return self._made[request]

    def length(self, wanted: int) -> int:
        """The length asked for, or the model's context if that is shorter."""
        return min(wanted, self.subject.max_length)

    def _make(self, request: Request) -> list[Batch]:
        subject, length = self.subject, self.length(request.length)
        if request.kind == "any":
            if self.tokens is not None:
                length = subject.check_length(self.tokens)
            at_once = max(1, self.batch_rows * request.length // max(length, 1))
            given = dict(self.inputs) if self.inputs is not None else any_inputs(subject, self.text, request.rows, length)
            return _split(given, min(at_once, self.batch_rows) if self.inputs is None else None)
        if request.kind == "text":
            rows = text_rows(subject, self.text, request.rows, length)
            at_once = min(self.batch_rows, subject.rows_at_once(rows.shape[1]))  # so that losses of a batch are one forward pass
            return [Batch({"input_ids": part}) for part in rows.split(at_once)]
        if request.kind == "repeats":
            ids, periods = repeated_rows(subject.vocabulary, request.rows, length, begin=subject.begin, seed=self.seed)
            made = torch.from_numpy(ids).to(subject.device), torch.from_numpy(periods).to(subject.device)
            return [
                Batch({"input_ids": part}, periods=period)
                for part, period in zip(*(tensor.split(self.batch_rows) for tensor in made), strict=True)
            ]
        if request.kind == "needles":
            return self._needles(request.rows, length)
        raise InputError(f"no material of kind {request.kind!r}")

    def _needles(self, count: int, length: int) -> list[Batch]:
        """Needles at depths spread over the haystack; prompt and answer fill each row, answers at its right end."""
        subject = self.subject
        depths = [(i + 0.5) / count for i in range(count)]
        haystack = text_ids(subject, self.text)
        haystack *= -(-length // len(haystack))
        prompts = needle_prompts(
            haystack, length, depths, encode=subject.encode_raw if subject.tokenizer is not None else None,
            vocabulary=subject.vocabulary, begin=subject.begin, seed=self.seed,
        )  # fmt: skip
        batches = []
        for start in range(0, len(prompts), self.batch_rows):
            part = prompts[start : start + self.batch_rows]
            rows = torch.tensor([[*prompt.input_ids, *prompt.answer] for prompt in part], device=subject.device)
            batches.append(Batch({"input_ids": rows}, prompts=tuple(part)))
        return batches


def _split(given: dict[str, Any], rows: int | None) -> list[Batch]:
    sizes = {len(value) for value in given.values() if isinstance(value, Tensor) and value.dim() > 0}
    if rows is None or len(sizes) != 1:
        return [Batch(given)]
    total = sizes.pop()
    cut = range(0, total, rows)
    return [Batch({k: v[i : i + rows] if isinstance(v, Tensor) else v for k, v in given.items()}) for i in cut]
