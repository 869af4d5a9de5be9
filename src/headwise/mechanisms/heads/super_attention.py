"""Attention with fewer projections, and a learned matrix that mixes values along the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend, attention_weights
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest
from .._rotary import Rotary

CARD = Card(
    paper="You Need to Pay Better Attention",
    year=2024,
    room="heads",
    source=(
        "arXiv:2403.01643, by its abstracts and a re-implementation that its authors helped with: optimised (no value "
        "projection), efficient (no key projection either), super (efficient, and values W_A v along the text). A head without a "
        "projection reads its slice of the tokens. One W_A for all heads; that re-implementation normalises over queries, which "
        "is not followed. Texts shorter than W_A use its first rows and columns. Scale 1 / sqrt(head size) and Xavier's start "
        "are not certain; `sized` starts with W_A at one, which is efficient attention"
    ),
)
VARIANTS = ("optimised", "efficient", "super")


class SuperAttention(Mixer):
    """Attention without a value projection, without a key projection, and with values that are mixed along the text.

    Args:
        variant: "optimised" (queries, keys, output), "efficient" (queries, output) or "super" (these, and W_A).
        context: how many tokens W_A is for. lower: whether W_A is lower triangular, so that values hold nothing later; if not,
            it can't read causally. start: of W_A, "xavier" or "identity". bias: of the projections.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        heads: int,
        variant: str = "super",
        *,
        context: int | None = None,
        lower: bool = True,
        start: str = "xavier",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS or start not in ("xavier", "identity"):
            raise ShapeError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}; start {start!r} 'xavier' or 'identity'")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads, which read a slice of it each")
        if (variant == "super") != (context is not None):
            raise ShapeError(f"variant {variant!r} with context={context}: W_A needs a length, and only super attention has it")
        self.width, self.heads, self.lower = width, heads, lower
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias) if variant == "optimised" else None
        self.out = nn.Linear(width, width, bias=bias)
        self.align = None if context is None else nn.Parameter(torch.eye(context))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and (name != "align" or start == "xavier"):
                nn.init.xavier_uniform_(parameter)
        if not lower:
            self.cannot = {"causal": "its W_A mixes later tokens into the values"}

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        q, tokens = self._split(self.q(x)), self._split(x)
        if self.k is not None:
            seen = cache.extend(q, self._split(self.k(x)), tokens, attention_mask, self.rotary)
            k, v = seen.k, seen.v
        elif self.align is not None:
            seen = cache.extend(q, tokens, self._aligned(tokens, cache, attention_mask), attention_mask)
            k, v = seen.k, seen.v
        else:  # keys and values are the tokens, kept once
            seen = cache.extend(q, tokens, tokens.new_zeros(*tokens.shape[:3], 0), attention_mask)
            k = v = seen.k
        q = seen.q
        if self.k is None:
            q, k = seen.turned(self.rotary)
        merged: Tensor = self.out(attend(q, k, v, *stages, **seen.places).transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _aligned(self, new: Float[Tensor, "b h n d"], cache: KeyValues, attention_mask: Real | None) -> Float[Tensor, "b h n d"]:
        """The new rows of W_A x, over all tokens so far: row and column of a token are its place."""
        assert self.align is not None
        n, before = new.shape[2], len(cache)
        everything = new if cache.k is None else torch.cat([cache.k, new], 2)
        matrix = self.align.tril() if self.lower else self.align
        rows = cache.places_of_next(new, attention_mask)
        reached = before + n if rows is None else int(rows.max()) + 1
        if reached > len(matrix):
            raise ShapeError(f"a text of {reached} tokens, but W_A is for {len(matrix)}; build it with context={reached} or more")
        if rows is None:
            return matrix[before : before + n, : before + n] @ everything
        old = torch.arange(before, device=rows.device).expand(len(rows), -1) if cache.positions is None else cache.positions
        columns = torch.cat([old, rows], 1)
        mixed = matrix[rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None]]  # (b, n, tokens), for all heads
        return mixed[:, None] @ everything.masked_fill((columns < 0)[:, None, :, None], 0.0)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: tokens, and beside them keys (optimised), nothing (efficient) or mixed values (super)."""
        return KeyValues()


def oracle(mixer: SuperAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""
    n, d = len(x), mixer.width // mixer.heads

    def linear(f: nn.Linear, token: Tensor) -> Tensor:
        return f.weight @ token if f.bias is None else f.weight @ token + f.bias

    keys = list(x) if mixer.k is None else [linear(mixer.k, token) for token in x]
    values = list(x)
    if mixer.align is not None:
        a = mixer.align
        values = [sum(a[j, t] * x[t] for t in range(j + 1 if mixer.lower else n)) for j in range(n)]  # type: ignore[misc]
    rows = []
    for i in range(n):
        query, read = linear(mixer.q, x[i]), []
        seen = visible[i].nonzero().flatten().tolist()
        for head in range(mixer.heads):
            own = slice(head * d, head * d + d)
            s = torch.stack([(query[own] * keys[j][own]).sum() / d**0.5 for j in seen])
            e = torch.exp(s - s.max().detach())
            read.append((e / e.sum()) @ torch.stack([values[j][own] for j in seen]))
        rows.append(linear(mixer.out, torch.cat(read)))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[SuperAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        SuperAttention(width, heads, context=48),
        SuperAttention(width, heads, context=40, lower=False, bias=True),
        SuperAttention(width, heads, "efficient"),
        SuperAttention(width, 1, "efficient"),
        SuperAttention(width, heads, "optimised", bias=True),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> SuperAttention:
    """Super attention for texts of that length, whose values are at first the tokens."""
    if options.get("variant", "super") == "super":
        options = {"context": tokens, "start": "identity", **options}
    return SuperAttention(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formulas promise, and how far off it is."""
    torch.manual_seed(0)
    c, n = 32, 13
    x = torch.randn(2, n, c, dtype=torch.float64)
    optimised, efficient = (SuperAttention(c, 4, variant).double() for variant in VARIANTS[:2])
    for mixer in (optimised, efficient):
        plain = Attention(c, 4).double()
        plain.projections.q, plain.projections.out = mixer.q, mixer.out
        nn.init.eye_(plain.projections.v.weight)
        if mixer.k is None:
            nn.init.eye_(plain.projections.k.weight)
        else:
            plain.projections.k = mixer.k
        yield "plain attention, where what was left out is one", largest(mixer(x, Causal()) - plain(x, Causal()))

    whole, absorbed = Attention(c, 1).double(), SuperAttention(c, 1, "efficient").double()
    p = whole.projections
    with torch.no_grad():
        absorbed.q.weight.copy_(p.k.weight.T @ p.q.weight)
        absorbed.out.weight.copy_(p.out.weight @ p.v.weight)
    yield "with one head, the others absorb what was left out", largest(absorbed(x, Causal()) - whole(x, Causal()))

    mixed = SuperAttention(c, 4, context=20).double()
    mixed.q, mixed.out = efficient.q, efficient.out
    q, tokens = mixed._split(mixed.q(x)), mixed._split(x)
    assert mixed.align is not None
    weights = attention_weights(q, tokens, Causal()) @ mixed.align.tril()[:n, :n]
    by_weights = mixed.out((weights @ tokens).transpose(1, 2).flatten(2))
    yield "mixed values are mixed weights", largest(by_weights - mixed(x, Causal()))
    mixed.align = nn.Parameter(torch.eye(20).double())
    yield "W_A of one is efficient attention", largest(mixed(x, Causal()) - efficient(x, Causal()))
    mixed.align = nn.Parameter(torch.eye(20).double().roll(1, 0).tril())
    shifted = torch.cat([torch.zeros_like(tokens[:, :, :1]), tokens[:, :, :-1]], 2)
    by_hand = mixed.out(attend(q, tokens, shifted, Causal()).transpose(1, 2).flatten(2))
    yield "W_A below the diagonal: each key gives the token before it", largest(mixed(x, Causal()) - by_hand)

    made = {"optimised": optimised, "efficient": efficient, "super": mixed}
    parameters = {"optimised": 3 * c**2, "efficient": 2 * c**2, "super": 2 * c**2 + 20**2}
    held = {"optimised": 2 * c, "efficient": c, "super": 2 * c}
    for name, mixer in made.items():
        count = sum(p.numel() for p in mixer.parameters())
        yield f"{name}: {parameters[name]} parameters, plain attention has {4 * c**2}", float(abs(count - parameters[name]))
        cache = mixer.new_cache()
        for i in range(n):
            mixer(x[:, i : i + 1], Causal(), cache=cache)
        yield f"{name}: {held[name]} numbers kept a token", float(abs(cache.nbytes / (2 * n * 8) - held[name]))
    for mixer in (efficient, mixed):  # that rotates what it has kept
        mixer.rotary = Rotary()
        cache = mixer.new_cache()
        parts = torch.cat([mixer(part, Causal(), cache=cache) for part in x.split((4, 1, 8), 1)], 1)
        yield "decoding with rotation is one pass", largest(parts - mixer(x, Causal()))
        places = torch.arange(n)
        values = tokens if mixer.align is None else shifted
        by_hand = attend(mixer.rotary(q, places), mixer.rotary(tokens, places), values, Causal())
        yield "and rotates by places", largest(mixer.out(by_hand.transpose(1, 2).flatten(2)) - mixer(x, Causal()))
        gap = torch.cat([x[:, :5], x[:, :3], x[:, 5:]], 1)
        real = torch.ones(2, n + 3, dtype=torch.bool)
        real[:, 5:8] = False
        kept = mixer(gap, Causal(), attention_mask=real)[:, real[0]]
        yield "padding within the text takes no place", largest(kept - mixer(x, Causal()))
