"""The single attention head of the SHA-RNN, and its feed-forward layer without a second matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.window import Window
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest, shake
from .._norms import layer_norm

CARD = Card(
    paper="Single Headed Attention RNN: Stop Thinking With Your Head",
    year=2019,
    room="heads",
    source=(
        "arXiv:1911.11423, sec. 3, and the author's code: one head as wide as the model; queries through a matrix, a norm and "
        "a gate, keys and values one normed tensor through gates, which are vectors that see no input; no positions, no output "
        "matrix. The code's memory and segment hold 5000 tokens together; here each query reads the last 5000, the same up to that "
        "length. Unused parameters of the code and its dropouts (of queries, values and weights) are left out; its layer norms "
        "came from a library that its own start of all weights does not reach, and start at one here. The block around it is a "
        "stack's: LSTM before, then what this reads plus `query_norm` of what it was given, then `Boom`"
    ),
)
EPSILON = 1e-12


def _start(linear: nn.Linear, width: int) -> nn.Linear:
    nn.init.normal_(linear.weight, std=0.1 * width**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


class Sha(Mixer):
    """Reads with one head as wide as the model; keys and values are the same tokens, told apart by learned gates.

    Args:
        memory: each token reads so many of the last ones, its own included; None for all.
    """

    def __init__(self, width: int, *, memory: int | None = 5000) -> None:
        super().__init__()
        if memory is not None and memory < 1:
            raise ShapeError(f"a memory of {memory} tokens holds nothing; give at least 1, or None for all")
        self.width, self.memory = width, memory
        self.query_norm, self.memory_norm = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        self.query = _start(nn.Linear(width, width), width)
        self.inner_norm = nn.LayerNorm(width, eps=EPSILON)
        self.query_gate, self.key_gate, self.value_gate = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.overparametrised = _start(nn.Linear(width, 2 * width), width)

    def value_gates(self) -> Tensor:
        """(width,): what values are multiplied by, sigmoid(f) tanh(a) with (a, f) = W sigmoid(v) + b: a constant once trained."""
        a, f = self.overparametrised(torch.sigmoid(self.value_gate)).chunk(2)
        return torch.sigmoid(f) * torch.tanh(a)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        # gates of keys go to the queries and those of values to the output, so that one tensor is both keys and values
        gate = torch.sigmoid(self.query_gate) * torch.sigmoid(self.key_gate)
        q = gate * layer_norm(self.inner_norm, self.query(layer_norm(self.query_norm, x)))
        tokens = layer_norm(self.memory_norm, x)[:, None]
        nothing = tokens[..., :0]
        seen = (self.new_cache() if cache is None else cache).extend(q[:, None], tokens, nothing, attention_mask)
        if self.memory is not None and seen.k.shape[2] > self.memory:
            stages = (*stages, Window(self.memory))
        return self.value_gates() * attend(seen.q, seen.k, seen.k, *stages, **seen.places)[:, 0]

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: one vector a token, which is key and value."""
        return KeyValues(last=self.memory)


class Boom(nn.Module):
    """A feed-forward layer whose second matrix is a sum: phi(W x + b) in chunks as wide as x, summed; phi(y) = y sigmoid(1.702 y).

    Args:
        hidden: default 4 width.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        if hidden < 1 or hidden % width:
            raise ShapeError(f"{hidden} hidden units do not fall into chunks of {width}; give a multiple")
        self.up = _start(nn.Linear(width, hidden), width)

    def forward(self, x: Tokens) -> Tokens:
        """(b, n, width) -> the same."""
        y = self.up(x)
        return (y * torch.sigmoid(1.702 * y)).unflatten(-1, (-1, x.shape[-1])).sum(-2)


def oracle(mixer: Sha, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time, with gated queries, keys and values."""

    def normed(norm: nn.LayerNorm, row: Tensor) -> Tensor:
        centred = row - row.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-12) * norm.weight + norm.bias

    def gate(vector: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-vector))

    a, f = (mixer.overparametrised.weight @ gate(mixer.value_gate) + mixer.overparametrised.bias).split(mixer.width)
    memory = [normed(mixer.memory_norm, row) for row in x]
    keys, values = [gate(mixer.key_gate) * m for m in memory], [gate(f) * torch.tanh(a) * m for m in memory]
    rows = []
    for i in range(len(x)):
        projected = mixer.query.weight @ normed(mixer.query_norm, x[i]) + mixer.query.bias
        q = gate(mixer.query_gate) * normed(mixer.inner_norm, projected)
        last = len(x) if mixer.memory is None else mixer.memory
        seen = [j for j in range(len(x)) if visible[i, j] and abs(i - j) < last]
        e = torch.stack([torch.exp((q * keys[j]).sum() / mixer.width**0.5) for j in seen])
        rows.append((e / e.sum()) @ torch.stack([values[j] for j in seen]))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Sha]:
    """Settings that the conformance checks run."""
    made = [Sha(heads * size), Sha(heads * size, memory=6), Sha(heads * size, memory=None)]
    shake((p for mixer in made for p in mixer.parameters()), seed=2, by=0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Sha:
    """One head of the whole width; its memory is longer than the texts."""
    return Sha(heads * size, **{"memory": max(5000, tokens), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    sha = examples(2, 8)[0].double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    whole = sha(x, Causal())
    cache = sha.new_cache()
    segments = torch.cat([sha(part, Causal(), cache=cache) for part in x.split(7, dim=1)], 1)
    yield "segments with a memory are one pass", largest(segments - whole)
    yield "the cache holds c numbers a token", float(abs(cache.nbytes - 2 * 20 * 16 * 8))
    plain = Attention(16, 1).new_cache()
    Attention(16, 1).double()(x, Causal(), cache=plain)
    yield "which is half of what plain attention keeps", float(abs(plain.nbytes - 2 * cache.nbytes))
    mixed = torch.cat([x[:, torch.randperm(14)], x[:, 14:]], 1)
    yield "the order of memories does not matter", largest((sha(mixed, Causal()) - whole)[:, 14:])
    with torch.no_grad():
        sha.overparametrised.weight[:16] = 0.0
        sha.overparametrised.bias[:16] = 0.0
    yield "value gates with a = 0 are shut", largest(sha(x, Causal()))
    boom = Boom(16).double()
    hidden = boom.up(x)
    second = torch.eye(16, dtype=torch.float64).repeat(1, 4)
    yield "Boom's second matrix is four stacked identities", largest(boom(x) - (hidden * torch.sigmoid(1.702 * hidden)) @ second.T)
    with torch.device("meta"):
        parameters = [sum(p.numel() for p in module.parameters()) for module in (Sha(1024), Boom(1024))]
    yield "3,158,016 parameters at a width of 1024", float(abs(parameters[0] - 3 * 1024**2 - 12 * 1024))
    yield "Boom has half the weights of a feed-forward layer", float(abs(parameters[1] - 4 * 1024 - 2 * 4 * 1024**2 / 2))
