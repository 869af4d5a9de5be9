"""ReGLA: exponential features below one, a forget gate on channels of values that a second gate refines, and a norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import Rms
from .._states import Pass, StateCache, begin

CARD = Card(
    paper="ReGLA: Refining Gated Linear Attention",
    year=2025,
    room="linear",
    source=(
        "arXiv:2502.01578, read in its abstract and in two descriptions by others that agree on the equations: phi_q = exp(q - "
        "max over channels), phi_k = exp(k - max over channels and tokens), h_t = S_t phi_q / (e sqrt(d (e^2 - 1))), S_t = F_t * "
        "S_(t-1) + v_t phi_k^T with F the same for all channels of keys. They disagree on the rest: here gates read the layer's "
        "input and have biases, the norm is an RMS norm of each head (1e-12, as shifted features are small), no rotation is "
        "built in. The maximum of keys is over the tokens so far, and the state moves on by exp(old - new): the norm takes out "
        "what that changes. As the gate is on values, not on keys, the operator of this package does not fit: within chunks of "
        "16 tokens values are rescaled pair by pair by the gates between them, so that no product of gates is divided by"
    ),
)
SPAN = 16  # tokens within which gates are made pair by pair
NOTHING = -60.0  # exp of it leaves nothing; less would cost the sums of others their digits


class GateCache(StateCache):
    """The state and the largest key so far."""

    top: Tensor | None = None  # (b, h, 1)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (self.state, self.top)


class Regla(Mixer):
    """S_t = F_t * S_(t-1) + v_t phi(k_t)^T, F = (1 - r) g^2 + r (1 - (1 - g)^2); out = norm of S_t phi(q_t).

    Args:
        heads: of width / heads. refined: False for the plain gate, F = g.
    """

    cannot = {"full": "its gate takes tokens in their order"}
    rotates = True
    bounded = True

    def __init__(self, width: int, heads: int, *, refined: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads, self.size = width, heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Linear(width, width)
        self.refine = nn.Linear(width, width) if refined else None
        self.norm = Rms(self.size, 1e-12)
        self.factor = 1 / (math.e * math.sqrt(self.size * (math.e**2 - 1)))

    def forward(self, x: Tokens, *stages: Stage, cache: GateCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        read = self.norm(self.read(x, *stages, cache=cache, attention_mask=attention_mask))
        mapped: Tensor = self.out(read.to(x.dtype).transpose(1, 2).flatten(2))
        return mapped

    def read(self, x: Tokens, *stages: Stage, cache: GateCache | None = None, attention_mask: Real | None = None) -> Tensor:
        """What each head reads, (b, h, n, d), before the norm: up to the factor exp(-largest key so far)."""
        cache = GateCache() if cache is None else cache
        now = begin(cache, x, stages, attention_mask)
        if not now.causal or now.ids is not None:
            raise ShapeError("a gated state reads what came before: give Causal(), and no Documents")
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (self._of_heads(f(x)).to(wide) for f in (self.q, self.k, self.v))
        q, k = now.rotated(q, self.rotary), now.rotated(k, self.rotary)
        kept = self.log_gate(x)
        if now.real is not None:
            k, v, kept = (t.where(now.real[:, None, :, None], 0.0) for t in (k, v, kept))
        tops, moved = _tops(k, now, cache)
        features = torch.exp(k - tops[..., None])
        out, cache.state = _gated(
            self.factor * torch.exp(q - q.amax(-1, keepdim=True)), features, v, kept + moved[..., None], cache.state
        )
        return out

    def log_gate(self, x: Tokens) -> Tensor:
        """log F (b, h, n, d), also where F or its parts vanish: g (g + 2 r (1 - g)), each part in logarithms."""
        wide = torch.promote_types(x.dtype, torch.float32)
        g = self._of_heads(self.gate(x)).to(wide)
        if self.refine is None:
            return F.logsigmoid(g)
        r = self._of_heads(self.refine(x)).to(wide)
        return F.logsigmoid(g) + torch.logaddexp(F.logsigmoid(g), math.log(2) + F.logsigmoid(r) + F.logsigmoid(-g))

    def new_cache(self, owner: Cache | None = None) -> GateCache:
        """An empty cache for decoding."""
        return GateCache()

    def _of_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _tops(k: Tensor, now: Pass, cache: GateCache) -> tuple[Tensor, Tensor]:
    """The largest key so far at each token, (b, h, n), and the logarithm by which it shrinks what came before."""
    tops = k.amax(-1)
    if now.real is not None:
        tops = tops.masked_fill(~now.real[:, None], -torch.inf)
    before = torch.full_like(tops[..., :1], -torch.inf) if cache.top is None else cache.top.to(tops.dtype)
    tops = torch.cat([before, tops], -1).cummax(-1).values
    cache.top = tops[..., -1:].clone()
    old, new = tops[..., :-1], tops[..., 1:]
    moved = torch.where(old.isinf(), 0.0, old - new)
    return new.masked_fill(new.isinf(), 0.0), moved  # before the first token: anything, as nothing is read


def _gated(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = S_(t-1) exp(decay_t) + k_t v_t^T, decay on channels of v, read by q_t: outputs (b, h, n, dv) and the last state."""
    n = k.shape[2]
    q, k, v, decay = (F.pad(t, (0, 0, 0, -n % SPAN)).unflatten(2, (-1, SPAN)) for t in (q, k, v, decay))
    total = decay.clamp(min=NOTHING).cumsum(3)
    shown = torch.ones(SPAN, SPAN, dtype=torch.bool, device=q.device).tril()
    between = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~shown[..., None], 0.0).exp()
    scores = (q @ k.mT).masked_fill(~shown, 0.0)
    inside = torch.einsum("bhcij,bhcijd,bhcjd->bhcid", scores, between, v)
    added = k.mT @ (v * (total[..., -1:, :] - total).exp())
    carried = total[..., -1:, :].exp()
    states = []
    last = torch.zeros_like(added[:, :, 0]) if state is None else state
    for i in range(added.shape[2]):
        states.append(last)
        last = carried[:, :, i] * last + added[:, :, i]
    out = inside + total.exp() * (q @ torch.stack(states, 2))
    return out.flatten(2, 3)[:, :, :n], last


