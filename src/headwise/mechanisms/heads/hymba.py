"""Hymba's hybrid heads: attention heads and a state space head read the same tokens side by side."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.window import Window
from .._caches import Cache, KeyValues, Recent
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import Rms
from ._selective_scan import selective_scan

CARD = Card(
    paper="Hymba: A Hybrid-head Architecture for Small Language Models",
    year=2024,
    room="heads",
    source=(
        "arXiv:2411.13676, sec. 2, and the code of the released model: values are twice as wide as queries and keys, one Mamba-1 "
        "head of width 2 c, norms of its step, B and C, no bias around. The authors' shorter example has queries and keys twice as "
        "wide, too, and biases. Steps start as Mamba's do, between 0.001 and 0.1; the released code does not tell. The "
        "convolution's size in the released model is not known for sure; 4 is Mamba's, the example has 3. Not in the mixer, for "
        "it is of the whole stack: the meta tokens, which are put before the text once, and layers that read the keys and "
        "values of another. Windows are a stage, `Causal(), Window(1024)`, or `Window(1024) | Prefix(128)` with 128 meta tokens"
    ),
)


class HybridState(KeyValues):
    """Keys and values; the state of the state space head, whose size does not grow; and what its convolution needs."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.state: Tensor | None = None  # (b, e, s)
        self.recent = Recent(back)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), self.state, self.recent.rows)


class StateSpace(nn.Module):
    """One Mamba-1 head of `size` channels: a state of `states` numbers a channel, whose steps the tokens choose.

    s_t = exp(step_t A) s_{t-1} + step_t B_t u_t, y_t = C_t . s_t + D u_t, where u is convolved over near tokens.
    """

    def __init__(self, size: int, states: int, rank: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(size, size, kernel, groups=size)
        self.choose = nn.Linear(size, rank + 2 * states, bias=False)
        self.widen = nn.Linear(rank, size)
        self.norms = nn.ModuleList(Rms(part) for part in (rank, states, states))
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(size, 1))
        self.direct = nn.Parameter(torch.ones(size))
        nn.init.uniform_(self.widen.weight, -(rank**-0.5), rank**-0.5)
        start = torch.exp(torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.widen.bias.copy_(start + torch.log(-torch.expm1(-start)))  # softplus of it is that step

    def forward(self, u: Tensor, cache: HybridState, attention_mask: Real | None) -> Tensor:
        """(b, n, size) -> the same, in float32 at least; the cache's state is moved on."""
        u = F.silu(cache.recent.along(u, attention_mask, lambda rows: self.conv(rows.mT).mT))
        if attention_mask is not None:
            u = u.masked_fill(~attention_mask.bool()[..., None], 0.0)
        rank, states = self.widen.in_features, self.log_decay.shape[1]
        parts = self.choose(u).split([rank, states, states], -1)
        step, write, read = (norm(part) for norm, part in zip(self.norms, parts, strict=True))
        step = F.softplus(F.linear(step, self.widen.weight.to(step.dtype), self.widen.bias.to(step.dtype)))
        if attention_mask is not None:
            step = step * attention_mask.bool()[..., None]  # padding leaves the state as it is
        u = u.to(step.dtype)
        state = u.new_zeros(len(u), u.shape[-1], states) if cache.state is None else cache.state
        y, cache.state = selective_scan(step, u, -self.log_decay.to(step.dtype).exp(), write, read, state)
        return y + self.direct.to(step.dtype) * u


class Hymba(Mixer):
    """Attention heads and a state space head on the same tokens: their outputs are normed, scaled, averaged and mapped back.

    Args:
        heads: query heads, of width / heads. kv_heads: key/value heads; values are `expand` times as wide as keys. expand:
            channels of the state space head / width. states: numbers that each of its channels keeps. kernel: tokens of its
            convolution. rank: of the map that chooses its steps; default width / 16.
    """

    rotates = True
    cannot = {"full": "the state space head reads what came before only"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        expand: int = 2,
        states: int = 16,
        kernel: int = 4,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads = width, heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ShapeError(f"{heads} query heads are no multiple of {self.kv_heads} key/value heads")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        inner, shared = expand * width, self.kv_heads * (width // heads)
        self.parts = (width, shared, expand * shared, inner, inner)  # queries, keys, values, state space, its gate
        self.inward = nn.Linear(width, sum(self.parts), bias=False)
        self.space = StateSpace(inner, states, math.ceil(width / 16) if rank is None else rank, kernel)
        self.attention_norm, self.space_norm = Rms(inner), Rms(inner)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: HybridState | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        q, k, v, u, gate = self.inward(x).split(self.parts, -1)
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2) for t, heads in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))
        )
        k, v = k.clone(), v.clone()  # or the cache would hold on to all that came out of the map
        seen = cache.extend(q, k, v, attention_mask, self.rotary)
        attended = attend(seen.q, seen.k, seen.v, *stages, **seen.places).transpose(1, 2).flatten(2)
        remembered = self.space(u, cache, attention_mask) * F.silu(gate)
        both = (self.attention_norm(attended) + self.space_norm(remembered)) / 2
        out: Tensor = self.out(both.to(x.dtype))
        return out

    def new_cache(self, owner: Cache | None = None) -> HybridState:
        """An empty cache for decoding: keys and values, and the state."""
        return HybridState(self.space.conv.kernel_size[0] - 1)


