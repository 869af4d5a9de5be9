"""One way to scan with a state space core, forward or from the last token back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .._states import Pass, Reading, StateCache
from ..heads._selective_scan import selective_scan
from ._fading import Fading
from ._parts import ShortConvolutions


class Told(NamedTuple):
    """What a scan is told, in its own order: C and B (b, n, state), u (b, n, inner), what steps are made of (b, n, heads)."""

    c: Tensor
    b: Tensor
    u: Tensor
    step: Tensor


class Way(nn.Module):
    """One way to scan: S_t = exp(-step_t exp(rate)) S_(t-1) + B_t (step_t u_t)^T, S_t^T C_t + D u_t; of each head or channel.

    Args:
        heads: of Mamba-2; Mamba-1 has as many as channels, each with a rate for every number of its state.
    """

    def __init__(self, core: str, inner: int, heads: int, state: int, taps: int, rank: int) -> None:
        super().__init__()
        self.diagonal, self.state = core == "mamba1", state
        self.heads = inner if self.diagonal else heads
        near = {"u": inner} if self.diagonal else {"u": inner, "b": state, "c": state}
        self.convolutions = ShortConvolutions(near, taps, bias=True)
        start = Fading(self.heads)
        self.rate, self.bias = start.rate, start.bias
        self.skip = nn.Parameter(torch.ones(self.heads))
        if self.diagonal:
            self.rate = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
            self.choose = nn.Linear(inner, rank + 2 * state, bias=False)
            self.widen = nn.Linear(rank, inner, bias=False)
            nn.init.uniform_(self.widen.weight, -(rank**-0.5), rank**-0.5)
        else:
            self.weight = nn.Parameter(torch.ones(inner))

    def told(self, maps: dict[str, Tensor], now: Pass) -> Told:
        """maps: of the tokens, before convolutions."""
        near = {name: F.silu(self.convolutions(name, part, now)) for name, part in maps.items() if name != "step"}
        if not self.diagonal:
            return Told(near["c"], near["b"], near["u"], maps["step"])
        step, b, c = self.choose(near["u"]).split([self.widen.in_features, self.state, self.state], -1)
        return Told(c, b, near["u"], self.widen(step))

    def steps(self, told: Told) -> Float[Tensor, "b n heads"]:
        """How far each head goes on at each token, in float32 at least."""
        wide = torch.promote_types(told.step.dtype, torch.float32)
        return F.softplus(told.step.to(wide) + self.bias.to(wide))

    def reading(self, told: Told) -> Reading:
        """The same as queries, keys and values; a channel of Mamba-1 is a head whose values are one number."""
        q, k = (t[:, None].expand(-1, self.heads, -1, -1) for t in (told.c, told.b))
        step = self.steps(told).mT
        rate = self.rate.to(step.dtype).exp()[:, None]
        decay = -rate * (step[..., None] if self.diagonal else step)
        return Reading(q, k, told.u.unflatten(-1, (self.heads, -1)).transpose(1, 2), decay, step)

    def scan(self, told: Told, now: Pass) -> Float[Tensor, "b heads n 1"]:
        """What a core of Mamba-1 reads, without its decays at all tokens at a time."""
        step = self.steps(told)
        c, b, u = (t.to(step.dtype) for t in told[:3])
        if now.real is not None:
            step, u, b = (t.where(now.real[..., None], 0.0) for t in (step, u, b))
        state = now.cache.state
        first = u.new_zeros(len(u), self.heads, self.state) if state is None else state[..., 0]
        out, last = selective_scan(step, u, -self.rate.to(step.dtype).exp(), b, c, first)
        now.cache.state = last[..., None]
        return out.mT[..., None]


def backwards(now: Pass) -> Pass:
    """The same call, read from the last token: documents begin where they ended."""
    ids = starts = None
    if now.ids is not None:
        ids = now.ids.flip(1)
        starts = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids.diff(dim=1) != 0], 1)
    real = None if now.real is None else now.real.flip(1)
    return Pass(StateCache(), True, real, torch.zeros_like(now.count), now.places.flip(1), ids, starts)
