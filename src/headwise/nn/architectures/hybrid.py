"""Hybrid stacks: layers that keep a state, and every so often one of full attention."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import registry
from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import largest
from ..build import named
from ..transformer import Transformer
from . import _slow

CARD = Card(
    paper="A Systematic Analysis of Hybrid Linear Attention",
    year=2025,
    room="linear",
    source=(
        "arXiv:2507.06457, abstract and the library that its authors used: a hybrid is a list of the layers that are full "
        "attention, with rotary embeddings; all others have the linear mixer. Where full layers stand at a ratio r:1 is not said; "
        "here the last of every r + 1, as in Kimi Linear (arXiv:2510.26692), whose full layers have no positions "
        "(`positions='none'`). The study's six mixers are in the inventory but for HGRN of vectors: hgrn2, retention, gla, "
        "delta_net, gated_delta_net"
    ),
)


@named
def hybrid(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    linear: str = "gated_delta_net",
    full: str = "softmax",
    ratio: int = 3,
    full_layers: Sequence[int] | None = None,
    **options: Any,
) -> Transformer:
    """A decoder of linear layers in which the last of every `ratio` + 1 is full attention: only those keep keys and values.

    Args:
        linear, full: mixers of the inventory, at their papers' settings. ratio: linear layers to each full one; 0 for full ones
            alone. full_layers: which ones are full instead, [] for none. options: as for `Transformer`.

    Raises: ShapeError for a ratio below 0, or layers that are not there.
    """
    if ratio < 0:
        raise ShapeError(f"a ratio of {ratio}; it is the number of linear layers to each full one, 0 or more")
    chosen = [layer for layer in range(layers) if layer % (ratio + 1) == ratio] if full_layers is None else list(full_layers)
    if not set(chosen) <= set(range(layers)):
        raise ShapeError(f"full_layers {chosen} names layers that are not there; there are {layers}")
    mixers = [full if layer in chosen else linear for layer in range(layers)]
    return Transformer(vocabulary, width, layers, heads, mixer=mixers, context=context, **options)


def full_in(model: Transformer) -> list[int]:
    """The layers that are full attention, as the model was built."""
    given, layers = model.config.get("full_layers"), len(model.blocks)
    ratio = model.config.get("ratio", 3)
    return [n for n in range(layers) if (n % (ratio + 1) == ratio if given is None else n in given)]


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary). Full layers are written out here; linear ones by their own paper's oracle."""
    linear = importlib.import_module(registry.load("mechanism", model.config.get("linear", "gated_delta_net")).__module__)
    full, causal = full_in(model), _slow.causal(len(ids))

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer: Any = _slow.mixer_of(model, at)
        if layer not in full:
            found: Tensor = linear.oracle(mixer, x, causal)
            return found
        p, base = mixer.projections, _slow.base_of(mixer)
        q, k, v = (_slow.heads_of(x, map_, model.heads) for map_ in (p.q, p.k, p.v))
        return _slow.merged(_slow.attention_rows(_slow.turned(q, base), _slow.turned(k, base), v, causal), p.out)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        hybrid(23, 32, 4, 4, context=64),
        hybrid(23, 32, 3, 4, context=64, linear="delta_net", full_layers=[1], positions="none"),
        hybrid(23, 32, 2, 4, context=64, ratio=1, tied=False),
    ]
    _slow.shake_norms(made)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: keys and values of full layers, and states, which do not grow."""
    total = 0
    for _, block in model.layers():
        mixer: Any = block.mixer
        if isinstance(mixer, Attention):
            total += 2 * model.width * tokens
            continue
        keys, values = (map_.weight.shape[0] for map_ in (mixer.k, mixer.v))
        total += keys * values // mixer.heads + sum(taps[:, 1:].numel() for taps in mixer.convolutions.weights.values())
    return total


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """Three linear layers to each full one, or in fewer layers one full one at the end."""
    return hybrid(vocabulary, width, layers, heads, **{"context": tokens, "ratio": min(3, max(layers - 1, 0)), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 12))
    yield "at 3:1, layers 3, 7 and 11 of 12 are full", float(full_in(hybrid(23, 32, 12, 4)) != [3, 7, 11])
    for ratio, mixer in ((0, "softmax"), (12, "gated_delta_net")):
        mixed = hybrid(23, 32, 3, 4, ratio=ratio).double()
        pure = Transformer(23, 32, 3, 4, mixer=mixer).double()
        pure.load_state_dict(mixed.state_dict())
        yield f"at {ratio}:1 it is the stack of {mixer} alone", largest(mixed(ids) - pure(ids))
    with torch.device("meta"):
        wide, plain = hybrid(32, 64, 8, 4), Transformer(32, 64, 8, 4)
    n = 2**20
    grows = (kept(wide, 2 * n) - kept(wide, n)) / (2 * plain.width * 8 * n)
    yield "at 3:1 its cache grows by a quarter of full attention's", abs(grows - 1 / 4)
    try:
        hybrid(23, 32, 2, 4, full_layers=[2])
        refused = False
    except ShapeError:
        refused = True
    yield "a layer that is not there is refused", float(not refused)
