"""Mega: a damped moving average of many dimensions, which feeds gated attention of one head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._rotary import Rotary
from .._states import Pass, begin
from ._memory import Held, MemoryCache, in_blocks, wide

CARD = Card(
    paper="Mega: Moving Average Equipped Gated Attention",
    year=2022,
    room="linear",
    source=(
        "arXiv:2209.10655 and the authors' code, facebookresearch/mega: values are made of x, all else of the average, which has a "
        "skip and a SiLU; read from both sides the two kernels both hold the token itself (an older state of the code shifts one). "
        "Laplace and squared ReLU divide scores by the number of keys a query sees (the code's causal mask counts padding, too). "
        "Norms and dropout are the caller's. Read causally the average is computed in blocks, by its kernel inside and its "
        "states between them, since a Fourier transform rounds earlier tokens by later ones; both ways it is a Fourier transform. "
        "`residual` of False, u * (h - x), is our own, for stacks that add x themselves"
    ),
)
ACTIVATIONS = ("softmax", "laplace", "relu2")
BIASES = ("simple", "rotary")
BLOCK = 32  # tokens of a block of the average


class Mega(Mixer):
    """x + u * (h - x), u the update gate and h what a moving average, and attention over it, make of x.

    Args:
        width: of tokens. keys: size of queries and keys, values: of values; default a quarter and twice the width.
        states: dimensions of each channel's moving average. activation: of scores, "softmax", "laplace" or "relu2".
        chunk: tokens that attention reads together, counted from the text's start; None for all.
        bias: of scores by distance, "simple", a number for each distance up to `longest` (or `chunk`), or "rotary".
        both: reads both sides, with an average each; else only what came before. residual: whether x is added.
    """

    bounded = False

    def __init__(
        self,
        width: int,
        *,
        keys: int | None = None,
        values: int | None = None,
        states: int = 16,
        activation: str = "softmax",
        chunk: int | None = None,
        bias: str = "simple",
        longest: int = 1024,
        both: bool = False,
        residual: bool = True,
    ) -> None:
        super().__init__()
        for what, given, known in (("activation", activation, ACTIVATIONS), ("bias", bias, BIASES)):
            if given not in known:
                raise ShapeError(f"{what} {given!r} must be one of {', '.join(known)}")
        if min(states, longest, 1 if chunk is None else chunk) < 1:
            raise ShapeError(f"states {states}, longest {longest} and chunk {chunk} must be 1 or more")
        self.width, self.states, self.activation, self.chunk, self.residual = width, states, activation, chunk, residual
        self.keys = max(2, width // 4 // 2 * 2) if keys is None else keys
        self.values = 2 * width if values is None else values
        if bias == "rotary" and self.keys % 2:
            raise ShapeError(f"a rotary bias turns pairs, and keys of size {self.keys} are no pairs")
        self.both, self.bounded = both, chunk is not None and not both
        self.cannot = {"causal": "reads both sides", "decode": "reads both sides"} if both else {"full": "reads what came before"}
        sides = 1 + both
        self.take, self.damp = (nn.Parameter(0.2 * torch.randn(sides, width, states)) for _ in range(2))
        signs = 1.0 - 2.0 * (torch.arange(states) % 2)
        self.spread = nn.Parameter(signs + 0.02 * torch.randn(sides, width, states))
        self.gather, self.skip = nn.Parameter(torch.randn(sides, width, states)), nn.Parameter(torch.randn(width))
        self.value = nn.Linear(width, self.values)
        self.base = nn.Linear(width, 2 * width + self.keys + self.values)
        self.hidden = nn.Linear(self.values, width)
        self.scale, self.shift = nn.Parameter(0.02 * torch.randn(2, self.keys)), nn.Parameter(torch.zeros(2, self.keys))
        for part in (self.value, self.base, self.hidden):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        self.longest = longest if chunk is None else chunk
        self.table = nn.Parameter(0.02 * torch.randn(2 * self.longest - 1)) if bias == "simple" else None
        self.turned = nn.Parameter(0.02 * torch.randn(2, self.keys)) if bias == "rotary" else None

    def forward(self, x: Tokens, *stages: Stage, cache: MemoryCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        other = [stage for stage in stages if not isinstance(stage, Causal)]
        if other or bool(stages) == self.both:
            raise ShapeError(f"given {list(stages)}; it reads {'both sides: give no stage' if self.both else 'Causal() alone'}")
        if cache is not None and self.both:
            raise ShapeError("it reads both sides, so it can't go on from a cache")
        now = begin(self.new_cache() if cache is None else cache, x, stages, attention_mask)
        average = F.silu(self.moving_average(x, now) + self.skip * x)
        u, z, r, made = self.base(average.to(x.dtype)).split([self.width, self.keys, self.values, self.width], -1)
        z, r, v = wide(F.silu(z)), F.silu(r), wide(F.silu(self.value(x)))
        q, k = (z * scale + shift for scale, shift in zip(self.scale, self.shift, strict=True))
        read = (self._read_all if self.chunk is None else self._read_chunks)(q, k, v, now)
        h = F.silu(made + self.hidden((read * r).to(x.dtype)))
        out = torch.sigmoid(u) * (h - x)
        return x + out if self.residual else out

    def new_cache(self, owner: Cache | None = None) -> MemoryCache:
        """An empty cache for decoding."""
        return MemoryCache(attention=KeyValues())

    def kernels(self, length: int) -> Float[Tensor, "sides width length"]:
        """What the average makes of a token so many places away."""
        weight, log_left, gather = self._coefficients()
        powers = torch.exp(torch.arange(length, device=weight.device) * log_left[..., None])
        return torch.einsum("scn,scnl->scl", weight * gather, powers)

    def moving_average(self, x: Tokens, now: Pass) -> Tokens:
        """Of each channel: h_t = p * beta x_t + (1 - p * d) h_(t-1), read as the sum of eta * h_t / sqrt(states)."""
        x = wide(x)
        if not self.both:
            start = (x.new_zeros(len(x), self.width, self.states),)
            return in_blocks(x, now, BLOCK, start, self._block, "average")
        n = x.shape[1]
        there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if now.real is None else now.real
        order = (~there).int().argsort(dim=1, stable=True)[..., None].expand_as(x)  # tokens, then padding
        close = x.where(there[..., None], 0.0).gather(1, order)
        before, after = self.kernels(n)
        kernel = torch.cat([before, after.new_zeros(self.width, 1), after[:, 1:].flip(-1)], -1)
        kernel = kernel + F.pad(after[:, :1], (0, 2 * n - 1))
        found = torch.fft.irfft(torch.fft.rfft(close, 2 * n, 1) * torch.fft.rfft(kernel, 2 * n).mT, 2 * n, 1)[:, :n]
        return torch.zeros_like(x).scatter(1, order, found)

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sides, width, states): what is taken of a token, log of what is left of the state, how it is read."""
        take, damp = wide(self.take).sigmoid(), wide(self.damp).sigmoid()
        return take * self.spread, torch.log1p(-take * damp), self.gather / math.sqrt(self.states)

    def _block(self, x: Tensor, held: Held) -> tuple[Tensor, Callable[[], Held]]:
        """The average of one block of tokens, and how to get its states after it."""
        n, (state,) = x.shape[1], held
        weight, log_left, gather = (t[0] for t in self._coefficients())
        powers = torch.exp(torch.arange(n + 1, device=x.device) * log_left[..., None])  # (width, states, n + 1)
        kernel = torch.einsum("cn,cnl->cl", weight * gather, powers[..., :n])
        at = torch.arange(n, device=x.device)
        back = at[:, None] - at
        square = kernel[:, back.clamp(min=0)].where(back >= 0, 0.0)
        out = torch.einsum("cts,bsc->btc", square, x) + torch.einsum("bcn,cnt->btc", state * gather, powers[..., 1:])
        taken = weight[..., None] * powers[..., :n].flip(-1)
        return out, lambda: (powers[..., n] * state + torch.einsum("cns,bsc->bcn", taken, x),)

    def _read_all(self, q: Tensor, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        cache = now.cache
        assert isinstance(cache, MemoryCache)
        assert isinstance(cache.attention, KeyValues)
        seen = cache.attention.extend(q[:, None], k[:, None], v[:, None], now.real)
        n, m = q.shape[1], seen.k.shape[2]
        i = torch.arange(m - n, m, device=q.device)[None] if seen.query_positions is None else seen.query_positions
        j = torch.arange(m, device=q.device)[None] if seen.key_positions is None else seen.key_positions
        visible = (j >= 0)[:, None].expand(-1, n, -1)
        return self._read(q, seen.k[:, 0], seen.v[:, 0], visible if self.both else visible & (j[:, None] <= i[..., None]), i, j)

    def _read_chunks(self, q: Tensor, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        sizes = [self.keys, self.keys, self.values, 1]

        def run(rows: Tensor, held: Held) -> tuple[Tensor, Callable[[], Held]]:
            q, k, v, there = rows.split(sizes, -1)
            at = torch.arange(rows.shape[1], device=rows.device)[None]
            visible = (there[..., 0] > 0)[:, None] if self.both else at[:, None] <= at[..., None]
            return self._read(q, k, v, visible, at, at), lambda: ()

        assert self.chunk is not None
        return in_blocks(torch.cat([q, k, v, torch.ones_like(q[..., :1])], -1), now, self.chunk, (), run, "chunk")

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Bool[Tensor, "b n m"], i: Tensor, j: Tensor
    ) -> Float[Tensor, "b n values"]:
        """q (b, n, keys), k (b, m, keys), v (b, m, values), at places i (b or 1, n) and j (b or 1, m)."""
        bias = self._bias(i.clamp(min=0), j.clamp(min=0))
        if self.activation == "softmax":
            scores = (q @ k.mT * self.keys**-0.5 + bias).masked_fill(~visible, -torch.inf)
            scores = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0)
            weights = scores.softmax(-1)
        else:
            scores = q @ k.mT / visible.sum(-1, keepdim=True).clamp(min=1) + bias
            weights = F.relu(scores).square() if self.activation == "relu2" else _laplace(scores)
        return weights.where(visible, 0.0) @ v

    def _bias(self, i: Tensor, j: Tensor) -> Float[Tensor, "b n m"]:
        if self.turned is not None:
            first, second = wide(self.turned)[:, None, None, None]
            turn = Rotary(10000.0)
            first, second = (turn(t.expand(*at.shape, 1, -1).transpose(1, 2), at) for t, at in ((first[0], i), (second[0], j)))
            return (first @ second.mT)[:, 0]
        assert self.table is not None
        if int(torch.maximum(i.max(), j.max())) >= self.longest:
            raise ShapeError(
                f"a bias for {self.longest} tokens does not reach token {int(i.max())}; build it with a larger `longest`"
            )
        return wide(self.table)[self.longest - 1 + j[:, None] - i[..., None]]


