"""MobileLLM: deep and thin, with grouped heads, tied embeddings, and blocks that may run twice in a row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import largest
from ..build import named
from ..transformer import Transformer
from . import _slow

CARD = Card(
    paper="MobileLLM: Optimizing Sub-billion Parameter Language Models for On-Device Use Cases",
    year=2024,
    room="heads",
    source=(
        "arXiv:2402.14905, sec. 2 and 3, and the configurations of the authors' code: a Llama block (silu gates, RMSNorm with "
        "1e-5, rotary embedding of base 10000, no bias), weights drawn with a deviation of 0.02, tied embeddings. Repeated blocks "
        "keep keys and values of their own each time they run; the authors' code gives both runs one cache, and the second reads "
        "what the first kept"
    ),
)


class Size(NamedTuple):
    """One of the published models, with head dimension 64 and 32000 tokens."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    parameters: int  # the model cards say 124.6M, 345.3M, 603.1M, 1.01B, 1.51B


VOCABULARY = 32000
SIZES = {
    "125M": Size(30, 576, 9, 3, 1536, 124_635_456),
    "350M": Size(32, 960, 15, 5, 2560, 345_355_200),
    "600M": Size(40, 1152, 18, 6, 3072, 603_188_352),
    "1B": Size(54, 1280, 20, 5, 3584, 1_005_461_760),
    "1.5B": Size(54, 1600, 25, 5, 4352, 1_511_188_800),
}


@named
def mobile_llm(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 2048,
    kv_heads: int | None = None,
    repeat: int = 1,
    **options: Any,
) -> Transformer:
    """A decoder with many thin layers, few key/value heads and one matrix for embeddings and logits.

    With `repeat` 2 it is MobileLLM-LS: each block runs twice in a row, B_1 B_1 B_2 B_2 ..., with the same weights and norms. That
    costs no parameter, and twice the work and the cache: each run keeps keys and values of its own.

    Args:
        layers: blocks that have weights; repeat * layers run. The paper's shapes are in `SIZES`.
        kv_heads: the most that divide heads and are a third of them at most, by default, as in all the published models.
        options: as for `Transformer`.

    Raises: ShapeError if blocks would not run.
    """
    if repeat < 1:
        raise ShapeError(f"blocks that run {repeat} times; repeat must be at least 1")
    grouped = ("softmax", {"kv_heads": thirds(heads) if kv_heads is None else kv_heads})
    order = [block for block in range(layers) for _ in range(repeat)]
    settings = {"mixer": grouped, "context": context, "order": order, "epsilon": 1e-5, **options}
    model = Transformer(vocabulary, width, layers, heads, **settings)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    return model


def thirds(heads: int) -> int:
    """The largest divisor of heads that is a third of them at most; 1 if there is none."""
    return max((n for n in range(1, heads // 3 + 1) if heads % n == 0), default=1)


def published(name: str, *, repeat: int = 1, **options: Any) -> Transformer:
    """One of the paper's models, untrained: "125M", "350M", "600M", "1B" or "1.5B"; with repeat=2, its LS form.

    Raises: ShapeError for a size that there is none of.
    """
    if name not in SIZES:
        raise ShapeError(f"there is no MobileLLM of size {name!r}; there are: {', '.join(SIZES)}")
    size = SIZES[name]
    shape = {"kv_heads": size.kv_heads, "hidden": size.hidden, "repeat": repeat}
    return mobile_llm(VOCABULARY, size.width, size.layers, size.heads, **{**shape, **options})


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time: x <- B(B(x)) for each block, if it repeats."""

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        return _slow.attention(model, at, x, 10000.0)

    repeat = model.config.get("repeat", 1)
    return _slow.stack(model, ids, mix, [layer // repeat for layer in range(repeat * len(model.blocks))])


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        mobile_llm(23, 32, 3, 4, context=64),
        mobile_llm(23, 32, 2, 4, context=64, repeat=2),
        mobile_llm(23, 36, 2, 6, context=64, repeat=3, kv_heads=3, tied=False, windows=[7, None]),
    ]
    for model in made:
        for parameter in model.parameters():
            nn.init.normal_(parameter, float(parameter.dim() == 1), 0.3)  # far from the start, where all is small
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: keys and values of each run of each block."""
    numbers = 0
    for at, block in enumerate(model.blocks):
        of = cast(Attention, block.mixer).projections
        numbers += int(model.config.get("repeat", 1)) * 2 * of.kv_heads * of.head_dim * _slow.slots(model, at, tokens)
    return numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """Its blocks run once; with repeat=2 twice in a row, as in MobileLLM-LS."""
    return mobile_llm(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    cards = dict(zip(SIZES, (124.6, 345.3, 603.1, 1010, 1510), strict=True))
    for name, size in SIZES.items():
        off = abs(size.parameters / 1e6 / cards[name] - 1)
        yield f"{name} has the {cards[name]} million parameters of its model card, to half a percent", float(off > 0.005)
        with torch.device("meta"):
            model, twice = published(name), published(name, repeat=2)
        c, d = size.width, size.width // size.heads
        block = 2 * c * d * (size.heads + size.kv_heads) + 3 * c * size.hidden + 2 * c
        off = abs(model.parameter_count - size.parameters) + abs(VOCABULARY * c + size.layers * block + c - size.parameters)
        yield f"{name} has {size.parameters} parameters", float(off)
        yield f"{name} has heads of 64", float(d - 64)
        yield f"{name} has as many key/value heads as the rule gives", float(thirds(size.heads) - size.kv_heads)
        yield f"{name} twice has no more", float(abs(twice.parameter_count - size.parameters))
        yield f"{name} twice keeps twice as much", float(abs(kept(twice, 7) - 2 * 7 * size.layers * 2 * size.kv_heads * 64))
    plain = Transformer(23, 32, 3, 4, mixer=("softmax", {"kv_heads": 1}), epsilon=1e-5).double()
    once = mobile_llm(23, 32, 3, 4).double()
    plain.load_state_dict(once.state_dict())
    yield "run once, it is a stack of grouped heads", largest(once(ids) - plain(ids))
    spread = mobile_llm(200, 60, 1, 6)
    off = max(abs(float(p.detach().std()) / 0.02 - 1) for p in spread.parameters() if p.dim() > 1)
    yield "its weights begin with a deviation of 0.02, within a tenth", float(off > 0.1)
    half = mobile_llm(23, 32, 2, 4, repeat=2).double()
    whole = mobile_llm(23, 32, 4, 4).double()
    for layer in range(4):
        whole.blocks[layer] = copy.deepcopy(half.blocks[layer // 2])
    whole.embedding, whole.norm = copy.deepcopy(half.embedding), copy.deepcopy(half.norm)
    yield "blocks that run twice are twice as many that are alike in pairs", largest(half(ids) - whole(ids))
    for model in (half, whole):
        model(ids).square().sum().backward()
    for name, parameter in half.blocks[1].named_parameters():
        summed = sum(cast(Tensor, whole.blocks[layer].get_parameter(name).grad) for layer in (2, 3))
        yield f"and the gradient of {name} is the sum of both", largest(cast(Tensor, parameter.grad) - summed)
    split = mobile_llm(23, 32, 2, 4, repeat=2, tied=False).double()
    split.load_state_dict({**half.state_dict(), "head.weight": half.embedding.weight})
    split(ids).square().sum().backward()
    parts = cast(Tensor, split.embedding.weight.grad) + cast(Tensor, cast(nn.Linear, split.head).weight.grad)
    yield "the embeddings' gradient is that of embedding and of logits", largest(cast(Tensor, half.embedding.weight.grad) - parts)
