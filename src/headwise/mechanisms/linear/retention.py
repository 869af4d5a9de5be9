"""Retention of RetNet: linear attention that fades with the distance, each head at its own rate, over rotated queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Tokens, largest
from .._norms import rms_normed
from .._rotary import Rotary
from .._states import Pass, Reading, StateMixer, begin

CARD = Card(
    paper="Retentive Network: A Successor to Transformer for Large Language Models",
    year=2023,
    room="linear",
    source=(
        "arXiv:2307.08621, sec. 2, and the authors' torchscale: gamma of a head is 1 - 2^(-5 - head), values have twice the "
        "size of keys, outputs are normed by heads (RMS without weights, 1e-6, as in their later code; GroupNorm in the paper) "
        "times SiLU(x W_g). Angles are those of RoPE on halves, as in flash-linear-attention; torchscale spaces them a little "
        "otherwise and turns neighbours. The paper's scalings of rows and of the decay's matrix cancel in the norm but for its "
        "epsilon, and are left out"
    ),
)


class Retention(StateMixer):
    """S_t = gamma S_(t-1) + k_t v_t^T, read by S_t^T q_t: weights (q_i . k_j) gamma^(i - j), normed by heads and gated.

    Args:
        heads: of keys of width / heads. expand: values of so many times that size.
        first: gamma of a head is 1 - 2^(-first - head).
    """

    cannot = {"full": "it fades with how long ago a token was"}
    rotates = True

    def __init__(self, width: int, heads: int, *, expand: int = 2, first: float = 5.0) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads, self.first = width, heads, first
        self.rotary = Rotary()
        self.q, self.k = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.v, self.gate = (nn.Linear(width, expand * width, bias=False) for _ in range(2))
        self.back = nn.Linear(expand * width, width, bias=False)
        for part in (self.q, self.k, self.v, self.gate):
            nn.init.xavier_uniform_(part.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.back.weight)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = torch.arange(self.heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        decay = torch.log1p(-torch.exp2(-self.first - heads))[None, :, None].expand(len(x), -1, x.shape[1])
        return Reading(now.rotated(q, self.rotary) * q.shape[-1] ** -0.5, now.rotated(k, self.rotary), v, decay)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.back((rms_normed(out).transpose(1, 2).flatten(2) * F.silu(self.gate(x))).to(x.dtype))
        return mapped


def oracle(mixer: Retention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), every pair of tokens; the rotation is one of complex numbers."""
    n, h = len(x), mixer.heads
    d, base = mixer.width // h, mixer.rotary.base if mixer.rotary is not None else torch.inf
    angles = base ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    q, k, v, gate = (x @ part.weight.T for part in (mixer.q, mixer.k, mixer.v, mixer.gate))
    dv = v.shape[1] // h
    rows = []
    for i in range(n):
        read = []
        for head in range(h):
            own = slice(head * d, head * d + d)
            out = torch.zeros(dv, dtype=x.dtype)
            for j in range(n):
                if visible[i, j]:
                    near, far = (torch.complex(t[own][: d // 2], t[own][d // 2 :]) for t in (q[i], k[j]))
                    score = (near * far.conj() * torch.exp(1j * (i - j) * angles)).real.sum() / d**0.5
                    out = out + score * (1 - 2 ** (-mixer.first - head)) ** (i - j) * v[j, head * dv : head * dv + dv]
            read.append(out / torch.sqrt((out * out).mean() + 1e-6))
        rows.append(mixer.back.weight @ (torch.cat(read) * gate[i] / (1 + torch.exp(-gate[i]))))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Retention]:
    """Settings that the conformance checks run."""
    return [Retention(heads * size, heads), Retention(heads * size, heads // 2, expand=1, first=1.5)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Retention:
    """The paper's: values of twice the size, gammas 1 - 1/32, 1 - 1/64, ..."""
    return Retention(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)

    def given(mixer: Retention) -> Reading:
        return mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))

    still = Retention(32, 4, first=60.0).double()
    q, k, *_ = given(still)
    yield "gamma of one: linear attention", largest(still.weights(x, Causal()) - (q @ k.mT).tril())
    gone = Retention(32, 1, first=0.0).double()
    q, k, v, *_ = given(gone)
    yield "gamma of zero: each token reads its own value only", largest(gone.read(x, Causal()) - (q * k).sum(-1, keepdim=True) * v)
    mixer = Retention(32, 4).double()
    same = mixer.weights(x[:, :1].expand(-1, 40, -1), Causal())
    yield "of tokens that are alike, weights know the distance only", largest(same[..., 1:, 1:] - same[..., :-1, :-1])
    mixer.rotary = None
    fades = mixer.weights(x[:, :1].expand(-1, 40, -1), Causal())[..., 33, :]
    halves = 1 - 0.5 ** torch.arange(5, 9, dtype=torch.float64)
    yield "without rotation they fall by 31/32, 63/64, ... a token", largest(fades[..., :33] - halves[:, None] * fades[..., 1:34])
    made = sized(4, 16, 1)
    yield "it has 8 width^2 weights", float(sum(p.numel() for p in made.parameters()) - 8 * 64**2)
