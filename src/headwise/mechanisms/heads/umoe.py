"""UMoE: attention whose values are experts, the same that a feed-forward layer may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.window import Window
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest, shake
from .._norms import rms_normed

CARD = Card(
    paper="UMoE: Unifying Attention and FFN with Shared Experts",
    year=2025,
    room="heads",
    source=(
        "arXiv:2505.07260, sec. 3, and the authors' code: tokens are mixed first, a query for each picked expert and one key head; "
        "experts read the mixes; gates are softmax probabilities, not divided by their sum; one more expert always reads, "
        "with a query of its own and no gate. The code that they train has an RMS norm between the two factors of a query, which "
        "the paper has not: `norm`. Their balance loss, weighted by 0.001 for each router, is left to the caller: `Routing`. "
        "What else a layer holds (RMS norms before, residuals) is a stack's"
    ),
)
STD = 0.02  # of all weights at the start, routers excepted
EPSILON = 1e-6
ROWS = 8  # an expert's rows come in multiples of it


@dataclass(frozen=True)
class Routing:
    """Which experts each token picks. probabilities (b, n, experts); picked, gates (b, n, active): the largest."""

    probabilities: Float[Tensor, "b n e"]
    picked: Int[Tensor, "b n k"]
    gates: Float[Tensor, "b n k"]

    def balance_loss(self, attention_mask: Real | None = None) -> Tensor:
        """In each row, sum_i E (share of picks of i) (mean probability of i), meaned over rows: 1 if all are picked alike."""
        experts, active = self.probabilities.shape[-1], self.picked.shape[-1]
        real = torch.ones_like(self.picked[..., 0]) if attention_mask is None else attention_mask
        real = real.to(self.probabilities)[..., None]
        count = real.sum(1).clamp(min=1)
        picks = F.one_hot(self.picked, experts).sum(2)
        share, mean = (picks * real).sum(1) / (active * count), (self.probabilities * real).sum(1) / count
        return experts * (share * mean).sum(-1).mean()


class Router(nn.Module):
    """Picks the `active` experts with the largest softmax(x W), computed in float32 at least."""

    def __init__(self, width: int, experts: int, active: int) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ShapeError(f"{active} active of {experts} experts; choose 1 to {experts}")
        self.active = active
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tokens) -> Routing:
        """The routing of each token."""
        wide = torch.promote_types(x.dtype, torch.float32)
        probabilities = F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        gates, picked = probabilities.topk(self.active, dim=-1)
        return Routing(probabilities, picked, gates)


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * STD)


class Dispatch:
    """Vectors sorted by the expert that they go to, so that each expert runs once, on its own rows only.

    An expert's rows are filled up with zeros to a multiple of `ROWS`: a row then comes out the same to the bit whoever else picks
    its expert, so that later tokens change nothing at earlier ones.
    """

    def __init__(self, picked: Int[Tensor, "b n k"], experts: int) -> None:
        self.shape, flat = picked.shape, picked.flatten()
        counts = flat.bincount(minlength=experts)
        filled = (counts + ROWS - 1) // ROWS * ROWS
        gaps = (filled - counts).cumsum(0) - (filled - counts)  # zeros before an expert's own rows
        order = flat.argsort(stable=True)
        self.row = torch.empty_like(order).scatter(0, order, torch.arange(len(flat), device=flat.device) + gaps[flat[order]])
        self.rows: list[int] = filled.tolist()

    def collect(self, x: Float[Tensor, "b n k c"]) -> Float[Tensor, "rows c"]:
        """A vector for each pick, in order of experts."""
        return x.new_zeros(sum(self.rows), x.shape[-1]).index_copy(0, self.row, x.flatten(0, 2))

    def apply(self, rows: Float[Tensor, "rows c"], weights: Float[Tensor, "e out c"]) -> Float[Tensor, "rows out"]:
        """Each row times its expert's own matrix."""
        return torch.cat([part @ weight.T for part, weight in zip(rows.split(self.rows), weights.unbind(), strict=True)])

    def spread(self, rows: Float[Tensor, "rows c"]) -> Float[Tensor, "b n k c"]:
        """Back to their places."""
        return rows[self.row].unflatten(0, self.shape)


class Experts(nn.Module):
    """Two-matrix experts W_2 silu(W_1 z), each applied to the rows that picked it.

    Args:
        width: of what they read and give. hidden: of each expert. activation: silu between the two; without, they are linear.
    """

    def __init__(self, width: int, experts: int, hidden: int, *, activation: bool = True) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = _normal(experts, hidden, width), _normal(experts, width, hidden)

    def forward(self, z: Float[Tensor, "b n k c"], picked: Int[Tensor, "b n k"]) -> Float[Tensor, "b n k c"]:
        """What the picked experts make of the vectors that they are given."""
        dispatch = Dispatch(picked, len(self.up))
        hidden = dispatch.apply(dispatch.collect(z), self.up)
        return dispatch.spread(dispatch.apply(F.silu(hidden) if self.activation else hidden, self.down))

    def one_more(self) -> Experts:
        """A single expert of the same shape."""
        return Experts(self.up.shape[2], 1, self.up.shape[1], activation=self.activation)

    def alone(self, z: Tokens) -> Tokens:
        """What the first of them makes of every token."""
        hidden = z @ self.up[0].T
        return (F.silu(hidden) if self.activation else hidden) @ self.down[0].T


