"""Clustered head attention: heads that look alike on the first tokens share queries and keys from then on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...attention import attend, attention_weights
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues, Seen
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest
from .._rotary import Rotary

CARD = Card(
    paper="CHAI: Clustered Head Attention for Efficient LLM Inference",
    year=2024,
    room="heads",
    source=(
        "arXiv:2403.08058 and the authors' code: causal weights of the first 5 tokens, cosine distance, average linkage (the "
        "code's; the paper says k-means), the lowest head of a cluster represents it, values stay each head's own. The code's "
        "weights there are not causal, it mixes up heads and tokens, and it keeps all keys. Here the first 5 tokens "
        "themselves are read by all heads, so that none depends on later ones; in the code the whole prompt is clustered. The "
        "number of clusters is read off a plot there; here it is the point farthest below the line between its ends"
    ),
)


class ClusteredKeys(KeyValues):
    """Keys of all heads until each row's clusters are known, then those of the representatives; values of all heads.

    member: (b, heads) the head whose queries and keys each head uses, itself until that is decided.
    kept: (b, clusters) the heads whose keys are kept, once all rows have decided; slot: (b, heads) which of these each uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin: Tensor | None = None  # (b, first, width) the first tokens, as far as they are there
        self.there: Tensor | None = None  # (b, first)
        self.member: Tensor | None = None
        self.kept: Tensor | None = None
        self.slot: Tensor | None = None

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*super().tensors(), self.begin)

    def drop(self, clusters: int) -> None:
        """Lets go of the keys that no head will use."""
        assert self.member is not None
        assert self.k is not None
        represents = self.member == torch.arange(self.member.shape[1], device=self.member.device)
        self.kept = represents.nonzero()[:, 1].view(-1, clusters)
        self.slot = (represents.cumsum(1) - 1).gather(1, self.member)
        self.k, self.begin = _heads(self.k, self.kept), None


