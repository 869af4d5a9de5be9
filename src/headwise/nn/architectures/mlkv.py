"""Multi-layer key-value heads: few layers have keys and values, and the rest read theirs; with a conversion by means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import largest
from ...mechanisms.following import KeyFollower
from ...mechanisms.heads.gqa import pool
from ..build import named
from ..model import LanguageModel
from ..transformer import Transformer
from . import _slow
from ._conversion import ODD, fill, plain
from .cla import chosen, cla

CARD = Card(
    paper="MLKV: Multi-Layer Key-Value Heads for Memory Efficient Transformer Decoding",
    year=2024,
    room="heads",
    source=(
        "arXiv:2406.09297, and the authors' code, which uptrains Pythia-160M; here on a Llama-shaped stack, without its parallel "
        "blocks and with all of each head rotated. All layers read the rotated key; the code gives those that share the key "
        "before it is rotated in a full pass and the rotated one in decoding, so its checkpoints do not agree with themselves. "
        'Means of layers: of the whole group, or as the code takes them, one after another (mean="running"). Widened feed-forward '
        "layers keep the function here: copied neurons share what the first ones gave, where the code has both give all of it"
    ),
)


@named
def mlkv(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    owners: int | Sequence[int] | None = None,
    kv_heads: int = 1,
    head_dim: int | None = None,
    bias: bool = False,
    **options: Any,
) -> Transformer:
    """A decoder in which only some layers have keys and values; each of the others reads those of the nearest one before it.

    Caches hold owners * kv_heads key/value heads, which may be fewer than there are layers. Owners stand at 0 and
    floor(i * layers / owners).

    Args:
        owners: how many layers have keys and values, half of them by default; or which, from 0. kv_heads: of each.
        head_dim: width / heads by default. bias: of the projections. options: as for `Transformer`.

    Raises: ShapeError if there are more owners than layers, or none at 0.
    """
    at = spread(layers, -(-layers // 2) if owners is None else owners)
    own: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "bias": bias, "context": context, **options}
    return cla(vocabulary, width, layers, heads, producers=at, separate_norms=False, **own)


def spread(layers: int, owners: int | Sequence[int]) -> list[int]:
    """The layers that have keys and values.

    Raises: ShapeError if there are none at 0, or more than layers.
    """
    if isinstance(owners, int):
        if not 1 <= owners <= layers:
            raise ShapeError(f"{owners} of {layers} layers can't have keys and values; give 1 to {layers}")
        return [i * layers // owners for i in range(owners)]
    return chosen(layers, owners)


def merge(
    model: LanguageModel, owners: int | Sequence[int], kv_heads: int, *, mean: str = "group", widen: bool = False
) -> Transformer:
    """A plain stack with its key and value maps averaged: first over neighbouring heads, then over the layers that share.

    Exact if those were alike; otherwise what training goes on from. Queries, outputs and all else are copied.

    Args:
        owners: as for `mlkv`. kv_heads: key/value heads left in each. mean: "group", all layers alike; or "running", as the
            authors' code does: the mean of what there is so far and the next layer, so that the last one counts half.
        widen: neurons are added to the feed-forward layers until there are about as many parameters as before.

    Raises: UnsupportedModelError for anything but a `Transformer` of softmax attention. ShapeError if heads do not pool.
    """
    if mean not in ("group", "running"):
        raise ShapeError(f"there is no mean {mean!r}; give 'group' or 'running'")
    sizes, options, shape, _ = plain(model)
    at = spread(sizes[2], owners)
    pooled = [pool(cast(Attention, block.mixer), kv_heads).projections for _, block in cast(Transformer, model).layers()]
    given: dict[str, Tensor] = {}
    for owner, end in zip(at, [*at[1:], len(pooled)], strict=True):
        for kind in ("k.weight", "v.weight", "k.bias", "v.bias")[: 4 if shape["bias"] else 2]:
            parts = [of.get_parameter(kind).detach() for of in pooled[owner:end]]
            joined = torch.stack(parts).mean(0) if mean == "group" else parts[0]
            for part in parts[1:] if mean == "running" else ():
                joined = (joined + part) / 2
            given[f"blocks.{owner}.mixer.projections.{kind}"] = joined
    if widen:
        dims = shape["kv_heads"] * len(pooled) - kv_heads * len(at)
        more = round(2 * dims * shape["head_dim"] * (sizes[1] + shape["bias"]) / len(pooled) / (3 * sizes[1]))
        options["hidden"] = [hidden + min(more, hidden) for hidden in options["hidden"]]
        for block, hidden in enumerate(options["hidden"]):
            given |= _widened(model, f"blocks.{block}.feed_forward", hidden) if hidden else {}
    made = mlkv(*sizes, owners=at, kv_heads=kv_heads, head_dim=shape["head_dim"], bias=shape["bias"], **options)
    fill(made, model, given)
    return made


def _widened(model: LanguageModel, name: str, hidden: int) -> dict[str, Tensor]:
    """A gated feed-forward layer's weights with the first neurons twice; of what each gave, its copy gives a quarter."""
    gate, up, down = (model.get_parameter(f"{name}.{part}.weight").detach() for part in ("gate", "up", "down"))
    more = hidden - len(gate)
    share = torch.ones_like(down[0])
    share[:more] = 3 / 4  # not halves, with which both would stay alike in training
    return {
        f"{name}.gate.weight": torch.cat([gate, gate[:more]]),
        f"{name}.up.weight": torch.cat([up, up[:more]]),
        f"{name}.down.weight": torch.cat([down * share, down[:, :more] / 4], 1),
    }


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time."""
    made: list[tuple[Tensor, Tensor]] = []  # the nearest layer's is the last

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer: Any = _slow.mixer_of(model, at)
        of: Any = mixer if isinstance(mixer, KeyFollower) else mixer.projections
        base = _slow.base_of(mixer)
        if not isinstance(mixer, KeyFollower):
            k, v = (_slow.heads_of(x, linear, of.kv_heads) for linear in (of.k, of.v))
            made.append((_slow.turned(k, base), v))
        q = _slow.turned(_slow.heads_of(x, of.q, model.heads), base)
        read = _slow.attention_rows(q, *made[-1], _slow.visible_to(model, at, len(ids)))
        return _slow.heads_of(read.flatten(1), of.out, 1).flatten(1)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        mlkv(23, 32, 5, 4, context=64, owners=2, kv_heads=2),
        mlkv(23, 32, 4, 4, context=64, owners=[0, 1], bias=True, head_dim=6, positions="learned"),
    ]
    torch.manual_seed(1)
    merged = merge(Transformer(23, 32, 4, 4, context=64, tied=False, windows=9), 2, 2, mean="running", widen=True)
    for model in [*made, merged]:
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms begin with ones
                nn.init.normal_(parameter, 1.0, 0.3)
    return [*made, merged]


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: 2 kv_heads head_dim for each, of as many layers as own them."""
    owners = model.config.get("owners", -(-len(model.blocks) // 2))
    of, window = cast(Attention, model.blocks[0].mixer).projections, _slow.window_of(model, 0)
    slots = tokens if window is None else min(tokens, window)
    return 2 * of.kv_heads * of.head_dim * slots * (owners if isinstance(owners, int) else len(owners))


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """Keys and values of one head in every other layer, as the paper's MLKV-6 has them in 6 of 12."""
    return mlkv(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    yield "5 owners of 12 layers: 0, 2, 4, 7, 9", float(spread(12, 5) != [0, 2, 4, 7, 9])
    yield "by default half of the layers, 0, 1 and 3 of 5", float(mlkv(23, 8, 5, 2, hidden=0).follows != {2: 1, 4: 3})
    rule = [spread(n, m) == [0] + [int((i + 1) * n / m) for i in range(m - 1)] for n in range(1, 13) for m in range(1, n + 1)]
    yield "owners are 0 and floor((i + 1) layers / owners)", float(not all(rule))
    base = Transformer(23, 32, 4, 4).double()
    for kv_heads in (1, 2):
        grouped = Transformer(23, 32, 4, 4, mixer=("softmax", {"kv_heads": kv_heads})).double()
        every = mlkv(23, 32, 4, 4, owners=4, kv_heads=kv_heads).double()
        every.load_state_dict(grouped.state_dict())
        yield f"an owner in every layer is attention of {kv_heads} key/value heads", largest(every(ids) - grouped(ids))
    for positions in ("rotary", "learned", "none"):
        odd = Transformer(23, 32, 3, 4, **ODD, positions=positions).double()
        yield f"and merging nothing changes nothing, with {positions} positions", largest(merge(odd, 3, 4)(ids) - odd(ids))

    twice = Transformer(23, 32, 4, 4).double()
    for _, block in twice.layers():
        _alike(cast(Attention, block.mixer), 2)
    yield "merging heads that are alike is exact", largest(merge(twice, 4, 2)(ids) - twice(ids))
    # all layers have the same input where all but the last add nothing, and the same keys where their maps are alike
    for layer, block in twice.layers():
        if layer < 3:
            cast(Any, block.mixer).projections.out.weight.data.zero_()
            cast(Any, block.feed_forward).down.weight.data.zero_()
        for kind in ("k", "v"):
            of_first = cast(Any, twice.blocks[0]).mixer.projections.get_parameter(f"{kind}.weight")
            cast(Any, block.mixer).projections.get_parameter(f"{kind}.weight").data.copy_(of_first)
    for mean in ("group", "running"):
        yield f"and so is merging layers that are, by the {mean} mean", largest(merge(twice, 1, 2, mean=mean)(ids) - twice(ids))

    thirds = [cast(Any, base.blocks[layer]).mixer.projections.k.weight for layer in range(3)]
    wanted = {"group": sum(thirds) / 3, "running": thirds[0] / 4 + thirds[1] / 4 + thirds[2] / 2}
    for mean, weight in wanted.items():
        merged = merge(base, [0, 3], 4, mean=mean)
        yield f"the {mean} mean of three layers", largest(cast(Any, merged.blocks[0]).mixer.projections.k.weight - weight)
    shares = {p.data_ptr() for p in merge(base, 2, 2).parameters()} & {p.data_ptr() for p in base.parameters()}
    yield "a conversion shares no memory with what it was made of", float(len(shares))

    wide, slim = merge(base, 2, 2, widen=True), merge(base, 2, 2)
    yield "widened feed-forward layers do the same", largest(wide(ids) - slim(ids))
    off = abs(wide.parameter_count - base.parameter_count)
    yield "and bring back the parameters, to a neuron a layer", float(off > 4 * 3 * 32)
    yield (
        "and those lost are 2 width head_dim for each key/value head",
        float(base.parameter_count - slim.parameter_count - 2 * 32 * 8 * (4 * 4 - 2 * 2)),
    )
    query = mlkv(23, 48, 12, 12, owners=12, hidden=8)
    sizes = [kept(mlkv(23, 48, 12, 12, owners=n, kv_heads=g, hidden=8), 7) for n, g in ((4, 12), (4, 3), (6, 1), (2, 1), (1, 1))]
    told = [48 / 12, 12 / 12, 6 / 12, 2 / 12, 1 / 12]
    yield (
        "caches are owners kv_heads / layers of those of multi-query attention, a sixth at 2 of 12",
        sum(abs(size / kept(query, 7) - part) for size, part in zip(sizes, told, strict=True)),
    )


def _alike(attention: Attention, group: int) -> None:
    """Makes neighbouring key/value heads alike."""
    of = attention.projections
    for linear in (of.k, of.v):
        heads = linear.weight.data.view(-1, group, of.head_dim, linear.in_features)
        heads.copy_(heads[:, :1].clone().expand_as(heads))
