"""UMoE's stack: the attention and the feed-forward layer of a block pick among the same experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...card import Card
from ...errors import ShapeError
from ...mechanisms._mixer import largest
from ...mechanisms.heads.umoe import Dispatch, Experts, FeedForward, Router, Routing, Umoe
from ..build import named
from ..transformer import Block, Transformer
from . import _slow

CARD = Card(
    paper="UMoE: Unifying Attention and FFN with Shared Experts",
    year=2025,
    room="heads",
    source=(
        "arXiv:2505.07260, sec. 3, and the authors' code: pre-norm blocks whose two layers have routers and always active experts "
        "of their own, and the other experts in common; the base model has 12 layers of width 768, 128 experts, 3 and 15 of them "
        "picked; the large one (`width=2048, layers=24, experts=64, feed_active=10, rank=36`) the same shape. `heads` counts the "
        "mixes a token makes, 4 in both. Their balance loss, times 0.001, is for the caller to add: `with_balance`. Logits by the "
        "embeddings, as `Transformer` has them, is not known to be theirs"
    ),
)
EPSILON = 1e-6  # of the norm within a query


class ExpertDecoder(Transformer):
    """A stack whose layers pick experts, and can say how evenly."""

    def with_balance(
        self, ids: Int[Tensor, "b n"], attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n vocabulary"], Tensor]:
        """Logits, and the sum of all routers' balance losses: one for each router that picks all experts alike."""
        logits, routings = self.with_routings(ids, attention_mask)
        return logits, torch.stack([routing.balance_loss(attention_mask) for routing in routings]).sum()

    def with_routings(
        self, ids: Int[Tensor, "b n"], attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n vocabulary"], list[Routing]]:
        """Logits, and what each layer's router chose: attention and feed-forward by turns."""
        found: list[Routing] = []
        routers = [module for module in self.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(lambda _router, _inputs, routing: found.append(routing)) for router in routers]
        try:
            return self(ids, attention_mask=attention_mask), found
        finally:
            for hook in hooks:
                hook.remove()


@named
def umoe_stack(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    experts: int = 128,
    feed_active: int = 15,
    expert_hidden: int | None = None,
    key_dim: int | None = None,
    rank: int = 16,
    shared: bool = True,
    norm: bool = False,
    unified: bool = True,
    **options: Any,
) -> ExpertDecoder:
    """A decoder whose attention and feed-forward layers apply the same two-matrix experts: to mixes of tokens, and to tokens.

    Each layer has a router of its own, and an expert of its own that is always active.

    Args:
        heads: how many mixes of tokens an attention makes for each: one for each expert that the token picks, and one for the
            expert that is always active. experts: of a block. feed_active: how many a token picks in a feed-forward layer.
        expert_hidden: of an expert; width / heads by default. key_dim: of queries and the one key head; likewise.
        rank: of what sets an expert's query apart. norm: an RMS norm inside that query, as the authors train it.
        shared: whether each layer has an expert that is always active. unified: False gives each layer experts of its own.
        options: as for `Transformer`; there is no `hidden`.

    Raises: ShapeError if heads leave no expert to pick, or there are fewer experts than are picked.
    """
    active = heads - shared
    if active < 1:
        raise ShapeError(f"{heads} heads, {int(shared)} of them of the expert that is always active, pick no expert; take one more")
    if width % heads:
        raise ShapeError(f"width {width} is no multiple of {heads} heads")
    if options.keys() & {"hidden", "mixer"}:
        raise ShapeError(f"options {sorted(options)}: layers are made of experts here; their size is expert_hidden")
    size = width // heads if expert_hidden is None else expert_hidden
    d = 2 * max(1, width // heads // 2) if key_dim is None else key_dim
    mixers = [
        Umoe(width, experts, active, hidden=size, key_dim=d, rank=rank, shared=shared, norm=norm) for _ in range(layers)
    ]  # fmt: skip
    model = ExpertDecoder(vocabulary, width, layers, heads, mixer=mixers, context=context, hidden=0, **options)
    for module, mixer in zip(model.blocks, mixers, strict=True):
        block = cast(Block, module)
        block.feed_norm = nn.RMSNorm(width, eps=float(cast(nn.RMSNorm, block.norm).eps or 0.0))
        own = mixer.experts if unified else Experts(width, experts, size)
        block.feed_forward = FeedForward(own, feed_active, shared=shared)
    return model


def oracle(model: ExpertDecoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token and an expert at a time."""
    x = model.embedding.weight[ids]
    for at, block in model.layers():
        mixer, feed = cast(Any, block.mixer), cast(Any, block.feed_forward)
        x = x + _attended(mixer, _slow.normed(x, block.norm), _slow.visible_to(model, at, len(ids)))
        rows = []
        for token in _slow.rms_norm(x, cast(Any, block.feed_norm).weight, cast(Any, block.norm).eps):
            out = torch.zeros_like(token) if feed.shared is None else _expert(feed.shared, 0, token)
            rows.append(out + sum(p * _expert(feed.experts, best, token) for best, p in _picks(feed.router, token)))
        x = x + torch.stack(rows)
    return _slow.normed(x, model.norm) @ (model.embedding if model.head is None else model.head).weight.T


def _attended(mixer: Any, x: Tensor, visible: Tensor) -> Tensor:
    base = _slow.base_of(mixer)

    def turned(z: Tensor, place: int) -> Tensor:
        return z if base is None else _slow.rotate(z[None], place, base)[0]

    def mixed(q: Tensor, place: int) -> Tensor:
        seen = visible[place].nonzero().flatten()
        return _slow.weights_row(turned(q, place), keys[seen]) @ x[seen]

    keys, rows = torch.stack([turned(mixer.key.weight @ token, place) for place, token in enumerate(x)]), []
    for place, token in enumerate(x):
        out = torch.zeros_like(token)
        for best, p in _picks(mixer.router, token):
            inner = mixer.query_down[best] @ token
            if mixer.query_norm is not None:
                inner = _slow.rms_norm(inner, mixer.query_norm, EPSILON)
            q = mixer.query.weight @ token + mixer.query_up[best] @ inner
            out = out + p * _expert(mixer.experts, best, mixed(q, place))
        if mixer.shared is not None:
            out = out + _expert(mixer.shared, 0, mixed(mixer.shared_query.weight @ token, place))
        rows.append(out)
    return torch.stack(rows)


def _picks(router: Any, x: Tensor) -> list[tuple[int, Tensor]]:
    """The likeliest experts, and how likely they are."""
    e = torch.exp(router.weight @ x)
    by_size = sorted(range(len(e)), key=lambda at: -float(e[at].detach()))
    return [(at, e[at] / e.sum()) for at in by_size[: router.active]]


def _expert(experts: Any, at: int, z: Tensor) -> Tensor:
    hidden = experts.up[at] @ z
    made: Tensor = experts.down[at] @ (hidden / (1 + torch.exp(-hidden)))
    return made


def examples() -> list[ExpertDecoder]:
    """Settings that the conformance checks run."""
    made = [
        umoe_stack(23, 32, 3, 4, context=64, experts=6, feed_active=4, rank=3),
        umoe_stack(23, 32, 2, 2, context=64, experts=4, feed_active=1, rank=2, expert_hidden=12, key_dim=6, norm=True, windows=9),
        umoe_stack(23, 32, 2, 2, context=64, experts=5, feed_active=3, rank=2, shared=False, unified=False, tied=False),
    ]
    with torch.no_grad():
        for model in made:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


def kept(model: ExpertDecoder, tokens: int) -> int:
    """In each layer the normed tokens and a key for each, of all tokens or of a window."""
    windows = [_slow.window_of(model, layer) for layer, _ in model.layers()]
    sizes = [cast(Umoe, block.mixer).key.out_features + model.width for _, block in model.layers()]
    return sum(size * (tokens if window is None else min(tokens, window)) for size, window in zip(sizes, windows, strict=True))


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> ExpertDecoder:
    """The base model's 128 experts, of which 15 and one more make a feed-forward layer of four times the width with 4 heads."""
    return umoe_stack(vocabulary, width, layers, heads, **{"context": tokens, "rank": min(16, max(1, width // 4)), **options})


def multiply_adds(model: ExpertDecoder, tokens: int) -> int:
    """Of matrices with one text: what is active, by the formula. Every query is counted with every key."""
    c, count = model.width, tokens * model.width * model.vocabulary
    for _, block in model.layers():
        mixer, feed = cast(Umoe, block.mixer), cast(FeedForward, block.feed_forward)
        (experts, r, _), (d, h) = mixer.query_down.shape, (mixer.key.out_features, mixer.experts.up.shape[1])
        k, extra = mixer.router.active, int(mixer.shared is not None)
        linear = 2 * c * experts + (2 + extra) * c * d + k * r * (c + d)  # routers; queries and keys
        read = 2 * c * h * (k + extra + feed.router.active + extra)  # experts of both layers
        count += tokens * (linear + read + tokens * (k + extra) * (d + c))
    return count


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (1, 24))
    model = umoe_stack(23, 32, 3, 4, experts=6, feed_active=4, rank=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    apart = umoe_stack(23, 32, 3, 4, experts=6, feed_active=4, rank=3, unified=False).double()
    apart.load_state_dict(model.state_dict())
    same = [cast(Any, block.mixer).experts is cast(Any, block.feed_forward).experts for _, block in model.layers()]
    yield "both layers of a block have one tensor of experts", float(not all(same))
    saved = apart.parameter_count - model.parameter_count
    yield "which spares a whole set of experts in each block", float(abs(saved - 3 * 6 * 2 * 32 * 8))
    yield "experts of one's own with equal weights give the same", largest(model(ids) - apart(ids))
    for one in (model, apart):
        one(ids).sin().sum().backward()
    off, parts = [], []
    for (_, block), (_, other) in zip(model.layers(), apart.layers(), strict=True):
        mine, first, second = (cast(Any, of).experts for of in (block.mixer, other.mixer, other.feed_forward))
        for name in ("up", "down"):
            both = [getattr(of, name).grad for of in (first, second)]
            off.append(largest(getattr(mine, name).grad - both[0] - both[1]))
            parts += [largest(part) for part in both]
    yield "their gradient is the sum of what both layers ask for", max(off)
    yield "and both ask for something", float(min(parts) < 1e-6)

    counted = []
    for one in (model, umoe_stack(23, 32, 3, 4, experts=24, feed_active=4, rank=3).double()):
        with FlopCounterMode(display=False) as counter:
            _, routings = one.with_routings(ids)
        filling = 0  # rows of zeros that experts are given so that their numbers are even
        for at, routing in enumerate(routings):
            more = sum(Dispatch(routing.picked, routing.probabilities.shape[-1]).rows) - routing.picked.numel()
            filling += more * (2 * 32 * 8 + (3 * (32 + 8) if at % 2 == 0 else 0))
        counted.append(counter.get_total_flops() // 2 - filling)
        yield (
            f"multiply-adds with {6 * len(counted) ** 2} experts are those of active ones",
            float(abs(counted[-1] - multiply_adds(one, 24))),
        )
    yield "of four times the experts only the routers cost more", float(abs(counted[1] - counted[0] - 24 * 3 * 2 * 32 * 18))
    with torch.device("meta"):
        paper = umoe_stack(1, 768, 12, 4)
    of_block = 128 * (2 * 768 * 192 + 16 * (768 + 192)) + 2 * 2 * 768 * 192 + 3 * 768 * 192 + 2 * 128 * 768 + 2 * 768
    yield "parameters of the base model's blocks", float(abs(paper.parameter_count - 12 * of_block - 2 * 768))
    of_token = 2 * 768 * 128 + 3 * 768 * 192 + 3 * 16 * (768 + 192) + 2 * 768 * 192 * (3 + 1 + 15 + 1) + 4 * (768 + 192)
    yield "and its multiply-adds for a lone token", float(abs(multiply_adds(paper, 1) - 12 * of_token - 768))
    small = umoe_stack(1, 32, 1, 2, experts=3, feed_active=1, expert_hidden=5, key_dim=6, rank=2, shared=False, norm=True)
    of_block = 3 * (2 * 32 * 5 + 2 * (32 + 6)) + 2 + 2 * 32 * 6 + 2 * 3 * 32 + 2 * 32
    yield (
        "without experts that are always active, and with a norm in queries",
        float(abs(small.parameter_count - of_block - 2 * 32)),
    )
    feed = cast(FeedForward, cast(Block, paper.blocks[0]).feed_forward)
    active = (feed.router.active + 1) * 2 * 768 * feed.experts.up.shape[1]
    yield "its feed-forward layers use as many as plain ones of four times the width", float(abs(active - 8 * 768 * 768))
    yield "its cache holds 960 numbers a token and layer; attention of 4 heads, 1536", float(abs(kept(paper, 1) - 12 * 960))

    before, order = model(ids), torch.randperm(6)
    with torch.no_grad():
        for _, block in model.layers():
            mixer, feed = cast(Umoe, block.mixer), cast(FeedForward, block.feed_forward)
            for part in (
                mixer.router.weight,
                feed.router.weight,
                mixer.query_down,
                mixer.query_up,
                mixer.experts.up,
                mixer.experts.down,
            ):
                part.copy_(part[order].clone())
    yield "the order of experts does not matter, if both routers follow it", largest(model(ids) - before)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.zero_()
    yield "routers that tell nothing apart have a balance loss of one each", largest(model.with_balance(ids)[1] - 6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down") and "query" not in name:
                parameter.zero_()
    words = _slow.normed(model.embedding.weight[ids], model.norm) @ model.embedding.weight.T
    yield "experts that give nothing leave the words as they are", largest(model(ids) - words)
