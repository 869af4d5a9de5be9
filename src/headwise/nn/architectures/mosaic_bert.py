"""MosaicBERT: an encoder with symmetric ALiBi and gated feed-forward layers that spends nothing on padding outside attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...attention import attend
from ...card import Card
from ...errors import InputError, ShapeError
from ...mechanisms._mixer import largest
from ...stages.alibi import Alibi
from ..build import named
from ..model import Caches, LanguageModel

CARD = Card(
    paper="MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining",
    year=2023,
    room="softmax",
    source=(
        "arXiv:2312.17482, sec. 2, and the authors' code: norms after each layer, -slope |i - j| on scores, GELU of the first half "
        "of the gated layer times its second, biases but in the gated layer's input, no table of positions, BERT's head. Padding "
        "is left out rather than given a score of -10000. Their norms in low precision are a matter of autocast"
    ),
)
EPSILON = 1e-12


class Layer(nn.Module):
    """Self-attention and a gated feed-forward layer, each followed by a norm of its sum with its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.gated = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width)
        self.feed_norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, x: Float[Tensor, "tokens width"], packing: Packing, bias: Alibi) -> Float[Tensor, "tokens width"]:
        """Of the tokens of all texts in one row after another; only attention sees them text by text."""
        qkv = packing.spread(self.qkv(x))  # (b, n, 3 width)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = attend(q, k, v, bias, query_positions=packing.places, key_positions=packing.places)
        x = self.norm(self.out(packing.gather(read.transpose(1, 2).flatten(2))) + x)
        gate, up = self.gated(x).chunk(2, -1)
        made: Tensor = self.feed_norm(self.down(F.gelu(gate) * up) + x)
        return made


class Packing:
    """Where the tokens of a padded batch are, so that they can be taken out of it and put back."""

    def __init__(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        self.shape = ids.shape
        self.places: Tensor | None = None  # (b, n), -1 at padding
        self.where: Tensor | None = None
        if attention_mask is not None:
            there = attention_mask.bool()
            self.places = torch.where(there, there.cumsum(1) - 1, -1)
            self.where = there.flatten().nonzero().flatten()

    def gather(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "tokens width"]:
        """The tokens without padding."""
        flat = x.flatten(0, 1)
        return flat if self.where is None else flat[self.where]

    def spread(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "b n width"]:
        """Tokens in their places, zeros at padding."""
        if self.where is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[-1]).index_copy(0, self.where, x)
        return x.unflatten(0, self.shape)


