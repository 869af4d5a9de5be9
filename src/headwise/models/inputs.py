"""Rows of input for any model: text where it reads text, seeded noise where it reads pixels or sound."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import zoo
from ..errors import InputError
from .subject import Subject

NOISE_SEED = 20


def text_ids(subject: Subject, text: str | None) -> list[int]:
    """Token ids of a text, or of the embedded held-out text; random ordinary ids where there is no tokenizer."""
    if subject.tokenizer is None:
        if text is not None:
            raise InputError(f"{subject.name} has no tokenizer here, so it cannot read the text; pass a tokenizer")
        return np.random.default_rng(NOISE_SEED).choice(subject.vocabulary, size=65536).tolist()
    return subject.encode(zoo.heldout_text() if text is None else text)


def text_rows(subject: Subject, text: str | None, rows: int, length: int) -> Tensor:
    """(<= rows, <= length) ids: windows of the text, evenly spread, each after the model's begin tokens.

    A text shorter than the rows asked for gives fewer windows, or one shorter window.
    """
    ids = text_ids(subject, text)
    begin = list(subject.begin)
    size = min(subject.check_length(length) - len(begin), len(ids))
    if size < 2:
        raise InputError(f"the text has {len(ids)} tokens; at least 2 are needed")
    rows = max(1, min(rows, len(ids) // size))
    starts = np.linspace(0, len(ids) - size, rows).astype(int) if rows > 1 else [0]
    return torch.tensor([begin + ids[start : start + size] for start in starts], device=subject.device)


def any_inputs(subject: Subject, text: str | None, rows: int, length: int) -> dict[str, Any]:
    """Inputs for a forward pass of any supported model: what its forward asks for, by name.

    Raises: InputError, naming the missing argument, where only the user can know what the model reads.
    """
    model, config, names = subject.model, subject.model.config, inspect.signature(subject.model.forward).parameters
    first = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(NOISE_SEED)
    given: dict[str, Any] = {}
    if first == "input_ids":
        length = min(length, subject.max_length)
        given["input_ids"] = text_rows(subject, text, rows, length)
        rows = len(given["input_ids"])
    vision = getattr(config, "vision_config", config)
    pixels = first == "pixel_values" or (
        "pixel_values" in names and "text_config" in config.sub_configs and not subject.main.causal
    )
    if pixels:
        size = getattr(vision, "image_size", None)
        if size is None:
            raise InputError(f"cannot tell the image size of {type(model).__name__}; pass inputs={{'pixel_values': ...}}")
        height, width = (size, size) if isinstance(size, int) else size
        shape = (rows, getattr(vision, "num_channels", 3), height, width)
        given["pixel_values"] = torch.randn(shape, generator=generator).to(subject.device, model.dtype)
    if first == "input_features":
        frames = 2 * config.max_source_positions
        given["input_features"] = torch.randn(rows, config.num_mel_bins, frames, generator=generator).to(
            subject.device, model.dtype
        )
    if subject.layout.encoder_decoder:
        length = min(length, subject.max_length)
        given["decoder_input_ids"] = text_rows(subject, text, rows, length)
        longest = min(len(value) for value in given.values())
        given = {name: value[:longest] for name, value in given.items()}
    if not given:
        raise InputError(f"cannot tell what {type(model).__name__} reads ({first}); pass inputs={{'{first}': ...}}")
    return given
