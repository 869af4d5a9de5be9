"""Cross-layer attention: consecutive layers share the keys and values of the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Cache, KeyValues, Mixer, Projections
from ...mechanisms._mixer import Real, Tokens, largest
from ...mechanisms._norms import rms_normed
from ...mechanisms.following import KeyFollower
from ..build import named
from ..transformer import Block, Transformer
from . import _slow

CARD = Card(
    paper="Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
    year=2024,
    room="heads",
    source=(
        "arXiv:2405.12981, sec. 2 and 3.1: groups of consecutive layers, the short one in front where the factor does not divide "
        "the layers; keys and values have norm weights apart from those of queries (`separate_norms`), here of an RMSNorm. The "
        "uneven layouts of its ablation can be given as `producers`. Linear maps begin with the standard deviation of the paper's "
        "at its width of 2048, 0.01275, and with 1 / sqrt(3 width) at others"
    ),
)


class Unweighted(nn.Module):
    """x / sqrt(mean x^2 + epsilon), in float32 at least."""

    weight = None

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.eps = epsilon

    def forward(self, x: Tokens) -> Tokens:
        """(b, n, width) -> the same."""
        return rms_normed(x, self.eps).to(x.dtype)


class Producer(Mixer):
    """Softmax attention whose keys and values scale the normed input by weights of their own, apart from those of queries.

    It stands behind a norm without weights. Args: heads, kv_heads, head_dim, bias: as for `Attention`.
    """

    rotates = True

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.q_norm = nn.Parameter(torch.ones(width))
        self.kv_norm = nn.Parameter(torch.ones(width))
        self.projections = Projections(width, heads, kv_heads, head_dim, bias)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        p, of_keys = self.projections, x * self.kv_norm
        projected = p.q(x * self.q_norm), p.k(of_keys), p.v(of_keys)
        q, k, v = (made.unflatten(-1, (-1, p.head_dim)).transpose(1, 2) for made in projected)
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        return p.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding."""
        return KeyValues()


@named
def cla(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    factor: int = 2,
    kv_heads: int = 1,
    head_dim: int | None = None,
    bias: bool = False,
    producers: Sequence[int] | None = None,
    separate_norms: bool = True,
    **options: Any,
) -> Transformer:
    """A decoder in which each group of `factor` layers reads the keys and values that its first layer makes.

    The cache holds those of ceil(layers / factor) layers. If factor does not divide layers, the first group is the short one:
    10 layers in threes are 0 | 1 2 3 | 4 5 6 | 7 8 9. It is told apart from fewer key/value heads, and goes with them.

    Args:
        factor: layers that share. kv_heads: key/value heads of a layer that makes them; one, as in most of the paper's models.
        head_dim: width / heads by default. bias: of the projections. producers: the layers that make keys and values, instead of
            groups of `factor`; the first must be 0.
        separate_norms: keys and values have norm weights of their own. options: as for `Transformer`.

    Raises: ShapeError if the factor is no number of layers, the first layer would have nothing to read, or a layer would read
        farther back than the window of the one that it follows.
    """
    if factor < 1:
        raise ShapeError(f"a sharing factor of {factor}; it is a number of layers, 1 for none to share")
    owners = grouped(layers, factor) if producers is None else chosen(layers, producers)
    follows = {layer: max(o for o in owners if o < layer) for layer in range(layers) if layer not in owners}
    windows: Any = options.get("windows")
    for layer, owner in follows.items() if isinstance(windows, Sequence) and len(windows) == layers else ():
        mine, theirs = windows[layer] or torch.inf, windows[owner] or torch.inf
        if mine > theirs:
            raise ShapeError(f"layer {layer} reads {mine} tokens back, and layer {owner} keeps {theirs}; give it no wider a window")
    shared = {"kv_heads": kv_heads, "head_dim": head_dim, "bias": bias}

    def mixer(layer: int) -> Any:
        if layer in follows:
            return KeyFollower(width, heads, head_dim=head_dim, bias=bias)
        return Producer(width, heads, kv_heads, head_dim, bias) if separate_norms else ("softmax", shared)

    mixers = [mixer(layer) for layer in range(layers)]
    model = Transformer(vocabulary, width, layers, heads, mixer=mixers, context=context, follows=follows, **options)
    for _, block in model.layers():
        if isinstance(block.mixer, Producer):
            block.norm = Unweighted(float(options.get("epsilon", 1e-6)))
    return model


def grouped(layers: int, factor: int) -> list[int]:
    """The first layer of each group."""
    short = layers % factor
    return [0] * (short > 0) + list(range(short, layers, factor))


