"""Flow-Attention: linear attention as a flow from values to outputs, whose sources compete and whose sinks are allotted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Projections, Real, Tokens, largest
from .._states import Pass, Reading, StateMixer, begin, over
from ._carried import CarryCache, summed
from ._prefix import prefix_softmax

CARD = Card(
    paper="Flowformer: Linearizing Transformers with Conservation Flows",
    year=2022,
    room="linear",
    source=(
        "arXiv:2202.06258, sec. 4, and thuml/Flowformer, Flow_Attention.py: sigmoid features, maps with biases, no scale and no "
        "positions; eps = 1e-6 is added to both factors of each product of a feature and a sum. Only the code clamps conserved "
        "outflows to -1 ... 1 before competition (their mean is 1, so all above it are cut) and multiplies competition by the "
        "number of sources; clamp=False leaves the cut out. Causal: sums run, and each token's competition is settled when it "
        "comes, with the numbers of tokens of the code. Dropout and a second eps of its vision folder are left out"
    ),
)


class Flows(NamedTuple):
    """Of each head and token, (b, h, n).

    incoming: of sinks, from all keys. outgoing: of sources, to all queries. conserved_incoming, conserved_outgoing: the same
    once the other side's flows are one. competition: what sources' values are multiplied by; allocation: what sinks' outputs are.
    """

    incoming: Float[Tensor, "b h n"]
    outgoing: Float[Tensor, "b h n"]
    conserved_incoming: Float[Tensor, "b h n"]
    conserved_outgoing: Float[Tensor, "b h n"]
    competition: Float[Tensor, "b h n"]
    allocation: Float[Tensor, "b h n"]


class Flowformer(StateMixer):
    """o_i = sigmoid(I'_i) q_i / I_i . sum_j k_j (c_j v_j): I incoming flows, I' conserved ones, c competition of sources.

    Args:
        heads: of width / heads. clamp: whether conserved outgoing flows are cut to -1 ... 1. eps: see `CARD`.
    """

    def __init__(self, width: int, heads: int, *, clamp: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        if eps < 0:
            raise ShapeError(f"eps {eps} must be 0 or more")
        self.width, self.heads, self.clamp, self.eps = width, heads, clamp, eps
        self.projections = Projections(width, heads, bias=True)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self._parts(x)
        flows = self._flows(q, k, now)
        return Reading(q * over(flows.allocation, flows.incoming)[..., None], k * flows.competition[..., None], v)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        return self.projections.merge(out.to(x.dtype))

    def flows(self, x: Tokens, *stages: Stage, attention_mask: Real | None = None) -> Flows:
        """Flows, competition and allocation, for looking."""
        q, k, _ = self._parts(x)
        return self._flows(q, k, begin(self.new_cache(), x, stages, attention_mask))

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()

    def _parts(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.projections.split(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.sigmoid(q.to(wide)), torch.sigmoid(k.to(wide)), v

    def _flows(self, q: Tensor, k: Tensor, now: Pass) -> Flows:
        sinks, sources = torch.cat([q, k], 1), torch.cat([k, q], 1)  # incoming flows, then outgoing ones
        one = torch.ones_like(q[:, :1, :, :1])
        count = summed("tokens", self, one, one, one, now)
        flow = self._flow("flows", sinks, sources, one.expand(-1, sinks.shape[1], -1, -1), now)
        share = over(count if now.causal else one, flow[..., None])  # running sums are brought to the size of means
        conserved = self._flow("conserved", sinks, sources, torch.cat(share.chunk(2, 1)[::-1], 1), now)
        if now.causal:
            conserved = over(conserved, count[..., 0])
        incoming, outgoing = conserved.chunk(2, 1)
        bids = outgoing.clamp(-1.0, 1.0) if self.clamp else outgoing
        competition = count[..., 0] * prefix_softmax(bids[..., None], now).key[..., 0]
        first, second = flow.chunk(2, 1)
        return Flows(first, second, incoming, outgoing, competition, torch.sigmoid(incoming))

    def _flow(self, name: str, sinks: Tensor, sources: Tensor, values: Tensor, now: Pass) -> Float[Tensor, "b h n"]:
        """(sinks + eps) . (sum of values * sources + eps)."""
        sinks = sinks + self.eps
        return summed(name, self, sinks, sources, values, now)[..., 0] + self.eps * sinks.sum(-1)


def oracle(mixer: Flowformer, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every flow between two tokens by itself."""
    maps, eps, n = mixer.projections, mixer.eps, len(x)
    causal, size = n > 1 and not bool(visible[0, n - 1]), maps.head_dim
    reads = []
    for head in range(mixer.heads):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (x @ part.weight[own].T + part.bias[own] for part in (maps.q, maps.k, maps.v))
        q, k = 1 / (1 + torch.exp(-q)), 1 / (1 + torch.exp(-k))
        seen = [[j for j in range(n) if visible[i, j]] for i in range(n)]
        number = [len(s) if causal else 1 for s in seen]

        def flow(one: Tensor, others: list[Tensor], weights: list[Any]) -> Tensor:
            total = sum(other * weight for other, weight in zip(others, weights, strict=True))
            return ((one + eps) * (total + eps)).sum()

        into = [flow(q[i], [k[j] for j in seen[i]], [1.0] * n if not causal else [1.0] * len(seen[i])) for i in range(n)]
        out_of = [flow(k[i], [q[j] for j in seen[i]], [1.0] * len(seen[i])) for i in range(n)]
        kept_in = [flow(q[i], [k[j] for j in seen[i]], [number[j] / out_of[j] for j in seen[i]]) / number[i] for i in range(n)]
        kept_out = [flow(k[i], [q[j] for j in seen[i]], [number[j] / into[j] for j in seen[i]]) / number[i] for i in range(n)]
        bids = [torch.exp(b.clamp(-1, 1) if mixer.clamp else b) for b in kept_out]
        won = [bids[i] / sum(bids[j] for j in seen[i]) * len(seen[i]) for i in range(n)]
        rows = []
        for i in range(n):
            taken = sum((q[i] @ k[j]) * won[j] * v[j] for j in seen[i])
            rows.append(taken / into[i] / (1 + torch.exp(-kept_in[i])))
        reads.append(torch.stack(rows))
    return torch.cat(reads, 1) @ maps.out.weight.T + maps.out.bias


def examples(heads: int, size: int) -> list[Flowformer]:
    """Settings that the conformance checks run."""
    return [Flowformer(heads * size, heads), Flowformer(heads * size, heads // 2, clamp=False, eps=0.01)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Flowformer:
    """The code's: outgoing flows cut at 1."""
    return Flowformer(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    mixer = Flowformer(32, 4, clamp=False, eps=0.0).double()
    q, k, _ = mixer._parts(x)
    flows = mixer.flows(x)
    into, out_of = q / flows.incoming[..., None], k / flows.outgoing[..., None]
    yield "conserved: each sink's incoming flow is one", largest((into @ k.mT).sum(-1) - 1)
    yield "conserved: each source's outgoing flow is one", largest((out_of @ q.mT).sum(-1) - 1)
    yield "conserved flows of sinks sum to the number of sources", largest(flows.conserved_incoming.sum(-1) - 40)
    yield "and those of sources to that of sinks", largest(flows.conserved_outgoing.sum(-1) - 40)
    yield "competition has a mean of one", largest(flows.competition.mean(-1) - 1)
    yield "and differs", float(flows.competition.std(-1).min() < 1e-3)
    cut = Flowformer(32, 4).double()
    yield "by default bids are cut, and eps is 1e-6", float((cut.clamp, cut.eps) != (True, 1e-6))
    yield "the cut leaves no bid above one", float(cut.flows(x).competition.max() > torch.e / cut.flows(x).competition.min())
    early = mixer.flows(x, Causal())
    sums = ((q / early.incoming[..., None])[..., None, :] @ k.cumsum(2)[..., None]).flatten(2)
    yield "causal: each sink's incoming flow, of the tokens before, is one", largest(sums - 1)
    yield "causal: as sums run, the last token's flows are those of all", largest((early.incoming - flows.incoming)[..., -1])
    a_mean = F.softmax(early.conserved_outgoing, -1)[..., -1] * 40
    yield "causal: the last token's competition is settled among all", largest(early.competition[..., -1] - a_mean)
    first = mixer.projections.merge(torch.sigmoid(x.new_ones(())) * mixer._parts(x)[2])[:, 0]
    yield "causal: the first token has its own value, times sigmoid(1)", largest(mixer(x, Causal())[:, 0] - first)
    for part in (mixer.projections.q, mixer.projections.k):
        part.weight.zero_()
    even = torch.sigmoid(x.new_ones(())) * mixer._parts(x)[2].mean(2, keepdim=True)
    yield "queries and keys all alike: the mean of values, times sigmoid(1)", largest(mixer.read(x) - even)
