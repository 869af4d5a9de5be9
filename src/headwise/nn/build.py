"""Models by name, and models of folders."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from .. import registry
from ..errors import ModelLoadError, RegistryError
from .model import CONFIG, FORMAT, LanguageModel
from .transformer import Transformer

PLAIN = "transformer"
Make = TypeVar("Make", bound=Callable[..., LanguageModel])


def build(architecture: str, /, *sizes: int, **options: Any) -> LanguageModel:
    """A model of the inventory's architectures, or "transformer".

    sizes: vocabulary, width, layers, heads. options: as its own page says; all must be plain data, so that it can be saved.

    Raises: RegistryError if there is none of that name, or if it does not take these options.
    """
    make = Transformer if architecture == PLAIN else registry.load("architecture", architecture)
    try:
        inspect.signature(make).bind(*sizes, **options)
    except TypeError as error:
        raise RegistryError(f"{architecture} can't be built: {error}; it takes {inspect.signature(make)}") from error
    model: LanguageModel = make(*sizes, **options)
    return model


def named(make: Make) -> Make:
    """Lets models of a function remember its name and arguments, so that they can be saved and built again."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def making(*args: Any, **options: Any) -> LanguageModel:
        given = signature.bind(*args, **options).arguments
        model = make(*args, **options)
        model.config = {"architecture": make.__name__, **given, **given.get("options", {})}
        model.config.pop("options", None)
        return model

    return cast(Make, making)


def from_pretrained(folder: str | Path) -> LanguageModel:
    """The model that `save_pretrained` wrote into a folder, in eval mode.

    Raises: ModelLoadError if there is none, or if parts of it were given as modules: build it then, and use `load_weights`.
    """
    file = Path(folder) / CONFIG
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} can't be read ({error}); give a folder that save_pretrained has written") from error
    if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
        raise ModelLoadError(f"{file} is not of the format {FORMAT!r}")
    modules = _modules(told)
    if modules:
        raise ModelLoadError(f"{file} names {modules}, given as modules; build the model as before and call load_weights")
    dtype = getattr(torch, str(told.pop("dtype", "float32")))
    if told.get("follows"):
        told["follows"] = {int(layer): owner for layer, owner in told["follows"].items()}
    try:
        model = build(told.pop("architecture"), **told).to(dtype)
    except (KeyError, RegistryError, ValueError, TypeError) as error:
        raise ModelLoadError(f"{file} describes a model that can't be built: {error}") from error
    model.load_weights(folder)
    return model.eval()


def _modules(told: Any) -> list[str]:
    """The names of modules that a config speaks of and does not hold."""
    if isinstance(told, dict):
        if set(told) == {"module"}:
            return [str(told["module"])]
        return [name for part in told.values() for name in _modules(part)]
    return [name for part in told for name in _modules(part)] if isinstance(told, list) else []
