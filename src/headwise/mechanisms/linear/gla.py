"""Gated linear attention: linear attention whose state's channels decay by gates that each token says."""

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
from .._norms import Rms
from .._states import Pass, Reading, StateMixer, begin
from ._fading import LowRank

CARD = Card(
    paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
    year=2023,
    room="linear",
    source=(
        "arXiv:2312.06635, sec. 4, and the authors' library: gates sigmoid(x W_1 W_2 + b)^(1/16) of rank 16 on the channels of "
        "keys, keys of half the width together, values of all of it, queries divided by sqrt(d), outputs normed by heads times "
        "SiLU(x W_r). The norm is the library's RMS norm with weights (1e-5) where the paper says LayerNorm. No convolutions, "
        "feature maps or rotation, and no gates on values, as in its final model"
    ),
)


class Gla(StateMixer):
    """S_t = diag(alpha_t) S_(t-1) + k_t v_t^T, read by S_t^T q_t; alpha_t = sigmoid(low rank of x_t)^(1 / temperature).

    Args:
        heads: of values of width / heads. key_size: of a head, default half of that. rank: of the map to gates.
        temperature: the larger, the slower the decay.
    """

    cannot = {"full": "its state takes tokens in their order"}

    def __init__(self, width: int, heads: int, *, key_size: int | None = None, rank: int = 16, temperature: float = 16.0) -> None:
        super().__init__()
        if width % heads or (key_size is None and width // heads % 2):
            raise ShapeError(f"width {width} is no multiple of {heads} heads of an even size; give key_size where it is odd")
        self.width, self.heads, self.temperature = width, heads, temperature
        self.key_size = width // heads // 2 if key_size is None else key_size
        keys = heads * self.key_size
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (keys, keys, width))
        self.alpha = LowRank(width, rank, keys, bias=True)
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = Rms(width // heads, 1e-5)
        self.back = nn.Linear(width, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        parts = (self.q(x) * self.key_size**-0.5, self.k(x), self.v(x), self.alpha(x))
        q, k, v, alpha = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return Reading(q, k, v, F.logsigmoid(alpha.to(torch.promote_types(x.dtype, torch.float32))) / self.temperature)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.back((self.norm(out).transpose(1, 2).flatten(2) * F.silu(self.gate(x))).to(x.dtype))
        return mapped


def oracle(mixer: Gla, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    h, d, dv = mixer.heads, mixer.key_size, mixer.width // mixer.heads
    states, rows = [torch.zeros(d, dv, dtype=x.dtype) for _ in range(h)], []
    for row in x:
        q, k, v = (part.weight @ row for part in (mixer.q, mixer.k, mixer.v))
        alpha = 1 / (1 + torch.exp(-(mixer.alpha.up.weight @ (mixer.alpha.down.weight @ row) + mixer.alpha.up.bias)))
        gate = mixer.gate.weight @ row
        read = []
        for head in range(h):
            own, values = slice(head * d, head * d + d), v[head * dv : head * dv + dv]
            kept = torch.diag(alpha[own] ** (1 / mixer.temperature)) @ states[head]
            states[head] = kept + torch.outer(k[own], values)
            out = q[own] @ states[head] / d**0.5
            read.append(out / torch.sqrt((out * out).mean() + 1e-5) * mixer.norm.weight)
        rows.append(mixer.back.weight @ (torch.cat(read) * gate / (1 + torch.exp(-gate))))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Gla]:
    """Settings that the conformance checks run."""
    made = [Gla(heads * size, heads), Gla(heads * size, heads // 2, key_size=3, rank=2, temperature=1.5)]
    for mixer in made:
        shake([mixer.norm.weight], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Gla:
    """The paper's: keys of half the width together, gates of rank 16 and temperature 16."""
    return Gla(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    mixer = Gla(32, 4, temperature=2.0).double()
    q, k, v, decay, *_ = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    assert decay is not None
    total = decay.cumsum(2)
    taken_apart = ((q * total.exp()) @ (k * (-total).exp()).mT).tril()
    yield (
        "its parallel form: queries times running products of gates, keys over them",
        largest(mixer.read(x, Causal()) - taken_apart @ v),
    )
    linear = (q @ k.mT).tril() @ v
    mixer.temperature = 1e300
    yield "an endless temperature: linear attention", largest(mixer.read(x, Causal()) - linear)
    mixer.temperature = 2.0
    mixer.alpha.up.bias.fill_(1e3)
    yield "gates that are open: linear attention", largest(mixer.read(x, Causal()) - linear)
    mixer.alpha.up.bias.fill_(-1e4)
    own = (q * k).sum(-1, keepdim=True) * v
    yield "gates that are closed: each token reads its own value only", largest(mixer.read(x, Causal()) - own)
    mixer.alpha.up.weight.zero_()
    mixer.alpha.up.bias.fill_(0.7)
    i = torch.arange(70).double()
    fade = mixer.alpha.up.bias[0].sigmoid() ** ((i[:, None] - i).clamp(min=0).div(2))
    yield "the same gate everywhere: retention", largest(mixer.weights(x, Causal()) - (q @ k.mT * fade).tril())
    made = sized(4, 16, 1)
    maps = sum(part.weight.numel() for part in (made.q, made.k, made.v, made.gate, made.back))
    yield "its large maps have 4 width^2 weights, as softmax attention's", float(maps - 4 * 64**2)
