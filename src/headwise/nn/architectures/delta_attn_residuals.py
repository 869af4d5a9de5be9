"""Delta attention residuals: each layer's input adds what it chooses among the outputs of earlier layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError, UnsupportedModelError
from ...mechanisms._mixer import Tokens, largest
from ..build import named
from ..model import LanguageModel
from ..residual import Residual, Stream
from ..transformer import Transformer
from . import _slow

CARD = Card(
    paper="Delta Attention Residuals",
    year=2026,
    room="heads",
    source=(
        "arXiv:2605.18855 and the authors' code: h = p + sum_i softmax_i(w . RMSNorm(v_i)) v_i before each layer, p the plain sum, "
        "v_i the embedding and earlier layers' outputs. Queries w begin at zero, as their text says; the class in their code "
        "leaves them to the library's initialisation. In blocks of layers a source is what a block has added; their code takes "
        "every second one from another start, which is mended here. `sources='states'` is Attention Residuals, arXiv:2603.15031, "
        "layer by layer: h = sum_i softmax_i(w . RMSNorm(s_i)) s_i over the states themselves"
    ),
)


class Routing(Residual):
    """Softmax routing over what earlier layers made, one query and one norm for each mixer and feed-forward layer.

    Args:
        layers: mixers and feed-forward layers together. blocks: None for a source of each; else the number of transformer blocks
            (a mixer and a feed-forward layer) whose outputs are summed into one source. sources: "deltas" or "states".
        null: a further source, zero at first, that may be chosen instead.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        blocks: int | None = None,
        sources: str = "deltas",
        null: bool = False,
        epsilon: float = 1e-6,
    ) -> None:
        super().__init__()
        if sources not in ("deltas", "states"):
            raise ShapeError(f"sources {sources!r} must be 'deltas' or 'states'")
        if sources == "states" and (blocks is not None or null):
            raise ShapeError("routing over states has neither blocks nor a null source; take sources='deltas'")
        if blocks is not None and blocks < 1:
            raise ShapeError(f"blocks of {blocks} layers; at least 1, or None for a source of every layer")
        self.blocks, self.sources, self.epsilon = blocks, sources, epsilon
        choosing = range(1, layers)  # the first has nothing to choose from
        self.query = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(width)) for layer in choosing})
        self.gain = nn.ParameterDict({str(layer): nn.Parameter(torch.ones(width)) for layer in choosing})
        self.null = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(width)) for layer in range(layers)} if null else {})
        self.weights: list[Tensor] | None = None  # kept while `routing_weights` looks

    def forward(self, x: Tokens) -> Stream:
        """See `Residual.forward`."""
        return _Routed(self, x)

    def choose(self, layer: int, sources: list[Tensor]) -> Tensor | None:
        """(b, n, width): the weighted sum of sources; None where there is nothing to choose from."""
        name = str(layer)
        if name in self.null:
            sources = [self.null[name].expand_as(sources[0]) if sources else self.null[name], *sources]
        if name not in self.query:
            return sources[0] if name in self.null else None
        wanted = self.query[name] * self.gain[name]
        wide = torch.promote_types(wanted.dtype, torch.float32)
        scores = []
        for source in sources:
            size = torch.rsqrt(source.to(wide).square().mean(-1) + self.epsilon)
            scores.append((source @ wanted.to(source.dtype)).to(wide) * size)
        weights = torch.stack(torch.broadcast_tensors(*scores)).softmax(0)
        if self.weights is not None:
            self.weights.append(weights.detach())
        chosen = sources[0] * weights[0, ..., None].to(sources[0].dtype)
        for weight, source in zip(weights[1:], sources[1:], strict=True):
            chosen = chosen + source * weight[..., None].to(source.dtype)
        return chosen


