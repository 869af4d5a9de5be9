"""Mixture of heads: each token chooses which heads read for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues, Seen
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest

CARD = Card(
    paper="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    room="heads",
    source=(
        "arXiv:2410.11842 and the authors' code. Paper: gates a_0 softmax(x W_s) of shared heads and a_1 softmax(x W_r), "
        "cut to the k largest, of routed ones. Code: the same times 2 h_s and 2 k, "
        "routed ones divided by their sum; only that starts as plain attention, and it is the default. Without shared "
        "heads the code has no factor 2 a_1. Their conversion of a checkpoint "
        "routes by the length of each head's query; they train it with a straight-through gradient, here hard gates have none"
    ),
)


@dataclass(frozen=True)
class Routing:
    """Which heads read for each token.

    gates: (b, n, heads), what each head's output is multiplied by. probabilities, picked: (b, n, routed heads), before top-k
    and by it.
    """

    gates: Tensor
    probabilities: Tensor
    picked: Tensor

    def balance_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """E sum_i (mean probability of i) (share of tokens that pick i): k if all routed heads are picked alike."""
        real = torch.ones_like(self.picked[..., 0]) if attention_mask is None else attention_mask.bool()
        probability, share = self.probabilities[real].mean(0), self.picked[real].to(self.probabilities).mean(0)
        return len(share) * (probability * share).sum()


class Moh(Mixer):
    """Attention in which `shared` heads always read, and each token picks `active` of the rest, weighing what they read.

    Args:
        shared: how many heads, the first ones, always read. active: how many of the others each token picks.
        scale: "code" or "paper", see the card. router: "learned", or "norm": the routed heads with the longest queries, gates
            of one. sparse: read only where a head was picked, instead of everywhere and gating.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        heads: int,
        shared: int,
        active: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: str = "code",
        router: str = "learned",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        routed = heads - shared
        if not 0 <= shared <= heads or not 0 <= active <= routed or shared + active == 0:
            raise ShapeError(f"{shared} shared and {active} active of {routed} other heads; there are {heads} heads in all")
        if scale not in ("code", "paper") or router not in ("learned", "norm"):
            raise ShapeError(f"scale {scale!r} must be 'code' or 'paper', router {router!r} 'learned' or 'norm'")
        self.width, self.shared, self.active, self.scale, self.sparse = width, shared, active, scale, sparse
        self.projections = Projections(width, heads, kv_heads, head_dim)
        learned = router == "learned"
        self.share = nn.Linear(width, shared, bias=False) if learned and shared else None
        self.route_to = nn.Linear(width, routed, bias=False) if learned and routed else None
        self.balance = nn.Linear(width, 2, bias=False) if learned and shared and active else None

    @staticmethod
    def of(attention: Attention, shared: int, active: int, *, sparse: bool = False) -> Moh:
        """A trained attention as a mixture of its heads, routed by the lengths of queries: no new parameters, gates of 0 and 1."""
        if attention.mechanism is not None:
            raise ShapeError("only plain attention becomes a mixture of heads; this one has a mechanism of its own")
        p = attention.projections
        made = Moh(attention.width, p.heads, shared, active, kv_heads=p.kv_heads, head_dim=p.head_dim, router="norm", sparse=sparse)
        made.projections = p
        return made

    def route(self, x: Float[Tensor, "b n width"], q: Float[Tensor, "b h n d"]) -> Routing:
        """Which heads read for each token, and how much they count."""
        gates = []
        if self.route_to is not None:
            probabilities = self.route_to(x).softmax(-1)
        else:
            lengths = q[:, self.shared :].norm(dim=-1).transpose(1, 2)
            spread = lengths.std(-1, keepdim=True) if lengths.shape[-1] > 1 else torch.ones_like(lengths)
            probabilities = (lengths / spread.clamp(min=torch.finfo(lengths.dtype).eps)).softmax(-1)
        best = probabilities.topk(self.active, dim=-1).indices
        picked = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, best, True)
        if self.share is None and self.route_to is None:
            gates = [torch.ones_like(x[..., : self.shared]), picked.to(x)]
        else:
            pair = None if self.balance is None else self.balance(x).softmax(-1)
            if self.share is not None:
                gates.append(self._shared_gates(self.share(x).softmax(-1), pair))
            if self.route_to is not None:
                gates.append(self._routed_gates(probabilities, picked, pair))
        return Routing(torch.cat(gates, -1), probabilities, picked)

    def _shared_gates(self, probabilities: Tensor, pair: Tensor | None) -> Tensor:
        part = 1.0 if pair is None else pair[..., :1]
        if self.scale == "paper":
            return part * probabilities
        return (1 if pair is None else 2) * part * self.shared * probabilities

    def _routed_gates(self, probabilities: Tensor, picked: Tensor, pair: Tensor | None) -> Tensor:
        part, chosen = (1.0 if pair is None else pair[..., 1:]), probabilities * picked
        if self.scale == "paper":
            return part * chosen
        total = chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).eps)
        return (1 if pair is None else 2) * part * self.active * chosen / total

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        q, k, v = self.projections.split(x)
        routing = self.route(x, q)
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        if self.sparse:
            out = self._read_picked(seen, routing.picked, stages)
        else:
            out = attend(seen.q, seen.k, seen.v, *stages, **seen.places)
        return self.projections.merge(out * routing.gates.transpose(1, 2)[..., None])

    def _read_picked(self, seen: Seen, picked: Tensor, stages: tuple[Stage, ...]) -> Tensor:
        """(b, h, n, d): shared heads read everywhere, routed ones for the tokens that picked them; zero elsewhere."""
        (b, h, n, d), m = seen.q.shape, seen.k.shape[2]
        queries, keys = seen.query_positions, seen.key_positions
        queries = torch.arange(m - n, m, device=seen.q.device)[None] if queries is None else queries
        keys = torch.arange(m, device=seen.q.device)[None] if keys is None else keys
        group = h // seen.k.shape[1]
        out = seen.q.new_zeros(b, h, n, seen.v.shape[-1])
        for head in range(h):
            there = torch.ones_like(picked[..., 0]) if head < self.shared else picked[..., head - self.shared]
            most = int(there.sum(1).max())
            if not most:
                continue
            order = (~there).int().argsort(dim=1, stable=True)[:, :most]  # those that picked it, then others, gated by 0
            places = queries.expand(b, -1).gather(1, order)
            rows = seen.q[:, head].gather(1, order[..., None].expand(-1, -1, d))[:, None]
            kv = slice(head // group, head // group + 1)
            mine = [stage.select([head]) for stage in stages]
            read = attend(rows, seen.k[:, kv], seen.v[:, kv], *mine, query_positions=places, key_positions=keys)
            out[:, head] = out[:, head].scatter(1, order[..., None].expand_as(read[:, 0]), read[:, 0])
        return out

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: all heads', for later tokens may pick any."""
        return KeyValues()


def oracle(mixer: Moh, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time, by the formulas of the authors' code."""
    p = mixer.projections
    hs, k, d, group = mixer.shared, mixer.active, p.head_dim, p.heads // p.kv_heads
    rows = []
    for i in range(len(x)):
        seen = visible[i].nonzero().flatten()
        out = torch.zeros(mixer.width, dtype=x.dtype)
        shares = torch.softmax(mixer.share.weight @ x[i], 0) if mixer.share is not None else None
        chances = torch.softmax(mixer.route_to.weight @ x[i], 0) if mixer.route_to is not None else None
        pair = torch.softmax(mixer.balance.weight @ x[i], 0) if mixer.balance is not None else None
        best = sorted(range(p.heads - hs), key=lambda e: -float(chances[e].detach()))[:k] if chances is not None else []
        for head in range(p.heads):
            if head < hs:
                assert shares is not None
                gate = shares[head] * (1 if pair is None else pair[0])
                gate = gate if mixer.scale == "paper" else gate * hs * (1 if pair is None else 2)
            elif head - hs in best:
                assert chances is not None
                gate = chances[head - hs] * (1 if pair is None else pair[1])
                if mixer.scale == "code":
                    gate = gate * k * (1 if pair is None else 2) / sum(chances[e] for e in best)
            else:
                continue
            at, kv = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            e = torch.exp((x[seen] @ p.k.weight[kv].T) @ (p.q.weight[at] @ x[i]) / d**0.5)
            out = out + gate * (p.out.weight[:, at] @ ((e / e.sum()) @ (x[seen] @ p.v.weight[kv].T)))
        rows.append(out)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Moh]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        Moh(width, heads, 1, 2),
        Moh(width, heads, 2, 1, sparse=True),
        Moh(width, heads, 0, 2, kv_heads=heads // 2, scale="paper"),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Moh:
    """Three quarters of the heads active, as in the paper."""
    return Moh(heads * size, heads, **{"shared": heads // 2, "active": heads // 4, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    even, plain = Moh(32, 4, 2, 2).double(), Attention(32, 4).double()
    plain.projections = even.projections
    for router in (even.share, even.route_to, even.balance):
        nn.init.zeros_(router.weight)  # type: ignore[union-attr]
    yield "routers of zero that pick all heads are plain attention", largest(even(x, Causal()) - plain(x, Causal()))
    mixed = Moh(32, 4, 1, 2).double()
    routing = mixed.route(x, mixed.projections.split(x)[0])
    total = routing.gates[..., :1].sum(-1) / 1 + routing.gates[..., 1:].sum(-1) / 2
    yield "shared gates / h_s and routed gates / k sum to two", largest(total - 2)
    yield "each token picks k heads", largest(routing.picked.sum(-1) - 2)
    dense = mixed(x, Causal())
    mixed.sparse = True
    yield "reading only where picked changes nothing", largest(mixed(x, Causal()) - dense)
    by_norm = Moh.of(plain, 2, 1)
    q = plain.projections.split(x)[0]
    one, other = (by_norm.route(x, scale * q).picked for scale in (1.0, 7.0))
    yield "the size of all queries does not route", float((one != other).sum())
    yield (
        "all heads active is the attention it came from",
        largest(Moh.of(plain, 2, 2)(x, Causal()) - plain(x, Causal())),
    )
