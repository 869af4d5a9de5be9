"""DeltaNet: a state that a token first corrects where its key reads, then writes into."""

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
from .._states import Pass, Reading, StateMixer
from ._parts import ShortConvolutions, l2_normed

CARD = Card(
    paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    year=2024,
    room="linear",
    source=(
        "arXiv:2406.06484, sec. 3, and the authors' library: queries, keys and values go through a short convolution and SiLU, "
        "queries and keys are then normalised by their length (rsqrt of the sum of squares + 1e-6), queries divided by sqrt(d); "
        "each head's output goes through an RMS norm with weights, 1e-5. No output gate by default. The older form (1 + ELU, "
        "sum of one) is not built"
    ),
)


class DeltaNet(StateMixer):
    """S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)^T k_t)^T, read by S_t^T q_t: what a key already reads is replaced, not added to.

    Args:
        heads: of width / heads. taps: of the convolutions of queries, keys and values; 0 for none. negative: lets beta go up to
            two, so that the state may have negative eigenvalues.
    """

    cannot = {"full": "its state takes tokens in their order"}

    def __init__(self, width: int, heads: int, *, taps: int = 4, negative: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads, self.size, self.negative = width, heads, width // heads, negative
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.beta = nn.Linear(width, heads, bias=False)
        self.convolutions = ShortConvolutions({"q": width, "k": width, "v": width}, taps)
        self.norm = Rms(self.size, 1e-5)
        self.out = nn.Linear(width, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        parts = (F.silu(self.convolutions(name, part(x), now)) for name, part in (("q", self.q), ("k", self.k), ("v", self.v)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        beta = torch.sigmoid(self.beta(x).mT.to(torch.promote_types(x.dtype, torch.float32)))
        beta = 2 * beta if self.negative else beta
        return Reading(l2_normed(q) * self.size**-0.5, l2_normed(k), v, write=beta, erase=beta)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(self.norm(out).to(x.dtype).transpose(1, 2).flatten(2))
        return mapped


def oracle(mixer: DeltaNet, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    n, h, d = len(x), mixer.heads, mixer.size

    def near(name: str, weight: Tensor, t: int) -> Tensor:
        taps = mixer.convolutions.weights[name]
        here = sum(taps[:, a] * (weight @ x[s]) for a, s in enumerate(range(t - taps.shape[1] + 1, t + 1)) if s >= 0)
        return here / (1 + torch.exp(-here))  # type: ignore[operator, arg-type]

    def unit(t: Tensor) -> Tensor:
        return t / torch.sqrt((t * t).sum() + 1e-6)

    rows = []
    states = [torch.zeros(d, d, dtype=x.dtype) for _ in range(h)]
    for t in range(n):
        q, k, v = (near(name, getattr(mixer, name).weight, t) for name in "qkv")
        read = []
        for head in range(h):
            own = slice(head * d, head * d + d)
            beta = (1 + mixer.negative) / (1 + torch.exp(-(mixer.beta.weight[head] @ x[t])))
            key = unit(k[own])
            old = key @ states[head]
            states[head] = states[head] - torch.outer(key, beta * old) + torch.outer(key, beta * v[own])
            out = (unit(q[own]) / d**0.5) @ states[head]
            read.append(out / torch.sqrt((out * out).mean() + 1e-5) * mixer.norm.weight)
        rows.append(mixer.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[DeltaNet]:
    """Settings that the conformance checks run."""
    made = [DeltaNet(heads * size, heads), DeltaNet(heads * size, heads // 2, taps=2, negative=True)]
    for mixer in made:
        shake([mixer.norm.weight], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> DeltaNet:
    """The paper's: convolutions of 4 tokens, beta below one."""
    return DeltaNet(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[None, None]
    values, ones = torch.randn(1, 1, 8, 5, dtype=torch.float64), torch.ones(1, 1, 8, dtype=torch.float64)
    state = recur(keys, keys, values, write=ones, erase=ones).state
    yield "orthonormal keys, beta of one: every key reads just its value", largest(keys @ state - values)
    plain = recur(keys, keys, values)
    yield "orthogonal keys: as linear attention", largest(recur(keys, keys, values, write=ones, erase=ones).out - plain.out)
    again, other = keys.clone(), torch.randn(1, 1, 8, 5, dtype=torch.float64)
    rewritten = recur(again, again, other, write=ones, erase=ones, state=state).state
    yield "written again with other values, they are overwritten exactly", largest(keys @ rewritten - other)
    twice = recur(keys, keys, values, write=ones, erase=ones, state=state).state
    yield "written again with the same values, nothing changes", largest(twice - state)
    mixer = DeltaNet(32, 4, taps=1).double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.beta.weight.zero_()
        mixer.v.weight.zero_()
    yield "values of zero leave a state of zero", largest(mixer(x, Causal()))