class _Routed(Stream):
    """p, the sources so far, and where the block began that is not yet one of them."""

    def __init__(self, routing: Routing, x: Tensor) -> None:
        self.routing, self.out = routing, x
        self.start: Tensor | None = None
        self.sources: list[Tensor] = [x] if routing.sources == "states" else []

    def read(self, layer: int) -> Tensor:
        of = self.routing
        chosen = of.choose(layer, self.sources)
        if of.sources == "states":
            return self.out if chosen is None else chosen
        if of.blocks is None:
            if not layer:
                self.sources.append(self.out)
        elif layer % (2 * of.blocks) == 0:  # a block has ended; it is a source from the next layer on
            self.sources.append(self.out if self.start is None else self.out - self.start)
            self.start = self.out
        return self.out if chosen is None else self.out + chosen

    def add(self, out: Tensor) -> None:
        self.out = self.out + out
        if self.routing.sources == "states":
            self.sources.append(self.out)
        elif self.routing.blocks is None:
            self.sources.append(out)


@named
def delta_attn_residuals(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    blocks: int | None = None,
    sources: str = "deltas",
    null: bool = False,
    **options: Any,
) -> Transformer:
    """A decoder whose layers add, to the plain sum that they read, a softmax choice among what earlier layers have made.

    2 width parameters for each mixer and feed-forward layer but the first. At the start it is a plain decoder: the choice is
    then the mean of what sums up to p, so that p grows by a factor, which the next norm takes out (not within blocks of layers).

    Args:
        blocks: how many sources the depth is divided into, each the sum of ceil(layers / blocks) layers; None: one a layer.
        sources: "deltas", or "states" for Attention Residuals, which chooses among states instead of adding to them.
        null: a source that begins at zero. options: as for `Transformer`.

    Raises: ShapeError for settings that do not go together.
    """
    model = Transformer(vocabulary, width, layers, heads, context=context, **options)
    depth = len(model.order)
    per_block = None if blocks is None else -(-depth // blocks)
    if any(block.feed_forward is None for _, block in model.layers()):
        raise ShapeError("every block needs a feed-forward layer here: sources alternate between mixers and those")
    model.residual = Routing(width, 2 * depth, blocks=per_block, sources=sources, null=null)
    return model


def convert(model: LanguageModel, *, null: bool = False) -> Transformer:
    """A plain decoder with routing over all layers' outputs, at which it still gives the same (up to the norms' epsilon).

    Raises: UnsupportedModelError for a model that is no plain `Transformer`.
    """
    if not isinstance(model, Transformer) or model.config.get("architecture") != "transformer":
        raise UnsupportedModelError(f"{type(model).__name__} {model.config.get('architecture')!r} is no plain Transformer")
    made = copy.deepcopy(model)
    made.residual = Routing(model.width, 2 * len(model.order), null=null).to(next(model.parameters()))
    told = {name: value for name, value in model.config.items() if name not in ("architecture", "follows")}
    made.config = {"architecture": "delta_attn_residuals", **told, "null": null}
    return made


def routing_weights(model: Transformer, ids: Tensor) -> list[Tensor]:
    """(sources, b, n) for each layer that chooses: how much of each source it takes, in the order in which they run."""
    routing = model.residual
    if not isinstance(routing, Routing):
        raise UnsupportedModelError(f"a residual stream of {type(routing).__name__} does not choose; build delta_attn_residuals")
    routing.weights = []
    try:
        with torch.no_grad():
            model.encode(ids)
        return routing.weights
    finally:
        routing.weights = None


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time."""
    routing = model.residual
    assert isinstance(routing, Routing)
    per_block, made, total = routing.blocks, [model.embedding.weight[ids]], 2 * len(model.order)

    def choice(layer: int, sources: list[Tensor]) -> Tensor:
        rows = []
        for token in range(len(ids)):
            values = [source[token] for source in sources]
            keys = [_slow.rms_norm(v, routing.gain[str(layer)], routing.epsilon) for v in values]
            e = [torch.exp(key @ routing.query[str(layer)]) for key in keys]
            rows.append(sum((a * v for a, v in zip(e, values, strict=True)), torch.zeros_like(values[0])) / sum(e))
        return torch.stack(rows)

    for layer in range(total):
        # what each source holds, from the list of all that was made so far
        p = torch.stack(made).sum(0)
        if routing.sources == "states":
            sources = [torch.stack(made[: end + 1]).sum(0) for end in range(len(made))]
        elif per_block is None:
            sources = list(made) if layer else []
        else:
            # blocks that have ended: the embedding, then what each added; the newest from the layer after its end on
            ended = (max(layer - 1, 0)) // (2 * per_block) + 1 if layer else 0
            parts = [made[:1]] + [made[1:][2 * per_block * b : 2 * per_block * (b + 1)] for b in range(len(made))]
            sources = [torch.stack(part).sum(0) for part in parts[:ended]]
        if str(layer) in routing.null:
            sources = [routing.null[str(layer)].expand_as(p), *sources]
        if str(layer) not in routing.query:
            x = p + sources[0] if str(layer) in routing.null else p
        else:
            x = choice(layer, sources) if routing.sources == "states" else p + choice(layer, sources)
        block: Any = model.blocks[model.order[layer // 2]]
        if layer % 2 == 0:
            at = model.order[layer // 2]
            made.append(_slow.attention(model, at, _slow.normed(x, block.norm), _slow.base_of(block.mixer)))
        else:
            made.append(_slow.gated_mlp(_slow.normed(x, block.feed_norm), block.feed_forward))
    x = torch.stack(made).sum(0)
    return _slow.normed(x, model.norm) @ (model.embedding if model.head is None else model.head).weight.T


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        delta_attn_residuals(23, 32, 3, 4, context=64),
        delta_attn_residuals(23, 32, 5, 4, context=64, blocks=3, null=True),
        delta_attn_residuals(23, 32, 3, 4, context=64, sources="states", windows=9),
    ]
    for model in made:
        for parameter in model.residual.parameters():
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.5)
    return made


def kept(model: Transformer, tokens: int) -> int:
    """Numbers that the caches hold: keys and values of all layers, as without routing, which is a matter of one token."""
    return sum(2 * model.width * _slow.slots(model, at, tokens) for at in model.order)


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """A source of every layer."""
    return delta_attn_residuals(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    plain = Transformer(23, 32, 3, 4, epsilon=0.0).double()
    for null in (False, True):
        made = convert(plain, null=null)
        yield f"at the start it is the plain decoder{' with a null source too' * null}", largest(made(ids) - plain(ids))
    routed = delta_attn_residuals(23, 32, 3, 4).double()
    yield (
        "4 width parameters a layer, less those of the first",
        float(abs(routed.parameter_count - plain.parameter_count - 2 * 32 * (2 * 3 - 1))),
    )
    routing = routed.residual
    assert isinstance(routing, Routing)
    x, outs = torch.randn(1, 4, 32).double(), torch.randn(4, 1, 4, 32).double()
    stream = _Routed(routing, x)
    for layer, out in enumerate(outs):
        stream.read(layer)
        stream.add(out)
        yield f"sources after layer {layer} sum up to the plain stream", largest(torch.stack(stream.sources).sum(0) - stream.out)
    with torch.no_grad():
        routing.query["4"].copy_(1e6 * outs[3, 0, 0])
    chosen = stream.read(4) - stream.out
    yield "a query along one source, far longer, doubles that source", largest(chosen[0, 0] - outs[3, 0, 0])
    weights = routing_weights(convert(plain), ids)
    yield "queries of zero choose evenly", max(largest(w - 1 / len(w)) for w in weights)
    yield "the k-th layer chooses among k sources", float(sum(abs(len(w) - k) for k, w in enumerate(weights, 2)))
    blocks = delta_attn_residuals(23, 32, 6, 4, blocks=3).double()
    counts = [len(w) for w in routing_weights(blocks, ids)]
    yield "of six layers in three blocks, the last chooses among the embedding and two of them", float(abs(counts[-1] - 3))
