"""Linear attention made for decoding: ReLU^2 within groups, linear attention to complete ones, a causal convolution of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Tokens, largest, shake
from .._states import KernelAttention, Pass, Reading
from ._carried import CarryCache, NearReading, Pieces

CARD = Card(
    paper=(
        "When Linear Attention Meets Autoregressive Decoding: Towards More Effective and Efficient Linearized Large Language Models"
    ),
    year=2024,
    room="linear",
    source=(
        "arXiv:2406.07368 and the authors' code for LLaMA: queries and keys of length one, ReLU(q . k)^2 within groups of 64 "
        "tokens, one learned number a layer, 0 at first, times q . k to complete groups before, no denominator; a depthwise "
        "convolution of values by one kernel a head, of whose 63 taps the 32 that see no future are kept, 0 at first. The code "
        "checks a tree of guesses right only within a group: where it passes the end of one, that group's keys are lost. Here "
        "each path counts its own groups, as if decoded alone. Left out: the optional norms and kernels, and the form for "
        "training from scratch"
    ),
)


class LinearizedLlm(KernelAttention):
    """out_t = sum of ReLU(q_t . k_j)^2 v_j in t's own group + a q_t . (sum of k_j v_j of complete groups) + convolved values.

    Its state holds all tokens; what the one of t's own group would add is taken off again within the group.

    Args:
        group: tokens of a group. taps: of the convolution, the token itself included.
    """

    epsilon = None  # type: ignore[assignment]
    cannot = {"full": "its groups and its convolution take tokens in their order"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        group: int = 64,
        taps: int = 32,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        if group < 1 or taps < 1:
            raise ShapeError(f"group {group} and taps {taps} must be 1 or more")
        self.group, self.taps = group, taps
        self.share = nn.Parameter(torch.zeros(()))
        self.kernel = nn.Parameter(torch.zeros(heads, taps))

    def features(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> tuple[Tensor, Tensor]:
        """See `KernelAttention.features`: of length one, in float32 at least."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return F.normalize(q.to(wide), dim=-1, eps=1e-30), F.normalize(k.to(wide), dim=-1, eps=1e-30)

    def _split(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.projections.split(x)
        times = q.shape[1] // k.shape[1]
        k, v = (t if times == 1 else t.repeat_interleave(times, 1) for t in (k, v))
        return q, k, v.to(torch.promote_types(x.dtype, torch.float32))

    def _own(self, scores: Tensor) -> Tensor:
        """Weights within a group, less what the state adds there."""
        return F.relu(scores).square() - self.share * scores

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`; with what is read of the own group, and the convolution."""
        q, k, v = self._split(x)
        q, k = self.features(now.rotated(q, self.rotary), now.rotated(k, self.rotary))
        groups = Pieces.of(now, self.group)
        weights = self._own(groups.cut(q) @ groups.cut(k, "k").mT).tril()
        near = groups.joined(weights @ groups.cut(v, "v"))
        taps = self.kernel.to(v.dtype).repeat_interleave(v.shape[-1], 0)
        moved = now.convolved("v", v.transpose(1, 2).flatten(2), taps)
        return NearReading.of(Reading(self.share * q, k, v), near + moved.unflatten(-1, (v.shape[1], -1)).transpose(1, 2))

    def beside(self, out: Float[Tensor, "b h n d"], given: Reading) -> Float[Tensor, "b h n d"]:
        """The state's part, the group's and the convolution's."""
        return out if not isinstance(given, NearReading) or given.near is None else out + given.near

    def finish(self, out: Float[Tensor, "b h n d"], x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        return self.projections.merge(out.to(x.dtype))

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()

    def tree(self, x: Float[Tensor, "b m width"], parents: Sequence[int], cache: CarryCache) -> Float[Tensor, "b m width"]:
        """The outputs of a tree of guessed tokens after those in the cache, each as if its path had been decoded alone.

        The cache stays as it is: decode the path that was accepted, see `accepted`, to go on.

        Args:
            parents: of each token, the number of the one before it, which stands earlier in x; -1 after the last one in the cache.
        """
        lines = lineage(parents, x.device)
        depth = lines.sum(-1) - 1
        q, k, v = self._split(x)
        if self.rotary is not None:
            places = cache.count(x)[:, None] + depth
            q, k = self.rotary(q, places), self.rotary(k, places)
        q, k = self.features(q, k)
        out = v.new_zeros(q.shape[:-1] + v.shape[-1:])
        if cache.state is not None:
            out = self.share * q @ cache.state
        inside = cache.carried.get("inside", depth.new_zeros(len(x)))
        group = (inside[:, None] + depth) // self.group
        if "k" in cache.carried:  # tokens of the group that has begun, for guesses that still fall into it
            within = self._own(q @ cache.carried["k"].mT).where((group == 0)[:, None, :, None], 0.0)
            out = out + within @ cache.carried["v"]
        scores, same = q @ k.mT, group[:, :, None] == group[:, None, :]
        weights = torch.where(same[:, None], F.relu(scores).square(), self.share * scores)
        lag = depth[:, None] - depth
        out = out + (weights + self._taps(lag)).where(lines, 0.0) @ v
        recent = cache.recent.get("v")
        if recent is not None and recent.rows is not None:
            rows, channels = recent.rows, v.shape[1] * v.shape[-1]
            past = rows[..., :channels]
            if rows.shape[-1] > channels:  # the last token's document goes on
                past = past.where(rows[..., channels:] == rows[:, -1:, channels:], 0.0)
            lag = depth[:, None] + torch.arange(rows.shape[1], 0, -1, device=x.device)
            out = out + self._taps(lag) @ past.unflatten(-1, (v.shape[1], -1)).transpose(1, 2)
        return self.finish(out, x)

    def _taps(self, lag: Tensor) -> Float[Tensor, "h m k"]:
        """What the convolution weighs tokens by that stand so far back."""
        found = self.kernel[:, (self.taps - 1 - lag).clamp(0, self.taps - 1)]
        return found.where((lag >= 0) & (lag < self.taps), 0.0)


def lineage(parents: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(m, m): whether a token of a tree is another's ancestor, or itself, in the other's row.

    Raises: ShapeError for a parent that does not stand before its child.
    """
    lines = torch.eye(len(parents), dtype=torch.bool, device=device)
    for child, parent in enumerate(parents):
        if not -1 <= parent < child:
            raise ShapeError(f"token {child} of the tree comes after token {parent}; parents stand earlier, -1 is the text before")
        if parent >= 0:
            lines[child] |= lines[parent]
    return lines


def accepted(parents: Sequence[int], tokens: Sequence[int], first: int, likeliest: Sequence[int]) -> tuple[list[int], int]:
    """The path of a guessed tree that greedy decoding would have taken, and the token that comes after it.

    first: the likeliest token after the text before. likeliest: after each token of the tree.
    """
    path: list[int] = []
    wanted = first
    while True:
        last = path[-1] if path else -1
        found = [at for at, parent in enumerate(parents) if parent == last and tokens[at] == wanted]
        if not found:
            return path, wanted
        path.append(found[0])
        wanted = likeliest[found[0]]


def oracle(mixer: LinearizedLlm, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), weight by weight."""
    p = mixer.projections
    d, times = p.head_dim, p.heads // p.kv_heads
    rows = []
    for t in range(len(x)):
        read = []
        for head in range(p.heads):
            own, shared = (slice(at * d, at * d + d) for at in (head, head // times))
            query, out = p.q.weight[own] @ x[t], torch.zeros(d, dtype=x.dtype)
            for j in range(t + 1):
                key, value = p.k.weight[shared] @ x[j], p.v.weight[shared] @ x[j]
                cosine = (query * key).sum() / torch.sqrt((query * query).sum() * (key * key).sum())
                same = j // mixer.group == t // mixer.group
                weight = torch.clamp(cosine, min=0) ** 2 if same else mixer.share * cosine
                if t - j < mixer.taps:
                    weight = weight + mixer.kernel[head, mixer.taps - 1 - (t - j)]
                out = out + weight * value
            read.append(out)
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LinearizedLlm]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [LinearizedLlm(width, heads, group=4, taps=3), LinearizedLlm(width, heads, kv_heads=heads // 2, group=7, taps=8)]
    for mixer in made:
        shake([mixer.share, mixer.kernel], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> LinearizedLlm:
    """The paper's groups of 64 tokens and 32 taps."""
    return LinearizedLlm(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    mixer = LinearizedLlm(32, 4, group=5, taps=4).double()
    p = mixer.projections
    q, k, v = p.split(x)
    cosines = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    at = torch.arange(23)
    same = at[:, None] // 5 == at // 5
    local = cosines.relu().square().where(same, 0.0).tril()
    yield "as it starts: ReLU^2 within groups alone", largest(mixer(x, Causal()) - p.merge(local @ v))
    single = LinearizedLlm(32, 4, group=1).double()
    single.projections = p
    own = p.merge(cosines.diagonal(dim1=2, dim2=3).relu().square()[..., None] * v)
    yield "groups of one token: ReLU(q_t . k_t)^2 v_t", largest(single(x, Causal()) - own)
    whole = LinearizedLlm(32, 4).double()
    whole.projections = p
    yield "no more tokens than a group: dense ReLU^2", largest(whole(x, Causal()) - p.merge(cosines.relu().square().tril() @ v))
    with torch.no_grad():
        mixer.share.fill_(0.7)
    both = local + 0.7 * cosines.where(~same, 0.0).tril()
    yield "the rest of the past is read linearly, group by group", largest(mixer(x, Causal()) - p.merge(both @ v))
    shake([mixer.kernel], seed=1)
    small = 1e6 * mixer(1e-6 * x, Causal())
    yield "queries and keys have length one: outputs are as small as values", largest(small - mixer(x, Causal()))
    for before in (0, 1, 4, 5, 9, 12):
        yield f"a tree after {before} tokens is as each of its paths alone", _tree(mixer, x[:, :before], x[:, before : before + 9])
    path, after = accepted([-1, -1, 0, 1, 1, 4], [5, 6, 7, 7, 8, 9], 6, [0, 8, 0, 0, 3, 0])
    yield "a tree is followed as far as its guesses are the likeliest", float(path != [1, 4]) + float(after != 3)


def _tree(mixer: LinearizedLlm, before: Tensor, nodes: Tensor) -> float:
    parents = [-1, -1, 0, 0, 1, 2, 5, 6, 4]
    cache = mixer.new_cache()
    if before.shape[1]:
        mixer(before, Causal(), cache=cache)
    found, off = mixer.tree(nodes, parents, cache), 0.0
    for at, line in enumerate(lineage(parents)):
        alone = mixer(torch.cat([before, nodes[:, line]], 1), Causal())
        off = max(off, largest(found[:, at] - alone[:, -1]))
    return off
