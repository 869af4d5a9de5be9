"""EL-attention: multi-head attention that keeps hidden states, and makes no keys and values of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Output, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.offset import Offset
from ...stages.sink_logit import SinkLogit
from ...stages.softcap import Softcap
from ...stages.window import Window
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Positions, Projections, Real, Tokens, largest

CARD = Card(
    paper="EL-Attention: Memory Efficient Lossless Attention for Generation",
    year=2021,
    room="cache",
    source=(
        "arXiv:2105.04779, abstract, and the authors' code (fastseq, for fairseq): a head's query goes through its map to keys, "
        "reads hidden states, and what it has read goes through its map to values. The code does so in cross-attention only, "
        "where all layers and beams share the encoder's states; here in self-attention too, whose cache then holds one vector "
        "of the width for each token. The code keeps the key bias; here it is left out where softmax does not see it. Dropout "
        "of weights, with which biases of values would no longer count once, is not built"
    ),
)
Q, K, V, OUT = ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o_proj", "out", "o")


class Memory:
    """Hidden states that are read as keys and values by all layers, heads and beams: held once.

    y: (b, m, width), one for each sentence. real: (b, m), False at padding; None for none.
    """

    def __init__(self, y: Float[Tensor, "b m width"], real: Bool[Tensor, "b m"] | None = None) -> None:
        if real is not None and real.shape != y.shape[:2]:
            raise ShapeError(f"the mask of hidden states is {tuple(real.shape)}, they are (batch, tokens) = {tuple(y.shape[:2])}")
        self.y, self.real = y, None if real is None else real.bool()

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return self.y.numel() * self.y.element_size()


class States(KeyValues):
    """The hidden states of all tokens, as keys of one head; what is read of them are themselves."""

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.k,)


class ElAttention(Mixer):
    """softmax((q_h W_K^T) y^T / sqrt(d)) y W_V + b_V for each head: multi-head attention, by its numbers, on hidden states y.

    Keeps `width` numbers a token, where keys and values are 2 kv_heads head_dim: half as many where each head has its own.
    Reads cost width / head_dim times more. The maps to keys and values are the `projections` of the attention it is made of.

    Args:
        heads, kv_heads, head_dim, bias: as for `Attention`. memory_width: of the states that `cross` reads, if another one.
        scale: of scores, default head_dim^-0.5.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        memory_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.projections = p = Projections(width, heads, kv_heads, head_dim, bias)
        self.scale = p.head_dim**-0.5 if scale is None else scale
        if memory_width is not None:
            p.v = nn.Linear(memory_width, p.kv_heads * p.head_dim, bias=bias)
        # a bias of keys adds the same to all scores of a row: softmax does not see it, so it would have no gradient
        p.k = nn.Linear(p.v.in_features, p.kv_heads * p.head_dim, bias=False)

    @staticmethod
    def of(module: nn.Module, *, scale: float | None = None) -> ElAttention:
        """A trained attention that keeps hidden states; it shares the weights.

        module: an `Attention`, or any module of linear maps q_proj, k_proj, v_proj, out_proj (or q, k, v, o) and a number of heads.
        scale: of its scores; its own `scaling`, or head_dim^-0.5.

        Raises: ShapeError if its keys are more than a linear map of hidden states: rotated or normed; or if there are no such maps.
        """
        _require_plain_keys(module)
        holder = module.projections if isinstance(module, Attention) else module
        q, k, v, out = (_linear(holder, names) for names in (Q, K, V, OUT))
        told = (getattr(holder, name, None) for name in ("heads", "num_heads", "n_heads", "num_attention_heads"))
        heads = next((number for number in told if isinstance(number, int)), None)
        if heads is None or q.out_features % heads:
            raise ShapeError(f"{type(module).__name__} does not tell its number of heads, or {heads} do not divide its queries")
        size = q.out_features // heads
        scale = getattr(module, "scaling", None) if scale is None else scale
        made = ElAttention(
            q.in_features, heads, kv_heads=k.out_features // size, head_dim=size, memory_width=k.in_features, scale=scale
        )
        p = made.projections
        p.q, p.k, p.v, p.out = q, k, v, out
        return made.train(module.training)

    def forward(self, x: Tokens, *stages: Stage, cache: States | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        q = self._queries(x)
        cache = self.new_cache() if cache is None else cache
        seen = cache.extend(q, x[:, None], x.new_empty(len(x), 1, x.shape[1], 0), attention_mask)
        return self._read(q, seen.k, x, stages, seen.places)

    def cross(self, x: Tokens, memory: Memory) -> Tokens:
        """Cross-attention on hidden states that are held once.

        x: (b * beams, n, width), the beams of a sentence one after another, all of which read its states (b, m, memory width). The
        expanded queries of all heads and beams of a sentence are one matrix against them.

        Raises: ShapeError if the rows are no multiple of the sentences.
        """
        b, m, width = memory.y.shape
        if len(x) % b or width != self.projections.k.in_features:
            raise ShapeError(
                f"queries {tuple(x.shape)} do not fit hidden states {tuple(memory.y.shape)}: rows are a multiple of the sentences, "
                f"and states are read that are {self.projections.k.in_features} wide"
            )
        beams, n = len(x) // b, x.shape[1]
        q = self._queries(x).unflatten(0, (b, beams)).transpose(1, 2).flatten(2, 3)  # (b, h, beams * n, d)
        at = None if memory.real is None else torch.arange(m, device=x.device).where(memory.real, -1)
        places: Positions = {"query_positions": torch.full((beams * n,), m, device=x.device), "key_positions": at}
        made = self._read(q, memory.y[:, None], None, (), places)
        return made.view(len(x), n, -1)

    def _queries(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        p = self.projections
        q: Tensor = p.q(x).unflatten(-1, (p.heads, p.head_dim)).transpose(1, 2)
        return q

    def _read(
        self,
        q: Float[Tensor, "b h n d"],
        y: Float[Tensor, "b 1 m c"],
        own: Tokens | None,
        stages: Sequence[Stage],
        places: Positions,
    ) -> Tokens:  # fmt: skip
        """What all heads read of states y, mapped back. own: (b, n, c) the queries' own states, if they are among y."""
        p = self.projections
        to_keys, to_values = (f.weight.unflatten(0, (p.kv_heads, p.head_dim)) for f in (p.k, p.v))
        grouped = q.unflatten(1, (p.kv_heads, -1))  # (b, hk, g, n, d)
        expanded = (grouped @ to_keys[:, None]).flatten(1, 2)
        values = y
        column = (p.k.bias is not None or p.v.bias is not None) and not _sums_to_one(stages, places)
        if column:  # one channel more, of ones: scores of the key bias, and what weights sum to
            of_keys = p.k.weight.new_zeros(p.k.out_features) if p.k.bias is None else p.k.bias
            with_bias = grouped @ of_keys.view(p.kv_heads, 1, p.head_dim, 1)
            expanded = torch.cat([expanded, with_bias.flatten(1, 2)], -1)
            values = torch.cat([y, torch.ones_like(y[..., :1])], -1)
        last = [stage for stage in stages if isinstance(stage, Output)]
        rest = [stage for stage in stages if not isinstance(stage, Output)]
        read = attend(expanded, values, values, *rest, scale=self.scale, **places)
        width = y.shape[-1]
        out = (read[..., :width].unflatten(1, (p.kv_heads, -1)) @ to_values.mT[:, None]).flatten(1, 2)
        if p.v.bias is not None:
            bias = p.v.bias.unflatten(0, (p.kv_heads, 1, p.head_dim)).repeat_interleave(p.heads // p.kv_heads, 0)
            out = out + (read[..., width:] * bias if column else bias)
        if last:
            mine = None if own is None else p.v(own).unflatten(-1, (p.kv_heads, -1)).transpose(1, 2)
            mine = None if mine is None else mine.repeat_interleave(p.heads // p.kv_heads, 1)
            for stage in last:
                out = stage.output(out, mine)
        return p.merge(out)

    def new_cache(self, owner: Cache | None = None) -> States:
        """An empty cache for decoding."""
        return States()


def _sums_to_one(stages: Sequence[Stage], places: Positions) -> bool:
    """Whether all rows surely are softmax and sum to one: then biases of keys do nothing, and those of values count once."""
    return places.get("key_positions") is None and all(isinstance(stage, Causal | Window | Output) for stage in stages)


def _linear(holder: nn.Module, names: Sequence[str]) -> nn.Linear:
    found = next((part for name in names if isinstance(part := getattr(holder, name, None), nn.Linear)), None)
    if found is None:
        raise ShapeError(f"{type(holder).__name__} has no linear map named {' or '.join(names)}; give an attention of such maps")
    return found


def _require_plain_keys(module: nn.Module) -> None:
    """Raises: ShapeError if keys are not a linear map of hidden states and nothing else."""
    if isinstance(module, Attention) and module.mechanism is not None:
        raise ShapeError("only plain attention can read hidden states; this one has a mechanism of its own")
    turned = "cos" in (names := inspect.signature(module.forward).parameters) or "position_embeddings" in names
    if turned or any(getattr(module, name, None) is not None for name in ("rotary", "rotary_emb", "rotary_fn")):
        raise ShapeError(
            f"{type(module).__name__} rotates its keys by their places, so no query can be carried through its map to keys; "
            "EL-attention is for absolute or relative positions"
        )
    normed = [name for name, _ in module.named_children() if "norm" in name]
    if normed:
        raise ShapeError(f"{type(module).__name__} norms queries or keys ({', '.join(normed)}), which is no linear map of states")


class FromStates(nn.Module):
    """Stands in for a cross-attention of transformers' BART family: reads the encoder's states, and keeps no keys and values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.attention = ElAttention.of(module)

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, cache: Any = None,
        attention_mask: Tensor | None = None, **others: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """(b, n, width), and no weights. attention_mask: (b, 1, n, m), booleans or what is added to scores."""
        if key_value_states is None:
            raise ShapeError("cross-attention reads the encoder's states, and none were given")
        real = None
        if attention_mask is not None:
            row = attention_mask[:, 0, 0]
            real = (row if row.dtype == torch.bool else row >= 0).expand(len(key_value_states), -1)
        return self.attention.cross(hidden_states, Memory(key_value_states, real)), None


@contextmanager
def encoder_states_only(model: nn.Module) -> Iterator[list[str]]:
    """All cross-attentions named `encoder_attn` (BART, mBART, Marian, Pegasus, Whisper, ...) read the encoder's states meanwhile.

    Their layers then share the states, and the cache of `generate` has no cross-attention part. Yields the names of the layers.

    Raises: ShapeError if there is none, or one can't be carried over; nothing is changed then.
    """
    found = {name: part for name, part in model.named_modules() if name.rpartition(".")[2] == "encoder_attn"}
    if not found:
        raise ShapeError(f"{type(model).__name__} has no cross-attention named encoder_attn; give an encoder-decoder as BART is")
    stand_ins = {name: FromStates(part) for name, part in found.items()}
    try:
        for name, part in stand_ins.items():
            model.set_submodule(name, part.train(found[name].training))
        yield list(found)
    finally:
        for name, part in found.items():
            model.set_submodule(name, part)


def oracle(mixer: ElAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): multi-head attention, a query of a head at a time, with keys and values as they are usually made."""
    p, rows = mixer.projections, []
    d, group = p.head_dim, p.heads // p.kv_heads
    for i in range(len(x)):
        seen = visible[i].nonzero().flatten()
        heads = []
        for head in range(p.heads):
            at, kv = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            q = p.q.weight[at] @ x[i] + (0 if p.q.bias is None else p.q.bias[at])
            k = x[seen] @ p.k.weight[kv].T + (0 if p.k.bias is None else p.k.bias[kv])
            v = x[seen] @ p.v.weight[kv].T + (0 if p.v.bias is None else p.v.bias[kv])
            e = torch.exp(mixer.scale * (k @ q))
            heads.append((e / e.sum()) @ v)
        rows.append(p.out.weight @ torch.cat(heads) + (0 if p.out.bias is None else p.out.bias))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[ElAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        ElAttention(width, heads),
        ElAttention(width, heads, kv_heads=heads // 2, bias=True),
        ElAttention(width, heads, head_dim=6, bias=True),
    ]


def neutral(heads: int, size: int) -> list[ElAttention]:
    """All settings are plain attention, which is the paper's claim."""
    return examples(heads, size)


def sized(heads: int, size: int, tokens: int, **options: Any) -> ElAttention:
    """Each head has keys and values of its own, which then are not kept."""
    return ElAttention(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :4] = False
    plain = Attention(32, 4, kv_heads=2, bias=True).double()
    for parameter in plain.parameters():
        parameter.data.add_(0.3)
    made = ElAttention.of(plain)
    yield (
        "it is the attention it came from, with biases of queries, keys, values and the output",
        largest(made(x, Causal(), attention_mask=real) - plain(x, Causal(), attention_mask=real)),
    )
    cap, sink = Softcap(1.5), SinkLogit(torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64))
    for words, stages in (
        ("also where scores are capped, which sees the key bias", (Causal(), cap)),
        ("also where weights do not sum to one", (Causal(), sink)),
        ("also where heads are given more", (Causal(), Offset(torch.randn(4, 8, dtype=torch.float64)))),
    ):
        yield words, largest(made(x, *stages) - plain(x, *stages))
    before = made(x, Causal())
    plain.projections.k.bias.data.normal_()
    yield "a bias of keys changes nothing", largest(ElAttention.of(plain)(x, Causal()) - before)

    y = torch.randn(2, 9, 32, dtype=torch.float64)
    there = torch.ones(2, 9, dtype=torch.bool)
    there[1, 6:] = False
    beams = x.repeat_interleave(3, 0) + torch.randn(6, 11, 32, dtype=torch.float64)
    once, repeated = Memory(y, there), Memory(y.repeat_interleave(3, 0), there.repeat_interleave(3, 0))
    yield "beams read states that are held once as they read copies", largest(made.cross(beams, once) - made.cross(beams, repeated))
    own = Attention(32, 4).double()
    held = []
    for mixer in (ElAttention.of(own), own):
        cache = mixer.new_cache()
        mixer(x, Causal(), cache=cache)
        held.append(cache.nbytes)
    yield "its cache is half of keys and values", float(abs(2 * held[0] - held[1]) + abs(held[0] - x.numel() * 8))