def _laplace(x: Tensor) -> Tensor:
    """The distribution function of a normal distribution that touches relu(x)^2 at sqrt(1/2)."""
    return 0.5 * (1 + torch.erf((x - math.sqrt(0.5)) / math.sqrt(0.5 / math.pi)))


def oracle(mixer: Mega, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time: the average as a recurrence."""
    n, c = x.shape

    def sigmoid(t: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-t))

    def silu(t: Tensor) -> Tensor:
        return t * sigmoid(t)

    def averages(rows: Tensor, side: int) -> list[Tensor]:
        take, damp = sigmoid(mixer.take[side]), sigmoid(mixer.damp[side])
        h, out = torch.zeros(c, mixer.states, dtype=x.dtype), []
        for row in rows:
            h = take * mixer.spread[side] * row[:, None] + (1 - take * damp) * h
            out.append((mixer.gather[side] * h).sum(1) / mixer.states**0.5)
        return out

    y = averages(x, 0)
    if mixer.both:
        y = [a + b for a, b in zip(y, averages(x.flip(0), 1)[::-1], strict=True)]
    parts = [mixer.base(silu(a + mixer.skip * row)).split([c, mixer.keys, mixer.values, c]) for a, row in zip(y, x, strict=True)]
    values = [silu(mixer.value(row)) for row in x]
    half = mixer.keys // 2

    def turned(t: Tensor, at: int) -> Tensor:
        angles = at * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        a, b = t[:half], t[half:]
        return torch.cat([a * torch.cos(angles) - b * torch.sin(angles), b * torch.cos(angles) + a * torch.sin(angles)])

    rows = []
    for i in range(n):
        u, z, r, made = parts[i]
        query = silu(z) * mixer.scale[0] + mixer.shift[0]
        seen = [j for j in range(n) if bool(visible[i, j]) and (mixer.chunk is None or i // mixer.chunk == j // mixer.chunk)]
        scores = []
        for j in seen:
            score = query @ (silu(parts[j][1]) * mixer.scale[1] + mixer.shift[1])
            score = score / (mixer.keys**0.5 if mixer.activation == "softmax" else len(seen))
            if mixer.table is not None:
                scores.append(score + mixer.table[mixer.longest - 1 + j - i])
            else:
                assert mixer.turned is not None
                scores.append(score + turned(mixer.turned[0], i) @ turned(mixer.turned[1], j))
        weights = torch.stack(scores)
        if mixer.activation == "softmax":
            weights = torch.exp(weights) / torch.exp(weights).sum()
        elif mixer.activation == "relu2":
            weights = torch.clamp(weights, min=0) ** 2
        else:
            sigma = (1 / (4 * math.pi)) ** 0.5
            weights = torch.special.ndtr((weights - 0.5**0.5) / sigma)
        read = (weights[:, None] * torch.stack([values[j] for j in seen])).sum(0)
        h = silu(made + mixer.hidden(read * silu(r)))
        rows.append(sigmoid(u) * h + ((1 - sigmoid(u)) if mixer.residual else -sigmoid(u)) * x[i])
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Mega]:
    """Settings that the conformance checks run."""
    made = [
        Mega(heads * size, keys=size, values=12, states=4, longest=50),
        Mega(heads * size, keys=size, values=8, states=3, activation="laplace", chunk=6, residual=False),
        Mega(heads * size, keys=size, values=8, states=3, activation="laplace", bias="rotary", chunk=5, both=True),
        Mega(heads * size, keys=size, values=8, states=2, activation="relu2", longest=50, both=True),
        Mega(heads * size, keys=size, values=8, states=2, bias="rotary"),
    ]
    for mixer in made:
        _shaken(mixer)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mega:
    """The paper's for language: queries and keys a quarter as wide, values twice, softmax; without x, which the stack adds."""
    return Mega(heads * size, **{"longest": tokens, "residual": False, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    n, dtype = 75, torch.float64
    x = torch.randn(2, n, 32, dtype=dtype)
    with torch.no_grad():
        mixer = _shaken(Mega(32, states=4).double())

        def average(mixer: Mega, x: Tensor) -> Tensor:
            return mixer.moving_average(x, begin(mixer.new_cache(), x, () if mixer.both else (Causal(),), None))

        kernel = mixer.kernels(n)[0]
        direct = torch.stack([(kernel[:, : t + 1].flip(-1).T * x[:, : t + 1]).sum(1) for t in range(n)], 1)
        yield "the average in blocks is its convolution", largest(average(mixer, x) - direct)
        spectrum = torch.fft.rfft(kernel, 2 * n).mT * torch.fft.rfft(x, 2 * n, 1)
        yield "by a Fourier transform, too", largest(torch.fft.irfft(spectrum, 2 * n, 1)[:, :n] - direct)
        both = _shaken(Mega(32, states=4, both=True).double())
        for name in ("take", "damp", "spread", "gather"):
            getattr(both, name)[0] = getattr(both, name)[1] = getattr(mixer, name)[0]
        yield "read from both sides: one average each way", largest(average(both, x) - direct - average(mixer, x.flip(1)).flip(1))
        mixer.spread.fill_(1.0)
        mixer.gather.fill_(mixer.states**-0.5)
        mixer.damp.fill_(100.0)
        mixer.take.fill_(0.0)
        plain = torch.zeros(2, 32, dtype=dtype)
        for t in range(n):
            plain = 0.5 * x[:, t] + 0.5 * plain
        yield "damped in full: the usual moving average", largest(average(mixer, x)[:, -1] - plain)
        for activation in ACTIVATIONS:
            whole = _shaken(Mega(32, activation=activation, longest=n).double())
            parts = _shaken(Mega(32, activation=activation, chunk=n).double())
            parts.load_state_dict(whole.state_dict())
            yield f"{activation}: one chunk of all is no chunk", largest(parts(x, Causal()) - whole(x, Causal()))
        whole.base.weight[:32] = 0.0
        whole.base.bias[:32] = -1000.0
        yield "a closed update gate gives back x", largest(whole(x, Causal()) - x)
        whole.base.bias[:32] = 1000.0
        whole.hidden.weight.zero_()
        whole.hidden.bias.fill_(-1000.0)
        yield "an open one nothing of it", largest(whole(x, Causal()))
        at = torch.tensor(math.sqrt(0.5), dtype=dtype)
        yield "laplace touches relu^2 at the root of one half", largest(_laplace(at) - at.square())
    at.requires_grad_()
    yield "with its slope", largest(torch.autograd.grad(_laplace(at), at)[0] - 2 * at)


def _shaken(mixer: Mega) -> Mega:
    """The same mixer, off its start, where it hardly reads."""
    shake(mixer.parameters(), seed=2)
    return mixer
