"""LightNet: an additive recurrence, whose keys are shares among all that was read, so that one scan serves any number of axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Tokens, largest, shake
from .._norms import Rms
from .._states import Pass, Reading, StateMixer
from ._axes import MdLrpe, MdTpe, on_axes
from ._carried import CarryCache, carried_of
from ._fading import LowRank
from ._prefix import prefix_softmax

CARD = Card(
    paper="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    year=2024,
    room="linear",
    source=(
        "arXiv:2405.21022 by its code: flash-linear-attention's layer (queries through SiLU, keys exp(k - log of the sum of all "
        "exp(k) up to now), RMS norm with weights over all channels, 1e-5, times SiLU of a map of low rank) and the first "
        "author's xmixers (sigmoid before the norm). xmixers starts its sum with one more weight of 1; here, as in the former, "
        "there is none. The rank is a head's size, which is 128 in the former. MD-LRPE in its cosine form, as in xopes: a "
        "channel's two halves share a decay. MD-TPE is MdTpe in _axes.py, to add after the embedding; it reads what came before "
        "on each axis. Short convolutions, off in the code, and a scalar decay are left out"
    ),
)
GATES = ("silu", "sigmoid")


class LightNet(StateMixer):
    """out_t = SiLU(q_t) . sum_s softmax_s(k)_s v_s^T, softmax over tokens for each channel: up to t if causal, else over all.

    Args:
        heads: of values of width / heads. key_size: of a head, default the same. gate: "silu" of a low rank map, after the norm,
            "sigmoid", before it, or None. rank: of that map, default a head's size. lrpe: turns queries and keys by their places:
            on the axes of `grid`, the last one first, or along a line. first: tokens before the grid, which are not turned.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_size: int | None = None,
        gate: str | None = "silu",
        rank: int | None = None,
        lrpe: bool = False,
        grid: tuple[int, ...] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if gate is not None and gate not in GATES:
            raise ShapeError(f"gate {gate!r} must be one of {', '.join(GATES)}, or None")
        if (grid is not None or first) and not lrpe:
            raise ShapeError("a grid, and tokens before it, matter to lrpe only, which is off")
        self.width, self.heads, self.gate, self.grid, self.first = width, heads, gate, grid or (0,), first
        size = width // heads
        self.key_size = key_size or size
        keys = heads * self.key_size
        self.q, self.k, self.v = (nn.Linear(width, channels, bias=False) for channels in (keys, keys, width))
        self.low = None if gate is None else LowRank(width, rank or size, width)
        self.lrpe = MdLrpe(heads, self.key_size, len(self.grid)) if lrpe else None
        self.norm = Rms(width, 1e-5)
        self.out = nn.Linear(width, width, bias=False)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        key, decay, _ = prefix_softmax(k, now)
        q = F.silu(q.to(key.dtype))
        if self.lrpe is not None:
            places = on_axes((self._places(now) - self.first).clamp(min=0), self.grid)
            q, key = self.lrpe(q, places), self.lrpe(key, places)
            if decay is not None and decay.dim() == 4:
                decay = torch.cat([decay, decay], -1)
        return Reading(q, key, v, decay)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        out = out.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).flatten(2)
        gate = None if self.low is None else self.low(x).to(out.dtype)
        if gate is None:
            out = self.norm(out)
        else:
            out = self.norm(out) * F.silu(gate) if self.gate == "silu" else self.norm(out * torch.sigmoid(gate))
        mapped: Tensor = self.out(out.to(x.dtype))
        return mapped

    def _places(self, now: Pass) -> Int[Tensor, "b n"]:
        """Places, counted anew in each document."""
        carried = carried_of(now).carried
        before = carried.get("start", torch.zeros_like(now.places[:, :1]))
        if now.starts is None:
            return now.places - before
        start = torch.cat([before, now.places.where(now.starts, 0)], 1).cummax(1).values
        carried["start"] = start[:, -1:].clone()
        return now.places - start[:, 1:]

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


