"""Attention with as few matrices as it can do with: one for similarity, none or one for values."""

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
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest
from .._rotary import Rotary

CARD = Card(
    paper="Reducing the Transformer Architecture to a Minimum",
    year=2024,
    room="heads",
    source=(
        "arXiv:2410.13732: query and key matrices collapsed into one, values and output into one or left out, and similarity made "
        "symmetric by W_Q = W_K (what its experiments have), by a mirrored matrix or by T T^T. Leaving out the MLP is up to the "
        "model around this layer. The paper collapses for one head; more heads keep W_Q, and without a value matrix read their "
        "slice of the tokens. Scores are divided by the root of the keys' size, which is not certain, nor is the start. A rotary "
        "embedding makes similarity depend on places, so it is not symmetric then"
    ),
)
SIMILARITIES = ("separate", "shared", "collapsed", "mirrored", "triangular")
VALUES = ("full", "collapsed", "none")


class Minimal(Mixer):
    """Attention whose query and key matrices are one, if any, and whose values may be the tokens themselves.

    Args:
        similarity: "separate" (W_Q and W_K), "shared" (W_Q = W_K), or for one head x W x with W of any kind ("collapsed"),
            symmetric ("mirrored"), or T T^T ("triangular").
        values: "full" (W_V and W_O), "collapsed" (one matrix, for one head) or "none" (the tokens).
    """

    rotates = True

    def __init__(self, width: int, heads: int = 1, similarity: str = "shared", values: str = "none") -> None:
        super().__init__()
        if similarity not in SIMILARITIES or values not in VALUES:
            raise ShapeError(f"similarity {similarity!r} must be one of {SIMILARITIES}, values {values!r} one of {VALUES}")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        whole = similarity not in ("separate", "shared")
        if heads > 1 and (whole or values == "collapsed"):
            raise ShapeError(f"matrices collapse for 1 head, not for {heads}; give similarity='shared' and values='none' or 'full'")
        self.width, self.heads, self.similarity, self.whole = width, heads, similarity, whole
        self.triangle = nn.Parameter(torch.empty(width * (width + 1) // 2)) if similarity in SIMILARITIES[3:] else None
        self.q = nn.Linear(width, width, bias=False) if self.triangle is None else None
        self.k = nn.Linear(width, width, bias=False) if similarity == "separate" else None
        self.v = nn.Linear(width, width, bias=False) if values == "full" else None
        self.out = nn.Linear(width, width, bias=False) if values != "none" else None
        if self.triangle is not None:
            nn.init.uniform_(self.triangle, -(width**-0.5), width**-0.5)  # as rows of nn.Linear start

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        q = self._split(self.queries(x))
        if self.whole:  # keys and values are the tokens, kept once; the value matrix waits until they are read
            tokens = self._split(x)
            seen = cache.extend(q, tokens, tokens.new_zeros(*tokens.shape[:3], 0), attention_mask)
            q, k = seen.turned(self.rotary)
            out = attend(q, k, seen.k, *stages, **seen.places).transpose(1, 2).flatten(2)
            out = out if self.v is None else self.v(out)
        else:
            k = q if self.k is None else self._split(self.k(x))
            v = self._split(x if self.v is None else self.v(x))
            seen = cache.extend(q, k, v, attention_mask, self.rotary)
            out = attend(seen.q, seen.k, seen.v, *stages, **seen.places).transpose(1, 2).flatten(2)
        return out if self.out is None else self.out(out)

    def queries(self, x: Tokens) -> Tokens:
        """What is compared with keys: x W_Q, or x W for one head whose keys are the tokens."""
        if self.q is not None:
            product: Tensor = self.q(x)
            return product
        assert self.triangle is not None
        rows, columns = torch.tril_indices(self.width, self.width, device=x.device)
        lower = self.triangle.new_zeros(self.width, self.width).index_put((rows, columns), self.triangle)
        if self.similarity == "triangular":
            return x @ lower @ lower.T
        return x @ (lower + lower.tril(-1).T)

    def _split(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: with one matrix for similarity it keeps the tokens, and nothing else."""
        return KeyValues()


def oracle(mixer: Minimal, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): scores by the full matrices of each option, values before they are read."""
    n, c, d = len(x), mixer.width, mixer.width // mixer.heads
    eye = torch.eye(c, dtype=x.dtype)
    wq, wk = eye, eye
    if mixer.triangle is not None:
        cell = iter(mixer.triangle)
        lower = [[next(cell) if j <= i else torch.zeros((), dtype=x.dtype) for j in range(c)] for i in range(c)]
        t = torch.stack([torch.stack(row) for row in lower])
        if mixer.similarity == "triangular":
            wq = wk = t.T
        else:
            wq = torch.stack([torch.stack([lower[max(i, j)][min(i, j)] for j in range(c)]) for i in range(c)])
    elif mixer.q is not None:
        wq = mixer.q.weight
        wk = {"separate": mixer.k.weight if mixer.k else eye, "shared": wq, "collapsed": eye}[mixer.similarity]
    wv = eye if mixer.v is None else mixer.v.weight
    rows = []
    for i in range(n):
        read, seen = [], visible[i].nonzero().flatten().tolist()
        for head in range(mixer.heads):
            own = slice(head * d, head * d + d)
            s = torch.stack([(wq[own] @ x[i]) @ (wk[own] @ x[j]) / d**0.5 for j in seen])
            e = torch.exp(s - s.max().detach())
            read.append(sum(w * (wv[own] @ x[j]) for w, j in zip(e / e.sum(), seen, strict=True)))
        row = torch.cat(read)  # type: ignore[arg-type]
        rows.append(row if mixer.out is None else mixer.out.weight @ row)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Minimal]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        Minimal(width, heads),
        Minimal(width, heads, "shared", "full"),
        Minimal(width, heads, "separate"),
        Minimal(width, 1, "collapsed", "collapsed"),
        Minimal(width, 1, "mirrored", "none"),
        Minimal(width, 1, "triangular", "full"),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Minimal:
    """One matrix in all: W_Q = W_K for each head, and the tokens as values."""
    return Minimal(heads * size, **{"heads": heads, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the options promise, and how far off it is."""
    torch.manual_seed(0)
    c, n = 16, 11
    x = torch.randn(2, n, c, dtype=torch.float64)
    plain, full = Attention(c, 4).double(), Minimal(c, 4, "separate", "full").double()
    p = plain.projections
    full.q, full.k, full.v, full.out = p.q, p.k, p.v, p.out
    yield "separate and full is plain attention", largest(full(x, Causal()) - plain(x, Causal()))

    plain, one = Attention(c, 1).double(), Minimal(c, 1, "collapsed", "collapsed").double()
    p = plain.projections
    assert one.q is not None
    assert one.out is not None
    with torch.no_grad():
        one.q.weight.copy_(p.k.weight.T @ p.q.weight)
        one.out.weight.copy_(p.out.weight @ p.v.weight)
    yield "for one head, four matrices are two", largest(one(x, Causal()) - plain(x, Causal()))

    for similarity in ("mirrored", "triangular"):
        mixer = Minimal(c, 1, similarity).double()
        scores = mixer.queries(x) @ x.mT
        yield f"{similarity}: similarity is symmetric", largest(scores - scores.mT)
    yield "triangular: no token is unlike itself", largest(scores.diagonal(dim1=1, dim2=2).clamp(max=0))
    shared = Minimal(c, 4).double()
    q = shared._split(shared.queries(x))
    read = attend(q, q, shared._split(x), Causal()).transpose(1, 2).flatten(2)
    yield "shared: queries are the keys", largest(shared(x, Causal()) - read)
    for without in (mixer, shared):
        out = without(x)
        over = out - x.amax(1, keepdim=True), x.amin(1, keepdim=True) - out
        yield "without values, what comes out lies between the tokens", largest(torch.cat(over).clamp(min=0))

    first, second = (Minimal(c, 1, "collapsed", "collapsed").double() for _ in range(2))
    stacked = [Minimal(c, 1, "collapsed", "none").double() for _ in range(2)]
    (q1, out1), (q2, out2) = ([f.weight for f in (layer.q, layer.out) if f is not None] for layer in (first, second))
    with torch.no_grad():
        for layer, weight in zip(stacked, (q1, out1.T @ q2 @ out1), strict=True):
            next(layer.parameters()).copy_(weight)
    by_one = stacked[1](stacked[0](x, Causal()), Causal()) @ (out2 @ out1).T
    yield "two layers in a row, S + 1 matrices for S layers", largest(by_one - second(first(x, Causal()), Causal()))

    counts = {
        ("separate", "full"): 4 * c**2,
        ("shared", "full"): 3 * c**2,
        ("collapsed", "collapsed"): 2 * c**2,
        ("collapsed", "none"): c**2,
        ("shared", "none"): c**2,
        ("mirrored", "none"): c * (c + 1) // 2,
        ("triangular", "none"): c * (c + 1) // 2,
    }
    for (similarity, values_), wanted in counts.items():
        mixer = Minimal(c, 1, similarity, values_).double()
        count = sum(p.numel() for p in mixer.parameters())
        yield f"{similarity} similarity, {values_} values: {wanted} parameters", float(abs(count - wanted))
        cache = mixer.new_cache()
        for i in range(n):
            mixer(x[:, i : i + 1], Causal(), cache=cache)
        kept = c if similarity in SIMILARITIES[2:] else 2 * c
        yield f"{similarity} similarity: {kept} numbers kept a token", float(abs(cache.nbytes / (2 * n * 8) - kept))
    mixer.rotary = Rotary()  # a layer that rotates what it has kept
    cache = mixer.new_cache()
    parts = torch.cat([mixer(part, Causal(), cache=cache) for part in x.split((4, 1, 6), 1)], 1)
    yield "decoding with rotation is one pass", largest(parts - mixer(x, Causal()))
