"""TLinFormer: tokens are written window by window; what came before is compressed to few rows, once for each window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Cache, Rotary
from ...mechanisms._mixer import Tokens, largest
from ...mechanisms._norms import layer_norm
from ...stages.causal import Causal
from ..build import named
from ..feedforward import GatedMlp, default_hidden
from ..model import Caches, LanguageModel
from . import _slow

CARD = Card(
    paper="Rethinking Transformer Connectivity: TLinFormer, A Path to Exact, Full Context-Aware Linear Attention",
    year=2025,
    room="linear",
    source=(
        "arXiv:2508.20407, by its description; the author's code, which is not free, was not ported. Two softmaxes, over the "
        "context and over the window, are summed. One window costs what is linear in its context; but that is built anew for each, "
        "so a whole text costs n^2 / window; what is kept for decoding grows with n in one layer of each block, and not at all in "
        "the others: the paper's constant cache is one within a window. The last block's restored context, which nothing reads, is "
        "not computed. Rotary pairs are halves, not neighbours. The width of feed-forward layers (8/3) is not known for sure; "
        "`auto` is at least 8; no dropout. Rows with different padding run one after the other"
    ),
)


class Read(nn.Module):
    """Softmax attention, (b, h, n, d): a module, so that what is read can be counted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *stages: Stage) -> Tensor:
        """See `headwise.attend`."""
        return attend(q, k, v, *stages)


