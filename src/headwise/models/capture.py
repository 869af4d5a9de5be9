"""Statistics of every head and layer in one forward pass, without attention weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.statistic import NAMED, Statistic
from ..errors import InputError
from ..types import Statistics
from .call import Call
from .inputs import any_inputs
from .subject import as_subject


def capture(
    model: Any = None,
    want: Sequence[str] | Mapping[str, Statistic] = ("entropy", "distance", "max_weight"),
    *,
    text: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    stacks: Sequence[str] | None = None,
    length: int = 512,
    mean: bool = False,
    tokenizer: Any | None = None,
) -> dict[str, Statistics]:
    """Runs a model once and returns, for each stack, its statistics with shape (layers, b, h, n).

    Works under whatever plan is applied to the model. Beyond the plain forward pass it holds the statistics asked for, and
    of one layer at a time what its sweep needs, O(n). Padding rows hold the statistics of what they read.

    Args:
        want: names such as entropy (`headwise.attention.statistic.NAMED`); or {name: Statistic}.
        text: what to read, cut to `length` tokens; or inputs: a dict for the model's forward.
        mean: reduce each layer at once over batch and real queries, to (layers, h, ...); columns are summed over the batch.

    Raises: InputError for an unknown statistic, or where layers of a stack differ in their number of heads.
    """
    subject = as_subject(model, tokenizer)
    unknown = [name for name in want if not isinstance(want, Mapping) and name not in NAMED]
    if unknown:
        raise InputError(f"there is no statistic {unknown[0]!r}; there are: {', '.join(NAMED)}, or give a Statistic of your own")
    chosen = want if isinstance(want, Mapping) else {name: NAMED[name] for name in want}
    wanted = set(subject.layout.stacks if stacks is None else (subject.layout.stack(name).name for name in stacks))
    found: dict[str, dict[int, Statistics]] = {name: {} for name in wanted}

    def tap(call: Call, out: Tensor) -> None:
        if call.site.stack in wanted:
            found[call.site.stack][call.site.layer] = call.statistics(chosen, mean=mean)

    if inputs is None:
        inputs = any_inputs(subject, text, 1, min(length, subject.max_length) if text is None else length)
    with torch.no_grad(), subject.tap(tap):
        subject.run(inputs)
    results = {}
    for name, layers in found.items():
        if not layers:
            continue  # a tower that this input did not reach
        if len({statistics[key].shape for statistics in layers.values() for key in list(chosen)[:1]}) > 1:
            raise InputError(f"the layers of {name} differ in shape, so their statistics do not stack; use Subject.tap to see each")
        results[name] = Statistics({key: torch.stack([layers[i][key] for i in sorted(layers)]) for key in chosen})
    return results