def oracle(mixer: Regla, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every output a sum over the tokens before it, with the gates between them."""
    size, rows = mixer.size, []
    q, k, v = (x @ f.weight.T for f in (mixer.q, mixer.k, mixer.v))
    kept = torch.sigmoid(x @ mixer.gate.weight.T + mixer.gate.bias)
    if mixer.refine is not None:
        r = torch.sigmoid(x @ mixer.refine.weight.T + mixer.refine.bias)
        kept = (1 - r) * kept**2 + r * (1 - (1 - kept) ** 2)
    for t in range(len(x)):
        read = []
        for head in range(mixer.heads):
            own, seen = slice(head * size, (head + 1) * size), [s for s in range(len(x)) if visible[t, s]]
            query, top = torch.exp(q[t, own] - q[t, own].max()), k[seen, own].max()
            out, gates = x.new_zeros(size), x.new_ones(size)
            for s in reversed(seen):
                out = out + gates * (query * torch.exp(k[s, own] - top)).sum() * v[s, own]
                gates = gates * kept[s, own]
            out = out / (math.e * (size * (math.e**2 - 1)) ** 0.5)
            read.append(out / torch.sqrt((out * out).mean() + 1e-12) * mixer.norm.weight)
        rows.append(mixer.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Regla]:
    """Settings that the conformance checks run."""
    made = [Regla(heads * size, heads), Regla(heads * size, heads // 2, refined=False)]
    for mixer in made:
        shake([mixer.norm.weight], seed=2)
        with torch.no_grad():
            mixer.gate.bias.add_(2.0)  # so that old tokens matter
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Regla:
    """The paper's: with the refining gate."""
    return Regla(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 53, 32, dtype=torch.float64)
    mixer = Regla(32, 4).double()
    assert mixer.refine is not None
    with torch.no_grad():
        mixer.v.weight.mul_(1e4)  # so that the norm's epsilon does not count
        q, k, v = (mixer._of_heads(f(x)) for f in (mixer.q, mixer.k, mixer.v))
        features = torch.exp(q - q.amax(-1, keepdim=True)) / (math.e * math.sqrt(8 * (math.e**2 - 1)))
        scores = (features @ k.exp().mT).tril()
        tops = k.amax(-1).cummax(-1).values[..., None].exp()
        total = mixer.log_gate(x).cumsum(2)
        gaps = (total[:, :, :, None] - total[:, :, None]).exp()
        wanted = torch.einsum("bhij,bhijd,bhjd->bhid", scores, gaps, v)
        yield "chunks: sums over pairs of tokens", largest(mixer.read(x, Causal()) * tops - wanted) / largest(wanted)
        few, born = slice(0, 9), total.exp()[:, :, :9]
        rescaled = born * (scores[:, :, few, few] @ (v[:, :, few] / born))
        yield "few tokens: linear attention of rescaled values", largest(rescaled - wanted[:, :, few]) / largest(rescaled)
        normed = mixer.norm(wanted / k.amax((2, 3), keepdim=True).exp())
        yield (
            "the largest key so far, or of the text: the same after the norm",
            largest(mixer.norm(mixer.read(x, Causal())) - normed),
        )
        spread = mixer.norm(mixer.read(x, Causal())).square().mean(-1)
        yield "the variance of outputs does not change over the text", largest(spread - 1)
        g = torch.sigmoid(mixer._of_heads(mixer.gate(x)))
        mixer.refine.weight.zero_()
        for bias, kept, words in ((0.0, g, "1/2: g"), (-1e3, g**2, "0: g^2"), (1e3, 1 - (1 - g) ** 2, "1: 1 - (1 - g)^2")):
            mixer.refine.bias.fill_(bias)
            yield f"the refining gate at {words}", largest(mixer.log_gate(x).exp() - kept)
        mixer.gate.bias.fill_(1e3)
        plain = scores @ v
        yield "gates of one: exponential attention", largest(mixer.read(x, Causal()) * tops - plain) / largest(plain)
    small = torch.sigmoid(torch.tensor(-7.0, dtype=torch.float64)).item()
    for gate, refine, times in ((-7.0, 1e3, 2 * (1 - small)), (7.0, -1e3, 2 * (1 - small)), (-7.0, 0.0, 1.0)):
        with torch.no_grad():
            mixer.gate.weight.zero_()
            mixer.gate.bias.fill_(gate)
            mixer.refine.bias.fill_(refine)
        slope = torch.autograd.grad(mixer.log_gate(x[:1, :1]).exp().sum(), mixer.gate.bias)[0]
        plain = slope / (small * (1 - small))
        yield f"gate at {gate:g}, refined at {refine:g}: {times:.3g} times the slope of the plain gate", largest(plain - times)
    at = torch.arange(-20, 20, 1e-3, dtype=torch.float64)
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi) * 1e-3
    mean, square = ((density * (times * at).exp()).sum() for times in (1, 2))
    one = 8 * Regla(8, 1).factor ** 2 * (square**2 - mean**4)
    yield "the factor: products of exponentials of normal numbers have a variance of one", largest(one - 1)
