"""Dual attention: heads that read what tokens are, and heads that read how they relate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.temperature import Temperature
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest

CARD = Card(
    paper="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
    year=2024,
    room="heads",
    source=(
        "arXiv:2405.16727 and the authors' code, at its layers' start (their language models start all matrices at normal 0.02). "
        "There one retriever of symbols serves all layers, and reads the residual stream before its norm: here it reads what the "
        "layer reads; give several layers one module to share it. Relations are linear, as is their default, "
        "and rotation is for attention only. Left out: other activations of relations, symbols of relative places, grouped heads"
    ),
    status="exact for linear relations, with symbols by place or by symbolic attention; other forms of either are left out",
)


class Symbols(nn.Module):
    """A learned symbol for each place. positions: how many places there are."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.table = nn.Embedding(positions, width)

    def forward(self, x: Tokens, places: Tensor) -> Tokens:
        """Symbols (b or 1, n, width) at places (b or 1, n); what padding gets, nobody reads."""
        reached = int(places.max()) + 1
        if reached > self.table.num_embeddings:
            raise ShapeError(f"a text of {reached} tokens, but {self.table.num_embeddings} places have symbols; build more")
        found: Tensor = self.table(places.clamp(min=0))
        return found


class SymbolicAttention(nn.Module):
    """Each token looks up its symbol by itself: attention to a learned library, with keys that are learned too.

    Args:
        library: how many symbols. heads: of the look-up.
    """

    def __init__(self, width: int, library: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads that look symbols up")
        self.heads = heads
        self.ask = nn.Linear(width, width)
        self.templates = nn.Parameter(torch.randn(library, width))
        self.library = nn.Parameter(torch.randn(library, width))

    def forward(self, x: Tokens, places: Tensor) -> Tokens:
        """Symbols (b, n, width) of tokens x."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (self.ask(x), self.templates, self.library))
        return attend(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1)).transpose(1, 2).flatten(2)


class DualAttention(Mixer):
    """Sensory heads read values of tokens; relational heads read symbols of tokens, and relations of the reader to each.

    A relation is a product of a query and a key of its own, read with the head's weights: sum_l A_jl (W_r r_jl + W_s s_l). No
    relation is worked out pair by pair: the read of its keys is multiplied by its query afterwards.

    Args:
        sensory, relational: how many heads. relations: how many, shared by all relational heads; default as many as these.
        symbols: a `Symbols` or `SymbolicAttention` of this width; none needed without relational heads.
        symmetric: whether relations have one map for both sides.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        sensory: int,
        relational: int,
        symbols: Symbols | SymbolicAttention | None = None,
        *,
        relations: int | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        heads, relations = sensory + relational, relational if relations is None else relations
        if min(sensory, relational) < 0 or not heads or width % heads:
            raise ShapeError(f"width {width} is no multiple of {sensory} sensory and {relational} relational heads")
        self.width, self.sensory, self.relational, self.size = width, sensory, relational, width // heads
        inner = relational * self.size
        if relational and (relations < 1 or inner % relations):
            raise ShapeError(f"{relations} relations do not divide {relational} heads of {self.size}, {inner} in all")
        if (symbols is None) != (relational == 0):
            raise ShapeError(f"{relational} relational heads with symbols={symbols}; those heads, and only they, read symbols")
        self.relations = relations
        self.queries, self.keys = (nn.Linear(width, width, bias=False) for _ in range(2))  # of both kinds of heads
        self.values = nn.Linear(width, sensory * self.size, bias=False) if sensory else None
        self.sensory_out = nn.Linear(sensory * self.size, sensory * self.size, bias=False) if sensory else None
        self.symbols = symbols
        if relational:
            self.symbol_values = nn.Linear(width, inner, bias=False)
            self.relation_queries = nn.Linear(width, inner, bias=False)
            self.relation_keys = self.relation_queries if symmetric else nn.Linear(width, inner, bias=False)
            bound = (self.size * relations) ** -0.5
            self.relation_values = nn.Parameter(torch.empty(relational, self.size, relations).uniform_(-bound, bound))
            self.relational_out = nn.Linear(inner, inner, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        values = [] if self.values is None else [self._split(self.values(x))]
        if self.symbols is not None:
            symbols = self.symbols(x, cache.next_places(x, attention_mask)).expand(len(x), -1, -1)
            values += [self._split(self.symbol_values(symbols)), self._split(self.relation_keys(x))]
        q, k = self._split(self.queries(x)), self._split(self.keys(x))
        seen = cache.extend(q, k, torch.cat(values, 1), attention_mask, self.rotary)
        first, heads, out = self.sensory, self.sensory + self.relational, []
        if self.sensory_out is not None:
            own = [stage.select(range(first)) for stage in stages]
            read = attend(seen.q[:, :first], seen.k[:, :first], seen.v[:, :first], *own, **seen.places)
            out.append(self.sensory_out(read.transpose(1, 2).flatten(2)))
        if self.relational:
            own = [stage.select(range(first, heads)) for stage in stages]
            symbols, keys = seen.v[:, first:heads], seen.v[:, heads:].transpose(1, 2).flatten(2)
            both = torch.cat([symbols, keys[:, None].expand(-1, self.relational, -1, -1)], -1)
            read = attend(seen.q[:, first:], seen.k[:, first:], both, *own, **seen.places)
            found = read[..., : self.size] + self._relate(x, read[..., self.size :])
            out.append(self.relational_out(found.transpose(1, 2).flatten(2)))
        return torch.cat(out, -1)

    def _relate(self, x: Tokens, read: Float[Tensor, "b h n keys"]) -> Float[Tensor, "b h n d"]:
        """Relations, from what each head has read of their keys."""
        q = self.relation_queries(x).unflatten(-1, (self.relations, -1))[:, None]
        k = read.unflatten(-1, (self.relations, -1))
        return torch.einsum("bhnr,hdr->bhnd", (q * k).sum(-1) * k.shape[-1] ** -0.5, self.relation_values)

    def _split(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: as values it keeps those of tokens, those of symbols, and keys of relations."""
        return KeyValues()


def oracle(mixer: DualAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time, with each relation of two tokens worked out."""
    n, d = len(x), mixer.size
    s: list[Tensor] = []
    if isinstance(mixer.symbols, Symbols):
        s = [mixer.symbols.table.weight[j] for j in range(n)]
    elif mixer.symbols is not None:
        look, wide = mixer.symbols, mixer.width // mixer.symbols.heads
        for token in x:
            asked, parts = look.ask.weight @ token + look.ask.bias, []
            for head in range(look.heads):
                at = slice(head * wide, head * wide + wide)
                e = torch.exp(torch.stack([asked[at] @ t[at] for t in look.templates]) / wide**0.5)
                parts.append(sum(w * symbol[at] for w, symbol in zip(e / e.sum(), look.library, strict=True)))
            s.append(torch.cat(parts))  # type: ignore[arg-type]
    rows = []
    for i in range(n):
        seen, sensory, relational = visible[i].nonzero().flatten().tolist(), [], []
        for head in range(mixer.sensory + mixer.relational):
            own = slice(head * d, head * d + d)
            q = mixer.queries.weight[own] @ x[i]
            e = torch.exp(torch.stack([q @ (mixer.keys.weight[own] @ x[j]) / d**0.5 for j in seen]))
            a = e / e.sum()
            if head < mixer.sensory:
                assert mixer.values is not None
                sensory.append(sum(w * (mixer.values.weight[own] @ x[j]) for w, j in zip(a, seen, strict=True)))
                continue
            h = head - mixer.sensory
            total = torch.zeros(d, dtype=x.dtype)
            for w, j in zip(a, seen, strict=True):
                left = (mixer.relation_queries.weight @ x[i]).view(mixer.relations, -1)
                right = (mixer.relation_keys.weight @ x[j]).view(mixer.relations, -1)
                r = (left * right).sum(1) / left.shape[1] ** 0.5
                total = total + w * (mixer.relation_values[h] @ r + mixer.symbol_values.weight[h * d : h * d + d] @ s[j])
            relational.append(total)
        parts = []
        if mixer.sensory_out is not None:
            parts.append(mixer.sensory_out.weight @ torch.cat(sensory))  # type: ignore[arg-type]
        if relational:
            parts.append(mixer.relational_out.weight @ torch.cat(relational))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[DualAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        DualAttention(width, heads // 2, heads // 2, SymbolicAttention(width, 5, 2)),
        DualAttention(width, 1, heads - 1, Symbols(width, 48), relations=2 * (heads - 1)),
        DualAttention(width, 0, heads, SymbolicAttention(width, 3, 1), relations=1, symmetric=True),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> DualAttention:
    """Half of the heads relational, and a library of as many symbols as the width, as the paper's language models have.

    symbols: "attention" as there, or "places", or a module.
    """
    width, relational = heads * size, heads // 2
    sensory, relational = options.pop("sensory", heads - relational), options.pop("relational", relational)
    symbols = options.pop("symbols", "attention" if relational else None)
    if isinstance(symbols, str):
        symbols = SymbolicAttention(width, width, heads) if symbols == "attention" else Symbols(width, tokens)
    return DualAttention(width, sensory, relational, symbols, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    c, n = 24, 11
    x = torch.randn(2, n, c, dtype=torch.float64)
    only, plain = DualAttention(c, 3, 0).double(), Attention(c, 3).double()
    p = plain.projections
    p.q, p.k, p.v, p.out = only.queries, only.keys, only.values, only.sensory_out  # type: ignore[assignment]
    yield "no relational heads is multi-head attention", largest(only(x, Causal()) - plain(x, Causal()))

    by_place = Symbols(c, 20)
    mixer = DualAttention(c, 0, 3, by_place, relations=6).double()
    wanted, turn = mixer(x, Causal()), torch.randn(3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for f, by in ((mixer.queries, turn.mT), (mixer.keys, turn.inverse())):
            f.weight.copy_((by @ f.weight.unflatten(0, (3, 8))).flatten(0, 1))
    yield "only products of queries and keys count", largest(mixer(x, Causal()) - wanted)
    turn = torch.randn(6, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for f, by in ((mixer.relation_queries, turn.mT), (mixer.relation_keys, turn.inverse())):
            f.weight.copy_((by @ f.weight.unflatten(0, (6, 4))).flatten(0, 1))
    yield "and in relations too", largest(mixer(x, Causal()) - wanted)

    one = DualAttention(c, 0, 1, Symbols(c, 20)).double()
    for f in (one.queries, one.keys, one.relation_queries, one.relation_keys):
        nn.init.eye_(f.weight)  # type: ignore[arg-type]
    rotation = torch.linalg.qr(torch.randn(c, c, dtype=torch.float64))[0]
    yield "turning all tokens changes no relation", largest(one(x @ rotation, Causal()) - one(x, Causal()))

    nn.init.zeros_(mixer.relation_values)
    symbols = mixer.symbol_values(by_place.table.weight[:n]).expand(2, -1, -1)
    q, k, v = (mixer._split(t) for t in (mixer.queries(x), mixer.keys(x), symbols))
    by_symbols = mixer.relational_out(attend(q, k, v, Causal()).transpose(1, 2).flatten(2))
    yield "without relations, heads read symbols", largest(mixer(x, Causal()) - by_symbols)

    sensory, relational, relations, d = 1, 2, 4, 8
    look = SymbolicAttention(c, 7, 2)
    mixed = DualAttention(c, sensory, relational, look, relations=relations).double()
    counted = sum(w.numel() for w in mixed.parameters()) - sum(w.numel() for w in look.parameters())
    ours = 5 * c * relational * d + (relational * d) ** 2 + relational * d * relations
    wanted_count = ours + 3 * c * sensory * d + (sensory * d) ** 2
    yield "5 c h d + (h d)^2 + h d d_r parameters in relational heads", float(abs(counted - wanted_count))
    cache = mixed.new_cache()
    for i in range(n):
        mixed(x[:, i : i + 1], Causal(), cache=cache)
    kept = cache.nbytes / (2 * n * 8)
    yield "3 d numbers kept a token for a relational head, 2 d for another", float(abs(kept - d * (3 * relational + 2 * sensory)))
    found = look(x, torch.arange(n))
    alone = torch.cat([look(x[:, i : i + 1], torch.arange(1)) for i in range(n)], 1)
    yield "each token looks up its symbol by itself", largest(found - alone)
    by_head = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    wanted = mixed(x, Causal(), Temperature(by_head))
    with torch.no_grad():
        mixed.queries.weight.div_(by_head.repeat_interleave(d)[:, None])
    yield "stages find the heads of both kinds, sensory ones first", largest(mixed(x, Causal()) - wanted)
