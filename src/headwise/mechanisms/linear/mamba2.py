"""Mamba-2: a state space model with one decay a head, which is linear attention with keys that all heads of a group share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Tokens, largest, shake
from .._norms import rms_normed
from .._states import Pass, Reading, StateMixer, begin
from ._fading import Fading
from ._parts import ShortConvolutions

CARD = Card(
    paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    year=2024,
    room="linear",
    source=(
        "arXiv:2405.21060, sec. 5 to 7, and the authors' code: x, B and C go through a short convolution with bias and SiLU, steps "
        "are softplus(x W + b) for each head, y = SSM(x) + D x is gated by SiLU(z), then normed (RMS, 1e-5, weights; by groups). "
        "Attention's q, k and v are C, B and x times the step, without a scale. Twice the width inside. The paper's state is "
        "twice as large as a head (128 and 64), which is kept at other sizes. No first states that are trained, no limits of steps"
    ),
)


class Mamba2(StateMixer):
    """S_t = exp(-step_t exp(A)) S_(t-1) + B_t (step_t x_t)^T; y_t = S_t^T C_t + D x_t.

    Args:
        heads: of expand * width / heads channels. state: numbers that each of these keeps, default twice as many.
        groups: of heads, each with its own B and C. taps: of the convolution; 0 for none.
    """

    cannot = {"full": "its state takes tokens in their order"}

    def __init__(
        self, width: int, heads: int, *, expand: int = 2, state: int | None = None, groups: int = 1, taps: int = 4
    ) -> None:
        super().__init__()
        inner = expand * width
        if inner % heads or heads % groups:
            raise ShapeError(f"{heads} heads must divide expand * width = {inner} and be a multiple of {groups} groups")
        self.width, self.heads, self.groups = width, heads, groups
        self.state = 2 * inner // heads if state is None else state
        keys = groups * self.state
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (keys, keys, inner))
        self.gate, self.step = nn.Linear(width, inner, bias=False), nn.Linear(width, heads, bias=False)
        self.convolutions = ShortConvolutions({"q": keys, "k": keys, "v": inner}, taps, bias=True)
        self.fading = Fading(heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.weight = nn.Parameter(torch.ones(inner))
        self.back = nn.Linear(inner, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        parts = (F.silu(self.convolutions(name, part(x), now)) for name, part in (("q", self.q), ("k", self.k), ("v", self.v)))
        counts = (self.groups, self.groups, self.heads)
        q, k, v = (t.unflatten(-1, (count, -1)).transpose(1, 2) for t, count in zip(parts, counts, strict=True))
        q, k = (t.repeat_interleave(self.heads // self.groups, 1) for t in (q, k))
        return Reading(q, k, v, *self.fading(self.step(x)))

    def beside(self, out: Tensor, given: Reading) -> Tensor:
        """See `StateMixer.beside`: the skip of each head."""
        return out + self.skip[:, None, None] * given.v

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        y = out.transpose(1, 2).flatten(2).to(torch.promote_types(x.dtype, torch.float32)) * F.silu(self.gate(x))
        normed = rms_normed(y.unflatten(-1, (self.groups, -1)), 1e-5).flatten(2) * self.weight
        mapped: Tensor = self.back(normed.to(x.dtype))
        return mapped


def oracle(mixer: Mamba2, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): the recurrence, for each channel of each head by itself."""
    n, h, groups, size = len(x), mixer.heads, mixer.groups, mixer.state

    def near(name: str) -> Tensor:
        rows = x @ getattr(mixer, name).weight.T
        if name in mixer.convolutions.weights:
            taps, bias = mixer.convolutions.weights[name], mixer.convolutions.biases[name]
            padded = F.pad(rows.T[None], (taps.shape[1] - 1, 0))
            rows = F.conv1d(padded, taps[:, None], bias, groups=len(taps))[0].T
        return rows / (1 + torch.exp(-rows))

    c, b, v = near("q").view(n, groups, size), near("k").view(n, groups, size), near("v").view(n, h, -1)
    step = torch.log(1 + torch.exp(x @ mixer.step.weight.T + mixer.fading.bias))
    gate = x @ mixer.gate.weight.T
    gate = gate / (1 + torch.exp(-gate))
    states, rows = torch.zeros(h, v.shape[2], size, dtype=x.dtype), []
    for t in range(n):
        of = torch.arange(h) // (h // groups)
        fade = torch.exp(-torch.exp(mixer.fading.rate) * step[t])
        states = fade[:, None, None] * states + (step[t, :, None] * v[t])[:, :, None] * b[t, of][:, None]
        y = (states * c[t, of][:, None]).sum(-1) + mixer.skip[:, None] * v[t]
        y = (y.flatten() * gate[t]).view(groups, -1)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        rows.append(mixer.back.weight @ (y.flatten() * mixer.weight))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Mamba2]:
    """Settings that the conformance checks run."""
    made = [Mamba2(heads * size, heads), Mamba2(heads * size, heads, expand=1, state=6, groups=2, taps=0)]
    for mixer in made:
        shake([mixer.skip, mixer.weight, mixer.fading.bias, *mixer.convolutions.biases.values()], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mamba2:
    """The paper's: twice the width inside, a state of twice a head's size (64 and 128 at heads of 32), convolutions of 4 tokens."""
    return Mamba2(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    mixer = Mamba2(32, 4).double()
    q, k, v, decay, step, *_ = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    assert decay is not None
    assert step is not None
    total = decay.cumsum(2)
    dual = torch.exp((total[..., None] - total[..., None, :]).tril()).tril() * (q @ k.mT) * step[..., None, :]
    yield "the duality: a semiseparable matrix of decays times C B^T, by steps", largest(mixer.read(x, Causal()) - dual @ v)
    mixer.step.weight.zero_()
    mixer.fading.bias.fill_(1.0).expm1_().log_()
    i = torch.arange(40)
    gamma = torch.exp(-mixer.fading.rate.exp())[:, None, None] ** (i[:, None] - i).clamp(min=0)
    yield "steps of one: retention", largest(mixer.weights(x, Causal()) - (q @ k.mT * gamma).tril())
    mixer.fading.rate.fill_(80.0)
    own = ((q * k).sum(-1, keepdim=True) + mixer.skip[:, None, None]) * v
    yield "endless decay: each token reads its own value, and skips", largest(mixer(x, Causal()) - mixer.finish(own, x))
    shared = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    yield "all heads of a group have the same keys and queries", max(largest(t - t[:, :1]) for t in shared[:2])