def oracle(mixer: Hymba, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time: the state as a recurrence, the attention by its sum."""
    n, h, group, space = len(x), mixer.heads, mixer.heads // mixer.kv_heads, mixer.space
    w_q, w_k, w_v, w_u, w_z = mixer.inward.weight.split(mixer.parts)
    d, dv, taps = len(w_q) // h, len(w_v) // mixer.kv_heads, space.conv.weight.shape[-1]
    rank, states = space.widen.in_features, space.log_decay.shape[1]

    def normed(t: Tensor, weight: Any) -> Tensor:
        return t / torch.sqrt((t * t).sum() / len(t) + 1e-6) * weight

    def swish(t: Tensor) -> Tensor:
        return t / (1 + torch.exp(-t))

    bias = dict(space.conv.named_parameters())["bias"]
    of_step, of_write, of_read = (norm.weight for norm in space.norms)
    state = torch.zeros(len(w_u), states, dtype=x.dtype)
    rows = []
    for i in range(n):
        near = [(a, i - taps + 1 + a) for a in range(taps) if i - taps + 1 + a >= 0]
        u = swish(bias + sum(space.conv.weight[:, 0, a] * (w_u @ x[j]) for a, j in near))
        chosen = space.choose.weight @ u
        delta = space.widen.weight @ normed(chosen[:rank], of_step) + space.widen.bias
        delta = torch.log(1 + torch.exp(delta))
        write, read = normed(chosen[rank : rank + states], of_write), normed(chosen[rank + states :], of_read)
        state = torch.stack(
            [torch.exp(-delta * torch.exp(space.log_decay[:, s])) * state[:, s] + delta * write[s] * u for s in range(states)],
            1,
        )
        remembered = (sum(read[s] * state[:, s] for s in range(states)) + space.direct * u) * swish(w_z @ x[i])
        seen, read_by = visible[i].nonzero().flatten().tolist(), []
        for head in range(h):
            kv = head // group
            q, keys, values = w_q[head * d : head * d + d] @ x[i], w_k[kv * d : kv * d + d], w_v[kv * dv : kv * dv + dv]
            e = torch.exp(torch.stack([q @ (keys @ x[j]) / d**0.5 for j in seen]))
            read_by.append(sum(e[at] / e.sum() * (values @ x[j]) for at, j in enumerate(seen)))
        attended = torch.cat(read_by)  # type: ignore[arg-type]
        both = normed(attended, mixer.attention_norm.weight) + normed(remembered, mixer.space_norm.weight)
        rows.append(mixer.out.weight @ (both / 2))
    return torch.stack(rows)


def _random(mixer: Hymba) -> Hymba:
    """With norms, decays and direct paths off their start, and steps large enough to matter."""
    shake((p for name, p in mixer.named_parameters() if "norm" in name or name.endswith(("direct", "log_decay"))), seed=2)
    with torch.no_grad():
        mixer.space.widen.bias.add_(2.0)
    return mixer


def examples(heads: int, size: int) -> list[Hymba]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        _random(Hymba(width, heads, kv_heads=heads // 2, states=4)),
        _random(Hymba(width, heads, expand=1, states=3, kernel=3, rank=5)),
        Hymba(width, heads, kv_heads=1, states=2, kernel=1),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Hymba:
    """Five query heads share a key/value head in the paper; here the divisor next to that. 16 states a channel."""
    shared = min((d for d in range(1, heads + 1) if heads % d == 0), key=lambda d: abs(heads / d - 5))
    return Hymba(heads * size, heads, **{"kv_heads": shared, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    mixer = _random(Hymba(32, 4, kv_heads=2, states=4)).double()
    alone = copy.deepcopy(mixer)
    nn.init.zeros_(alone.space_norm.weight)
    q, k, v = alone.inward(x).split(alone.parts, -1)[:3]
    q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in ((q, 4), (k, 2), (v, 2)))
    halves = [attend(q, k, half, Causal(), Window(9)) for half in v.chunk(2, -1)]
    attended = torch.cat(halves, -1).transpose(1, 2).flatten(2)
    yield (
        "without the state space head, it is half the normed attention, mapped back",
        largest(alone(x, Causal(), Window(9)) - alone.out(alone.attention_norm(attended) / 2)),
    )
    exact = copy.deepcopy(mixer)
    exact.attention_norm.epsilon = exact.space_norm.epsilon = 0.0
    louder = copy.deepcopy(exact)
    with torch.no_grad():
        louder.inward.weight.split(louder.parts)[2].mul_(7.0)
    yield "how loud the attention is does not matter", largest(louder(x, Causal()) - exact(x, Causal()))
    repeated = Hymba(32, 4, states=4).double()
    parts = list(mixer.inward.weight.split(mixer.parts))
    for at in (1, 2):
        parts[at] = parts[at].unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict({**mixer.state_dict(), "inward.weight": torch.cat(parts)})
    yield "grouped heads are repeated ones", largest(repeated(x, Causal()) - mixer(x, Causal()))

    still = copy.deepcopy(mixer)
    with torch.no_grad():
        still.space.widen.weight.zero_()
        still.space.widen.bias.fill_(-800.0)
    cache = still.new_cache()
    still(x, Causal(), cache=cache)
    yield "steps of zero write nothing", largest(torch.zeros(1) if cache.state is None else cache.state)
    real = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.6
    cache, filled = mixer.new_cache(), x.masked_fill(~real[..., None], torch.nan)
    pieces = [mixer(filled[:, at], Causal(), cache=cache, attention_mask=real[:, at]) for at in (slice(0, 41), slice(41, 70))]
    out = torch.cat(pieces, 1)
    off = [largest(out[row][real[row]] - mixer(x[row][real[row]][None], Causal())[0]) for row in range(2)]
    yield "padding anywhere is as if it were not there", max(off)

    step, u, write, read = torch.rand(4, 1, 70, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = [t.requires_grad_() for t in (step, u, -step[0, :3].detach(), write, read, u[:, :3].detach())]
    state, ys = given[-1], []
    for t in range(70):
        state = torch.exp(step[:, t, :, None] * given[2]) * state + (step * u)[:, t, :, None] * write[:, t, None]
        ys.append(state @ read[0, t])
    outs = torch.cat([state, torch.stack(ys, 1)], 1), torch.cat(selective_scan(*given)[::-1], 1)
    wanted, found = ([out, *torch.autograd.grad(out.sin().sum(), given)] for out in outs)
    off = [largest(a - b) for a, b in zip(wanted, found, strict=True)]
    yield "the scan of many tokens is the recurrence, and so are its gradients", max(off)

    with torch.no_grad():
        paper = Hymba(1600, 25, kv_heads=5)
        sizes = []
        for tokens in (1, 8):
            cache = paper.new_cache()
            paper(torch.randn(1, tokens, 1600), Causal(), cache=cache)
            sizes.append(cache.nbytes // 4)
    yield "in the paper's sizes, a token takes 960 numbers of the cache", float(abs(sizes[1] - sizes[0] - 7 * 960))
    yield "and the state 16 a channel, whatever the length", float(abs(sizes[0] - 960 - 3200 * 16 - 3200 * 3))
