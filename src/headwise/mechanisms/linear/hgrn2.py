"""HGRN2: a gated linear recurrence whose state is a matrix: what its gates forget of a channel is what that channel takes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur
from ...stages.causal import Causal
from .._mixer import Tokens, largest, shake
from .._norms import Rms
from .._states import Pass, Reading, StateMixer, begin

CARD = Card(
    paper="HGRN2: Gated Linear RNNs with State Expansion",
    year=2024,
    room="linear",
    source=(
        "arXiv:2404.07904, sec. 3, and flash-linear-attention: forget gates f = lower + (1 - lower) sigmoid(x W_f), keys 1 - f, "
        "queries (the output gates) SiLU(x W_q), values x W_v, an RMS norm over all channels (1e-5), no scale. original=True has "
        "the authors' first code's sigmoid of queries and SiLU of values; its biases and LayerNorm are not built. Lower bounds "
        "rise from layer to layer and are trained together: LowerBounds, the running sum of a softmax over layers less its first"
    ),
)


class LowerBounds(nn.Module):
    """Lower bounds of the forget gates of a stack's layers, for each channel: 0 in the first, then rising, below 1.

    One of these is given to the mixers of all layers; it is then trained with them.
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(layers, width))

    def forward(self, layer: int) -> Tensor:
        """(width,), in float32 at least."""
        parts = self.table.to(torch.promote_types(self.table.dtype, torch.float32)).softmax(0)
        bound: Tensor = parts[1 : layer + 1].sum(0)
        return bound


class Hgrn2(StateMixer):
    """S_t = diag(f_t) S_(t-1) + (1 - f_t) v_t^T, read by S_t^T q_t.

    Args:
        heads: of width / heads. lower: what forget gates do not fall below, from 0 up to 1, or the `LowerBounds` of a stack.
        layer: the number of this one in it. original: queries go through a sigmoid and values through SiLU.
    """

    cannot = {"full": "its state takes tokens in their order"}

    def __init__(self, width: int, heads: int, *, lower: float | LowerBounds = 0.0, layer: int = 0, original: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if isinstance(lower, LowerBounds):
            layers, channels = lower.table.shape
            if channels != width or not 0 <= layer < layers:
                raise ShapeError(f"lower bounds of {layers} layers of {channels} channels; this is layer {layer}, width {width}")
        elif not 0 <= lower < 1:
            raise ShapeError(f"lower {lower} must be from 0 up to, but not, 1")
        self.width, self.heads, self.lower, self.layer, self.original = width, heads, lower, layer, original
        self.q, self.forget, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = Rms(width, 1e-5)
        self.out = nn.Linear(width, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        forget = self.forget(x).to(torch.promote_types(x.dtype, torch.float32))
        lower = self.lower(self.layer) if isinstance(self.lower, LowerBounds) else forget.new_tensor(self.lower)
        key = (1 - lower) * torch.sigmoid(-forget)
        # log f from log sigmoid, so that gates far below zero keep a gradient; the least bound is too small to be seen
        decay = torch.logaddexp(F.logsigmoid(forget), lower.clamp(min=1e-30).log() + F.logsigmoid(-forget))
        q, v = self.q(x), self.v(x)
        q, v = (torch.sigmoid(q), F.silu(v)) if self.original else (F.silu(q), v)
        return Reading(*(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, key, v, decay)))

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(self.norm(out.transpose(1, 2).flatten(2)).to(x.dtype))
        return mapped


def oracle(mixer: Hgrn2, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    d = mixer.width // mixer.heads
    lower: Any = mixer.lower
    if isinstance(lower, LowerBounds):
        parts = torch.exp(lower.table) / torch.exp(lower.table).sum(0)
        lower = parts.cumsum(0)[mixer.layer] - parts[0]
    states, rows = [torch.zeros(d, d, dtype=x.dtype) for _ in range(mixer.heads)], []
    for row in x:
        q, v = mixer.q.weight @ row, mixer.v.weight @ row
        sigmoid = 1 / (1 + torch.exp(-q))
        q, v = (sigmoid, v / (1 + torch.exp(-v))) if mixer.original else (q * sigmoid, v)
        f = lower + (1 - lower) / (1 + torch.exp(-(mixer.forget.weight @ row)))
        read = []
        for head in range(mixer.heads):
            own = slice(head * d, head * d + d)
            states[head] = f[own, None] * states[head] + torch.outer(1 - f[own], v[own])
            read.append(q[own] @ states[head])
        out = torch.cat(read)
        rows.append(mixer.out.weight @ (out / torch.sqrt((out * out).mean() + 1e-5) * mixer.norm.weight))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Hgrn2]:
    """Settings that the conformance checks run."""
    width = heads * size
    bounds = LowerBounds(3, width)
    made = [Hgrn2(width, heads), Hgrn2(width, heads // 2, lower=0.3, original=True), Hgrn2(width, heads, lower=bounds, layer=1)]
    shake([bounds.table, *(mixer.norm.weight for mixer in made)], seed=2, by=0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Hgrn2:
    """The paper's, as a first layer: no lower bound."""
    return Hgrn2(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    bounds = LowerBounds(4, 32).double()
    rising = torch.stack([bounds(layer) for layer in range(4)])
    yield "lower bounds start even, from 0: layer / layers", largest(rising - torch.arange(4, dtype=torch.float64)[:, None] / 4)
    bounds.table.normal_()
    mixer = Hgrn2(32, 4, lower=bounds, layer=3).double()
    q, k, v, decay, *_ = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    assert decay is not None
    yield "what is forgotten is what is taken in: key and gate sum to one", largest(k + decay.exp() - 1)
    ones = recur(q, k, torch.ones_like(v), decay=decay).state
    yield "values of one: the state is one less the product of all gates", largest(ones + decay.sum(2).exp()[..., None] - 1)
    yield "so it stays a mean of values", largest(ones - ones.clamp(0, 1))
    mixer = Hgrn2(32, 4, lower=0.2).double()
    mixer.forget.weight.zero_()
    q, *_ = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    i = torch.arange(40)
    fade = 0.4 * 0.6 ** (i[:, None] - i).clamp(min=0).double()
    yield "gates that do not change: retention", largest(mixer.weights(x, Causal()) - (q.sum(-1, keepdim=True) * fade).tril())
