"""LLN attention: features exp(a q) and exp(b k), with a and b such that log weights vary as much as softmax's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Attention, Real, Tokens, largest, shake
from .._states import KernelAttention, Pass, Reading
from ._carried import CarryCache, NearReading, Pieces
from ._prefix import exp_reading

CARD = Card(
    paper="Linear Log-Normal Attention with Unbiased Concentration",
    year=2023,
    room="linear",
    source=(
        "arXiv:2311.13541, sec. 4, and the authors' code, whose two fitted constants are taken as they are. There the deviations "
        "of queries and keys, one number each, are those of the whole batch at every call, so that rows meet and decoding differs; "
        "here they are buffers: set by `calibrate`, moved by each call in train mode, frozen in eval mode, so that padding, other "
        "rows and decoding change nothing. A running log of sums takes the place of the code's maximum over all keys and of its "
        "epsilon. Blocks of softmax attention count real tokens of a document from its first. Both parts are then averaged, or "
        "weighted by channel as in the code's other modes"
    ),
)
A, B = 0.14855178144710912, -0.35487039130661086  # log weights vary by A (a^2 var q + b^2 var k) + B
MIXES = ("average", "scale", "ratio", "none")


class LlnAttention(KernelAttention):
    """Weights sum_c exp(alpha q_c + beta k_c) over their sum; half of the output is softmax attention within blocks of tokens.

    Args:
        mix: "average" of both parts; "scale", weights of each channel for both; "ratio", r and 1 - r; "none", no blocks.
        block: tokens of a block, as many as a head has channels by default. momentum: how far the deviations of queries and keys
            move towards those of a call in train mode; 1 for the call's own, as in the authors' code.
    """

    epsilon = None  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        mix: str = "average",
        block: int | None = None,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        if mix not in MIXES:
            raise ShapeError(f"mix {mix!r} must be one of {', '.join(MIXES)}")
        d = self.projections.head_dim
        self.mix, self.block, self.momentum = mix, d if block is None else block, momentum
        if self.block < 1:
            raise ShapeError(f"block {block} must be 1 or more")
        self.deviations: Tensor
        self.register_buffer("deviations", torch.ones(2))
        learned = {"scale": "rp", "ratio": "r"}.get(mix, "")
        self.parts = nn.ParameterDict({name: torch.full((heads, 1, d), 0.5) for name in learned})

    def scales(self) -> tuple[Tensor, Tensor]:
        """alpha and beta: log weights are then modelled to have the variance of softmax's, and queries and keys share it alike."""
        q, k = self.deviations.to(torch.promote_types(self.deviations.dtype, torch.float32))
        both = ((q * q * k * k - B) / (2 * A)).sqrt()
        return both / q, both / k

    @torch.no_grad()
    def calibrate(self, x: Tokens, attention_mask: Real | None = None, momentum: float = 1.0) -> None:
        """Sets the deviations to those of queries and keys of x (b, n, width), over all real tokens, heads and channels."""
        rows = x if attention_mask is None else x[attention_mask.bool()]
        if rows.numel() // x.shape[-1] > 1:
            found = torch.stack([part(rows).to(torch.float32).std() for part in (self.projections.q, self.projections.k)])
            self.deviations.lerp_(found.to(self.deviations), momentum)

    def _split(self, x: Tokens, now: Pass) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.projections.split(x)
        group = q.shape[1] // k.shape[1]
        k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
        return now.rotated(q, self.rotary), now.rotated(k, self.rotary), v

    def features(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> tuple[Tensor, Tensor]:
        """See `KernelAttention.features`; before exp, which they could overflow by."""
        alpha, beta = self.scales()
        return alpha * q.to(alpha.dtype), beta * k.to(beta.dtype)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`; with what is read within blocks."""
        if self.training:
            self.calibrate(x, now.real, self.momentum)
        q, k, v = self._split(x, now)
        near = None
        if self.mix != "none":
            pieces, weights = self._within(q, k, now)
            near = pieces.joined(weights @ pieces.cut(v, "v").to(weights.dtype)).to(v.dtype)
        return NearReading.of(exp_reading(*self.features(q, k), v, now), near)

    def _within(self, q: Tensor, k: Tensor, now: Pass) -> tuple[Pieces, Float[Tensor, "b h blocks size size"]]:
        """The blocks and the softmax weights inside them, in float32 at least."""
        pieces = Pieces.of(now, self.block)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.shape[-1] ** -0.5 * pieces.cut(q.to(wide)) @ pieces.cut(k, "k").to(wide).mT
        seen = pieces.seen.expand(-1, -1, -1, self.block, -1)
        seen = seen.tril() if now.causal else seen
        seen = seen | ~seen.any(-1, keepdim=True)  # slots without a token read anything, and nobody reads them
        return pieces, scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def beside(self, out: Float[Tensor, "b h n d"], given: Reading) -> Float[Tensor, "b h n d"]:
        """Both parts, mixed."""
        if not isinstance(given, NearReading) or given.near is None:
            return out
        r: Tensor | float = self.parts.get("r", 0.5)
        return r * out + self.parts.get("p", 1 - r) * given.near

    def finish(self, out: Float[Tensor, "b h n d"], x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        return self.projections.merge(out.to(x.dtype))

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()


class Concentration(NamedTuple):
    """The paper's probes of weights (..., n, n): means over rows of entropy, in nats; variance of logs; 1 - |second eigenvalue|.

    Even weights have log n, 0 and 1; a token that reads itself alone 0, 0 and 0. Weights of 0 have no logs and are left out.
    """

    entropy: Tensor
    log_variance: Tensor
    spectral_gap: Tensor


def concentration(weights: Float[Tensor, "... n n"]) -> Concentration:
    """How concentrated weights are, (...) each: see `Concentration`."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    there = weights > 0
    logs = weights.where(there, 1.0).log()
    count = there.sum((-2, -1))
    off = (logs - (logs.sum((-2, -1)) / count)[..., None, None]).where(there, 0.0)
    sizes = torch.linalg.eigvals(weights).abs().sort(-1, descending=True).values
    return Concentration(-(weights * logs).sum(-1).mean(-1), off.square().sum((-2, -1)) / count, 1 - sizes[..., 1])


def oracle(mixer: LlnAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), weight by weight."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads
    q_spread, k_spread = (float(t) for t in mixer.deviations)
    both = ((q_spread**2 * k_spread**2 + 0.35487039130661086) / (2 * 0.14855178144710912)) ** 0.5
    rows = []
    for i in range(len(x)):
        read: list[Tensor] = []
        seen = visible[i].nonzero().flatten().tolist()
        for head in range(p.heads):
            own, shared = (slice(at * d, at * d + d) for at in (head, head // group))
            query, parts = p.q.weight[own] @ x[i], {}
            for part, tokens in (("far", seen), ("near", [j for j in seen if j // mixer.block == i // mixer.block])):
                e: list[Tensor] = []
                for j in tokens:
                    key = p.k.weight[shared] @ x[j]
                    far = torch.exp(both / q_spread * query + both / k_spread * key).sum()
                    e.append(far if part == "far" else torch.exp((query * key).sum() / d**0.5))
                parts[part] = (torch.stack(e) / sum(e)) @ (x[tokens] @ p.v.weight[shared].T)
            r = {"average": 0.5, "none": 1.0}.get(mixer.mix) or mixer.parts["r"][head, 0]
            rest = mixer.parts["p"][head, 0] if mixer.mix == "scale" else 1 - r
            read.append(r * parts["far"] + rest * parts["near"])
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LlnAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        LlnAttention(width, heads, mix="scale", block=4),
        LlnAttention(width, heads, kv_heads=heads // 2),
        LlnAttention(width, heads, mix="ratio", block=3),
        LlnAttention(width, heads, mix="none"),
    ]
    for mixer, spread in zip(made, (0.6, 0.8, 1.1, 0.5), strict=True):
        mixer.deviations.copy_(torch.tensor([spread, 1.3 - spread]))
        shake([*mixer.parts.values()], seed=2)
    return made


def neutral(heads: int, size: int) -> list[LlnAttention]:
    """Settings that are plain softmax attention: one block for all tokens, which alone counts."""
    made = LlnAttention(heads * size, heads, mix="ratio", block=64)
    nn.init.zeros_(made.parts["r"])
    return [made]


def sized(heads: int, size: int, tokens: int, **options: Any) -> LlnAttention:
    """The paper's average with blocks as long as a head is wide."""
    return LlnAttention(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    mixer = LlnAttention(32, 4, mix="none", bias=True).double().eval()
    for spreads in ((1.0, 1.0), (1.5, 0.8), (0.3, 2.0)):
        mixer.deviations.copy_(torch.tensor(spreads))
        (sq, sk), (alpha, beta) = mixer.deviations.tolist(), (float(t) for t in mixer.scales())
        modelled = 0.14855178144710912 * (alpha**2 * sq**2 + beta**2 * sk**2) - 0.35487039130661086
        yield f"deviations {spreads}: the modelled variance of log weights is softmax's", modelled - sq**2 * sk**2
        yield f"deviations {spreads}: queries and keys share it alike", alpha * sq - beta * sk
    mixer.calibrate(x)
    stds = torch.stack([part(x).std() for part in (mixer.projections.q, mixer.projections.k)])
    yield "calibrated: the deviations of queries and keys, to float32", largest((mixer.deviations - stds).abs() / 1e4)
    p = mixer.projections
    q, k, v = p.split(x)
    queries, keys = mixer.features(q, k)
    virtual = torch.cat([torch.eye(8).double().expand(2, 4, 11, 8, 8), keys[..., None]], -1).flatten(2, 3)
    queries = torch.cat([queries, torch.ones_like(q[..., :1])], -1)
    read = attend(queries, virtual, v.repeat_interleave(8, 2), scale=1.0)
    yield "softmax attention to one key for each token and channel", largest(mixer.read(x) - read)
    before = mixer(x, Causal())
    with torch.no_grad():
        for part in (p.q, p.k):
            part.bias.add_(torch.tensor([1.0, -2.0, 30.0, 4.0]).double().repeat_interleave(8))
    yield "a number added to all of a head's queries or keys changes nothing", largest(mixer(x, Causal()) - before)
    single = LlnAttention(32, 4, mix="none", head_dim=1).double().eval()
    keys = single.scales()[1] * single.projections.split(x)[1].mT
    yield "one channel: a softmax of keys, the same for all queries", largest(single.weights(x) - keys.softmax(-1))
    blocks = LlnAttention(32, 4, block=11).double().eval()
    plain = Attention(32, 4).double()
    far = LlnAttention(32, 4, mix="none").double().eval()
    plain.projections = far.projections = blocks.projections
    alone, two = torch.eye(11, dtype=torch.float64), math.log(2)
    for weights, words, known in (
        (torch.full_like(alone, 1 / 11), "even weights", (math.log(11), 0.0, 1.0)),
        (alone, "each token reading itself", (0.0, 0.0, 0.0)),
        ((alone + 1) / 12, "itself twice as much as others", (math.log(12) - two / 6, 10 / 121 * two**2, 11 / 12)),
        (alone.new_tensor([[2, 0], [1, 1]]) / 2, "two tokens, causal and even", (two / 2, 2 / 9 * two**2, 0.5)),
    ):
        told = torch.stack(concentration(weights))
        yield f"probes of {words}", largest(told - torch.tensor(known, dtype=torch.float64))
    wanted = (plain(x, Causal()) + far(x, Causal())) / 2
    yield "no more tokens than a block: half of it softmax attention", largest(blocks(x, Causal()) - wanted)
