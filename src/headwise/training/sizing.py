"""Models of equal parameters: what a mechanism adds is taken from the feed-forward layers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import registry
from ..errors import HeadwiseError, InputError, RegistryError
from ..nn import LanguageModel, Transformer

PLAIN = "softmax"
ARCHITECTURE = "architecture"


@dataclass(frozen=True)
class Contender:
    """A mechanism or an architecture by its name, with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = ",".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in self.options.items())
        return f"{self.name}:{told}" if told else self.name

    @property
    def is_architecture(self) -> bool:
        """Whether it is a whole model rather than a mixer of the stack."""
        known = self.name == PLAIN or self.name in registry.names("mechanism")
        return not known and self.name in registry.names(ARCHITECTURE)


@dataclass(frozen=True)
class Sizes:
    """What all models of a comparison have in common."""

    vocabulary: int
    context: int
    width: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise InputError(
                f"width {self.width}, {self.layers} layers, {self.heads} heads; give 1 at least, and a multiple of heads as width"
            )


@dataclass(frozen=True)
class Sized:
    """What a model is built from, and how many parameters it then has. hidden: of each layer; None where it is not to be chosen."""

    contender: Contender
    sizes: Sizes
    hidden: tuple[int, ...] | None
    parameters: int

    def build(self, seed: int) -> LanguageModel:
        """The model as it is before training, its embeddings drawn with rows of about length one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(self.contender, self.sizes, self.hidden)
            for part in model.modules():
                if isinstance(part, nn.Embedding) and part.num_embeddings == self.sizes.vocabulary:
                    # Rows of length one: much shorter ones drown in what the first layer adds, and lookups are then not learned
                    nn.init.normal_(part.weight, std=part.embedding_dim**-0.5)
            return model


def parse(given: Sequence[str]) -> list[Contender]:
    """From `name` or `name:option=value,option=value`, or `module:object` for one's own; several with commas between them.

    Values are numbers, true, false, null, JSON, or else text.

    Raises: RegistryError for a name that is neither a mechanism nor an architecture. InputError for one given twice.
    """
    parts: list[str] = []
    for piece in (piece.strip() for text in given for piece in text.split(",")):
        if re.match(r"\w+=", piece) and parts and ":" in parts[-1]:
            parts[-1] += f",{piece}"  # a further option of the one before
        elif piece:
            parts.append(piece)
    found = [_contender(part) for part in parts]
    named = [str(contender) for contender in found]
    if len(set(named)) != len(named):
        raise InputError(f"{', '.join(named)}: each may be given once")
    if not found:
        raise RegistryError(f"no mechanism was given; there are: {', '.join(_known())}")
    return found


def _known() -> list[str]:
    return [PLAIN, *registry.names("mechanism"), *registry.names(ARCHITECTURE)]


def _contender(text: str) -> Contender:
    name, _, told = text.partition(":")
    name = name.strip().replace("-", "_")
    thing, _, rest = told.partition(":")
    if thing and "=" not in thing and name not in _known():  # one's own, as module:object
        name, told = f"{name}:{thing}", rest
    elif name not in _known():
        raise RegistryError(f"there is no mechanism or architecture {name!r}; there are: {', '.join(_known())}")
    options = {}
    for pair in told.split(",") if told else []:
        option, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{text}: {pair!r} is no option; write {name}:option=value")
        options[option.strip()] = value_of(value)
    return Contender(name, options)


def value_of(text: str) -> Any:
    """A number, true, false, null or JSON; else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def equal(contenders: Sequence[Contender], sizes: Sizes) -> list[Sized]:
    """How each is to be built so that all have as many parameters as plain softmax attention at its default hidden width.

    Raises: InputError if one can't, with the numbers. HeadwiseError if one can't be built, or reads both sides only.
    """
    reference = Contender(PLAIN)
    target = _count(reference, sizes, None)
    return [_fitted(contender, sizes, target) for contender in contenders]


def _fitted(contender: Contender, sizes: Sizes, target: int) -> Sized:
    model = _model(contender, sizes, None)
    why = cannot(model, "causal") or ("" if getattr(model, "causal", True) else "it reads both sides")
    if why:
        raise InputError(f"{contender} can't be trained to predict what comes next: {why}")
    if model.parameter_count == target:
        return Sized(contender, sizes, None, target)
    layers = sizes.layers
    try:
        one, two = (_count(contender, sizes, (hidden,) * layers) for hidden in (1, 2))
    except HeadwiseError as error:
        raise InputError(f"{contender} can't be made as large as plain softmax attention: {error}") from error
    unit = (two - one) // layers  # parameters of one unit of one layer
    units = round((target - one) / unit) + layers if unit > 0 else 0
    if units < layers:
        least = f"{one:,} at hidden width 1" if unit > 0 else "which its feed-forward layers don't change"
        raise InputError(
            f"{contender} has too many parameters, {least}; plain softmax attention has {target:,} in all. Give it options that "
            "make it smaller, or a larger width"
        )
    hidden = tuple(units // layers + (layer < units % layers) for layer in range(layers))
    try:
        found = _count(contender, sizes, hidden)
    except HeadwiseError:  # it takes one number for all layers
        hidden, unit = (round(units / layers),) * layers, unit * layers
        found = _count(contender, sizes, hidden)
    if 2 * abs(found - target) > unit:
        raise InputError(f"{contender} can't be made as large as plain softmax attention: {found:,} for {target:,} parameters")
    return Sized(contender, sizes, hidden, found)


def cannot(model: nn.Module, what: str) -> str:
    """Why a part of a model can't do something, such as "decode"; empty if all can."""
    for part in model.modules():
        told: Any = getattr(part, "cannot", {})
        if what in told:
            return str(told[what])
    return ""


def _count(contender: Contender, sizes: Sizes, hidden: tuple[int, ...] | None) -> int:
    with torch.random.fork_rng(devices=[]):
        return _model(contender, sizes, hidden).parameter_count


def _model(contender: Contender, sizes: Sizes, hidden: tuple[int, ...] | None) -> LanguageModel:
    chosen: dict[str, Any] = {} if hidden is None else {"hidden": hidden[0] if len(set(hidden)) == 1 else list(hidden)}
    shape = (sizes.vocabulary, sizes.width, sizes.layers, sizes.heads)
    if not contender.is_architecture:
        mixer = (contender.name, contender.options) if contender.options else contender.name
        try:
            return Transformer(*shape, mixer=mixer, context=sizes.context, **chosen)
        except HeadwiseError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"{contender} can't be built at width {sizes.width} with {sizes.heads} heads: {error}") from error
    made = registry.load(ARCHITECTURE, contender.name)
    options = {**contender.options, **chosen}
    try:
        model: LanguageModel = importlib.import_module(made.__module__).sized(*shape, sizes.context, **options)
    except TypeError as error:
        raise RegistryError(f"{contender} does not take the options {sorted(options)}: {error}") from error
    return model
