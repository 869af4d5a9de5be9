"""Log-linear attention: buckets of tokens that double in size with age, a state for each, and weights that read them."""

from __future__ import annotations

import math
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
from ._parts import ShortConvolutions, l2_normed

CARD = Card(
    paper="Log-Linear Attention",
    year=2025,
    room="linear",
    source=(
        "arXiv:2506.04761, sec. 3, the authors' code and fla-org/flash-linear-attention, log_linear_mamba2: tokens s are in the "
        "bucket bit_length(t XOR s) for the query at t; weights of buckets are softplus(scale * linear(x)), scales of one at the "
        "start. Around it the layers of Mamba-2 (one group of queries and keys for all heads, skip D, RMS norm after the gate) "
        "and of Gated DeltaNet (norm of each head, then the gate), without biases except the convolution's of Mamba-2. As in the "
        "authors' code queries of Gated DeltaNet are not divided by sqrt(d). Tokens older than the last bucket's reach are read "
        "with its weight, which is our own: the paper has enough levels for its longest text"
    ),
)
BASES = ("mamba2", "gated_delta")
NAMES = ("query_map", "key_map", "value_map")


class LogLinearAttention(StateMixer):
    """out_t = sum over levels of weight_t,level * S_level^T q_t: level 0 is token t, level l the 2^(l - 1) tokens of one bucket.

    Args:
        heads: of width / heads. levels: weights of each query, the token's own included: log2 of the longest text, plus one.
        base: "mamba2" (each head decays) or "gated_delta" (it also erases what its key reads). state: size of keys, default
            width / heads. expand: size of values, as a multiple of width / heads. taps: of the convolutions.
    """

    cannot = {"full": "its states take tokens in their order"}

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int = 15,
        *,
        base: str = "mamba2",
        state: int | None = None,
        expand: int = 2,
        taps: int = 4,
    ) -> None:
        super().__init__()
        if base not in BASES:
            raise ShapeError(f"base {base!r} must be one of {', '.join(BASES)}")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if levels < 2:
            raise ShapeError(f"levels {levels} must be 2 or more: a token's own and one of older ones")
        self.width, self.heads, self.levels, self.base = width, heads, levels, base
        self.state = width // heads if state is None else state
        self.size = width // heads * expand
        keys, values = self.state * (1 if base == "mamba2" else heads), self.size * heads
        self.query_map, self.key_map, self.value_map, self.gate = (
            nn.Linear(width, n, bias=False) for n in (keys, keys, values, values)
        )
        self.convolutions = ShortConvolutions(dict(zip(NAMES, (keys, keys, values), strict=True)), taps, bias=base == "mamba2")
        self.step = nn.Linear(width, heads, bias=False)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        steps = torch.exp(torch.empty(heads).uniform_(-6.9, -2.3))  # 0.001 to 0.1
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps back
        self.level_weights = nn.Linear(width, heads * levels, bias=False)
        self.level_scale = nn.Parameter(torch.ones(heads, levels))
        if base == "mamba2":
            self.skip = nn.Parameter(torch.ones(heads))
            self.norm = Rms(values, 1e-5)
        else:
            self.beta = nn.Linear(width, heads, bias=False)
            self.norm = Rms(self.size, 1e-5)
        self.out = nn.Linear(values, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (F.silu(self.convolutions(name, getattr(self, name)(x), now)) for name in NAMES)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        step = F.softplus(self.step(x).to(wide) + self.step_bias.to(wide)).mT
        decay = -self.log_rate.to(wide).exp()[:, None] * step
        raw = self.level_weights(x).to(wide).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        levels = F.softplus(self.level_scale.to(wide)[:, None] * raw)
        if self.base == "mamba2":
            q, k = (t[:, None].expand(-1, self.heads, -1, -1) for t in (q, k))
            return Reading(q, k, v, decay, write=step, levels=levels)
        q, k = (l2_normed(t.unflatten(-1, (self.heads, -1)).transpose(1, 2)) for t in (q, k))
        beta = torch.sigmoid(self.beta(x).mT.to(wide))
        return Reading(q, k, v, decay, write=beta, erase=beta, levels=levels)

    def beside(self, out: Tensor, given: Reading) -> Tensor:
        """See `StateMixer.beside`: Mamba-2's skip of each head."""
        return out + self.skip[:, None, None] * given.v if self.base == "mamba2" else out

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        gate = F.silu(self.gate(x))
        if self.base == "mamba2":
            made = self.norm(out.transpose(1, 2).flatten(2) * gate)
        else:
            made = self.norm(out).transpose(1, 2).flatten(2) * gate
        mapped: Tensor = self.out(made.to(x.dtype))
        return mapped


def oracle(mixer: LogLinearAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time: what each token wrote is kept apart and moved on by every later one."""
    h, d, mamba = mixer.heads, mixer.state, mixer.base == "mamba2"

    def near(name: str, t: int) -> Tensor:
        taps, weight = mixer.convolutions.weights[name], getattr(mixer, name).weight
        here = mixer.convolutions.biases[name] if mamba else 0 * taps[:, 0]
        for a, s in enumerate(range(t - taps.shape[1] + 1, t + 1)):
            here = here + taps[:, a] * (weight @ x[s]) if s >= 0 else here
        return here * sigmoid(here)

    def sigmoid(z: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-z))

    def softplus(z: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(z))

    rows: list[Tensor] = []
    written: list[list[Tensor]] = [[] for _ in range(h)]
    for t in range(len(x)):
        q, k, v = (near(name, t) for name in NAMES)
        gate = mixer.gate.weight @ x[t]
        gate = gate * sigmoid(gate)
        read = []
        for head in range(h):
            own = slice(head * mixer.size, (head + 1) * mixer.size)
            keys = slice(0, d) if mamba else slice(head * d, (head + 1) * d)
            query, key, value = q[keys], k[keys], v[own]
            if not mamba:
                query, key = (z / torch.sqrt((z * z).sum() + 1e-6) for z in (query, key))
            step = softplus(mixer.step.weight[head] @ x[t] + mixer.step_bias[head])
            strength = step if mamba else sigmoid(mixer.beta.weight[head] @ x[t])
            moved = [torch.exp(-torch.exp(mixer.log_rate[head]) * step) * state for state in written[head]]
            if not mamba:
                moved = [state - strength * torch.outer(key, key @ state) for state in moved]
            written[head] = [*moved, strength * torch.outer(key, value)]
            raw = mixer.level_weights.weight[head * mixer.levels : (head + 1) * mixer.levels] @ x[t]
            weight = softplus(mixer.level_scale[head] * raw)
            out = torch.zeros_like(value)
            for s, state in enumerate(written[head]):
                out = out + weight[min((t ^ s).bit_length(), mixer.levels - 1)] * (query @ state)
            if mamba:
                read.append((out + mixer.skip[head] * value) * gate[own])
            else:
                read.append(out / torch.sqrt((out * out).mean() + 1e-5) * mixer.norm.weight * gate[own])
        row = torch.cat(read)
        rows.append(mixer.out.weight @ (row / torch.sqrt((row * row).mean() + 1e-5) * mixer.norm.weight if mamba else row))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LogLinearAttention]:
    """Settings that the conformance checks run."""
    made = [
        LogLinearAttention(heads * size, heads, 7, expand=1, state=size // 2),
        LogLinearAttention(heads * size, heads // 2, 4, base="gated_delta", taps=2),
    ]
    for mixer in made:
        shake([mixer.norm.weight, mixer.level_scale], seed=2)
        _slow(mixer)
    shake([made[0].skip, *made[0].convolutions.biases.values()], seed=3)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> LogLinearAttention:
    """The paper's: levels for the longest text, values twice as wide as keys."""
    levels = options.pop("levels", max(1, (tokens - 1).bit_length()) + 1)
    return LogLinearAttention(heads * size, heads, levels, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    n, one = 37, math.log(math.e - 1)  # softplus of it is one
    x = torch.randn(2, n, 32, dtype=torch.float64)
    x[..., 0] = 1.0  # so that a column of weights is a bias
    at = torch.arange(n)
    level = torch.tensor([[(t ^ s).bit_length() for s in range(n)] for t in range(n)])
    for base in BASES:
        mixer = _slow(LogLinearAttention(32, 4, 7, base=base).double())
        bias = mixer.level_weights.weight.detach().view(4, 7, 32)[:, :, 0]
        with torch.no_grad():
            given = mixer.reading(x, begin(mixer.new_cache(), x, (), None))._replace(levels=None)
            plain = recur(**given._asdict()).out

            def off(wanted: Tensor, mixer: LogLinearAttention = mixer) -> float:
                return largest(mixer.read(x, Causal()) - wanted)

            mixer.level_weights.weight.zero_()
            yield f"{base}: nothing learned: the base model times log 2", off(plain * math.log(2))
            bias.fill_(one)
            yield f"{base}: all weights one: the base model", off(plain)
            shown = mixer.weights(x, Causal())
            bias.fill_(-1000.0)
            for only in range(7):
                bias[:, only] = one
                masked = mixer.weights(x, Causal()) - shown.where(level == only, 0.0)
                yield f"{base}: one weight of one at level {only}: just the pairs whose XOR has so many bits", largest(masked)
                bias[:, only] = -1000.0
            bias[:, 0] = one
            alone = given.write * (given.q * given.k).sum(-1)  # type: ignore[operator]
            yield f"{base}: only the first level: each token reads itself", off(alone[..., None] * given.v)
            bias[:, :4] = one
            restarted = recur(**given._asdict(), starts=(at % 8 == 0).expand(2, -1)).out
            yield f"{base}: ones up to level 3, then zeros: the base restarted every 8 tokens", off(restarted)
            cache, wrong = mixer.new_cache(), 0
            for t in range(n):
                mixer(x[:, t : t + 1], Causal(), cache=cache)
                assert cache.state is not None
                wrong += int((cache.state.abs().amax((3, 4)) > 0).sum(2).sub((t + 1).bit_count()).abs().max())
            yield f"{base}: as many states hold something as the count of tokens has ones", float(wrong)


def _slow(mixer: LogLinearAttention) -> LogLinearAttention:
    """The same mixer, forgetting slowly: so that old buckets matter in short texts."""
    with torch.no_grad():
        mixer.step_bias.add_(2.0)
        mixer.log_rate.sub_(3.0)
    return mixer