class Layer(nn.Module):
    """The maps of one layer, which serve the context and the window alike: before and after attention."""

    def __init__(self, width: int, heads: int, hidden: int, base: float) -> None:
        super().__init__()
        self.heads, self.rotary = heads, Rotary(base)
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = GatedMlp(width, hidden)
        self.read = Read()

    def split(self, x: Tokens, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, d) of rows at places start, start + 1, ..."""
        q, k, v = self.qkv(layer_norm(self.norm, x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        places = torch.arange(start, start + x.shape[1], device=x.device)
        return self.rotary(q, places), self.rotary(k, places), v.clone()  # or a cache would hold on to all three

    def join(self, x: Tokens, read: Float[Tensor, "b h n d"]) -> Tokens:
        """The rows with what they have read, and what the feed-forward layer makes of both."""
        x = x + self.out(read.transpose(1, 2).flatten(2))
        made: Tokens = x + self.feed_forward(layer_norm(self.feed_norm, x))
        return made


KeyValue = tuple[Tensor, Tensor]


@dataclass
class Text:
    """Texts that are equally long: their rows of the batch, all tokens, and for each layer keys and values that are read.

    context: of what came before the window, None in the first one. own: of the window so far.
    """

    rows: list[int]
    ids: Int[Tensor, "rows n"]
    context: list[KeyValue | None]
    own: list[KeyValue | None]

    def some(self, chosen: list[int]) -> Text:
        """Some of them, by their number among these."""
        if len(chosen) == len(self.rows):
            return self

        def of(pairs: list[KeyValue | None]) -> list[KeyValue | None]:
            return [None if pair is None else (pair[0][chosen], pair[1][chosen]) for pair in pairs]

        return Text([self.rows[i] for i in chosen], self.ids[chosen], of(self.context), of(self.own))


class Texts(Cache):
    """What is kept of a batch: of all layers, for each length of text by itself."""

    def __init__(self) -> None:
        self.texts: list[Text] = []
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        for text in self.texts:
            yield text.ids
            for pair in (*text.context, *text.own):
                yield from pair or ()

    def extend(self, ids: Tensor, real: Tensor, layers: int) -> Iterator[tuple[Text, Tensor, tuple[Tensor, Tensor]]]:
        """Texts, what they go on with (rows, m), and where that is in the batch; they are kept apart by length.

        Raises: ShapeError for another number of rows than before.
        """
        held = sum(len(text.rows) for text in self.texts)
        if self.texts and held != len(ids):
            raise ShapeError(f"a cache of {held} rows can't go on with {len(ids)}")
        before = self.texts or [Text(list(range(len(ids))), ids[:, :0], [None] * layers, [None] * layers)]
        self.texts, self.total = [], self.total + ids.shape[1]
        for text in before:
            counts = real[text.rows].sum(1).tolist()
            for count in sorted(set(counts)):
                self.texts.append(text.some([i for i, own in enumerate(counts) if own == count]))
                if count:
                    rows = torch.tensor(self.texts[-1].rows, device=ids.device)
                    row, column = real[rows].nonzero(as_tuple=True)
                    yield self.texts[-1], ids[rows[row], column].view(len(rows), count), (rows[row], column)


class TlinDecoder(LanguageModel):
    """Blocks of a layer that compresses the context, hidden ones, and one that restores it; with layer norms and tied embeddings.

    Args:
        depth: layers of a block, the first and the last included. window: how many tokens are written until the context is
            compressed anew. history: rows that it is compressed to; "auto" for about 12 log(tokens).
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        *,
        context: int,
        depth: int,
        window: int,
        history: int | str,
        hidden: int,
        base: float,
    ) -> None:
        super().__init__()
        if width % heads or width // heads % 2:
            raise ShapeError(f"width {width} must be {heads} heads of an even size")
        if depth < 2 or layers < depth or layers % depth:
            raise ShapeError(f"{layers} layers are no blocks of {depth}; a block has 2 or more, and there are 1 or more blocks")
        if window < 1 or (history != "auto" if isinstance(history, str) else history < 1):
            raise ShapeError(f"window {window} and history {history!r} must be 1 or more, or history 'auto'")
        self.vocabulary, self.width, self.context = vocabulary, width, context
        self.depth, self.window, self.history = depth, window, history
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, base) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("qkv.weight", "out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compressed(self, tokens: int) -> int:
        """How many rows stand for a context of so many tokens."""
        rows = self.history if isinstance(self.history, int) else max(8, 8 * int((12 * math.log(max(tokens, 1)) + 7) / 8))
        return min(tokens, rows)

    def forward(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocabulary"]:
        """See `LanguageModel.forward`."""
        return F.linear(self.encode(ids, caches=caches, attention_mask=attention_mask), self.embedding.weight)

    def encode(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """What the last layer says of each token, normed: all of `forward` but the logits."""
        caches = self.new_caches() if caches is None else caches
        caches.advance(ids, attention_mask)
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        x = self.embedding.weight.new_zeros(*ids.shape, self.width)
        for text, new, where in cast(Texts, caches.layers[0]).extend(ids, real, len(self.layers)):
            x = x.index_put(where, self.write(text, new).flatten(0, 1))
        return layer_norm(self.norm, x)

    def write(self, text: Text, new: Int[Tensor, "rows m"]) -> Float[Tensor, "rows m width"]:
        """What the last layer says of new tokens, which are read window by window."""
        outs = []
        while new.shape[1]:
            done = text.ids.shape[1]
            left = self.window - done % self.window
            if left == self.window:
                text.context, text.own = self.compress(text.ids), [None] * len(self.layers)
            x = self.embedding(new[:, :left])
            for at, layer in enumerate(cast(Iterable[Layer], self.layers)):
                q, k, v = layer.split(x, done)
                context, own = text.context[at], text.own[at]
                if own is not None:
                    k, v = torch.cat([own[0], k], 2), torch.cat([own[1], v], 2)
                text.own[at] = k, v
                read = layer.read(q, k, v, Causal())
                x = layer.join(x, read if context is None else read + layer.read(q, *context))
            outs.append(x)
            text.ids, new = torch.cat([text.ids, new[:, :left]], 1), new[:, left:]
        return torch.cat(outs, 1)

    def compress(self, ids: Int[Tensor, "rows n"]) -> list[KeyValue | None]:
        """Keys and values of a context, for each layer: of all tokens in the first of a block, of few rows in the others."""
        n = ids.shape[1]
        if not n:
            return [None] * len(self.layers)
        x, start = self.embedding(ids), n - self.compressed(n)
        made: list[KeyValue | None] = []
        for at in range(0, len(self.layers), self.depth):
            first, *middle, last = (cast(Layer, self.layers[at + i]) for i in range(self.depth))
            queries, k, v = first.split(x, 0)
            made.append((k, v))
            few = first.join(x[:, start:], first.read(queries[:, :, start:], k, v))
            for layer in middle:
                q, k, v = layer.split(few, start)
                made.append((k, v))
                few = layer.join(few, layer.read(q, k, v))
            _, k, v = last.split(few, start)
            made.append((k, v))
            if at + self.depth < len(self.layers):
                x = last.join(x, last.read(queries, k, v))
        return made

    def new_caches(self) -> Caches:
        """See `LanguageModel.new_caches`: one for all layers, since tokens are kept for the contexts of later windows."""
        return Caches([Texts()])


@named
def tlin_former(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    depth: int = 4,
    window: int = 256,
    history: int | str = 256,
    hidden: int | None = None,
    base: float = 10000.0,
) -> TlinDecoder:
    """A decoder that reads its window causally and what came before it through few rows, and in the first layer of a block in full.

    Args:
        depth: layers of a block; `layers` is a multiple. window: tokens until the context is compressed anew. history: rows that it
            is compressed to, or "auto". hidden: of the feed-forward layers, 8/3 of the width by default. base: of rotations.
    """
    hidden = default_hidden(width) if hidden is None else hidden
    options: dict[str, Any] = {"depth": depth, "window": window, "history": history, "hidden": hidden, "base": base}
    return TlinDecoder(vocabulary, width, layers, heads, context=context, **options)


def oracle(model: TlinDecoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a window at a time."""

    def norm(x: Tensor, by: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * by.weight + by.bias

    def split(x: Tensor, layer: Any, start: int) -> list[Tensor]:
        parts = _slow.heads_of(norm(x, layer.norm), layer.qkv, 3 * layer.heads).split(layer.heads, 1)
        return [_at(part, start) if at < 2 else part for at, part in enumerate(parts)]

    def read(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return _slow.attention_rows(q, k, v, _slow.causal(len(q)) if causal else torch.ones(len(q), len(k)))

    def join(x: Tensor, found: Tensor, layer: Any) -> Tensor:
        x = x + _slow.merged(found, layer.out)
        return x + _slow.gated_mlp(norm(x, layer.feed_norm), layer.feed_forward)

    def on(x: Tensor, layer: Any, start: int, keys: Tensor | None, values: Tensor | None) -> Tensor:
        q, k, v = split(x, layer, start)
        found = read(q, k, v, causal=True)
        return join(x, found if keys is None or values is None else found + read(q, keys, values), layer)

    rows = []
    for start in range(0, len(ids), model.window):
        before = model.embedding.weight[ids[:start]]
        x = model.embedding.weight[ids[start : start + model.window]]
        size = model.history if isinstance(model.history, int) else max(8, (math.floor(12 * math.log(start or 1)) + 7) // 8 * 8)
        cut = max(0, start - size)
        for at in range(0, len(model.layers), model.depth):
            block: Any = model.layers[at : at + model.depth]
            if not start:
                for layer in block:
                    x = on(x, layer, 0, None, None)
                continue
            queries, keys, values = split(before, block[0], 0)
            x = on(x, block[0], start, keys, values)
            few = join(before[cut:], read(queries[cut:], keys, values), block[0])
            for layer in block[1:-1]:
                q, keys, values = split(few, layer, cut)
                x = on(x, layer, start, keys, values)
                few = join(few, read(q, keys, values), layer)
            _, keys, values = split(few, block[-1], cut)
            x = on(x, block[-1], start, keys, values)
            before = join(before, read(queries, keys, values), block[-1])
        rows.append(norm(x, model.norm) @ model.embedding.weight.T)
    return torch.cat(rows)


def _at(x: Tensor, start: int) -> Tensor:
    """Heads (n, h, d) turned at places start, start + 1, ..."""
    return torch.stack([_slow.rotate(token, start + i, 10000.0) for i, token in enumerate(x)])


def examples() -> list[TlinDecoder]:
    """Settings that the conformance checks run."""
    made = [
        tlin_former(23, 32, 8, 4, context=64, window=8, history=5),
        tlin_former(23, 16, 4, 2, context=64, depth=2, window=3, history="auto", hidden=20),
        tlin_former(23, 16, 3, 2, context=64, depth=3, window=4, history=8),
    ]
    for model in made:
        for parameter in model.parameters():
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.3)
    return made


def kept(model: TlinDecoder, tokens: int) -> int:
    """All tokens; keys and values of the context in full in one layer of each block, of its few rows in others; of the window."""
    before = (tokens - 1) // model.window * model.window
    blocks, rest = len(model.layers) // model.depth, model.depth - 1
    numbers = before + rest * model.compressed(before) + model.depth * (tokens - before)
    return tokens + 2 * model.width * blocks * numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> TlinDecoder:
    """Blocks of 4 layers, or of as many as fit, and windows and contexts of a quarter of the text, as 256 of 1024 in the paper."""
    depth = next((depth for depth in (4, 3, 2) if layers % depth == 0), layers)
    quarter = max(1, tokens // 4)
    return tlin_former(
        vocabulary, width, layers, heads, **{"context": tokens, "depth": depth, "window": quarter, "history": quarter, **options}
    )


def _read_by(model: TlinDecoder, ids: Tensor, caches: Caches | None = None) -> int:
    """How many pairs of a query and a key are scored."""
    counts: list[int] = []

    def count(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        counts.append(given[0].shape[2] * given[1].shape[2])

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, Read)]
    model(ids, caches=caches)
    for hook in hooks:
        hook.remove()
    return sum(counts)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    model = examples()[0].double()
    ids = torch.randperm(23)[None]
    x = model.embedding(ids[:, :8])
    for layer in cast(Any, model.layers):
        q, k, v = layer.split(x, 0)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layer.out(read.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.feed_norm(x))
    yield (
        "no more than a window is an ordinary causal transformer",
        largest(model(ids[:, :8]) - model.norm(x) @ model.embedding.weight.T),
    )

    reach = torch.zeros(23, 23)
    with torch.enable_grad():
        out = model.encode(ids)[0]
        for i in range(23):
            grad = torch.autograd.grad(out[i, 0], model.embedding.weight, retain_graph=True)[0]
            reach[i] = grad[ids[0]].abs().amax(-1)
    yield "gradients of a token reach none later", largest(reach.triu(1))
    yield "and every earlier one, however far", float((reach < 1e-9).tril().any())

    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 23
    by = (model(other) - model(ids))[0].abs().amax(-1)
    yield (
        "a token changes nothing before it, and all after, beyond the context's last rows",
        float(by[:2].max()) + float(by[2:].min() < 1e-6),
    )
    caches, pieces = model.new_caches(), []
    for piece in ids.split(1, 1):
        pieces.append(model(piece, caches=caches))
    yield "decoding with what is kept is the whole pass", largest(torch.cat(pieces, 1) - model(ids))

    few, own, hidden, blocks = 5, 8, 2, 2

    def paper(n: int) -> int:
        """Scores of one window of a text of n tokens, the window included, less what restores the last block's context."""
        each = n * (2 * few + own) + hidden * (few**2 + own**2 + own * few) + own**2 - own * few
        return blocks * each - (n - own) * few

    ids = torch.randint(0, 23, (1, 64))
    caches = model.new_caches()
    first = _read_by(model, ids[:, :8], caches)
    told = [paper(8 * window) - _read_by(model, ids[:, 8 * (window - 1) : 8 * window], caches) for window in range(2, 9)]
    yield "one window costs what the paper says, linear in its context", float(max(abs(off) for off in told) + abs(first - 8 * 64))
    whole = 8 * 64 + sum(paper(8 * window) for window in range(2, 9))
    yield "a whole text costs the sum of its windows', which grows with its square", float(abs(_read_by(model, ids) - whole))
    caches = model.new_caches()
    model(ids[:, :33], caches=caches)
    token = _read_by(model, ids[:, :1], caches)
    yield "within a window, a token reads the context in one layer of a block", float(abs(token - 2 * (32 + 3 * few + 4 * 2)))
    sizes = [kept(model, 8 * k + 1) - (8 * k + 1) for k in (2**10, 2**11)]
    full = 2 * 32 * 8 * 8 * 2**10
    yield "what is kept grows with the text, at a quarter of full attention's", abs((sizes[1] - sizes[0]) / full - 1 / 4)
    grows = [kept(model, tokens + 1) - kept(model, tokens) for tokens in range(2 * 8 + 1, 3 * 8)]
    yield "and in a window by its own tokens alone", float(max(abs(grown - 1 - 2 * 32 * 8) for grown in grows))
    automatic = examples()[1]
    sizes = [automatic.compressed(n) for n in (3, 9, 1024, 10**6)]
    yield "`auto` is 12 log n, rounded up to eights", float(sizes != [3, 9, 88, 168])
    with torch.device("meta"):
        model, plain = (tlin_former(100, 48, 8, 4, window=window) for window in (4, 10**6))
    yield "windows have no parameters", float(abs(model.parameter_count - plain.parameter_count))