class Chai(Mixer):
    """Attention whose heads, once a sequence's first tokens are read, share queries and keys with those that read them alike.

    Nothing is learned: it is made of a trained attention by `Chai.of`. Each row of a batch has clusters of its own.

    Args:
        clusters: how many of the heads' queries and keys are left; see `choose`. first: how many tokens decide.
    """

    rotates = True
    cannot = {"full": "the first tokens are read before it is known which heads are left for the later ones"}

    def __init__(self, width: int, heads: int, clusters: int, *, head_dim: int | None = None, first: int = 5) -> None:
        super().__init__()
        if not 1 <= clusters <= heads or first < 1:
            raise ShapeError(f"{clusters} clusters of {heads} heads, by {first} tokens; give 1 to {heads}, and 1 token or more")
        self.width, self.clusters, self.first = width, clusters, first
        self.projections = Projections(width, heads, head_dim=head_dim)

    @staticmethod
    def of(attention: Attention, clusters: int, *, first: int = 5) -> Chai:
        """A trained attention with fewer keys; it shares the weights.

        Raises: ShapeError if it has a mechanism of its own, or fewer key/value heads than heads.
        """
        p = _of(attention)
        made = Chai(attention.width, p.heads, clusters, head_dim=p.head_dim, first=first)
        made.projections, made.rotary = p, attention.rotary
        return made

    def forward(self, x: Tokens, *stages: Stage, cache: ClusteredKeys | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        q, k, v = self.projections.split(x)
        if cache.kept is not None and cache.slot is not None:
            seen = cache.extend(_heads(q, cache.kept), _heads(k, cache.kept), v, attention_mask, self.rotary)
            q, k = _heads(seen.q, cache.slot), _heads(seen.k, cache.slot)
            return self.projections.merge(attend(q, k, seen.v, *stages, **seen.places))
        places = cache.next_places(x, attention_mask).expand(len(x), -1)
        decided = self._decide(x.detach(), places, cache)
        seen = cache.extend(q, k, v, attention_mask, self.rotary)
        if not decided.any():
            return self.projections.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))
        assert cache.member is not None
        q, k = _heads(seen.q, cache.member), _heads(seen.k, cache.member)
        late = attend(q, k, seen.v, *stages, **seen.places)
        is_first = (places >= 0) & (places < self.first)
        early = self._read_first(seen, places, stages)
        if decided.all():
            cache.drop(self.clusters)
        return self.projections.merge(torch.where(is_first[:, None, :, None], early, late))

    def _decide(self, x: Tokens, places: Int[Tensor, "b n"], cache: ClusteredKeys) -> Tensor:
        """(b,) which rows have their clusters, after these tokens."""
        slots, found = self._slots(places)
        new = x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
        if cache.begin is None or cache.there is None:
            cache.begin, cache.there = torch.zeros_like(new), torch.zeros_like(found)
            cache.member = torch.arange(self.projections.heads, device=x.device).repeat(len(x), 1)
        assert cache.member is not None
        before = cache.there.all(1)
        cache.begin = torch.where(found[..., None], new, cache.begin)
        cache.there = cache.there | found
        now = cache.there.all(1)
        for row in (now & ~before).nonzero().flatten().tolist():
            maps = _maps(self.projections, cache.begin[row : row + 1], self.rotary)
            cache.member[row] = average_linkage(maps, self.clusters)[0]
        return now

    def _slots(self, places: Int[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """(b, first): where each of the first tokens is among these, and whether it is."""
        hit = places[:, None] == torch.arange(self.first, device=places.device)[:, None]
        return hit.int().argmax(-1), hit.any(-1)

    def _read_first(self, seen: Seen, places: Int[Tensor, "b n"], stages: tuple[Stage, ...]) -> Float[Tensor, "b h n d"]:
        """What all heads read for the first tokens, with queries and keys of their own, at their slots."""
        slots, _ = self._slots(places)
        q = seen.q.gather(2, slots[:, None, :, None].expand(-1, seen.q.shape[1], -1, seen.q.shape[3]))
        m, own = seen.k.shape[2], torch.arange(self.first, device=places.device)
        keys = torch.arange(m, device=places.device) if seen.key_positions is None else seen.key_positions
        read = attend(q, seen.k, seen.v, *stages, query_positions=own, key_positions=keys)
        back = places.clamp(0, self.first - 1)[:, None, :, None]
        return read.gather(2, back.expand(-1, read.shape[1], -1, read.shape[3]))

    def new_cache(self, owner: Cache | None = None) -> ClusteredKeys:
        """An empty cache for decoding."""
        return ClusteredKeys()


def _of(attention: Attention) -> Projections:
    p = attention.projections
    if attention.mechanism is not None:
        raise ShapeError("only plain attention is clustered; this one has a mechanism of its own")
    if p.kv_heads != p.heads:
        raise ShapeError(f"{p.heads} heads share {p.kv_heads} key/value heads already; clusters need a key head for each of them")
    return p


def _heads(x: Float[Tensor, "b h n d"], index: Int[Tensor, "b g"]) -> Float[Tensor, "b g n d"]:
    """Some heads, of each row others."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _maps(p: Projections, x: Tokens, rotary: Rotary | None) -> Float[Tensor, "b h cells"]:
    """Each head's causal weights on these tokens, in float32 at least: rounding must not choose the clusters."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = []
        for f in (p.q, p.k):
            made = F.linear(x.to(wide), f.weight.to(wide), None if f.bias is None else f.bias.to(wide))
            made = made.unflatten(-1, (p.heads, -1)).transpose(1, 2)
            parts.append(made if rotary is None else rotary(made, torch.arange(x.shape[1], device=x.device)))
        return attention_weights(*parts, Causal()).flatten(2)


def average_linkage(vectors: Float[Tensor, "b h cells"], clusters: int) -> Int[Tensor, "b h"]:
    """Joins the two nearest clusters until so many are left; the lowest member of each one's cluster.

    Distances are 1 - cosine, between clusters the mean over all pairs; of equal ones the first is taken.
    """
    unit = F.normalize(vectors, dim=-1)
    distance = 1 - unit @ unit.mT
    b, h = distance.shape[:2]
    distance = ((distance + distance.mT) / 2).masked_fill(torch.eye(h, dtype=torch.bool, device=vectors.device), torch.inf)
    rows, size = torch.arange(b, device=vectors.device), torch.ones_like(distance[:, 0])
    member = torch.arange(h, device=vectors.device).repeat(b, 1)
    for _ in range(h - clusters):
        nearest = distance.flatten(1).argmin(1)
        low, high = torch.minimum(nearest // h, nearest % h), torch.maximum(nearest // h, nearest % h)
        one, other = size[rows, low], size[rows, high]
        joined = (one[:, None] * distance[rows, low] + other[:, None] * distance[rows, high]) / (one + other)[:, None]
        distance[rows, low], distance[rows, :, low] = joined, joined
        distance[rows, high], distance[rows, :, high] = torch.inf, torch.inf
        size[rows, low] = one + other
        member = torch.where(member == high[:, None], low[:, None], member)
    return member


def spreads(attention: Attention, x: Tokens) -> Tensor:
    """(heads,) the squared distances of heads from the means of 1, 2, ... clusters, by weights on sample texts x (b, n, width)."""
    maps = _maps(_of(attention), x, attention.rotary)
    b, h, _ = maps.shape
    found = []
    for clusters in range(1, h + 1):
        member = average_linkage(maps, clusters)
        total = torch.zeros_like(maps).index_put(
            (torch.arange(b, device=x.device)[:, None].expand(-1, h), member), maps, accumulate=True
        )
        count = F.one_hot(member, h).sum(1)
        mean = (total / count.clamp(min=1)[..., None]).gather(1, member[..., None].expand_as(maps))
        found.append((maps - mean).square().sum())
    return torch.stack(found)


def elbow(spread: Tensor) -> int:
    """The number of clusters at which a falling curve is farthest below the line between its ends."""
    line = spread[0] + (spread[-1] - spread[0]) * torch.linspace(0, 1, len(spread)).to(spread)
    return int((line - spread).argmax()) + 1


def choose(attention: Attention, x: Tokens) -> int:
    """How many clusters to give `Chai.of`, from sample texts x (b, n, width) as this attention gets them."""
    return elbow(spreads(attention, x))


def oracle(mixer: Chai, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time; clusters by the distances of all pairs."""
    p = mixer.projections
    d, h, first = p.head_dim, p.heads, mixer.first

    def weights(head: int, i: int, seen: list[int]) -> Tensor:
        own = slice(head * d, head * d + d)
        e = torch.exp(torch.stack([(p.q.weight[own] @ x[i]) @ (p.k.weight[own] @ x[j]) / d**0.5 for j in seen]))
        return e / e.sum()

    groups = [[head] for head in range(h)]
    if len(x) >= first:
        flat = []
        for head in range(h):
            lines = [weights(head, i, list(range(i + 1))).detach() for i in range(first)]
            flat.append(torch.cat([F.pad(line, (0, first - len(line))) for line in lines]))
        groups = _by_pairs(flat, mixer.clusters)
    rows = []
    for i in range(len(x)):
        seen, read = visible[i].nonzero().flatten().tolist(), []
        for head in range(h):
            group = next(g for g in groups if head in g)
            w = weights(head if i < first else min(group), i, seen)
            read.append(w @ torch.stack([p.v.weight[head * d : head * d + d] @ x[j] for j in seen]))
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def _by_pairs(vectors: Sequence[Tensor], clusters: int) -> list[list[int]]:
    """Clusters by average linkage, with all distances worked out again at each step."""

    def apart(a: list[int], b: list[int]) -> float:
        cosines = [(vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm())).item() for i in a for j in b]
        return 1 - sum(cosines) / len(cosines)

    groups = [[i] for i in range(len(vectors))]
    while len(groups) > clusters:
        _, s, t = min((apart(a, b), s, t) for s, a in enumerate(groups) for t, b in enumerate(groups) if s < t)
        groups = [g for n, g in enumerate(groups) if n not in (s, t)] + [groups[s] + groups[t]]
    return groups


def examples(heads: int, size: int) -> list[Chai]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [Chai(width, heads, heads // 2), Chai(width, heads, 1), Chai(width, heads, heads - 1, first=3)]


def neutral(heads: int, size: int) -> list[Chai]:
    """Settings that are plain attention: a cluster for each head."""
    return [Chai(heads * size, heads, heads)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> Chai:
    """An eighth of the heads, as the paper has in later layers, where that is two or more."""
    return Chai(heads * size, heads, **{"clusters": min(heads, max(2, heads // 8)), **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(3, 14, 24, dtype=torch.float64)
    attention = Attention(24, 6, head_dim=4).double()
    p = attention.projections
    with torch.no_grad():  # three kinds of heads, each twice; their values differ
        for f in (p.q, p.k):
            f.weight.copy_(3.0 * f.weight.unflatten(0, (6, 4))[[0, 1, 0, 2, 2, 1]].flatten(0, 1))
    wanted = attention(x, Causal())
    yield "as many clusters as kinds of heads lose nothing", largest(Chai.of(attention, 3)(x, Causal()) - wanted)
    spread = spreads(attention, x)
    yield "the spread is zero from there on", float(spread[2:].max())
    yield "and the elbow finds it", float(abs(choose(attention, x) - 3))
    yield "with fewer, something is lost", float(largest(Chai.of(attention, 2)(x, Causal()) - wanted) < 1e-3)

    attention.rotary = Rotary(10.0)
    yield "with rotation too", largest(Chai.of(attention, 3)(x, Causal()) - attention(x, Causal()))
    vectors = torch.randn(3, 9, 5, dtype=torch.float64)
    for clusters in range(1, 9):
        lowest = [{i: min(group) for group in _by_pairs(list(row), clusters) for i in group} for row in vectors]
        wanted = torch.tensor([[low[i] for i in range(9)] for low in lowest])
        moved = (average_linkage(vectors, clusters) - wanted).abs().max()
        yield f"{clusters} clusters of nine, by the mean distance of all pairs", float(moved)

    plain = Attention(24, 6, rotary=Rotary(3.0)).double()
    with torch.no_grad():
        plain.projections.q.weight.mul_(5.0)
    mixer = Chai.of(plain, 2)
    other = x.clone()
    other[:, 5:] = 3 - 2 * other[:, 5:]
    caches = [mixer.new_cache() for _ in range(2)]
    for cache, text in zip(caches, (x, other), strict=True):
        mixer(text, Causal(), cache=cache)
    q, k = (plain.rotary(t[:, :, :5], torch.arange(5)) for t in plain.projections.split(x)[:2])  # type: ignore[misc]
    member = average_linkage(attention_weights(q, k, Causal()).flatten(2), 2)
    assert caches[0].member is not None
    yield "heads are told apart as they read, rotated", float((caches[0].member - member).abs().max())
    moved = [getattr(caches[0], name) - getattr(caches[1], name) for name in ("member", "kept")]
    yield "what comes after the first five tokens moves no head", float(max(t.abs().max() for t in moved))
    yield "those five are read as by plain attention", largest((mixer(x, Causal()) - plain(x, Causal()))[:, :5])

    usual, cache = plain.new_cache(), mixer.new_cache()
    for i in range(14):
        plain(x[:, i : i + 1], Causal(), cache=usual)
        mixer(x[:, i : i + 1], Causal(), cache=cache)
    yield "keys of two heads and values of six are kept", float(abs(cache.nbytes / usual.nbytes - (2 + 6) / (6 + 6)))
    yield "the 7B model's layers save 19.1 % of the bytes", _saved_in_7b(x) - 0.5 * (1 - (18 * 32 + 14 * 4) / (32 * 32))


def _saved_in_7b(x: Tensor) -> float:
    """The share of bytes that are saved by 18 layers of all 32 heads and 14 layers of 4 clusters, as published."""
    attention = Attention(x.shape[-1], 32, head_dim=2).to(x)
    held = []
    for clusters in (32, 4):
        cache = Chai.of(attention, clusters).new_cache()
        Chai.of(attention, clusters)(x, Causal(), cache=cache)
        held.append(cache.nbytes)
    usual = attention.new_cache()
    attention(x, Causal(), cache=usual)
    return 1 - (18 * held[0] + 14 * held[1]) / (32 * usual.nbytes)
