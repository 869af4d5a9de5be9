"""Mixers by name: what a layer's mixer may be given as, and what is made of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .. import registry
from ..errors import RegistryError, ShapeError
from ..mechanisms import Attention, Mechanism, Mixer
from ..mechanisms.by_head import ByHead
from ..mechanisms.side_by_side import SideBySide

# One layer's mixer: a name; a name with options; how many heads run each of several mechanisms; or a module
Spec: TypeAlias = str | tuple[str, Mapping[str, Any]] | list[Any] | Mapping[str, int] | Mixer | Mechanism
# All layers': the same for each, a list, or a function of the layer's number
Specs: TypeAlias = Spec | Sequence[Spec] | Callable[[int], Spec]
PLAIN = "softmax"


def mixer(spec: Spec, width: int, heads: int, tokens: int) -> Mixer:
    """A mixer of this width and number of heads, for texts of up to `tokens`.

    spec: "softmax" for plain attention; a mechanism of the inventory, at its paper's settings, or one of your own as
        "module:object", whose module has `sized`; a pair of a name and its options; {name: heads} for heads of several
        mechanisms or mixers side by side; or a module, which is taken as it is.

    Raises: RegistryError for an unknown name. ShapeError if sizes do not fit.
    """
    if isinstance(spec, Mixer):
        if spec.width != width:
            raise ShapeError(f"a mixer of width {spec.width} does not fit into a stack of width {width}")
        return spec
    if width % heads:
        raise ShapeError(f"width {width} is no multiple of {heads} heads")
    size = width // heads
    if isinstance(spec, Mechanism):
        return Attention(width, heads, spec)
    if isinstance(spec, Mapping):
        if sum(spec.values()) != heads:
            raise ShapeError(f"{dict(spec)} names {sum(spec.values())} heads, the layer has {heads}")
        parts = [(_named(name, count, size, tokens, {}), count) for name, count in spec.items()]
        if any(isinstance(part, Mixer) for part, _ in parts):  # with projections of its own
            return SideBySide([p if isinstance(p, Mixer) else Attention(count * size, count, p) for p, count in parts])
        return Attention(width, heads, ByHead([(part, count) for part, count in parts if not isinstance(part, Mixer)]))
    name, options = (spec, {}) if isinstance(spec, str) else (spec[0], spec[1])
    made = _named(name, heads, size, tokens, options)
    return made if isinstance(made, Mixer) else Attention(width, heads, made)


def _named(name: str, heads: int, size: int, tokens: int, options: Mapping[str, Any]) -> Mixer | Mechanism | None:
    if name == PLAIN:
        return Attention(heads * size, heads, **options) if options else None
    module = _module_of(name) if ":" in name else importlib.import_module(registry.load("mechanism", name).__module__)
    try:
        made: Mixer | Mechanism = module.sized(heads, size, tokens, **options)
    except TypeError as error:
        raise RegistryError(f"{name} does not take the options {sorted(options)}: {error}") from error
    return made


def _module_of(name: str) -> Any:
    """The module of an own mechanism, `module:object`, which has a function `sized` as those of the inventory have."""
    path, _, thing = name.partition(":")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise RegistryError(f"cannot import {path!r} for the mechanism {name!r}: {error}") from error
    if not hasattr(module, thing) or not hasattr(module, "sized"):
        missing = thing if not hasattr(module, thing) else "sized(heads, size, tokens, **options), which builds it"
        raise RegistryError(f"{path} has no {missing}")
    return module


def specs(given: Specs, layers: int) -> list[Spec]:
    """One spec for each layer.

    Raises: ShapeError if a list has another length, or if one module would stand in several layers.
    """
    if isinstance(given, Mixer | Mechanism):
        if layers > 1:
            raise ShapeError(f"one module can't be the mixer of {layers} layers; give a list, or a function that makes them")
        return [given]
    if callable(given):
        return [given(layer) for layer in range(layers)]
    pair = isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], Mapping)
    if isinstance(given, str | Mapping) or pair:
        return [given] * layers  # type: ignore[list-item]
    found = list(given)
    if len(found) != layers:
        raise ShapeError(f"{len(found)} mixers for {layers} layers")
    return found