class MosaicEncoder(LanguageModel):
    """The encoder with the head of a masked language model: logits of what stands at each token.

    Args:
        hidden: of the gated layers; four times the width by default. types: of tokens, such as a first and a second sentence.
    """

    causal = False

    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, *, context: int = 512, hidden: int | None = None, types: int = 2
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.vocabulary, self.width, self.context = vocabulary, width, context
        self.embedding = nn.Embedding(vocabulary, width)
        self.types = nn.Embedding(types, width)
        self.embedding_norm = nn.LayerNorm(width, eps=EPSILON)
        self.layers = nn.ModuleList(Layer(width, heads, 4 * width if hidden is None else hidden) for _ in range(layers))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=EPSILON)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.slopes: Tensor
        self.register_buffer("slopes", Alibi.geometric(heads).slopes, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        caches: Caches | None = None,
        attention_mask: Bool[Tensor, "b n"] | None = None,
        types: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n vocabulary"]:
        """See `LanguageModel.forward`. types: of each token; 0 by default. Logits at padding are those of a row of zeros.

        Raises: InputError with caches, for it reads both sides.
        """
        if caches is not None and caches.layers:
            raise InputError("an encoder reads both sides, so it keeps no cache; give the whole text")
        packing = Packing(ids, attention_mask)
        x = self.embedding(ids) + self.types(torch.zeros_like(ids) if types is None else types)
        x = self.embedding_norm(packing.gather(x))
        bias = Alibi(self.slopes)
        for layer in self.layers:
            x = layer(x, packing, bias)
        x = self.transform_norm(F.gelu(self.transform(x)))
        return packing.spread(F.linear(x, self.embedding.weight, self.bias))

    def new_caches(self) -> Caches:
        """None to keep."""
        return Caches([])


@named
def mosaic_bert(vocabulary: int, width: int, layers: int, heads: int, *, context: int = 512, **options: Any) -> MosaicEncoder:
    """A bidirectional encoder: symmetric ALiBi, gated feed-forward layers, and no work on padding outside attention.

    options: hidden, types; see `MosaicEncoder`.
    """
    return MosaicEncoder(vocabulary, width, layers, heads, context=context, **options)


def oracle(model: MosaicEncoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary)."""

    def norm(x: Tensor, by: Any) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * by.weight + by.bias

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def linear(x: Tensor, by: Any) -> Tensor:
        return x @ by.weight.T + (0 if by.bias is None else by.bias)

    x = norm(model.embedding.weight[ids] + model.types.weight[0], model.embedding_norm)
    n = len(ids)
    for layer in model.layers:
        heads: Any = layer.heads
        q, k, v = linear(x, layer.qkv).view(n, 3, heads, -1).unbind(1)
        slopes = _slopes(heads)
        rows = []
        for i in range(n):
            read = []
            for head in range(heads):
                scores = torch.stack([q[i, head] @ k[j, head] / q.shape[-1] ** 0.5 - slopes[head] * abs(i - j) for j in range(n)])
                read.append(torch.softmax(scores, 0) @ v[:, head])
            rows.append(torch.cat(read))
        x = norm(linear(torch.stack(rows), layer.out) + x, layer.norm)
        half = x @ layer.gated.weight.T  # type: ignore[union-attr, operator]
        inner = half.shape[-1] // 2
        x = norm(linear(gelu(half[:, :inner]) * half[:, inner:], layer.down) + x, layer.feed_norm)
    return norm(gelu(linear(x, model.transform)), model.transform_norm) @ model.embedding.weight.T + model.bias


def _slopes(heads: int) -> list[float]:
    """2^(-8 i / h); if h is no power of two, those of the power below, then every second one of twice that power."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return first + [2.0 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: heads - power]


def examples() -> list[MosaicEncoder]:
    """Settings that the conformance checks run."""
    made = [mosaic_bert(23, 32, 2, 4, context=64), mosaic_bert(23, 30, 2, 6, context=64, hidden=20, types=1)]
    for model in made:
        for parameter in model.parameters():
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.3)
    return made


def kept(model: MosaicEncoder, tokens: int) -> int:
    """An encoder keeps nothing."""
    return 0


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> MosaicEncoder:
    """Gated layers of four times the width, as in the paper."""
    return mosaic_bert(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    model = mosaic_bert(23, 32, 2, 4).double().eval()
    ids = torch.randint(0, 23, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, :4] = False
    whole = model(ids, attention_mask=mask)
    yield (
        "padding on the right, and on the left, changes nothing",
        max(largest(whole[1, :5] - model(ids[1:2, :5])[0]), largest(whole[2, 4:] - model(ids[2:, 4:])[0])),
    )
    rows: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _m, inputs, _out: rows.append(inputs[0].shape[:-1].numel()))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    yield "linear layers see tokens and no padding", float(max(rows) - int(mask.sum()) + min(rows) - int(mask.sum()))
    packing = Packing(ids, mask)
    x = torch.randn(3, 12, 4).double()
    yield "taken out and put back, padding is zero", largest(packing.spread(packing.gather(x)) - x * mask[..., None])
    backwards = model(ids.flip(1)).flip(1)
    yield "a text backwards gives the same backwards: places count by distance alone", largest(backwards - model(ids))
    with torch.no_grad():
        model.slopes.zero_()  # type: ignore[operator, union-attr]
    order = torch.randperm(12)
    yield "without slopes the order of tokens does not matter", largest(model(ids[:, order]) - model(ids)[:, order])
    slopes = torch.tensor(_slopes(12)) - Alibi.geometric(12).slopes
    yield "slopes of 12 heads, in float32", float(largest(slopes) > 1e-7)
    with torch.device("meta"):
        gated = mosaic_bert(30528, 768, 12, 12)
    plain = 30528 * 768 + 12 * (4 * 768 * 769 + 768 * 3072 * 2 + 3072 + 768 + 4 * 768) + 768 * 769 + 30528 + 2 * 768 * 3
    # BERT's layers of the same widths; the gated ones have a third matrix of width x hidden, and no bias at their input
    more = gated.parameter_count - plain
    yield "the gate costs 12 x 768 x 3072 parameters more than BERT's layers", float(abs(more - 12 * (768 * 3072 - 3072)))
