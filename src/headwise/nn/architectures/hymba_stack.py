"""Hymba's stack: meta tokens before every text, windows in most layers, and pairs of these that share keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import InputError, ShapeError
from ...mechanisms import Cache, KeyValues, Mixer
from ...mechanisms._mixer import Real, Tokens, largest
from ...mechanisms._norms import Rms
from ...mechanisms.following import ALONE, Followed, root_of
from ...mechanisms.heads.hymba import HybridState, Hymba, StateSpace
from ...stages.sink import Sink
from ...stages.window import Window
from ..build import named
from ..model import Caches
from ..transformer import Block, Transformer
from . import _slow

CARD = Card(
    paper="Hymba: A Hybrid-head Architecture for Small Language Models",
    year=2024,
    room="heads",
    source=(
        "arXiv:2411.13676, sec. 2.2 to 2.4, and the code and settings of the released 1.5B model: 128 meta tokens at the first "
        "places, layers 0, 15 and 31 of 32 without a window, the others in pairs that share keys and values, rotated once; an odd "
        "run of them begins with three. A window of w holds w tokens, one's own included, as their decoding has it (their masks "
        "show one more), and the meta tokens. Where the middle is for other depths, (layers - 1) // 2, is ours. The paper's "
        "figures of memory leave out the state of the state space heads"
    ),
)
EPSILON = 1e-6  # of the norms within mixers


class FollowedHybrid(Followed):
    """The other layer's keys and values, which are not held here, and a state of one's own."""

    def __init__(self, owner: KeyValues, back: int) -> None:
        super().__init__(owner)
        self.own = HybridState(back)  # of which keys and values stay empty

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return self.own.tensors()


class HybridFollower(Mixer):
    """Hybrid heads with queries and a state space head of their own, on the keys and values of an earlier layer.

    Args: heads, expand, states, kernel, rank: as for `Hymba`, and equal to the other layer's.
    """

    rotates = True
    follows = True
    cannot = Hymba.cannot

    def __init__(
        self, width: int, heads: int, *, expand: int = 2, states: int = 16, kernel: int = 4, rank: int | None = None
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads = width, heads
        inner = expand * width
        self.parts = (width, inner, inner)  # queries, state space, its gate
        self.inward = nn.Linear(width, sum(self.parts), bias=False)
        self.space = StateSpace(inner, states, math.ceil(width / 16) if rank is None else rank, kernel)
        self.attention_norm, self.space_norm = Rms(inner, EPSILON), Rms(inner, EPSILON)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: FollowedHybrid | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`.

        Raises: InputError without a cache of another layer.
        """
        if cache is None:
            raise InputError(f"{type(self).__name__} {ALONE}")
        q, u, gate = self.inward(x).split(self.parts, -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = cache.attend(q, stages, self.rotary).transpose(1, 2).flatten(2)
        remembered = self.space(u, cache.own, attention_mask) * F.silu(gate)
        both = (self.attention_norm(attended) + self.space_norm(remembered)) / 2
        out: Tensor = self.out(both.to(x.dtype))
        return out

    def new_cache(self, owner: Cache | None = None) -> FollowedHybrid:
        """A view of another layer's cache, and an empty state."""
        return FollowedHybrid(root_of(owner, type(self).__name__), self.space.conv.kernel_size[0] - 1)


class MetaDecoder(Transformer):
    """A stack that puts learned meta tokens before each text; their outputs are dropped.

    They are read once, with the first tokens of a text, and stay in its caches.
    """

    def __init__(self, *sizes: int, meta: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.meta = nn.Parameter(torch.randn(meta, self.width)) if meta else None

    def encode(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """See `Transformer.encode`."""
        caches = self.caches_of_one_pass() if caches is None else caches
        start = len(caches)
        x = self.embed(ids, caches.advance(ids, attention_mask), start)
        if self.meta is not None and not start:
            x = torch.cat([self.meta.expand(len(x), -1, -1), x], 1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask.bool(), (len(self.meta), 0), value=True)
        return self.run(x, caches, attention_mask)[:, -ids.shape[1] :]


class Layout(NamedTuple):
    """Which layers read all tokens, and which of the others share: the first of a group makes its keys and values."""

    everywhere: list[int]
    groups: list[list[int]]


def layout(layers: int, everywhere: Sequence[int] | None = None) -> Layout:
    """The paper's: the first, middle and last layer read all; runs of others share in pairs, an odd run in three and pairs."""
    found = sorted({0, (layers - 1) // 2, layers - 1}) if everywhere is None else sorted(everywhere)
    groups = []
    for before, after in pairwise([-1, *found, layers]):
        run = list(range(before + 1, after))
        starts = [0, *range(2 + len(run) % 2, len(run), 2)]
        groups += [run[a:b] for a, b in pairwise([*starts, len(run)]) if b > a + 1]
    return Layout(found, groups)


@named
def hymba_stack(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    meta: int = 128,
    window: int = 1024,
    everywhere: Sequence[int] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    kv_heads: int | None = None,
    expand: int = 2,
    states: int = 16,
    kernel: int = 4,
    rank: int | None = None,
    hidden: int | None = None,
    **options: Any,
) -> MetaDecoder:
    """A decoder of hybrid heads behind learned meta tokens; most layers read a window, and pairs of these share keys and values.

    Layers that share have queries and a state space head of their own, and keep its state only. All read the meta tokens,
    however far they are.

    Args:
        meta: how many tokens stand before a text. window: tokens that most layers read back. everywhere: layers that read all; the
            first, the middle and the last by default. groups: of layers that share keys and values, which the first of them
            makes; pairs by default, three where a run of layers with windows is odd.
        kv_heads: five query heads share one by default, or as near to that as can be. expand, states, kernel, rank: as for `Hymba`.
        hidden: of the feed-forward layers; 3.44 times the width by default. options: as for `Transformer`.

    Raises: ShapeError if layers are named that there are none of, a layer is in two groups, or one would read farther back than the
        layer whose keys it reads.
    """
    if meta < 0:
        raise ShapeError(f"{meta} meta tokens; there are 0 or more")
    if options.keys() & {"causal", "order", "mixer", "windows", "follows"}:
        raise ShapeError(f"options {sorted(options)}: this stack lays out its layers itself, by `everywhere` and `groups`")
    everywhere, pairs = layout(layers, everywhere)
    groups = pairs if groups is None else [list(group) for group in groups]
    shared = [layer for group in groups for layer in group]
    if not all(0 <= layer < layers for layer in (*everywhere, *shared)) or len(set(shared)) < len(shared):
        raise ShapeError(f"groups {groups}, layers without a window {everywhere}: of {layers} layers, each once in a group at most")
    for group in groups:
        if group != sorted(group) or len({layer in everywhere for layer in group}) > 1:
            raise ShapeError(f"group {group} must be in order, and all of it with a window or all without; without: {everywhere}")
    follows = {layer: group[0] for group in groups for layer in group[1:]}
    space = {"expand": expand, "states": states, "kernel": kernel, "rank": rank}
    if kv_heads is None:
        kv_heads = min((d for d in range(1, heads + 1) if heads % d == 0), key=lambda d: abs(heads / d - 5))
    mixers = [
        HybridFollower(width, heads, **space)  # type: ignore[arg-type]
        if layer in follows
        else Hymba(width, heads, kv_heads=kv_heads, **space)  # type: ignore[arg-type]
        for layer in range(layers)
    ]
    hidden = max(8, round(3.44 * width / 8) * 8) if hidden is None else hidden
    model = MetaDecoder(
        vocabulary, width, layers, heads, meta=meta, mixer=mixers, context=context, hidden=hidden, follows=follows, **options
    )
    for layer, block in model.layers():
        if layer not in everywhere:
            block.stages = (Window(window) | Sink(meta),)
    return model


def reach(block: Block) -> tuple[int | None, int]:
    """(window, meta tokens) of a block's stages; None without a window."""
    if not block.stages:
        return None, 0
    window, sink = cast(Any, block.stages[0]).parts
    return window.size, sink.size


def oracle(model: MetaDecoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time."""
    meta = 0 if model.meta is None else len(model.meta)
    x = model.embedding.weight[ids]
    if model.meta is not None:
        x = torch.cat([model.meta, x])
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, block in model.layers():
        mixer, base, read_from = cast(Any, block.mixer), _slow.base_of(block.mixer), model.follows.get(layer, layer)
        h = _slow.normed(x, block.norm)
        maps = list(mixer.inward.weight.split(mixer.parts))
        d = model.width // model.heads
        if read_from == layer:
            k = _slow.turned((h @ maps.pop(1).T).unflatten(-1, (-1, d)), base)
            made[layer] = k, (h @ maps.pop(1).T).unflatten(-1, (k.shape[1], -1))
        w_q, w_u, w_gate = maps
        q = _slow.turned((h @ w_q.T).unflatten(-1, (-1, d)), base)
        window = reach(block)[0]
        near = range(len(x)) if window is None else range(window)
        visible = torch.tensor([[j <= i and (i - j in near or j < meta) for j in range(len(x))] for i in range(len(x))])
        attended = _slow.attention_rows(q, *made[read_from], visible).flatten(1)
        gate = h @ w_gate.T
        remembered = _recurrence(mixer.space, h @ w_u.T) * gate / (1 + torch.exp(-gate))
        one = _slow.rms_norm(attended, mixer.attention_norm.weight, EPSILON)
        other = _slow.rms_norm(remembered, mixer.space_norm.weight, EPSILON)
        x = x + (one + other) / 2 @ mixer.out.weight.T
        if block.feed_forward is not None:
            x = x + _slow.gated_mlp(_slow.normed(x, block.feed_norm), block.feed_forward)
    return _slow.normed(x[meta:], model.norm) @ (model.embedding if model.head is None else model.head).weight.T


def _recurrence(space: Any, u: Tensor) -> Tensor:
    """What a state space head makes of its inputs (n, e), a token at a time."""
    taps, (rank, states) = space.conv.weight[:, 0], (space.widen.in_features, space.log_decay.shape[1])
    of_step, of_write, of_read = (norm.weight for norm in space.norms)
    state, rows = torch.zeros_like(space.log_decay), []
    for i in range(len(u)):
        z = space.conv.bias + sum(taps[:, -1 - back] * u[i - back] for back in range(min(taps.shape[1], i + 1)))
        z = z / (1 + torch.exp(-z))
        delta, write, read = (space.choose.weight @ z).split([rank, states, states])
        delta = space.widen.weight @ _slow.rms_norm(delta, of_step, EPSILON) + space.widen.bias
        delta = torch.log(1 + torch.exp(delta))
        write, read = _slow.rms_norm(write, of_write, EPSILON), _slow.rms_norm(read, of_read, EPSILON)
        state = torch.exp(-delta[:, None] * torch.exp(space.log_decay)) * state + (delta * z)[:, None] * write
        rows.append(state @ read + space.direct * z)
    return torch.stack(rows)


def examples() -> list[MetaDecoder]:
    """Settings that the conformance checks run."""
    made = [
        hymba_stack(23, 32, 5, 4, context=64, meta=3, window=7, kv_heads=2, states=3, everywhere=[0, 4], hidden=24),
        hymba_stack(23, 32, 5, 4, context=64, meta=5, window=9, states=2, kernel=3, expand=1, groups=[[1, 2], [0, 4]], tied=False,
                    everywhere=[0, 4], rank=3, hidden=24),
        hymba_stack(23, 32, 3, 4, context=64, meta=0, window=6, states=2, groups=[[0, 1]], everywhere=[2], hidden=24),
    ]  # fmt: skip
    with torch.no_grad():
        for model in made:
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith(("direct", "log_decay")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
                if name.endswith("widen.bias"):
                    parameter.add_(2.0)  # steps large enough to matter
    return made


def keys_and_values(model: MetaDecoder, tokens: int) -> int:
    """Numbers in the keys and values that are kept after so many tokens: all or a window of them, and the meta tokens."""
    meta, numbers = 0 if model.meta is None else len(model.meta), 0
    for layer, block in model.layers():
        if layer not in model.follows:
            of_keys, of_values = cast(Any, block.mixer).parts[1:3]
            window = reach(block)[0]
            numbers += (meta + (tokens if window is None else min(tokens, window))) * (of_keys + of_values)
    return numbers


def kept(model: MetaDecoder, tokens: int) -> int:
    """Keys and values of the layers that make them; in every layer a state, and the tokens that its convolution reaches back to."""
    spaces = [cast(Any, block.mixer).space for _, block in model.layers()]
    return keys_and_values(model, tokens) + sum(
        s.log_decay.numel() + s.direct.numel() * (s.conv.kernel_size[0] - 1) for s in spaces
    )


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> MetaDecoder:
    """The paper's layout; windows of an eighth of the text, and an eighth of a window of meta tokens, as it has at 8k."""
    window = max(1, tokens // 8)
    return hymba_stack(
        vocabulary, width, layers, heads, **{"context": tokens, "window": window, "meta": min(128, max(1, window // 8)), **options}
    )


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 13))
    pairs = [[a, a + 1] for a in range(1, 15, 2)] + [[16, 17, 18]] + [[a, a + 1] for a in range(19, 31, 2)]
    yield "the layout of 32 layers is that of the released model", float(layout(32) != ([0, 15, 31], pairs))
    runs = all(len(group) in (2, 3) for n in range(1, 40) for group in layout(n).groups)
    yield "at any depth, layers with windows share in pairs or in threes", float(not runs)
    with torch.device("meta"):
        paper = hymba_stack(32001, 1600, 32, 25)
        alone = hymba_stack(32001, 1600, 32, 25, groups=[])
    yield "it has 1.5 billion parameters", float(round(paper.parameter_count / 1e8) != 15)
    yield "at 8k and 16 bits a number, keys and values take 79 MB", float(round(2 * keys_and_values(paper, 8192) / 1e6) != 79)
    told = 2 * 960 * (3 * (8192 + 128) + 14 * (1024 + 128))
    yield "of 3 layers that read all and of 14 of the 29 others", float(abs(2 * keys_and_values(paper, 8192) - told))
    fewer = alone.parameter_count - paper.parameter_count
    yield "each of the 15 that share saves its map to keys and values", float(abs(fewer - 15 * 1600 * 960))

    model = examples()[0].double()
    plain = Transformer(26, 32, 5, 4, mixer=[block.mixer for _, block in model.layers()], hidden=24, follows=model.follows).double()
    given = {name: part for name, part in model.state_dict().items() if name != "meta"}
    given["embedding.weight"] = torch.cat([model.embedding.weight, cast(Tensor, model.meta)])
    plain.load_state_dict(given)
    for mine, other in zip(model.layers(), plain.layers(), strict=True):
        other[1].stages = mine[1].stages
    longer = torch.cat([torch.arange(23, 26).expand(2, -1), ids], 1)
    yield "meta tokens are words before the text that no text has", largest(model(ids) - plain(longer)[:, 3:, :23])
    caches = model.new_caches()
    for at in range(13):
        model(ids[:, at : at + 1], caches=caches)
    places = cast(Tensor, cast(KeyValues, caches.layers[1]).positions)[0].tolist()
    yield "a window's cache holds them and the last tokens", float(places != [0, 1, 2, *range(9, 16)])
    holds = [cast(FollowedHybrid, caches.layers[layer]).nbytes // 8 for layer in model.follows]
    yield "layers that share hold their state only", float(set(holds) != {2 * 2 * 32 * (3 + 3)})

    free, shared = (hymba_stack(23, 32, 3, 4, meta=2, everywhere=[0, 1, 2], groups=g).double() for g in ([], [[0, 1, 2]]))
    old = shared.state_dict()
    with torch.no_grad():
        for layer, block in free.layers():
            own, first = cast(Any, block.mixer), cast(Any, free.blocks[0]).mixer
            own.inward.weight.split(own.parts)[1].copy_(first.inward.weight.split(own.parts)[1])
            own.inward.weight.split(own.parts)[2].copy_(first.inward.weight.split(own.parts)[2])
            if layer < 2:  # so that all layers have the same input
                own.out.weight.zero_()
                cast(Any, block.feed_forward).down.weight.zero_()
    new = free.state_dict()
    for name in old:
        if name.endswith("inward.weight") and not name.startswith("blocks.0"):
            parts = list(new[name].split(cast(Any, free.blocks[0]).mixer.parts))
            new[name] = torch.cat([parts[0], *parts[3:]])
    free_out = free(ids)
    shared.load_state_dict(new)
    yield "layers of equal inputs and equal maps to keys and values share exactly", largest(shared(ids) - free_out)
    everywhere = hymba_stack(23, 32, 3, 4, meta=2, window=15, everywhere=[], groups=[]).double()
    everywhere.load_state_dict(free.state_dict())
    yield "a window of the whole text is none", largest(everywhere(ids) - free_out)
