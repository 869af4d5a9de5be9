"""Multiple-head embeddings: one projection for all heads, told apart by a vector each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.mask import Mask
from ...attention.stage import Bias, RowScore, Score, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.sink_logit import SinkLogit
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest
from .._rotary import Rotary

CARD = Card(
    paper="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
    year=2023,
    room="heads",
    source=(
        "arXiv:2310.07911, whose code was not released. add: a + e; multiply: a * (1 + e), the one from memory, so that vectors "
        "near zero start from equal heads. With add, a key's vector adds the same to all scores of a row, which softmax does not "
        "see: it is left out, h d parameters less than the paper counts. The paper has no rotary embedding; here it turns the "
        "queries after all vectors, and the one key. The start of the vectors, normal of 0.02, is not certain"
    ),
)


class Mhe(Mixer):
    """Makes heads of one projection each to queries, keys and values, by a vector for each head that is added or multiplied.

    All heads read one key and one value a token: the keys' vectors act on the queries, the values' on what was read.

    Args:
        heads, head_dim: default size width / heads. how: "multiply" or "add". std: of the vectors at the start.
    """

    rotates = True

    def __init__(self, width: int, heads: int, *, head_dim: int | None = None, how: str = "multiply", std: float = 0.02) -> None:
        super().__init__()
        if how not in ("multiply", "add"):
            raise ShapeError(f"how {how!r} must be 'multiply' or 'add'")
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        size = width // heads if head_dim is None else head_dim
        self.width, self.heads, self.how = width, heads, how
        self.one_query, self.one_key, self.one_value = (nn.Linear(width, size, bias=False) for _ in range(3))
        self.query_vectors = nn.Parameter(std * torch.randn(heads, size))
        self.key_vectors = nn.Parameter(std * torch.randn(heads, size)) if how == "multiply" else None
        self.value_vectors = nn.Parameter(std * torch.randn(heads, size))
        self.out = nn.Linear(heads * size, width, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        one, k, v = (f(x)[:, None] for f in (self.one_query, self.one_key, self.one_value))
        seen = (self.new_cache() if cache is None else cache).extend(self._queries(one), k, v, attention_mask, self.rotary)
        if self.how == "multiply":
            read = attend(seen.q, seen.k, seen.v, *stages, **seen.places) * (1 + self.value_vectors[:, None])
        elif all(isinstance(stage, Score | Bias | RowScore | Mask) for stage in stages):  # then weights sum to one
            read = attend(seen.q, seen.k, seen.v, *stages, **seen.places) + self.value_vectors[:, None]
        else:  # a column of ones finds out what they sum to
            ones = torch.cat([seen.v, torch.ones_like(seen.v[..., :1])], -1)
            both = attend(seen.q, seen.k, ones, *stages, **seen.places)
            read = both[..., :-1] + both[..., -1:] * self.value_vectors[:, None]
        merged: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return merged

    def _queries(self, one: Float[Tensor, "b 1 n d"]) -> Float[Tensor, "b h n d"]:
        """Each head's queries: q * (1 + e) times (1 + e) of its keys, or q + e."""
        if self.key_vectors is None:
            return one + self.query_vectors[:, None]
        return one * ((1 + self.query_vectors) * (1 + self.key_vectors))[:, None]

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: it keeps one key and one value a token."""
        return KeyValues()


def oracle(mixer: Mhe, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): queries, keys and values of each head made first, then read a query at a time."""

    def of(one: nn.Linear, vectors: Tensor | None, head: int) -> Tensor:
        made = torch.stack([one.weight @ token for token in x])
        if vectors is None:
            return made
        return made + vectors[head] if mixer.how == "add" else made + made * vectors[head]

    heads = []
    for head in range(mixer.heads):
        q = of(mixer.one_query, mixer.query_vectors, head)
        k = of(mixer.one_key, mixer.key_vectors, head)
        v = of(mixer.one_value, mixer.value_vectors, head)
        rows = []
        for i in range(len(x)):
            seen = visible[i].nonzero().flatten().tolist()
            e = torch.exp(torch.stack([(q[i] * k[j]).sum() / q.shape[-1] ** 0.5 for j in seen]))
            rows.append(sum(w * v[j] for w, j in zip(e / e.sum(), seen, strict=True)))
        heads.append(torch.stack(rows))  # type: ignore[arg-type]
    return torch.cat(heads, -1) @ mixer.out.weight.T


def examples(heads: int, size: int) -> list[Mhe]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [Mhe(width, heads, std=0.5), Mhe(width, heads, how="add", std=0.5), Mhe(width, heads, head_dim=6, std=0.5)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mhe:
    """Heads that are multiplied."""
    return Mhe(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    for how in ("multiply", "add"):
        alike = Mhe(24, 3, how=how, std=0.0).double()
        plain = _repeated(alike)
        yield f"vectors of zero to {how}: all heads are the same", largest(alike(x, Causal()) - plain(x, Causal()))

    add = Mhe(24, 3, how="add", std=0.7).double()
    q, k, v = (f(x)[:, None] for f in (add.one_query, add.one_key, add.one_value))
    q, v = q + add.query_vectors[:, None], v + add.value_vectors[:, None]
    moved = k + torch.randn(3, 1, 8, dtype=torch.float64)
    read = attend(q, moved, v.expand(-1, 3, -1, -1), Causal())
    yield "vectors added to keys change nothing", largest(add.out(read.transpose(1, 2).flatten(2)) - add(x, Causal()))
    logit = SinkLogit(torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64))
    read = attend(q, k.expand(-1, 3, -1, -1), v, Causal(), logit)
    yield (
        "and those of values count by the sum of weights, where it is not one",
        largest(add.out(read.transpose(1, 2).flatten(2)) - add(x, Causal(), logit)),
    )

    turned = Mhe(24, 3, std=0.7).double()
    turned.rotary = Rotary()
    later = torch.cat([x[:, :1].expand(-1, 4, -1), x], 1)
    real = torch.ones(2, 15, dtype=torch.bool)
    real[:, :4] = False
    shifted = turned(later, Causal(), attention_mask=real)[:, 4:]
    yield "with rotation, padding before is nothing either", largest(shifted - turned(x, Causal()))

    n, d = 12, 4
    width = n * d
    usual = sum(p.numel() for p in Attention(width, n).parameters())
    counts = {how: sum(p.numel() for p in Mhe(width, n, how=how).parameters()) for how in ("multiply", "add")}
    saved = (3 * n**2 - 3 * n) * d**2 - 3 * n * d
    yield "(3 n^2 - 3 n) d^2 - 3 n d parameters less than multi-head attention", float(abs(usual - counts["multiply"] - saved))
    single = 3 * width * d + width**2
    yield (
        "3 n d more than one head, 2 n d if they are added",
        float(abs(counts["multiply"] - single - 3 * n * d) + abs(counts["add"] - single - 2 * n * d)),
    )
    cache = turned.new_cache()
    turned(x, Causal(), cache=cache)
    yield "the cache holds 2 d numbers a token", float(abs(cache.nbytes - 2 * 8 * x.shape[0] * x.shape[1] * 8))


def _repeated(mixer: Mhe) -> Attention:
    """Multi-head attention whose heads all have the projections of this one."""
    plain = Attention(mixer.width, mixer.heads).to(mixer.out.weight)
    ones = (mixer.one_query, mixer.one_key, mixer.one_value)
    with torch.no_grad():
        for into, one in zip((plain.projections.q, plain.projections.k, plain.projections.v), ones, strict=True):
            into.weight.copy_(one.weight.repeat(mixer.heads, 1))
        plain.projections.out.weight.copy_(mixer.out.weight)
    return plain
