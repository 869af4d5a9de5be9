"""The SHA-RNN: recurrent layers, one of which is followed by attention with a single head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...card import Card
from ...errors import ShapeError
from ...mechanisms import Cache
from ...mechanisms._mixer import Tokens, largest
from ...mechanisms.heads.sha import Boom, Sha
from ...stages.causal import Causal
from ..build import named
from ..model import Caches, LanguageModel

CARD = Card(
    paper="Single Headed Attention RNN: Stop Thinking With Your Head",
    year=2019,
    room="heads",
    source=(
        "arXiv:1911.11423, sec. 3, and the author's code: a block is an LSTM without residual, attention in the last layer but "
        "one, and Boom, both added to the normed, not the raw, input; logits by the embeddings and a bias. Dropouts are left "
        "out, and memory is cut token by token, not segment by segment"
    ),
)
EPSILON = 1e-12


class LstmState(Cache):
    """What an LSTM keeps: its output and its cell, (1, b, width) each."""

    def __init__(self) -> None:
        self.state: tuple[Tensor, Tensor] | None = None
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return () if self.state is None else self.state


class ShaBlock(nn.Module):
    """An LSTM, then attention if asked for, then Boom."""

    def __init__(self, width: int, hidden: int, attention: Sha | None) -> None:
        super().__init__()
        self.lstm_norm = nn.LayerNorm(width, eps=EPSILON)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.attention = attention
        self.boom_norm, self.sum_norm = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        self.boom = Boom(width, hidden)

    def forward(self, x: Tokens, recurrent: LstmState, memory: Cache | None, attention_mask: Tensor | None) -> Tokens:
        """Extends both caches."""
        x = self.recur(self.lstm_norm(x), recurrent, attention_mask)
        if self.attention is not None:
            x = self.attention(x, Causal(), cache=memory, attention_mask=attention_mask) + self.attention.query_norm(x)
        made: Tokens = self.boom(self.boom_norm(x)) + self.sum_norm(x)
        return made

    def recur(self, x: Tokens, cache: LstmState, attention_mask: Tensor | None) -> Tokens:
        """The LSTM's outputs; padding does not reach its state, and gives zeros."""
        cache.total += x.shape[1]
        before = cache.state
        if attention_mask is None:
            out, cache.state = self.lstm(x, before)
            return cast(Tensor, out)
        there = attention_mask.bool()
        order = (~there).int().argsort(dim=1, stable=True)  # tokens first, padding last
        lengths = there.sum(1)
        sorted_in = x.gather(1, order[..., None].expand_as(x))
        packed = pack_padded_sequence(sorted_in, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        zeros = x.new_zeros(1, len(x), x.shape[-1])
        before = (zeros, zeros) if before is None else before
        out, after = self.lstm(packed, before)
        out = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]
        moved = (lengths > 0)[None, :, None]
        cache.state = cast(
            tuple[Tensor, Tensor], tuple(torch.where(moved, new, old) for new, old in zip(after, before, strict=True))
        )
        back = torch.zeros_like(out).scatter(1, order[..., None].expand_as(out), out)
        return back * there[..., None]


