"""Scores of complex numbers: each head turns the angle between a query and a key in a way of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.read import repeat_heads
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Attention, Keys, Mechanism, Outputs, Positions, Queries, Values, largest, shake
from .._rotary import Rotary

CARD = Card(
    paper="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector Attention",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2505.10222 (withdrawn by its authors) and the first author's code, which came after: Adapt is "
        "delta * angle + b for each head and dimension, Delta the angles of rotary embedding, scores are not divided by sqrt(d). "
        "That code draws delta from N(0, 1 / (d / 2)), which nearly ignores the angles of queries and keys at first "
        "(start='paper'); the default here is ones, which is rotary embedding. Its frequencies in bfloat16 are not followed"
    ),
    status="follows the first author's code; whether the withdrawn paper has the same Adapt is not known",
)
EPSILON = 1e-9  # under the root of a magnitude


class ComplexFormer(Mechanism):
    """Takes the two halves of q and k as complex numbers and adds up |q| |k| cos(delta (angle of q - of k) + b + turn by distance).

    Exact at the cost of plain attention: both angles go into queries and keys of the same width.

    Args:
        heads, head_dim: of queries; each head has its own delta and b, of head_dim / 2 numbers. start: of delta, "ones" or "paper".
        base: of the wave lengths, as of `Rotary`.
    """

    positional = True

    def __init__(self, heads: int, head_dim: int, *, start: str = "ones", base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ShapeError(f"{head_dim} dimensions of a head are no complex numbers; the number must be even")
        if start not in ("ones", "paper"):
            raise ShapeError(f"delta starts as 'ones' or 'paper', not {start!r}")
        half = head_dim // 2
        self.base = base
        self.delta = nn.Parameter(torch.ones(heads, half) if start == "ones" else torch.randn(heads, half) * half**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, half))

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        heads, half = self.delta.shape
        if (q.shape[1], q.shape[3]) != (heads, 2 * half):
            raise ShapeError(f"made for {heads} heads of {2 * half}, the queries have {q.shape[1]} of {q.shape[3]}")
        n, m = q.shape[2], k.shape[2]
        own, theirs = places.get("query_positions"), places.get("key_positions")
        if theirs is not None:  # what empty slots hold must not reach delta's gradient
            k = torch.where((torch.atleast_2d(theirs) >= 0)[:, None, :, None], k, 0)
        own = torch.arange(m - n, m, device=q.device) if own is None else own
        theirs = torch.arange(m, device=q.device) if theirs is None else theirs
        groups = heads // k.shape[1]  # a shared key is turned by each of its heads
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
        return attend(self._turned(q, own, self.bias), self._turned(k, theirs), v, *stages, scale=1.0, **places)

    def _turned(self, x: Tensor, places: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b, h, n, d): the same magnitudes, at the angles delta * angle + bias + place * frequency."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        real, imaginary = wide.chunk(2, -1)
        magnitude = torch.sqrt(real.square() + imaginary.square() + EPSILON)
        angle = torch.atan2(imaginary, real)
        half = angle.shape[-1]
        frequency = self.base ** (-torch.arange(half, device=x.device, dtype=wide.dtype) / half)
        turn = torch.atleast_2d(places).to(wide.dtype)[:, None, :, None] * frequency
        angle = self.delta.to(wide.dtype)[:, None] * angle + turn
        if bias is not None:
            angle = angle + bias.to(wide.dtype)[:, None]
        return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], -1).to(x.dtype)


def oracle(mechanism: ComplexFormer, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), a pair at a time."""
    h, n, d = q.shape
    m, group = k.shape[1], h // k.shape[0]
    frequency = torch.tensor([mechanism.base ** (-2 * i / d) for i in range(d // 2)], dtype=q.dtype)
    out = []
    for head in range(h):
        for i in range(n):
            scores, seen = [], visible[i].nonzero().flatten().tolist()
            for j in seen:
                one, other = q[head, i], k[head // group, j]
                angles = torch.atan2(one[d // 2 :], one[: d // 2]) - torch.atan2(other[d // 2 :], other[: d // 2])
                between = mechanism.delta[head] * angles + mechanism.bias[head] + (m - n + i - j) * frequency
                sizes = [(x[: d // 2] ** 2 + x[d // 2 :] ** 2 + EPSILON) ** 0.5 for x in (one, other)]
                scores.append((sizes[0] * sizes[1] * torch.cos(between)).sum())
            out.append(torch.softmax(torch.stack(scores), 0) @ v[head // group, seen])
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[ComplexFormer]:
    """Settings that the conformance checks run."""
    return [_filled(heads, size), _filled(heads, size, start="paper", base=100.0)]


def _filled(heads: int, size: int, **options: Any) -> ComplexFormer:
    made = ComplexFormer(heads, size, **options)
    shake(made.parameters(), seed=heads)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> ComplexFormer:
    """From rotary embedding."""
    return ComplexFormer(heads, size, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    at = torch.arange(9)
    plain, filled = ComplexFormer(2, 8).double(), _filled(2, 8).double()
    rotary = Rotary()
    turned = attend(rotary(_lengthened(q), at), rotary(_lengthened(k), at), v, Causal(), scale=1.0)
    yield "delta of one and b of zero are rotary embedding, not divided by sqrt(d)", largest(plain(q, k, v, Causal()) - turned)
    moved = filled(q, k, v, Causal(), query_positions=at + 1000, key_positions=at + 1000)
    yield "only distances matter", largest(moved - filled(q, k, v, Causal()))
    nn.init.constant_(plain.delta, 2.0)
    above, below = torch.full_like(q, 1e-13), torch.full_like(q, -1e-13)
    above[..., :4] = below[..., :4] = -1.0
    yield "with whole deltas an angle of pi is one of -pi", largest(plain(above, k, v) - plain(below, k, v))
    nn.init.zeros_(filled.delta)
    here = torch.zeros(9, dtype=torch.long)
    got = filled(q, k, v, query_positions=here, key_positions=here)
    sizes = [_lengthened(x).unflatten(-1, (2, 4)).norm(dim=-2) for x in (q, k)]
    blind = attend(sizes[0] * filled.bias.cos()[:, None], sizes[1], v, scale=1.0)
    yield "delta of zero at one place: |q| |k| cos b, whatever the angles", largest(got - blind)
    zero = torch.zeros_like(q).requires_grad_()
    (slope,) = torch.autograd.grad(plain(zero, zero, v, Causal()).square().sum(), zero)
    yield "what is zero has no angle, and no gradient", largest(slope)
    yield "what empty slots hold does not reach delta", _slope_of_empty_slots(q, k, v)
    yield (
        "one delta and one b for each two numbers of a head",
        float(sum(p.numel() for p in ComplexFormer(16, 64).parameters()) - 1024),
    )
    x = torch.randn(1, 9, 16, generator=generator)
    kept = []
    for mixer in (Attention(16, 2, ComplexFormer(2, 8)), Attention(16, 2)):
        cache = mixer.new_cache()
        mixer(x, Causal(), cache=cache)
        kept.append(cache.nbytes)
    yield "the cache holds no more than that of plain attention", float(kept[0] - kept[1])


def _slope_of_empty_slots(q: Tensor, k: Tensor, v: Tensor) -> float:
    made, at = _filled(2, 8).double(), torch.arange(9)
    (alone,) = torch.autograd.grad(made(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], Causal()).square().sum(), made.delta)
    places = torch.where(at < 2, -1, at - 2)
    k = torch.where((at < 2)[:, None], torch.nan, k)
    out = made(q, k, v, Causal(), query_positions=places, key_positions=places)[:, :, 2:]
    return largest(torch.autograd.grad(out.square().sum(), made.delta)[0] - alone)


def _lengthened(x: Tensor) -> Tensor:
    """x with the epsilon that magnitudes have."""
    square = x.unflatten(-1, (2, -1)).square().sum(-2)
    return x * ((square + EPSILON) / square).sqrt().repeat(1, 1, 1, 2)