class FeedForward(nn.Module):
    """The feed-forward layer that shares an attention's experts, with a router and an always active expert of its own.

    Args:
        experts: `Umoe.experts`. active: how many each token picks. shared: whether one more always reads.
    """

    def __init__(self, experts: Experts, active: int = 15, *, shared: bool = True) -> None:
        super().__init__()
        self.experts = experts
        self.router = Router(experts.up.shape[2], len(experts.up), active)
        self.shared = experts.one_more() if shared else None

    def forward(self, x: Tokens) -> Tokens:
        """sum_i p_i E_i(x) over picked experts, and the shared one."""
        routing = self.router(x)
        read = self.experts(x[:, :, None].expand(-1, -1, self.router.active, -1), routing.picked)
        out = (read * routing.gates.to(read.dtype)[..., None]).sum(2)
        return out if self.shared is None else out + self.shared.alone(x)


class Umoe(Mixer):
    """Attention in which each token picks experts, mixes all tokens by a query for each of them, and lets the expert read the mix.

    Args:
        experts: how many, or those of another layer. active: how many each token picks. hidden: of an expert; default width / 4.
        key_dim: of queries and of the one key head; default width / 4. rank: of what sets an expert's query apart.
        shared: whether one more expert always reads. norm: an RMS norm inside that query, as in the authors' code.
        activation: as of `Experts`.
    """

    rotates = True

    def __init__(
        self,
        width: int,
        experts: int | Experts = 128,
        active: int = 3,
        *,
        hidden: int | None = None,
        key_dim: int | None = None,
        rank: int = 16,
        shared: bool = True,
        norm: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        hidden, d = max(1, width // 4) if hidden is None else hidden, 2 * max(1, width // 8) if key_dim is None else key_dim
        self.width = width
        self.experts = experts if isinstance(experts, Experts) else Experts(width, experts, hidden, activation=activation)
        count = len(self.experts.up)
        if self.experts.up.shape[2] != width:
            raise ShapeError(f"the experts read vectors of {self.experts.up.shape[2]}, the layer has {width}; they must agree")
        self.router = Router(width, count, active)
        self.query, self.key = nn.Linear(width, d, bias=False), nn.Linear(width, d, bias=False)
        self.query_down, self.query_up = _normal(count, rank, width), _normal(count, d, rank)
        self.query_norm = nn.Parameter(torch.ones(rank)) if norm else None
        self.shared_query = nn.Linear(width, d, bias=False) if shared else None
        self.shared = self.experts.one_more() if shared else None
        for linear in (self.query, self.key, self.shared_query):
            if linear is not None:
                nn.init.normal_(linear.weight, std=STD)

    def route(self, x: Tokens) -> Routing:
        """Which experts each token picks, for a balance loss."""
        routing: Routing = self.router(x)
        return routing

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`. Heads of stages are the shared expert's, if there is one, and one for each pick of a token."""
        routing = self.route(x)
        q, k, v = self._queries(x, routing.picked), self.key(x)[:, None], x[:, None]  # tokens are their own values
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        mixes = attend(seen.q, seen.k, seen.v, *stages, **seen.places).transpose(1, 2)
        read = self.experts(mixes if self.shared is None else mixes[:, :, 1:], routing.picked)
        out = (read * routing.gates.to(read.dtype)[..., None]).sum(2)
        return out if self.shared is None else out + self.shared.alone(mixes[:, :, 0])

    def _queries(self, x: Tokens, picked: Tensor) -> Tensor:
        """(b, shared + active, n, d): x W_q + x A_i B_i for each picked expert i, after that of the shared one."""
        dispatch = Dispatch(picked, len(self.query_down))
        inner = dispatch.apply(dispatch.collect(x[:, :, None].expand(-1, -1, picked.shape[2], -1)), self.query_down)
        if self.query_norm is not None:
            inner = rms_normed(inner, EPSILON).to(inner.dtype) * self.query_norm
        q = self.query(x)[:, :, None] + dispatch.spread(dispatch.apply(inner, self.query_up))
        if self.shared_query is not None:
            q = torch.cat([self.shared_query(x)[:, :, None], q], 2)
        return q.transpose(1, 2)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding: of each token a key, and the token itself."""
        return KeyValues()


def oracle(mixer: Umoe, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token and an expert at a time."""
    keys = [mixer.key.weight @ row for row in x]

    def mixed(q: Tensor, i: int) -> Tensor:
        seen = visible[i].nonzero().flatten().tolist()
        e = [torch.exp((q * keys[j]).sum() / len(q) ** 0.5) for j in seen]
        total = torch.stack([w * x[j] for w, j in zip(e, seen, strict=True)]).sum(0)
        return total / torch.stack(e).sum()

    def expert(experts: Experts, at: int, z: Tensor) -> Tensor:
        hidden = experts.up[at] @ z
        return experts.down[at] @ (hidden / (1 + torch.exp(-hidden)) if experts.activation else hidden)

    rows = []
    for i in range(len(x)):
        e = torch.exp(mixer.router.weight @ x[i])
        p = e / e.sum()
        out = torch.zeros_like(x[0])
        for best in sorted(range(len(p)), key=lambda at: -float(p[at].detach()))[: mixer.router.active]:
            inner = mixer.query_down[best] @ x[i]
            if mixer.query_norm is not None:
                inner = inner / torch.sqrt((inner**2).mean() + EPSILON) * mixer.query_norm
            mix = mixed(mixer.query.weight @ x[i] + mixer.query_up[best] @ inner, i)
            out = out + p[best] * expert(mixer.experts, best, mix)
        if mixer.shared is not None and mixer.shared_query is not None:
            out = out + expert(mixer.shared, 0, mixed(mixer.shared_query.weight @ x[i], i))
        rows.append(out)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Umoe]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Umoe(width, 6, 2, rank=3),
        Umoe(width, 5, 3, hidden=12, key_dim=6, rank=2, norm=True),
        Umoe(width, 4, 1, rank=4, shared=False, activation=False),
    ]
    shake((p for mixer in made for p in mixer.parameters()), seed=3)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Umoe:
    """The paper's base model: 128 experts of a quarter of the width, 3 picked and one shared, queries of rank 16."""
    return Umoe(heads * size, **{"rank": min(16, max(1, heads * size // 4)), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    umoe = examples(4, 8)[0].double()
    layer = FeedForward(umoe.experts, 2).double()
    layer.router, layer.shared = umoe.router, umoe.shared
    yield "who reads only itself is a feed-forward layer of the same experts", largest(umoe(x, Window(1)) - layer(x))
    before, shuffled = umoe(x, Causal()), torch.randperm(6)
    with torch.no_grad():
        for part in (umoe.router.weight, umoe.query_down, umoe.query_up, umoe.experts.up, umoe.experts.down):
            part.copy_(part[shuffled].clone())
    yield "the order of experts does not matter", largest(umoe(x, Causal()) - before)
    linear = Umoe(32, 4, 4, hidden=8, key_dim=8, rank=8, shared=False, activation=False).double()
    plain = Attention(32, 4, kv_heads=4).double()
    p = plain.projections
    with torch.no_grad():
        linear.router.weight.zero_()  # all gates 1 / 4
        linear.query_up.copy_(torch.eye(8))
        p.q.weight.copy_((linear.query.weight + linear.query_down).flatten(0, 1))
        p.k.weight.copy_(linear.key.weight.repeat(4, 1))
        p.v.weight.copy_(linear.experts.up.flatten(0, 1))
        p.out.weight.copy_(linear.experts.down.transpose(0, 1).flatten(1) / 4)
    difference = largest(linear(x, Causal()) - plain(x, Causal())) / largest(plain(x, Causal()))
    yield "linear experts, all picked, are the heads of plain attention with one key head: mixing may come first", difference
    cache = umoe.new_cache()
    umoe(x, Causal(), cache=cache)
    yield "the cache holds a key and the token itself: d_k + c numbers", float(abs(cache.nbytes - 2 * 11 * (8 + 32) * 8))
    kept = []
    for mixer in (Umoe(768, 1, 1), Attention(768, 4)):
        cache = mixer.new_cache()
        mixer(torch.randn(1, 1, 768), Causal(), cache=cache)
        kept.append(cache.nbytes // 4)
    yield "which is 960 in the base model, where attention of 4 heads keeps 1536", float(abs(kept[0] - 960) + abs(kept[1] - 1536))
    routing = Routing(torch.full((1, 4, 4), 0.25), torch.tensor([[[0, 1], [2, 3], [0, 2], [1, 3]]]), torch.full((1, 4, 2), 0.25))
    yield "experts picked alike have a balance loss of one", float((routing.balance_loss() - 1).abs())
    flops = []
    for count in (4, 16):
        one = Umoe(32, count, 2)
        with FlopCounterMode(display=False) as counter:
            one(x.float(), Causal())
        filling = sum(Dispatch(one.route(x.float()).picked, count).rows) - 2 * 11 * 2
        apart = 2 * 11 * 32 * count + filling * (16 * (32 + 8) + 8 * (32 + 32))
        flops.append(counter.get_total_flops() - 2 * apart)
    yield "four times the experts cost no multiply-add more, but for the router and filling", float(abs(flops[1] - flops[0]))
    shares = sum(parameter.numel() for parameter in nn.ModuleList([umoe, FeedForward(umoe.experts, 3)]).parameters())
    own = sum(parameter.numel() for parameter in umoe.parameters())
    yield "a layer that shares experts adds a router and an expert", float(abs(shares - own - 6 * 32 - 2 * 32 * 8))