class ShaDecoder(LanguageModel):
    """A stack of blocks, the embeddings' normal start of the author's, and a bias of the logits.

    Args:
        attend: the blocks with attention. hidden: of Boom. memory: how many tokens attention reads.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        *,
        context: int,
        attend: Sequence[int],
        hidden: Sequence[int],
        memory: int | None,
    ) -> None:
        super().__init__()
        if not all(0 <= layer < layers for layer in attend):
            raise ShapeError(f"attention in layers {list(attend)} of {layers}; layers count from 0")
        self.vocabulary, self.width, self.context = vocabulary, width, context
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.1 * width**-0.5)
        self.blocks = nn.ModuleList(
            ShaBlock(width, hidden[layer], Sha(width, memory=memory) if layer in attend else None) for layer in range(layers)
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocabulary"]:
        """See `LanguageModel.forward`."""
        caches = self.new_caches() if caches is None else caches
        caches.advance(ids, attention_mask)
        x, at = self.embedding(ids), iter(caches.layers)
        for block in self.blocks:
            recurrent = next(at)
            x = block(x, recurrent, next(at) if cast(ShaBlock, block).attention is not None else None, attention_mask)
        return F.linear(x, self.embedding.weight, self.bias)

    def new_caches(self) -> Caches:
        """See `LanguageModel.new_caches`: the state of each LSTM, and the tokens that attention still reads."""
        layers: list[Cache] = []
        for block in self.blocks:
            layers.append(LstmState())
            attention = cast(ShaBlock, block).attention
            if attention is not None:
                layers.append(attention.new_cache())
        return Caches(layers)


@named
def sha_rnn(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    attend: Sequence[int] | None = None,
    hidden: int | Sequence[int] | None = None,
    memory: int | None = 5000,
) -> ShaDecoder:
    """A recurrent decoder with one head of attention, whose cache is a state and, for one layer, one vector a token.

    Args:
        heads: not used, there is one. attend: the layers with attention; the last but one by default. hidden: of Boom, in all
            layers or in each, a multiple of the width; four times it by default. memory: how many tokens attention reads.

    Raises: ShapeError for a layer that is not there, or a hidden width that is no multiple.
    """
    attend = [max(0, layers - 2)] if attend is None else list(attend)
    hidden = 4 * width if hidden is None else hidden
    hidden = [hidden] * layers if isinstance(hidden, int) else list(hidden)
    if len(hidden) != layers:
        raise ShapeError(f"{len(hidden)} hidden widths for {layers} layers")
    return ShaDecoder(vocabulary, width, layers, context=context, attend=attend, hidden=hidden, memory=memory)


def oracle(model: ShaDecoder, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary), a token at a time."""
    c = model.width

    def norm(x: Tensor, by: Any) -> Tensor:
        centred = x - x.mean()
        return centred / ((centred**2).mean() + EPSILON).sqrt() * by.weight + by.bias

    def gate(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    xs = [model.embedding.weight[token] for token in ids]
    for block in cast(Any, model.blocks):
        out, cell = torch.zeros(c, dtype=xs[0].dtype), torch.zeros(c, dtype=xs[0].dtype)
        lstm, made = block.lstm, []
        for x in xs:
            all_four = lstm.weight_ih_l0 @ norm(x, block.lstm_norm) + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ out + lstm.bias_hh_l0
            i, f, g, o = (all_four[c * part : c * part + c] for part in range(4))
            cell = gate(f) * cell + gate(i) * torch.tanh(g)
            out = gate(o) * torch.tanh(cell)
            made.append(out)
        xs = made
        if block.attention is not None:
            sha = block.attention
            a, f = (sha.overparametrised.weight @ gate(sha.value_gate) + sha.overparametrised.bias).split(c)
            memory, reads = [norm(x, sha.memory_norm) for x in xs], []
            for at, x in enumerate(xs):
                q = gate(sha.query_gate) * norm(sha.query.weight @ norm(x, sha.query_norm) + sha.query.bias, sha.inner_norm)
                first = 0 if sha.memory is None else max(0, at + 1 - sha.memory)
                e = torch.stack([torch.exp(q @ (gate(sha.key_gate) * m) / c**0.5) for m in memory[first : at + 1]])
                read = (e / e.sum()) @ torch.stack(memory[first : at + 1]) * gate(f) * torch.tanh(a)
                reads.append(read + norm(x, sha.query_norm))
            xs = reads
        after = []
        for x in xs:
            y = block.boom.up.weight @ norm(x, block.boom_norm) + block.boom.up.bias
            y = y * gate(1.702 * y)
            after.append(sum(y[start : start + c] for start in range(0, len(y), c)) + norm(x, block.sum_norm))
        xs = after
    return torch.stack(xs) @ model.embedding.weight.T + model.bias


def examples() -> list[ShaDecoder]:
    """Settings that the conformance checks run."""
    made = [sha_rnn(23, 16, 3, 1, context=64), sha_rnn(23, 16, 2, 1, context=64, attend=[0, 1], memory=9, hidden=32)]
    for model in made:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.3)
    return made


def kept(model: ShaDecoder, tokens: int) -> int:
    """Two vectors a layer, and for attention one vector a token of its memory."""
    numbers = 2 * model.width * len(model.blocks)
    for block in model.blocks:
        sha = cast(ShaBlock, block).attention
        if sha is not None:
            numbers += model.width * (tokens if sha.memory is None else min(tokens, sha.memory))
    return numbers


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> ShaDecoder:
    """Attention in the last layer but one, with the paper's memory."""
    return sha_rnn(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    model = examples()[0].double()
    ids = torch.randint(0, 23, (2, 24))
    caches, outs = model.new_caches(), []
    for start in range(0, 24, 8):
        outs.append(model(ids[:, start : start + 8], caches=caches))
    yield "segments that carry state and memory are one pass", largest(torch.cat(outs, 1) - model(ids))
    memory = cast(Any, caches.layers[2])
    order = torch.randperm(24)
    more = model(ids[:, :4], caches=caches)
    caches = model.new_caches()
    model(ids, caches=caches)
    memory = cast(Any, caches.layers[2])
    memory.k = memory.k[:, :, order]
    yield "shuffled memory gives the next segment the same: it has no positions", largest(model(ids[:, :4], caches=caches) - more)
    with torch.device("meta"):
        one, all_layers = sha_rnn(256, 1024, 4, 1), sha_rnn(256, 1024, 4, 1, attend=range(4))  # type: ignore[arg-type]
    block = 2 * (4 * 1024 * 1024 + 4 * 1024) + 2 * 1024 + (1024 * 4096 + 4096) + 2 * 2 * 1024
    attention = 3 * (1024 * 1024 + 1024) + 3 * 1024 + 3 * 2 * 1024
    yield "parameters of 4 blocks of width 1024, bytes", float(abs(one.parameter_count - 256 * 1025 - 4 * block - attention))
    yield (
        "attention in all blocks costs three times that of one more",
        float(abs(all_layers.parameter_count - one.parameter_count - 3 * attention)),
    )