def chosen(layers: int, owners: Sequence[int]) -> list[int]:
    """Layers that make keys and values, in order.

    Raises: ShapeError if the first is not 0, or if they are not different ones.
    """
    found = sorted(owners)
    if found[:1] != [0] or found[-1] >= layers or len(set(found)) < len(found):
        raise ShapeError(f"layers {found} make keys and values; they must begin with 0 and be different ones of {layers}")
    return found


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer = _slow.mixer_of(model, at)
        base, source = _slow.base_of(mixer), model.follows.get(layer, layer)
        if isinstance(mixer, KeyFollower):
            q_map, out, for_q = mixer.q, mixer.out, x
        else:
            p = cast(Projections, mixer.projections)
            q_map, out, for_q, for_kv = p.q, p.out, x, x
            if isinstance(mixer, Producer):
                for_q, for_kv = x * mixer.q_norm, x * mixer.kv_norm
            k, v = (_slow.heads_of(for_kv, linear, p.kv_heads) for linear in (p.k, p.v))
            made[layer] = _slow.turned(k, base), v
        q = _slow.turned(_slow.heads_of(for_q, q_map, model.heads), base)
        read = _slow.attention_rows(q, *made[source], _slow.visible_to(model, at, len(ids)))
        return _slow.merged(read, out)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        cla(23, 32, 5, 4, factor=3, kv_heads=2, bias=True, context=64),
        cla(23, 32, 4, 4, tied=False, context=64),
        cla(23, 32, 4, 4, producers=[0, 1, 2], kv_heads=4, head_dim=6, separate_norms=False, windows=9, context=64),
    ]
    _slow.shake_norms(made)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: keys and values of the layers that make them."""
    numbers = 0
    for layer, block in model.layers():
        if layer not in model.follows:
            of = cast(Projections, block.mixer.projections)
            numbers += 2 * of.kv_heads * of.head_dim * _slow.slots(model, layer, tokens)
    return numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """Pairs of layers on one key/value head, which the paper finds best."""
    return cla(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    yield "ten layers in threes: keys and values at 0, 1, 4, 7", float(grouped(10, 3) != [0, 1, 4, 7])
    pairs = {2: 1, 3: 1, 5: 4, 6: 4, 8: 7, 9: 7}
    yield "and the others read the nearest of them", float(cla(23, 8, 10, 2, factor=3, hidden=0).follows != pairs)
    counts = [len(grouped(n, f)) - -(-n // f) for n in range(1, 13) for f in range(1, 6)]
    yield "ceil(layers / factor) layers make keys and values", float(sum(map(abs, counts)))

    base = Transformer(23, 32, 3, 4, mixer=("softmax", {"kv_heads": 2})).double()
    one = cla(23, 32, 3, 4, factor=1, kv_heads=2, separate_norms=False).double()
    one.load_state_dict(base.state_dict())
    yield "factor 1 is grouped-query attention", largest(one(ids) - base(ids))
    apart = cla(23, 32, 3, 4, factor=1, kv_heads=2).double()
    given = dict(base.state_dict())
    for layer in range(3):
        weight = given.pop(f"blocks.{layer}.norm.weight")
        given |= {f"blocks.{layer}.mixer.{name}_norm": weight for name in ("q", "kv")}
    apart.load_state_dict(given)
    yield "and with equal norms for keys and queries too", largest(apart(ids) - base(ids))

    base, shared = base.double(), cla(23, 32, 3, 4, factor=3, kv_heads=2, separate_norms=False).double()
    with torch.no_grad():
        for layer, block in base.layers():
            own, first = cast(Any, block.mixer).projections, cast(Any, base.blocks[0]).mixer.projections
            own.k.weight.copy_(first.k.weight)
            own.v.weight.copy_(first.v.weight)
            if layer < 2:  # so that all layers have the same input
                own.out.weight.zero_()
                cast(Any, block.feed_forward).down.weight.zero_()
    old = base.state_dict()
    names = {name: name if name in old else name.replace(".mixer.", ".mixer.projections.") for name in shared.state_dict()}
    shared.load_state_dict({name: old[theirs] for name, theirs in names.items()})
    yield "layers of equal inputs and equal maps to keys and values share exactly", largest(shared(ids) - base(ids))

    pair = cla(23, 32, 4, 4, factor=2).double()
    held = []
    for _ in range(2):
        caches = pair.new_caches()
        pair(ids, caches=caches)
        held.append(cast(Tensor, cast(KeyValues, caches.layers[0]).k))
        with torch.no_grad():
            for parameter in cast(Block, pair.blocks[1]).mixer.parameters():
                parameter.add_(1.0)
    yield "what a layer does that shares changes no key of its group", largest(held[1] - held[0])
    lost = 2 * 32 * 2 * 8
    fewer = [cla(23, 32, 6, 4, factor=f, kv_heads=2, separate_norms=False).parameter_count for f in (1, 2, 3)]
    yield (
        "each layer that shares saves 2 width kv_heads head_dim parameters",
        float(abs(fewer[0] - fewer[1] - 3 * lost) + abs(fewer[0] - fewer[2] - 4 * lost)),
    )
    counted = [cla(23, 32, 5, 4, factor=3, kv_heads=2, bias=bias).parameter_count for bias in (False, True)]
    biases = counted[1] - counted[0]
    yield "layers that share have biases where the others have", float(abs(biases - 2 * (2 * 32 + 2 * 16) - 3 * (2 * 32)))
    try:
        cla(23, 32, 2, 4, windows=[3, 4])
        refused = False
    except ShapeError:
        refused = True
    yield "no layer reads farther back than the one that it shares with keeps", float(not refused)
    with torch.device("meta"):
        models = [cla(32, 2048, 20, 16, factor=factor, hidden=0) for factor in (1, 2, 3, 4)]
    table = [10240, 5120, 3584, 2560]
    yield (
        "bytes of a token, 16 bits a number, are those of its table of 1B models with one head of 128",
        float(sum(abs(2 * kept(model, 1) - told) for model, told in zip(models, table, strict=True))),
    )
