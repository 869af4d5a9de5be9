"""Neural attention: a small network looks at a query and a key, and says how well they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...attention import attend
from ...attention.stage import Block, RowScore, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2502.17206 and the authors' code: q and k mapped to p = head_dim / 32 numbers, then ReLU layers of p and p / 2 "
        "units on both, and one number; all heads share them, and nothing is divided by sqrt(d). Only the first layer of their "
        "models has it, and places come from sinusoids added to the tokens. With p = 1 the code has no unit left and all scores "
        "are alike, without a word; here p is at least 2. With p = 2 one random start in eight has constant scores too"
    ),
)


@dataclass(frozen=True, eq=False)
class NetworkScore(RowScore):
    """Scores by layers of ReLU units; queries and keys are already what each puts into the first one, before its ReLU.

    weight, bias: (units, p), (units,), of the second layer. last, last_bias: (1, units), (1,), of the score.
    """

    weight: Tensor
    bias: Tensor
    last: Tensor
    last_bias: Tensor

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        query, key = block.query.to(scores.dtype), block.key.to(scores.dtype)
        first = torch.relu(query[:, :, :, None] + key[:, :, None])  # (b, h, c, m, p)
        second = torch.relu(nn.functional.linear(first, self.weight.to(scores), self.bias.to(scores)))
        return nn.functional.linear(second, self.last.to(scores), self.last_bias.to(scores))[..., 0]


class NeuralAttention(Mechanism):
    """Scores a query and a key by a feed-forward network of three layers, in the place of their product.

    Its first layer is a sum of what the query and the key put into it, so that pairs are never concatenated; it runs a block of
    rows at a time, at O(rows x keys x p) memory.

    Args:
        head_dim: of queries and keys. units: p, what each is mapped to, and the units of the first layer; default
            head_dim / 32, at least 2.
    """

    def __init__(self, head_dim: int, units: int | None = None) -> None:
        super().__init__()
        units = head_dim // 32 if units is None else units
        if units < 2:
            raise ShapeError(f"{units} units of a head of {head_dim} leave none for the second layer; give units, 2 or more")
        self.query, self.key = nn.Linear(head_dim, units), nn.Linear(head_dim, units)
        self.first = nn.Linear(2 * units, units)
        self.second = nn.Linear(units, units // 2)
        self.last = nn.Linear(units // 2, 1)

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        theirs = places.get("key_positions")
        if theirs is not None:  # what empty slots hold must not reach gradients of the maps
            k = torch.where((torch.atleast_2d(theirs) >= 0)[:, None, :, None], k, 0)
        for_query, for_key = self.first.weight.chunk(2, 1)
        q = nn.functional.linear(self.query(q), for_query, self.first.bias)
        k = nn.functional.linear(self.key(k), for_key)
        network = NetworkScore(self.second.weight, self.second.bias, self.last.weight, self.last.bias)
        return attend(q, k, v, network, *stages, **places)


def oracle(mechanism: NeuralAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a pair at a time, concatenated."""
    h, n, _ = q.shape
    group = h // k.shape[0]
    out = []
    for head in range(h):
        for i in range(n):
            scores, seen = [], visible[i].nonzero().flatten().tolist()
            for j in seen:
                x = torch.cat([_map(mechanism.query, q[head, i]), _map(mechanism.key, k[head // group, j])])
                x = _map(mechanism.first, x)
                x = _map(mechanism.second, torch.where(x > 0, x, 0.0))
                scores.append(_map(mechanism.last, torch.where(x > 0, x, 0.0))[0])
            out.append(torch.softmax(torch.stack(scores), 0) @ v[head // group, seen])
    return torch.stack(out).view(h, n, -1)


def _map(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.stack([(row * x).sum() + b for row, b in zip(layer.weight, layer.bias, strict=True)])


def examples(heads: int, size: int) -> list[NeuralAttention]:
    """Settings that the conformance checks run."""
    return [_filled(size, 4), _filled(size, 7)]


def _filled(size: int, units: int) -> NeuralAttention:
    made, generator = NeuralAttention(size, units), torch.Generator().manual_seed(units)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> NeuralAttention:
    """The paper's number of units, but at least 4: with 2, one random start in eight has constant scores and no gradient."""
    return NeuralAttention(size, **{"units": max(4, size // 32), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    made = _filled(8, 4).double()
    lifted = _filled(8, 4).double()
    nn.init.constant_(lifted.last.bias, 5.0)
    yield "the last bias does not matter", largest(lifted(q, k, v, Causal()) - made(q, k, v, Causal()))
    nn.init.zeros_(lifted.last.weight)
    mean = v.cumsum(2) / torch.arange(1, 10)[:, None]
    yield "without a last layer it reads the mean of what came before", largest(lifted(q, k, v, Causal()) - mean)
    deaf = _filled(8, 4).double()
    nn.init.zeros_(deaf.query.weight)
    yield "with queries unheard all of them read alike", largest(deaf(q, k, v) - deaf(q.flip(2), k, v))
    yield "what empty slots hold does not reach the maps", _slope_of_empty_slots(q, k, v)
    yield from _nearest()
    counted = sum(p.numel() for p in NeuralAttention(64).parameters())
    yield "275 parameters in a layer with heads of 64", float(counted - 275)
    q, k, v = torch.randn(3, 1, 1, 2048, 8, generator=generator, dtype=torch.float64)
    with _Largest() as seen, torch.no_grad():
        made(q, k, v)
    yield "nothing held of 2048 tokens is more than a quarter of all pairs x units", max(0.0, seen.elements / (2048**2 * 4) - 0.25)


def _slope_of_empty_slots(q: Tensor, k: Tensor, v: Tensor) -> float:
    made, at = _filled(8, 4).double(), torch.arange(9)
    weight = made.key.weight
    (alone,) = torch.autograd.grad(made(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], Causal()).square().sum(), weight)
    places = torch.where(at < 2, -1, at - 2)
    k = torch.where((at < 2)[:, None], torch.nan, k)
    out = made(q, k, v, Causal(), query_positions=places, key_positions=places)[:, :, 2:]
    return largest(torch.autograd.grad(out.square().sum(), weight)[0] - alone)


def _nearest() -> Iterator[tuple[str, float]]:
    """Two units score -|q - k|, which peaks at any key; a product of maps of q and k is monotone in k."""
    made = NeuralAttention(2, 2).double()
    weights = {
        "query": ([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        "key": ([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        "first": ([[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]], [0.0, 0.0]),
        "second": ([[1.0, 1.0]], [0.0]),
        "last": ([[-200.0]], [0.0]),
    }
    with torch.no_grad():
        for name, (weight, bias) in weights.items():
            layer = getattr(made, name)
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    numbers = torch.stack([torch.arange(8.0), torch.ones(8)], -1).double()[None, None]
    value = torch.randn(1, 1, 8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asked = torch.tensor([5, 2, 7, 0, 3])
    got = made(numbers[:, :, asked] + 0.2, numbers, value)
    yield "two units are enough to look up the nearest number", largest(got - value[:, :, asked])


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor made within it holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made
