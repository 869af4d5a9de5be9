"""Adaptive filter attention: tokens as noisy observations of a linear system, weighed by how precisely they foretell each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Block, RowScore, Stage, Weights
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.window import Window
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Real, Tokens, largest, shake

CARD = Card(
    paper="Attention as an Adaptive Filter",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2509.04154 and the authors' code of the isotropic variant: complex states of each head, decay and noises of each "
        "head, frequencies in pairs of both signs, robust or exponential weights, weights times the decay after the softmax. As "
        "there, keys and values share the dynamics, decay and frequencies are scaled by the length of the texts, exponents end at "
        "10, and the output is mixed with the token's own value by a gate, which the code draws but does not train; here it is a "
        "parameter. Its other weights (no prior, linear ones), norms of states and added noise are left out"
    ),
    status="the isotropic variant; the one with dynamics of each dimension, of cost n^2 d memory, is left out",
)
FARTHEST = 10.0  # where decay ends: exponents are no larger
LEAST = 1e-5  # of decay and noises


@dataclass(frozen=True, eq=False)
class Dynamics:
    """What a head believes of its states: each (heads,). decay: None for none.

    process, measured, anchored: variances of noise, added by time, of keys and of queries. freedom: of the residuals, nu.
    sharpness: on logits, tau squared.
    """

    decay: Tensor | None
    process: Tensor
    measured: Tensor
    anchored: Tensor
    freedom: Tensor
    sharpness: Tensor

    def carried(self, distance: Tensor) -> Tensor:
        """What is left of a state after some time: (..., heads, c, m) for distances (..., 1, c, m)."""
        if self.decay is None:
            return torch.ones_like(distance)
        return torch.exp(-(_each(self.decay, distance) * distance).clamp(max=FARTHEST))

    def variance(self, distance: Tensor) -> Tensor:
        """Of the difference between a query and a key carried to its time."""
        process, measured, anchored = (_each(t, distance) for t in (self.process, self.measured, self.anchored))
        if self.decay is None:
            return process * distance + measured + anchored
        decay = _each(self.decay, distance)
        twice = -2 * (decay * distance).clamp(max=FARTHEST)
        return process * -torch.expm1(twice) / (2 * decay) + measured * torch.exp(twice) + anchored


def _each(of_head: Tensor, like: Tensor) -> Tensor:
    return of_head.to(like)[:, None, None]


def _distance(block: Block) -> Tensor:
    return block.distance().abs().to(block.dtype)


@dataclass(frozen=True, eq=False)
class Precision(RowScore):
    """Scores q . k of states turned back to time 0 -> logits of the precision with which each key foretells the query."""

    dynamics: Dynamics
    robust: bool

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        distance = _distance(block)
        carried, variance = self.dynamics.carried(distance), self.dynamics.variance(distance)
        query, key = (t.to(scores).square().sum(-1) for t in (block.query, block.key))
        residual = query[..., None] + carried.square() * key[..., None, :] - 2 * carried * scores  # |q - carried k|^2
        ratio = residual.clamp(min=0) / (_each(self.dynamics.freedom, scores) * (block.query.shape[-1] // 2) * variance)
        return _each(self.dynamics.sharpness, scores) * (-variance.log() - (ratio.log1p() if self.robust else ratio))


@dataclass(frozen=True, eq=False)
class Carried(Weights):
    """Multiplies weights by what is left of a key's value at the query's time."""

    dynamics: Dynamics

    def edit(self, weights: Tensor, block: Block) -> Tensor:
        return weights * self.dynamics.carried(_distance(block)).to(weights)


class AdaptiveFilterAttention(Mixer):
    """Carries keys and values to each query's time by a learned linear system, and weighs them by how well they fit there.

    Weights are larger for keys near in time, whose noise has grown less, and for those that foretell the query; robust ones
    fall with the residual as a Student distribution does. It tells places apart by decay and rotation.

    Args:
        tokens: length of the texts, by which decay and frequencies are scaled. head_dim: complex dimensions of a head's states,
            even; default width / heads. robust: else weights fall exponentially with the squared residual. decay: whether
            states decay. process_noise: whether noise grows with time. gate: mixes in a token's own value. predict: carries
            what was read one step on.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int,
        *,
        head_dim: int | None = None,
        robust: bool = True,
        decay: bool = True,
        process_noise: bool = True,
        gate: bool = True,
        predict: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads; give head_dim")
        size = width // heads if head_dim is None else head_dim
        if size % 2:
            raise ShapeError(
                f"frequencies stand in pairs of both signs, and a head of {size} dimensions has no pairs; head_dim must be even"
            )
        self.width, self.heads, self.size, self.tokens = width, heads, size, tokens
        self.robust, self.predict = robust, predict
        self.q, self.k, self.v = (nn.Linear(width, 2 * heads * size) for _ in range(3))
        self.out = nn.Linear(2 * heads * size, width)
        for linear in (self.q, self.k, self.v, self.out):
            _fill_complex(linear, rows=linear is not self.out)
        self.decay = nn.Parameter(torch.randn(heads)) if decay else None
        self.frequency = nn.Parameter(torch.randn(heads, size // 2))
        self.process = nn.Parameter(torch.randn(heads)) if process_noise else None
        self.measured, self.anchored = nn.Parameter(torch.randn(heads)), nn.Parameter(torch.randn(heads))
        self.freedom, self.sharpness = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(heads))
        self.gate = nn.Parameter(torch.rand(heads, size)) if gate else None

    def dynamics(self, dtype: torch.dtype) -> Dynamics:
        """What its parameters mean, in this dtype."""
        decay = None
        if self.decay is not None:
            decay = torch.sigmoid(-self.decay.to(dtype)) * 10 / (2 * self.tokens) + LEAST
        measured, anchored, freedom = (F.softplus(t.to(dtype)) + LEAST for t in (self.measured, self.anchored, self.freedom))
        process = torch.zeros_like(measured) if self.process is None else F.softplus(self.process.to(dtype))
        return Dynamics(decay, process, measured, anchored, freedom, self.sharpness.to(dtype).square())

    def frequencies(self, dtype: torch.dtype) -> Tensor:
        """(heads, size): by how much a step turns each dimension."""
        half = self.frequency.to(dtype) * 10 * 2 * math.pi / (2 * self.tokens)
        return torch.stack([half, -half], -1).flatten(1)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (self._states(f(x)) for f in (self.q, self.k, self.v))
        cache = self.new_cache() if cache is None else cache
        at = cache.next_places(q, attention_mask).clamp(min=0)
        angles = at[:, None, :, None].to(wide) * self.frequencies(wide)[:, None]
        seen = cache.extend(_turned(q, -angles), _turned(k, -angles), _turned(v, -angles), attention_mask)
        dynamics = self.dynamics(wide)
        filtering = (Precision(dynamics, self.robust), Carried(dynamics))
        out = _turned(attend(seen.q, seen.k, seen.v, *stages, *filtering, scale=1.0, **seen.places), angles)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate)[:, None].repeat(1, 1, 2)
            out = gate * out + (1 - gate) * v
        if self.predict:
            left = 1.0 if dynamics.decay is None else torch.exp(-dynamics.decay)[:, None, None].to(out.dtype)
            out = left * _turned(out, self.frequencies(wide)[:, None])
        merged: Tensor = self.out(out.unflatten(-1, (2, -1)).permute(0, 2, 3, 1, 4).flatten(2))
        return merged

    def _states(self, projected: Tensor) -> Tensor:
        """(b, n, 2 * heads * size) -> (b, heads, n, 2 * size): all real parts, then all imaginary ones."""
        return projected.unflatten(-1, (2, self.heads, self.size)).permute(0, 3, 1, 2, 4).flatten(-2)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding; it keeps states turned back to time 0."""
        return KeyValues()


def _fill_complex(linear: nn.Linear, rows: bool) -> None:
    """Weights of random size and phase; real and imaginary parts are rows, or columns, one after the other."""
    shape = list(linear.weight.shape)
    shape[0 if rows else 1] //= 2
    size = torch.randn(shape) * (2 / sum(shape)) ** 0.5
    phase = 2 * math.pi * torch.rand(shape)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([size * phase.cos(), size * phase.sin()], 0 if rows else 1))
        linear.bias.zero_()


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x times e^(i angles)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    real, imaginary = x.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def oracle(mixer: AdaptiveFilterAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a pair of tokens at a time, in complex numbers."""
    n, d, h = len(x), mixer.size, mixer.heads
    unit = 10 / (2 * mixer.tokens)

    def softplus(raw: Tensor | None) -> Tensor:
        return torch.zeros(h, dtype=x.dtype) if raw is None else torch.log(1 + torch.exp(raw))

    process, measured, anchored = softplus(mixer.process), softplus(mixer.measured) + 1e-5, softplus(mixer.anchored) + 1e-5
    freedom = softplus(mixer.freedom) + 1e-5

    def complexes(linear: nn.Linear) -> Tensor:
        real, imaginary = (x @ linear.weight.T + linear.bias).view(n, 2, h, d).unbind(1)
        return torch.complex(real, imaginary)

    q, k, v = complexes(mixer.q), complexes(mixer.k), complexes(mixer.v)
    rows = []
    for i in range(n):
        read = []
        for head in range(h):
            alpha = torch.zeros((), dtype=x.dtype)
            if mixer.decay is not None:
                alpha = -((1 / (1 + torch.exp(-mixer.decay[head])) - 1) * unit - 1e-5)
            omega = torch.stack([sign * raw * 2 * math.pi * unit for raw in mixer.frequency[head] for sign in (1, -1)])
            logits, carried = [], []
            for j in visible[i].nonzero().flatten().tolist():
                apart = abs(i - j)
                step = torch.exp(torch.complex(-alpha * apart, omega * (i - j)))
                residual = (q[i, head] - step * k[j, head]).abs().square().sum()
                fade = torch.exp(-2 * alpha * apart)
                grown = (1 - fade) / (2 * alpha) if alpha > 0 else torch.tensor(float(apart), dtype=x.dtype)
                variance = process[head] * grown + measured[head] * fade + anchored[head]
                ratio = residual / (freedom[head] * d * variance)
                fit = (1 + ratio) ** -1 if mixer.robust else torch.exp(-ratio)
                logits.append(mixer.sharpness[head] ** 2 * torch.log(fit / variance))
                carried.append(step * v[j, head])
            weights = torch.stack(logits).softmax(0)
            out = sum(w * c for w, c in zip(weights, carried, strict=True))
            if mixer.gate is not None:
                gate = 1 / (1 + torch.exp(-mixer.gate[head]))
                out = gate * out + (1 - gate) * v[i, head]
            if mixer.predict:
                out = torch.exp(torch.complex(-alpha.expand(d), omega)) * out
            read.append(out)
        state = torch.stack(read).flatten()  # type: ignore[arg-type]
        rows.append(torch.cat([state.real, state.imag]) @ mixer.out.weight.T + mixer.out.bias)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[AdaptiveFilterAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        AdaptiveFilterAttention(width, heads, 40),
        AdaptiveFilterAttention(width, heads, 20, robust=False, process_noise=False, predict=True),
        AdaptiveFilterAttention(width, heads, 40, decay=False, gate=False, predict=True, head_dim=6),
    ]
    for_each = ((m.freedom, m.sharpness, *(f.bias for f in (m.q, m.k, m.v, m.out))) for m in made)
    shake((p for parameters in for_each for p in parameters), seed=5, by=0.2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> AdaptiveFilterAttention:
    """Robust weights and a gate, as the authors use it in stacks."""
    return AdaptiveFilterAttention(heads * size, heads, tokens, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    double = torch.float64
    still = AdaptiveFilterAttention(16, 2, 12, robust=False, decay=False, process_noise=False, gate=False).double()
    x = torch.randn(1, 12, 16, dtype=double)
    known = still.dynamics(double)
    angles = torch.arange(12)[:, None] * still.frequencies(double)[:, None]
    q, k, v = (_turned(still._states(f(x)), -angles) for f in (still.q, still.k, still.v))
    steep = (known.sharpness / (known.freedom * 8 * (known.measured + known.anchored)))[:, None, None]
    q, k = (
        torch.cat([2 * steep * q, torch.ones_like(q[..., :1])], -1),
        torch.cat([k, -steep * k.square().sum(-1, keepdim=True)], -1),
    )
    rotary = _turned(attend(q, k, v, Causal(), scale=1.0), angles).unflatten(-1, (2, -1)).permute(0, 2, 3, 1, 4).flatten(2)
    yield (
        "without decay and process noise it is rotary attention less the keys' lengths",
        largest(still.out(rotary) - still(x, Causal())),
    )
    for robust in (True, False):
        loose = AdaptiveFilterAttention(16, 2, 12, robust=robust, gate=False).double()
        loose.freedom.data.fill_(1e13)
        known = loose.dynamics(double)
        distance = (torch.arange(12)[:, None] - torch.arange(12)).abs()[None].double()
        prior = (known.variance(distance) ** -known.sharpness[:, None, None]).tril()
        weights = prior / prior.sum(-1, keepdim=True) * known.carried(distance)
        angles = torch.arange(12)[:, None] * loose.frequencies(double)[:, None]
        read = _turned(weights @ _turned(loose._states(loose.v(x)), -angles), angles)
        told = loose.out(read.unflatten(-1, (2, -1)).permute(0, 2, 3, 1, 4).flatten(2))
        yield "when residuals do not count, precision alone weighs", largest(told - loose(x, Causal()))
    mixer = AdaptiveFilterAttention(16, 2, 12).double()
    known = mixer.dynamics(double)
    assert known.decay is not None
    time = torch.linspace(0, 30, 31, dtype=double).requires_grad_()
    grown = known.variance(time[None, None])[:, 0]
    for head in range(2):
        slope = torch.autograd.grad(grown[head].sum(), time, retain_graph=True)[0]
        flow = known.process[head] - 2 * known.decay[head] * (grown[head] - known.anchored[head])
        yield "variances obey the Lyapunov equation", largest(slope - flow)
    yield "at no distance it is the noise of key and query", largest(grown[:, 0] - known.measured - known.anchored)
    carried = torch.exp(torch.complex(-known.decay[:, None, None], mixer.frequencies(double)[:, None]) * torch.arange(12)[:, None])
    path = carried * torch.randn(1, 2, 1, 8, dtype=torch.complex128)
    turned = _turned(torch.cat([path.real, path.imag], -1), -torch.arange(12)[:, None] * mixer.frequencies(double)[:, None])
    read = attend(torch.randn_like(turned), turned, turned, Causal(), Precision(known, True), Carried(known), scale=1.0)
    yield "states that follow the dynamics are read as they are", largest(read - turned)
    large = 1e6 * turned.float()
    known = mixer.dynamics(torch.float32)
    rounded = attend(large, large, large, Causal(), Precision(known, True), Carried(known), scale=1.0)
    yield "residuals that rounding makes negative do no harm", float((~rounded.isfinite()).sum())
    late = mixer(x, Causal(), Window(5))[:, -1] - mixer(x[:, -5:], Causal())[:, -1]
    yield "only differences of times count", largest(late)
    cache = mixer.new_cache()
    mixer(x, Causal(), cache=cache)
    yield "it keeps two complex states of each token and head", float(abs(cache.nbytes - 12 * 2 * 2 * 2 * 8 * 8))
    counted = sum(p.numel() for name, p in mixer.named_parameters() if "." not in name)
    yield "a head has 6 parameters, d / 2 frequencies and d gates", float(abs(counted - 2 * (6 + 4 + 8)))
