"""Shared attention: a span of layers reads its own values by the attention weights of the layer before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Attention
from ...mechanisms._mixer import largest
from ...mechanisms.following import WeightFollower
from ..build import named
from ..model import LanguageModel
from ..transformer import Transformer
from . import _slow
from ._conversion import ODD, fill, plain

CARD = Card(
    paper="Beyond KV Caching: Shared Attention for Efficient LLMs",
    year=2024,
    room="heads",
    source=(
        "arXiv:2407.12866, and the authors' code: followers are a list of layers, each of which takes the weights of the nearest "
        "layer before it that is not in the list (22 for their 23 to 26 of Llama-2-7B). Their followers still compute queries and "
        "throw them away; here they have none"
    ),
    status=(
        "exact; weights, n x n for each head, are not kept for the span: each follower computes them anew from the leader's "
        "queries and keys, so of the paper's savings the maps and the cache are here, and the product of queries and keys is not"
    ),
)


@named
def shared_attention(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    followers: Sequence[int] | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    bias: bool = False,
    **options: Any,
) -> Transformer:
    """A decoder in which some layers have no queries and keys: they read their values by the weights of an earlier layer.

    A follower's leader is the nearest layer before it that is none, so a span of followers has the layer before it for a leader,
    which is not in the span. Followers keep values only: a leader and g followers keep (2 + g) / (2 + 2g) of the usual bytes.

    Args:
        followers: layers that follow; by default an eighth of them from 23/32 of the depth on, as 23 to 26 of 32. Not layer 0.
        kv_heads, head_dim, bias: of all layers, as for `Attention`. options: as for `Transformer`; no windows where weights are
            shared.

    Raises: ShapeError for a follower that is no layer after the first, and for windows of leaders or followers.
    """
    chosen = span(layers) if followers is None else sorted(followers)
    if len(set(chosen)) < len(chosen) or not all(0 < layer < layers for layer in chosen):
        raise ShapeError(f"followers {chosen} must be different ones of layers 1 to {layers - 1}; layer 0 has none before it")
    follows = {layer: max(o for o in range(layer) if o not in chosen) for layer in chosen}
    windows = options.get("windows")
    for layer in {*follows, *follows.values()}:
        if windows is not None and (isinstance(windows, int) or any(windows[layer : layer + 1])):
            raise ShapeError(f"layer {layer} has a window; leaders {set(follows.values())} and followers {chosen} must read all")
    own: dict[str, Any] = {"kv_heads": kv_heads, "head_dim": head_dim, "bias": bias}
    mixers: list[Any] = [WeightFollower(width, heads, **own) if layer in follows else ("softmax", own) for layer in range(layers)]
    return Transformer(vocabulary, width, layers, heads, mixer=mixers, context=context, follows=follows, **options)


def span(layers: int) -> list[int]:
    """The layers that follow by default, none of a single one."""
    first = max(1, round(layers * 23 / 32))
    return list(range(first, min(layers, first + max(1, layers // 8))))


def share(model: LanguageModel, followers: Sequence[int] | None = None) -> Transformer:
    """A plain stack in which some layers give up their queries and keys and take the weights of the one before their span.

    All other weights are copied. Exact if the followers' queries and keys were their leader's.

    Args: followers: as for `shared_attention`.

    Raises: UnsupportedModelError for anything but a `Transformer` of softmax attention. ShapeError for layers that can't follow.
    """
    sizes, options, shape, _ = plain(model)
    vocabulary, width, layers, heads = sizes
    chosen = span(layers) if followers is None else list(followers)
    made = shared_attention(vocabulary, width, layers, heads, followers=chosen, **{**shape, **options})
    fill(made, model, {})
    return made


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary); weights are computed once and used by the whole span."""
    weights: list[Tensor] = []  # the nearest leader's are the last

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer: Any = _slow.mixer_of(model, at)
        of: Any = mixer if isinstance(mixer, WeightFollower) else mixer.projections
        if not isinstance(mixer, WeightFollower):
            q, k = (_slow.heads_of(x, *f) for f in ((of.q, of.heads), (of.k, of.kv_heads)))
            q, k = (_slow.turned(part, _slow.base_of(mixer)) for part in (q, k))
            weights.append(_slow.attention_weights(q, k, _slow.visible_to(model, at, len(ids))))
        read = _slow.read(weights[-1], _slow.heads_of(x, of.v, of.kv_heads))
        return _slow.merged(read, of.out)

    return _slow.stack(model, ids, mix)


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        shared_attention(23, 32, 5, 4, context=64, followers=[2, 3], kv_heads=2, bias=True),
        shared_attention(23, 32, 5, 4, context=64, followers=[1, 3, 4], tied=False, head_dim=6),
        shared_attention(23, 32, 4, 4, context=64, windows=[7, 7, None, None]),
        share(Transformer(23, 32, 3, 4, context=64, positions="learned", causal=False), [1, 2]),
    ]
    _slow.shake_norms(made)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold after so many tokens: keys and values of layers that compute weights, values of the others."""
    numbers = 0
    for layer, block in model.layers():
        mixer: Any = block.mixer
        of = mixer if layer in model.follows else mixer.projections
        numbers += (1 if layer in model.follows else 2) * of.kv_heads * of.head_dim * _slow.slots(model, layer, tokens)
    return numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """An eighth of the layers follow, late in the stack, as in the paper's Llama-2-7B."""
    return shared_attention(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    yield "of 32 layers 23 to 26 follow", float(span(32) != [23, 24, 25, 26])
    wrong = [n for n in range(2, 40) if not 0 < span(n)[0] <= span(n)[-1] < n]
    yield "and in stacks of any depth late ones, not the first", float(len(wrong) + len(span(1)))
    with torch.device("meta"):
        llama = shared_attention(32, 64, 32, 4, hidden=0)
    yield "the leader of a span is the layer before it", float(llama.follows != dict.fromkeys([23, 24, 25, 26], 22))

    base = Transformer(23, 32, 4, 4).double()
    for positions in ("rotary", "learned", "none"):
        odd = Transformer(23, 32, 3, 4, **ODD, positions=positions).double()
        yield f"no followers: the stack as it was, with {positions} positions", largest(share(odd, [])(ids) - odd(ids))
    alike = Transformer(23, 32, 4, 4).double()
    for layer, block in alike.layers():
        of, first = (cast(Attention, b).projections for b in (block.mixer, cast(Any, alike.blocks[0]).mixer))
        of.q.weight.data.copy_(first.q.weight)
        of.k.weight.data.copy_(first.k.weight)
        if layer < 2:  # so that the followers have their leader's input
            of.out.weight.data.zero_()
            cast(Any, block.feed_forward).down.weight.data.zero_()
    yield "layers of equal queries and keys share exactly", largest(share(alike, [1, 2])(ids) - alike(ids))
    apart = share(base, [1, 2])
    yield "and others do not", float(largest(apart(ids) - base(ids)) < 1e-3)
    shares = {p.data_ptr() for p in apart.parameters()} & {p.data_ptr() for p in base.parameters()}
    yield "a conversion shares no memory with what it was made of", float(len(shares))

    free = Transformer(23, 32, 3, 4, positions="none").double()
    before, leader = share(free, [2]), cast(Any, free.blocks[1]).mixer.projections
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    for linear in (leader.q, leader.k):
        linear.weight.data = (turn @ linear.weight.view(4, 8, 32)).reshape(32, 32)
    yield "turning a leader's queries and keys alike changes nothing in its span", largest(share(free, [2])(ids) - before(ids))

    mute = share(base, [1, 2])
    leader = cast(Any, mute.blocks[0]).mixer.projections
    leader.out.weight.data.zero_()
    grads = torch.autograd.grad(mute(ids).square().sum(), (leader.q.weight, leader.k.weight))
    yield "a leader's queries and keys learn from its followers, whatever it reads itself", float(not all(g.any() for g in grads))
    lost = base.parameter_count - share(base, [1, 2]).parameter_count
    yield "a follower saves its queries' and keys' maps", float(abs(lost - 2 * 2 * 32 * 32))
    try:
        share(Transformer(23, 32, 3, 4, windows=[None, 5, None]), [1])
        refused = False
    except ShapeError:
        refused = True
    yield "no window where weights are shared", float(not refused)
    five = kept(shared_attention(23, 32, 5, 4, followers=[1, 2, 3, 4]), 7) / kept(Transformer(23, 32, 5, 4), 7)
    yield "a leader and four followers keep 60% of the bytes", abs(five - 0.6)
