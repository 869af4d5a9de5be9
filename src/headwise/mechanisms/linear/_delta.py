"""The delta rule on a state that decays: what Gated DeltaNet and Kimi Delta Attention share."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ShapeError
from .._mixer import Tokens
from .._norms import Rms
from .._states import Pass, Reading, StateMixer
from ._parts import ShortConvolutions, l2_normed


class GatedDelta(StateMixer):
    """S' = diag(alpha_t) S_(t-1); S_t = S' + beta_t k_t (v_t - S'^T k_t)^T; read by S_t^T q_t, normed by heads and gated.

    Args:
        heads: of keys of `key_size` and values of `value_size`. taps: of the convolutions of queries, keys and values; 0 for none.
        negative: lets beta go up to two, so that the state may have negative eigenvalues.
    """

    cannot = {"full": "its state takes tokens in their order"}

    def __init__(self, width: int, heads: int, key_size: int, value_size: int, *, taps: int, negative: bool) -> None:
        super().__init__()
        if min(key_size, value_size) < 1:
            raise ShapeError(f"keys of {key_size} and values of {value_size} channels a head; both must be 1 or more")
        self.width, self.heads, self.key_size, self.value_size, self.negative = width, heads, key_size, value_size, negative
        keys, values = heads * key_size, heads * value_size
        self.q, self.k, self.v = (nn.Linear(width, size, bias=False) for size in (keys, keys, values))
        self.beta = nn.Linear(width, heads, bias=False)
        self.convolutions = ShortConvolutions({"q": keys, "k": keys, "v": values}, taps)
        self.norm = Rms(value_size, 1e-5)
        self.back = nn.Linear(values, width, bias=False)

    @abstractmethod
    def decay(self, x: Tokens) -> Tensor:
        """log alpha, (b, h, n) or (b, h, n, key_size)."""

    @abstractmethod
    def gated(self, x: Tokens) -> Tensor:
        """What outputs are multiplied by, (b, n, h * value_size)."""

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        parts = (F.silu(self.convolutions(name, part(x), now)) for name, part in (("q", self.q), ("k", self.k), ("v", self.v)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        beta = torch.sigmoid(self.beta(x).mT.to(torch.promote_types(x.dtype, torch.float32)))
        beta = 2 * beta if self.negative else beta
        return Reading(l2_normed(q) * self.key_size**-0.5, l2_normed(k), v, self.decay(x), beta, beta)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.back((self.norm(out).transpose(1, 2).flatten(2) * self.gated(x)).to(x.dtype))
        return mapped


def slowly(mixer: GatedDelta, x: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
    """The oracles' common part: one sequence (n, width), a token at a time; alpha (n, h, d) and gate (n, h * dv) by the formula."""
    h, d, dv = mixer.heads, mixer.key_size, mixer.value_size
    rows = []
    states = [torch.zeros(d, dv, dtype=x.dtype) for _ in range(h)]

    def near(name: str, t: int, at: slice) -> Tensor:
        weight, taps = getattr(mixer, name).weight[at], dict(mixer.convolutions.weights.items()).get(name)
        here = weight @ x[t]
        if taps is not None:
            last = taps.shape[1] - 1
            here = sum((taps[at, last - back] * (weight @ x[t - back]) for back in range(min(t, last) + 1)), torch.zeros_like(here))
        return here / (1 + torch.exp(-here))

    for t in range(len(x)):
        read = []
        for head in range(h):
            own = slice(head * d, head * d + d)
            q, k, v = near("q", t, own), near("k", t, own), near("v", t, slice(head * dv, head * dv + dv))
            q, k = (u / torch.sqrt((u * u).sum() + 1e-6) for u in (q, k))
            beta = (1 + mixer.negative) / (1 + torch.exp(-(mixer.beta.weight[head] @ x[t])))
            faded = torch.diag(alpha[t, head]) @ states[head]
            states[head] = faded - beta * torch.outer(k, k) @ faded + beta * torch.outer(k, v)
            out = states[head].T @ q / d**0.5
            read.append(out / torch.sqrt((out * out).mean() + 1e-5) * mixer.norm.weight)
        rows.append(mixer.back.weight @ (torch.cat(read) * gate[t]))
    return torch.stack(rows)
