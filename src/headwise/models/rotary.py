"""Rotary positions of a model's queries and keys: how they are turned, and back again, at any position.

Which entries of a head are paired differs between families, some layers of a model may not turn at all, and frequencies may
differ from layer to layer. The frequencies are read from the model; the rest is found by letting the attention module itself
turn a few random tokens, so that nothing is assumed about its code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .layout import Site

ARGUMENT = "position_embeddings"  # the argument by which attention modules are given cosines and sines
PROBE = "headwise_rotary_probe"
PLACES = (1, 2, 3, 7)  # small, so that frequencies that depend on the length stay as they are
CLOSE = {torch.bfloat16: 0.05, torch.float16: 0.01}  # relative; other types: 1e-4


@dataclass(frozen=True, eq=False)
class RotaryPositions:
    """What one attention layer does to a query or key at a position: it turns pairs of its first entries, and may scale them.

    module: holds the frequencies, under the name `frequencies`, and a factor under `scaling`. They are read at each use, so
    that frequencies that the model changes with the length of the text are those of its last call. pairs: whether entries
    2 i and 2 i + 1 make a pair, rather than entries i and i + half.
    """

    module: nn.Module
    frequencies: str
    scaling: str
    pairs: bool

    def _waves(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (b or 1, h or 1, n, half), rounded as the model rounds them."""
        frequencies = getattr(self.module, self.frequencies).to(x.device, torch.float32)
        places = positions.to(x.device)
        angles = (places[:, None] if places.dim() == 2 else places)[..., None].float() * frequencies
        factor = getattr(self.module, self.scaling, 1.0)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)

    def _split(self, x: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
        turning, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.pairs:
            return turning[..., ::2], turning[..., 1::2], rest
        return turning[..., :half], turning[..., half:], rest

    def _join(self, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
        turned = torch.stack([first, second], -1).flatten(-2) if self.pairs else torch.cat([first, second], -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (b, h, n, d) as the model has it at positions (b, n) or (b, h, n)."""
        cos, sin = self._waves(x, positions)
        first, second, rest = self._split(x, cos.shape[-1])
        return self._join(first * cos - second * sin, second * cos + first * sin, rest)

    def turned_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the model turned, and scaled, to x (b, h, n, d) at positions (b, n) or (b, h, n)."""
        cos, sin = self._waves(x, positions)
        first, second, rest = self._split(x, cos.shape[-1])
        length = cos * cos + sin * sin
        return self._join((first * cos + second * sin) / length, (second * cos - first * sin) / length, rest)


def rotary_of(model: nn.Module, site: Site) -> RotaryPositions | None:
    """The rotary positions of one attention module; None if it has none (learned or no positions, position biases).

    Raises: UnsupportedModelError if the module is given some, but how it turns by them cannot be told.
    """
    module = model.get_submodule(site.path)
    if ARGUMENT not in inspect.signature(inspect.unwrap(type(module).forward)).parameters:
        return None

    def unsure(why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"cannot tell the rotary positions of {site.path} ({type(module).__name__}): {why}. "
            "Rules and recipes that turn queries or keys do not work on this model; choose one that does not"
        )

    if site.latent:
        raise unsure("only a part of its keys, after others, is turned")
    sources = _sources(model, site.path)
    if len(sources) != 1:
        raise unsure(f"{len(sources)} modules above it hold inverse frequencies, where there should be one")
    source = sources[0]
    if _several_coordinates(source):
        raise unsure("its positions have several coordinates")
    kind = _layer_type(module)
    prefix = "" if hasattr(source, "inv_freq") else f"{kind}_"
    if not isinstance(getattr(source, f"{prefix}inv_freq", None), Tensor):
        raise unsure(f"there are no inverse frequencies for its layer type {kind!r}")
    apart = copy.deepcopy(source)  # calling it may change its frequencies
    try:
        start, there = (_keys(module, apart, kind if prefix else None, places) for places in ((0,) * len(PLACES), PLACES))
    except Exception as error:  # whatever a module's code raises when it is called in a way that it was not made for
        raise unsure(f"a call of it failed ({type(error).__name__}: {error})") from error
    if _near(start, there):
        return None
    positions = torch.tensor([PLACES])
    for pairs in (False, True):
        names = (f"{prefix}inv_freq", f"{prefix}attention_scaling")
        if 2 * getattr(apart, names[0]).numel() > start.shape[-1]:
            raise unsure("it has more frequencies than pairs")
        tried = RotaryPositions(apart, *names, pairs)
        if _near(tried.turned(tried.turned_back(start, torch.zeros_like(positions)), positions), there):
            return RotaryPositions(source, *names, pairs)
    raise unsure("it turns other pairs than halves or neighbours")


def _sources(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules with inverse frequencies, in the nearest module around the path that has any."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        found = [
            child for child in around.children() if any(name.endswith("inv_freq") for name, _ in child.named_buffers(recurse=False))
        ]
        if found:
            return found
    return []


def _several_coordinates(source: nn.Module) -> bool:
    """Whether a token has a place in time, height and width."""
    parameters = getattr(getattr(source, "config", None), "rope_parameters", None) or {}
    return hasattr(source, "mrope_section") or (isinstance(parameters, dict) and "mrope_section" in parameters)


def _layer_type(module: nn.Module) -> str | None:
    """ "full_attention", "sliding_attention", ... where a model has layers of several types."""
    own = getattr(module, "layer_type", None)
    if own is None:
        types, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
        own = types[index] if types is not None and index is not None else None
    return own


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).double().norm() <= CLOSE.get(a.dtype, 1e-4) * b.double().norm())


def _keys(module: nn.Module, source: nn.Module, kind: str | None, places: tuple[int, ...]) -> Tensor:
    """(1, kv, n, d): what keys the attention module makes of the same random tokens at given places. The source may change."""
    weight = next(p for p in module.parameters() if p.is_floating_point())
    config: Any = module.config
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(places), config.hidden_size, generator=generator).to(weight.device, weight.dtype)
    positions = torch.tensor([places], device=weight.device)
    with torch.no_grad(), _caught(config) as caught:
        waves = source(hidden, positions, kind) if kind else source(hidden, positions)
        given = {ARGUMENT: waves, "attention_mask": None}
        names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
        module.forward(hidden, **{name: value for name, value in given.items() if name in names})
    return caught[0]


@contextmanager
def _caught(config: Any) -> Iterator[list[Tensor]]:
    """Within the block, attention under this config notes its keys and reads nothing."""
    keys: list[Tensor] = []

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        keys.append(key)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    named = config._attn_implementation_internal
    ALL_ATTENTION_FUNCTIONS[PROBE] = attention
    try:
        config._attn_implementation_internal = PROBE
        yield keys
    finally:
        config._attn_implementation_internal = named
        del ALL_ATTENTION_FUNCTIONS[PROBE]
