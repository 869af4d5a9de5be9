"""What conversions of plain stacks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import UnsupportedModelError
from ...mechanisms import Attention, Projections
from ..model import LanguageModel
from ..transformer import Block, Transformer

KEPT = ("context", "hidden", "positions", "base", "windows", "causal", "tied", "epsilon")
# options far from the defaults, for identities: a conversion keeps them all
ODD: dict[str, Any] = {
    "context": 9, "hidden": [24, 0, 40], "base": 30.0, "windows": [5, None, 3], "causal": False, "tied": False, "epsilon": 0.1,
}  # fmt: skip


class Plain(NamedTuple):
    """A plain stack: what it is built from, and its attentions' projections, layer by layer."""

    sizes: tuple[int, int, int, int]  # vocabulary, width, layers, heads
    options: dict[str, Any]
    shape: dict[str, Any]  # kv_heads, head_dim, bias
    projections: list[Projections]


def plain(model: LanguageModel) -> Plain:
    """What a `Transformer` of softmax attention in all layers is built from.

    Raises: UnsupportedModelError for any other model.
    """
    config = getattr(model, "config", {})
    if not isinstance(model, Transformer) or config.get("architecture") != "transformer" or "residual" in config:
        raise UnsupportedModelError(f"{type(model).__name__} {config.get('architecture')!r} is no plain Transformer; convert one")
    if model.order != list(range(len(model.blocks))):
        raise UnsupportedModelError(f"blocks run in the order {model.order}; convert a model that runs each once")
    found, shapes = [], []
    for layer, block in model.layers():
        assert isinstance(block, Block)
        mixer = block.mixer
        if not isinstance(mixer, Attention) or mixer.mechanism is not None:
            raise UnsupportedModelError(f"layer {layer}'s mixer is no plain softmax attention; convert a stack of these alone")
        of = mixer.projections
        found.append(of)
        shapes.append({"kv_heads": of.kv_heads, "head_dim": of.head_dim, "bias": of.q.bias is not None})
    if any(shape != shapes[0] for shape in shapes):
        raise UnsupportedModelError(f"layers have heads of several shapes, {shapes}; convert a stack of one")
    sizes = (config["vocabulary"], config["width"], config["layers"], config["heads"])
    return Plain(sizes, {name: config[name] for name in KEPT}, shapes[0], found)


def fill(made: Transformer, model: LanguageModel, instead: Mapping[str, Tensor]) -> None:
    """Copies a plain stack's weights into one whose mixers have fewer; those of `instead` come from there.

    Its dtype, device and mode go along.
    """
    old = model.state_dict()
    made.to(next(model.parameters())).train(model.training)
    given = {}
    for name in made.state_dict():
        if name in instead:
            given[name] = instead[name]
        else:
            given[name] = old[name] if name in old else old[name.replace(".mixer.", ".mixer.projections.")]
    made.load_state_dict(given)
