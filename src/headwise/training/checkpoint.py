"""Checkpoints of a training run: one safetensors file, written beside the last one and then put in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ModelLoadError

FORMAT = "headwise.training 1"


def save(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, told: dict[str, Any]) -> None:
    """Writes model, optimizer, random states and what is told (JSON-able) into one file, all of it or nothing."""
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _tensors(model, optimizer).items()}
    held["random.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        held["random.cuda"] = torch.cuda.get_rng_state(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(held, str(beside), metadata={"format": FORMAT, "told": json.dumps(told)})
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts everything back as it was when the file was written, and returns what was told.

    Raises: ModelLoadError if it can't be read, or is of another model.
    """
    told = peek(file)
    with safe_open(str(file), "pt") as opened:
        held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    random = {name: held.pop(name) for name in list(held) if name.startswith("random.")}
    _make_state(optimizer, {name.split(".", 2)[2] for name in held if name.startswith("optimizer.")}, model)
    wanted = _tensors(model, optimizer)
    odd = sorted(set(held) ^ set(wanted)) or sorted(name for name in held if held[name].shape != wanted[name].shape)
    if odd:
        raise ModelLoadError(f"{file} is of another model: {', '.join(odd[:4])} differ; remove it, or give another folder")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(held[name])
    torch.set_rng_state(random["random.cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"], device)
    return told


def peek(file: Path) -> dict[str, Any]:
    """What was told when a checkpoint was written, without its tensors.

    Raises: ModelLoadError if it can't be read.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            found = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file} can't be read ({error}); remove it to begin again") from error
    if found.get("format") != FORMAT:
        raise ModelLoadError(f"{file} is not of the format {FORMAT!r}; remove it to begin again")
    return json.loads(found["told"])


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run by name: parameters, buffers, and the optimizer's of each parameter."""
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {f"model.{name}": p.data for name, p in parameters.items()}
    found |= {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in parameters.items():
        for part, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{part}.{name}"] = value
    return found


def _make_state(optimizer: torch.optim.Optimizer, stepped: set[str], model: nn.Module) -> None:
    """Makes AdamW's state of parameters that have been stepped, as it would itself, for values to be copied into."""
    for name, parameter in model.named_parameters():
        if name in stepped:
            device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