def oracle(mixer: LightNet, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), channel by channel of keys."""
    d, dv, rows = mixer.key_size, mixer.width // mixer.heads, []

    def phase(t: int, head: int, channel: int) -> Any:
        if mixer.lrpe is None:
            return torch.zeros(())
        at: list[int] = []
        place = max(t - mixer.first, 0)
        for size in reversed(mixer.grid[1:]):
            at.insert(0, place % size)
            place //= size
        each = mixer.lrpe.theta.shape[1]
        return [place, *at][channel // each] * mixer.lrpe.theta[head, channel % each]

    for t, row in enumerate(x):
        seen, read = visible[t].nonzero().flatten().tolist(), []
        q, k = mixer.q.weight @ row, x[seen] @ mixer.k.weight.T
        for head in range(mixer.heads):
            out = torch.zeros(dv, dtype=x.dtype)
            values = x[seen] @ mixer.v.weight[head * dv : (head + 1) * dv].T
            for channel in range(d):
                own = head * d + channel
                share = torch.exp(k[:, own]) / torch.exp(k[:, own]).sum()
                for i, s in enumerate(seen):
                    turned = torch.cos(phase(t, head, channel) - phase(s, head, channel))
                    out = out + q[own] / (1 + torch.exp(-q[own])) * share[i] * turned * values[i]
            read.append(out)
        merged = torch.cat(read)
        low = None if mixer.low is None else mixer.low.up.weight @ (mixer.low.down.weight @ row)
        if low is not None and mixer.gate == "sigmoid":
            merged = merged / (1 + torch.exp(-low))
        merged = merged / torch.sqrt((merged * merged).mean() + 1e-5) * mixer.norm.weight
        if low is not None and mixer.gate == "silu":
            merged = merged * low / (1 + torch.exp(-low))
        rows.append(mixer.out.weight @ merged)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LightNet]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        LightNet(width, heads),
        LightNet(width, heads // 2, key_size=5, gate="sigmoid", rank=3, lrpe=True, grid=(4, 3), first=1),
        LightNet(width, heads, gate=None, lrpe=True),
    ]
    for mixer in made:
        shake([mixer.norm.weight, *([mixer.lrpe.theta] if mixer.lrpe else [])], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> LightNet:
    """The library's: SiLU after the norm, no positions."""
    return LightNet(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    mixer = LightNet(32, 4).double()
    q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
    yield "both sides: direct sums, normalised", largest(mixer.read(x) - F.silu(q) @ (k.softmax(2).mT @ v))
    order = torch.randperm(40)
    yield "both sides: one scan, whose order does not matter", largest(mixer(x[:, order]) - mixer(x)[:, order])
    direct = torch.stack([F.silu(q[:, :, t, None]) @ (k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1]) for t in range(40)], 2)
    yield "causal: direct sums, normalised", largest(mixer.read(x, Causal()) - direct[..., 0, :])
    yield "causal: the last token reads what it reads of all", largest((mixer(x, Causal()) - mixer(x))[:, -1])
    cache, units = mixer.new_cache(), torch.eye(8, dtype=torch.float64).expand(2, 4, -1, -1)
    mixer(x, Causal(), cache=cache)
    assert cache.state is not None
    yield (
        "the state: softmax attention of unit queries",
        largest(cache.state - F.scaled_dot_product_attention(units, k, v, scale=1.0)),
    )
    mixer.k.weight.zero_()
    means = v.cumsum(2) / torch.arange(1, 41)[:, None]
    yield "keys all alike: running means", largest(mixer.read(x, Causal()) - F.silu(q).sum(-1, keepdim=True) * means)
    turn, at = MdLrpe(4, 7, 3).double(), on_axes(torch.arange(40)[None], (2, 5, 4))
    yield "angles start as powers of 10000", largest(turn.theta.flatten() - 10000 ** (-torch.arange(12) / 6).double()) // 1e-6
    a, b, moved = torch.randn(2, 4, 40, 7, dtype=torch.float64), q[..., :7], torch.tensor([3, 11, -2])
    scores = turn(a, at) @ turn(b, at).mT
    yield "MD-LRPE: products depend on offsets only", largest(turn(a, at + moved) @ turn(b, at + moved).mT - scores)
    yield "and on them they do depend", float(largest(turn(a, at + moved) @ turn(b, at).mT - scores) < 0.1)
    yield "at no offset they are as without", largest(scores.diagonal(dim1=2, dim2=3) - (a * b).sum(-1))
    grid = (2, 5, 4)
    tpe = MdTpe(32, 4, 3).double()
    shake([tpe.norm], seed=1)
    wanted = sum(_slow_tpe(tpe, x[0], axis, grid, at[0]) for axis in range(3))
    yield "MD-TPE: sums over tokens that differ on one axis", largest(tpe(x, grid)[0] - wanted)


def _slow_tpe(tpe: MdTpe, x: Tensor, axis: int, grid: tuple[int, ...], at: Tensor) -> Tensor:
    """One axis of MD-TPE, by pairs of tokens."""
    rows = []
    for t in range(len(x)):
        offset = at[t] - at
        others = [other for other in range(len(grid)) if other != axis]
        seen = [s for s in range(len(x)) if not offset[s, others].any() and offset[s, axis] >= 0]
        heads = []
        for head in range(tpe.heads):
            own = slice(head * 8, head * 8 + 8)
            fade = torch.sigmoid(tpe.decay[axis, head])
            out = (tpe.q[axis, own] @ tpe.k[axis, own]) * sum(fade ** offset[s, axis] * x[s, own] for s in seen)
            heads.append(out / torch.sqrt((out * out).mean() + 1e-6))
        rows.append(tpe.out[axis](torch.cat(heads) * tpe.norm[axis]))
    return torch.stack(rows)
