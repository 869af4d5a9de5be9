"""A stack of mixers and feed-forward layers that takes any mechanism."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..attention.mask import Mask
from ..attention.stage import Stage
from ..errors import InputError, ShapeError
from ..mechanisms import KeyValues, Mixer, Rotary
from ..stages.causal import Causal
from ..stages.window import Window
from .feedforward import GatedMlp, default_hidden
from .mixers import PLAIN, Specs, mixer, specs
from .model import Caches, LanguageModel
from .residual import Residual, Sum


class Block(nn.Module):
    """A mixer and a feed-forward layer (or none), each behind a norm.

    stages: what the mixer is given besides the causal mask, such as a window.
    """

    norm: nn.Module
    mixer: Mixer

    def __init__(
        self, mixer: Mixer, feed_forward: nn.Module | None, *, stages: Sequence[Stage] = (), epsilon: float = 1e-6
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.norm = nn.RMSNorm(mixer.width, eps=epsilon)
        self.mixer = mixer
        self.feed_norm = nn.RMSNorm(mixer.width, eps=epsilon) if feed_forward is not None else None
        self.feed_forward = feed_forward


class Transformer(LanguageModel):
    """A decoder (or encoder) whose layers take any mixer, by name or as modules.

    Args:
        vocabulary, width, layers, heads: as usual; width is a multiple of heads.
        mixer: for all layers, a list with one for each, or a function of the layer's number. See `headwise.nn.mixer`.
        context: the longest text, which sizes what depends on it: learned positions, tables of mechanisms.
        hidden: width of the feed-forward layers, 8/3 of the width by default; 0 for none. One number, or one a layer.
        positions: "rotary" turns queries and keys of mixers that rotate and do not tell places apart themselves; "learned" adds
            a vector to each embedding; "none". base: of the rotary embedding.
        windows: how many tokens each layer reads back, None for all: its cache keeps no more than that.
        follows: {layer: an earlier one whose cache it reads}, for mixers that follow.
        order: the blocks in the order in which they run; blocks may run several times, each time with a cache of its own.
        causal: False for an encoder, which reads both sides. tied: whether logits are products with the embeddings.
        residual: how layers are joined; the sum by default. epsilon: of the norms.

    Raises: ShapeError if sizes do not fit together. RegistryError for a mixer that there is none of.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        *,
        mixer: Specs = PLAIN,
        context: int = 1024,
        hidden: int | Sequence[int] | None = None,
        positions: str = "rotary",
        base: float = 10000.0,
        windows: Sequence[int | None] | int | None = None,
        follows: Mapping[int, int] | None = None,
        order: Sequence[int] | None = None,
        causal: bool = True,
        tied: bool = True,
        residual: Residual | None = None,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        if positions not in ("rotary", "learned", "none"):
            raise ShapeError(f"positions {positions!r} must be 'rotary', 'learned' or 'none'")
        given = specs(mixer, layers)
        self.vocabulary, self.width, self.heads, self.context, self.causal = vocabulary, width, heads, context, causal
        self.order = list(range(layers) if order is None else order)
        self.follows = dict(follows or {})
        windows = [windows] * layers if windows is None or isinstance(windows, int) else list(windows)
        hiddens = (
            [default_hidden(width) if hidden is None else hidden] * layers if not isinstance(hidden, Sequence) else list(hidden)
        )
        for what, found in (("windows", windows), ("hidden", hiddens)):
            if len(found) != layers:
                raise ShapeError(f"{what} has {len(found)} entries for {layers} layers")
        if not self.order or not all(0 <= index < layers for index in self.order):
            raise ShapeError(f"order {self.order} names blocks that are not there; there are {layers}")
        self.config = {
            "architecture": "transformer",
            "vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads, "mixer": [_told(spec) for spec in given],
            "context": context, "hidden": hiddens, "positions": positions, "base": base, "windows": windows,
            "follows": dict(self.follows), "order": self.order, "causal": causal, "tied": tied, "epsilon": epsilon,
        }  # fmt: skip
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # shorter rows drown in what the first layer adds
        self.places = nn.Embedding(context, width) if positions == "learned" else None
        if self.places is not None:
            nn.init.normal_(self.places.weight, std=width**-0.5)
        self.blocks = nn.ModuleList()
        for spec, window, inner in zip(given, windows, hiddens, strict=True):
            made = _mixer(spec, width, heads, context)
            if positions == "rotary" and made.rotates:
                made.rotary = Rotary(base)
            stages = () if window is None else (Window(window),)
            self.blocks.append(Block(made, GatedMlp(width, inner) if inner else None, stages=stages, epsilon=epsilon))
        self._check_follows()
        self._check_directions()
        self.residual: Residual = Sum() if residual is None else residual
        if residual is not None:
            self.config["residual"] = {"module": type(residual).__name__}
        self.norm = nn.RMSNorm(width, eps=epsilon)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)

    def layers(self) -> Iterator[tuple[int, Block]]:
        """Each layer's number and block, in the order in which they run."""
        for depth, index in enumerate(self.order):
            yield depth, cast(Block, self.blocks[index])

    def _check_directions(self) -> None:
        way, words = ("causal", "causally") if self.causal else ("full", "both sides")
        for depth, block in self.layers():
            if way in block.mixer.cannot:
                why = block.mixer.cannot[way]
                raise ShapeError(
                    f"layer {depth}'s mixer, {type(block.mixer).__name__}, can't read {words}: {why}; set causal={not self.causal}"
                )

    def _check_follows(self) -> None:
        for depth, block in self.layers():
            owner, mixer = self.follows.get(depth), block.mixer
            if mixer.follows != (owner is not None):
                told = "must be told in `follows`" if mixer.follows else "keeps what it reads itself"
                raise ShapeError(f"layer {depth}'s mixer, {type(mixer).__name__}, {told}; follows is {self.follows}")
            if owner is None:
                continue
            if not 0 <= owner < depth:
                raise ShapeError(f"layer {depth} can't follow layer {owner}, which does not come before it")
            theirs, own = (kept(b.stages)[1] for b in (cast(Block, self.blocks[self.order[owner]]), block))
            if theirs is not None and (own is None or own > theirs):
                raise ShapeError(
                    f"layer {depth} reads {own or 'all'} tokens back, and layer {owner}, which it follows, keeps {theirs}"
                )

    def forward(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocabulary"]:
        """See `LanguageModel.forward`.

        Raises: InputError for a text longer than the context, where places are learned.
        """
        hidden = self.encode(ids, caches=caches, attention_mask=attention_mask)
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def encode(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """What the last layer says of each token, normed: all of `forward` but the logits."""
        caches = self.caches_of_one_pass() if caches is None else caches
        start = len(caches)
        return self.run(self.embed(ids, caches.advance(ids, attention_mask), start), caches, attention_mask)

    def run(
        self, x: Float[Tensor, "b n width"], caches: Caches, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """All layers, and the last norm, on embeddings that are there already."""
        stream = self.residual(x)
        mask = () if not self.causal else (Causal(),)
        for depth, block in self.layers():
            x = block.norm(stream.read(2 * depth))
            stream.add(block.mixer(x, *mask, *block.stages, cache=caches.layers[depth], attention_mask=attention_mask))
            if block.feed_forward is not None and block.feed_norm is not None:
                stream.add(block.feed_forward(block.feed_norm(stream.read(2 * depth + 1))))
        caches.release()
        normed: Tensor = self.norm(stream.out)
        return normed

    def embed(self, ids: Tensor, places: Tensor | None, start: int) -> Tensor:
        """Embeddings of tokens at their places; `start`, `start` + 1, ... for None."""
        x: Tensor = self.embedding(ids)
        if self.places is None:
            return x
        if places is None:
            places = torch.arange(start, start + ids.shape[1], device=ids.device)
        if int(places.max()) >= self.context:
            raise InputError(f"a text of {int(places.max()) + 1} tokens; positions are learned up to {self.context}")
        return x + self.places(places)

    def caches_of_one_pass(self) -> Caches:
        """Caches that keep all, for nothing is read after the pass: what windows hide need not be found out and let go."""
        caches = self.new_caches()
        for cache in caches.layers:
            if isinstance(cache, KeyValues):
                cache.first, cache.last = 0, None
        return caches

    def changed(self, change: Callable[[int, Mixer], Mixer]) -> Transformer:
        """A copy in which each block's mixer is what `change(block, mixer)` makes of it; its rotary embedding goes along."""
        made = copy.deepcopy(self)
        given = []
        for index, block in enumerate(made.blocks):
            old = cast(Mixer, block.mixer)
            new = change(index, old)
            if new.width != self.width:
                raise ShapeError(f"the new mixer of block {index} has width {new.width}, the stack {self.width}")
            if new is not old and new.rotates and old.rotates:
                new.rotary = old.rotary
            block.mixer = new.train(self.training)
            given.append(self.config["mixer"][index] if new is old else _told(new))
        made.config = {**self.config, "mixer": given}
        made._check_follows()
        made._check_directions()
        return made

    def new_caches(self) -> Caches:
        """See `LanguageModel.new_caches`. Layers with a window keep no more than that; those that follow keep less or nothing."""
        layers: list[Any] = []
        for depth, block in self.layers():
            owner = self.follows.get(depth)
            if "decode" in block.mixer.cannot:
                layers.append(None)
                continue
            cache = block.mixer.new_cache(None if owner is None else layers[owner])
            if isinstance(cache, KeyValues) and self.causal:
                cache.first, cache.last = kept(block.stages)
            layers.append(cache)
        return Caches(layers)


_mixer = mixer  # the name is also that of an argument


def _told(spec: Any) -> Any:
    """A spec as it is saved: a module is named in words, and can't be built from them."""
    return {"module": type(spec).__name__} if isinstance(spec, nn.Module) else list(spec) if isinstance(spec, tuple) else spec


def kept(stages: Sequence[Stage]) -> tuple[int, int | None]:
    """(first, last): how many tokens at the beginning and before the next one causal masks leave to later queries."""
    masks: list[Mask] = [Causal(), *(stage for stage in stages if isinstance(stage, Mask))]
    joined = masks[0]
    for mask in masks[1:]:
        joined = joined & mask
    pattern = joined.pattern()
    if pattern is None or pattern.window is None:
        return 0, None
    return pattern.sink, pattern.window
