"""Hierarchical self-attention: softmax attention whose weights are tied by a tree of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import attend
from ...attention.read import Operands, repeat_heads
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    year=2025,
    room="softmax",
    source=(
        "arXiv:2509.15448, the recursion of energies and theorem 3.2, as public notes tell them; the authors show no code. Their "
        "interaction energy has squared distances, which layer-normed queries and keys make the mean score up to a constant; here "
        "it is the mean score for any of them, which is what the theorem needs. A token's energy is its score for itself, so that "
        "the flat tree is softmax attention. The tree is groups of groups of neighbouring tokens. Embeddings of places among "
        "siblings, whose form is open, are sinusoids here. Queries may be fewer than keys: the tied weights are then those "
        "nearest to softmax in the rows that there are"
    ),
    status="trees are regular: groups of fixed sizes, the last of each level shorter; an arbitrary tree can't be given",
)
READS = "is defined for encoders: later siblings are part of every node's energy"


class _Nodes(NamedTuple):
    """The nodes of one level: energies (b, h, N); mean queries, keys, values (b, h, N, d); tokens under each, (b, 1, N)."""

    energy: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    queries: Tensor
    keys: Tensor


class HierarchicalAttention(Mechanism):
    """Lets all tokens of a group weigh all tokens of a sibling group alike, by the weights that are nearest to softmax.

    Within the smallest groups tokens weigh tokens; beyond, groups weigh groups, of groups as of tokens. For n tokens that is
    O(n) weights and not n^2, as long as the uppermost groups are few.

    Args:
        groups: how many tokens a group has, how many of these groups a larger one, and so on; () for softmax attention. What
            is left of a text at the end makes shorter groups. Uppermost groups are siblings, however many they are.
        embedding: size of sinusoidal embeddings of a node's place among its siblings, whose products add to scores; 0 for none.
    """

    cannot = {"causal": READS, "decode": READS}

    def __init__(self, groups: Sequence[int] = (8, 8), *, embedding: int = 0) -> None:
        super().__init__()
        if any(size < 1 for size in groups):
            raise ShapeError(f"groups of sizes {tuple(groups)}; each must be at least 1")
        if embedding % 2:
            raise ShapeError(f"embeddings are pairs of sine and cosine, and {embedding} dimensions are no pairs")
        self.groups, self.embedding = tuple(groups), embedding
        self.positional = embedding > 0

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`.

        Raises: ShapeError for stages: masks and the like would untie the weights.
        """
        if stages:
            raise ShapeError(f"hierarchical attention reads a whole text by its tree and takes no stages such as {stages[0]!r}")
        x = Operands.of(q, k, v, **places)
        assert x.v is not None
        b, h, _, d = q.shape
        total = 1 + max(0, int(x.query_position.max()), int(x.key_position.max()))
        wide = torch.promote_types(q.dtype, torch.float32)
        query, asks = _by_place(q.to(wide), x.query_position, total)
        key, there = _by_place(repeat_heads(x.k, x.groups).to(wide).expand(b, -1, -1, -1), x.key_position, total)
        value, _ = _by_place(repeat_heads(x.v, x.groups).to(wide).expand(b, -1, -1, -1), x.key_position, total)
        scale = d**-0.5
        own = (query * key).sum(-1) * scale + self.embedding / 2
        nodes = _Nodes(own, query, key, value, asks, there)
        levels = []
        for size in (*self.groups, 0):  # 0: the uppermost family, of all that is left
            weights, nodes = self._family(nodes, size or nodes.keys.shape[2], scale)
            levels.append(weights)
        kept, read = query.new_ones(b, h, 1), value.new_zeros(b, h, 1, value.shape[-1])
        for itself, siblings in reversed(levels):  # down the tree: what a node has read, all below it have read
            families = itself.shape[2]
            read = (read[:, :, :families, None] + kept[:, :, :families, None, None] * siblings).flatten(2, 3)
            kept = (kept[:, :, :families, None] * itself).flatten(2)
        out = read[:, :, :total] + kept[:, :, :total, None] * value
        at = x.query_position.expand(b, -1)
        mine = out.gather(2, at.clamp(min=0)[:, None, :, None].expand(-1, h, -1, v.shape[-1]))
        return torch.where((at >= 0)[:, None, :, None], mine, 0.0).to(v.dtype)

    def _family(self, nodes: _Nodes, size: int, scale: float) -> tuple[tuple[Tensor, Tensor], _Nodes]:
        """Reads within families of `size` nodes: (weight on oneself, what siblings give), and the nodes above them."""
        energy, q, k, v, queries, keys = (_families(t, size) for t in nodes)
        scores = q @ k.mT * scale + keys[..., None, :].clamp(min=1).log()  # (b, h, families, size, size)
        if self.embedding:
            scores = scores + _sinusoids(size, self.embedding, q)
        oneself = torch.eye(size, dtype=torch.bool, device=q.device)
        scores = torch.where(oneself, energy[..., None, :], scores)
        shown = (keys > 0)[..., None, :].expand_as(scores)
        scores = scores.masked_fill(~shown, -torch.inf)
        log_sum = scores.masked_fill(~shown.any(-1, keepdim=True), 0.0).logsumexp(-1)  # of a node that sees nothing: no NaN
        weights = torch.exp(scores - log_sum[..., None])
        itself = weights.diagonal(dim1=-2, dim2=-1)
        siblings = weights.masked_fill(oneself, 0.0) @ v

        def mean(t: Tensor, counts: Tensor) -> Tensor:
            share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
            return (t * share[..., None]).sum(-2)

        above = mean(log_sum[..., None], queries)[..., 0]
        parents = _Nodes(above, mean(q, queries), mean(k, keys), mean(v, keys), queries.sum(-1), keys.sum(-1))
        return (itself, siblings), parents


def _by_place(x: Tensor, positions: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """x (b, h, n, d) in the order of its places, zero where none stands; and where one does, (b, 1, total) of 1 and 0."""
    b, h, _, d = x.shape
    at = torch.where(positions >= 0, positions, total).expand(b, -1)  # what has no place goes behind the end
    placed = x.new_zeros(b, h, total + 1, d).scatter(2, at[:, None, :, None].expand_as(x), x)
    there = x.new_zeros(b, total + 1).scatter(1, at, 1.0)
    return placed[:, :, :total], there[:, None, :total]


def _families(t: Tensor, size: int) -> Tensor:
    """Nodes (b, h, N, ...) in families (b, h, N / size, size, ...), the last one filled up with zeros."""
    missing = -t.shape[2] % size
    filled = F.pad(t, (0, 0) * (t.dim() - 3) + (0, missing))
    return filled.unflatten(2, (-1, size))


def _sinusoids(size: int, embedding: int, like: Tensor) -> Tensor:
    """(size, size): products of the sinusoidal embeddings of places."""
    steps = 10000.0 ** (-torch.arange(0, embedding, 2, device=like.device, dtype=like.dtype) / embedding)
    angles = torch.arange(size, device=like.device, dtype=like.dtype)[:, None] * steps
    table = torch.cat([angles.sin(), angles.cos()], -1)
    return table @ table.mT


Tree = list[Any]  # of trees, or of places


def _tree(places: list[int], groups: Sequence[int]) -> Tree:
    nodes: Tree = list(places)
    for size in groups:
        nodes = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    return nodes


def _leaves(node: Any) -> list[int]:
    return [leaf for child in node for leaf in _leaves(child)] if isinstance(node, list) else [node]


def oracle(mechanism: HierarchicalAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), by the recursion over the tree and all pairs of tokens."""
    group = q.shape[0] // k.shape[0]
    return torch.stack([_tied(mechanism, q[head], k[head // group]) @ v[head // group] for head in range(q.shape[0])])


def _tied(mechanism: HierarchicalAttention, q: Tensor, k: Tensor) -> Tensor:
    """(n, m) weights of one head; queries stand at the last of the keys' places."""
    (n, d), m = q.shape, k.shape[0]
    weights: dict[tuple[int, int], Tensor] = {}

    def score(i: int, j: int) -> Tensor:
        return (q[i - (m - n)] * k[j]).sum() / d**0.5

    def embedded(a: int, b: int) -> float:
        return sum(math.cos((a - b) * 10000.0 ** (-e / mechanism.embedding)) for e in range(0, mechanism.embedding, 2))

    def asking(node: Any) -> list[int]:
        return [i for i in _leaves(node) if i >= m - n]

    def to_sibling(family: Tree, at: int, other: int) -> Tensor:
        pairs = [score(i, j) for i in asking(family[at]) for j in _leaves(family[other])]
        return torch.stack(pairs).mean() + embedded(at, other)

    def to_itself(family: Tree, at: int) -> Tensor:
        node = family[at]
        return energy(node) if isinstance(node, list) else score(node, node) + embedded(at, at)

    def log_sum(family: Tree, at: int) -> Tensor:
        total = torch.exp(to_itself(family, at))
        for other, sibling in enumerate(family):
            if other != at:
                total = total + len(_leaves(sibling)) * torch.exp(to_sibling(family, at, other))
        return torch.log(total)

    def energy(node: Tree) -> Tensor:
        parts = [len(asking(child)) / len(asking(node)) * log_sum(node, at) for at, child in enumerate(node) if asking(child)]
        return torch.stack(parts).sum()

    def down(family: Tree, weight: Tensor) -> None:
        for at, node in enumerate(family):
            if not asking(node):
                continue
            total = log_sum(family, at)
            for other, sibling in enumerate(family):
                if other != at:
                    each = weight * torch.exp(to_sibling(family, at, other) - total)
                    weights.update({(i, j): each for i in asking(node) for j in _leaves(sibling)})
            own = weight * torch.exp(to_itself(family, at) - total)
            if isinstance(node, list):
                down(node, own)
            else:
                weights[node, node] = own

    down(_tree(list(range(m)), mechanism.groups), torch.ones((), dtype=q.dtype))
    return torch.stack([torch.stack([weights[i, j] for j in range(m)]) for i in range(m - n, m)])


def examples(heads: int, size: int) -> list[HierarchicalAttention]:
    """Settings that the conformance checks run."""
    return [HierarchicalAttention((3, 2)), HierarchicalAttention((4,), embedding=6), HierarchicalAttention((2, 3, 2), embedding=2)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> HierarchicalAttention:
    """Groups of eight, twice."""
    return HierarchicalAttention(**options)


def neutral(heads: int, size: int) -> list[HierarchicalAttention]:
    """Settings that are plain attention: a flat tree, and groups of one."""
    return [HierarchicalAttention(()), HierarchicalAttention((1, 1))]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    m, groups = 11, (2, 3)
    q, k, v = torch.randn(3, 1, 1, m, 4, generator=generator, dtype=torch.float64)
    eye = torch.eye(m, dtype=torch.float64)[None, None]

    def weights(groups: Sequence[int]) -> Tensor:
        return HierarchicalAttention(groups)(q, k, eye)[0, 0]

    def far(a: Tensor) -> Tensor:
        return (a * (a.log() - plain.log())).sum()

    plain = (q @ k.mT / 2).softmax(-1)[0, 0]
    tied = weights(groups)
    yield "weights sum to one", largest(tied.sum(-1) - 1)
    blocks = _blocks(m, groups)
    inside = torch.einsum("rij,ij->r", blocks, tied) / blocks.sum((1, 2))
    yield "a block has one weight", largest(torch.einsum("r,rij->ij", inside, blocks) - tied)
    # KL is convex, so weights are the nearest if no step that keeps blocks tied and rows' sums changes it at first order
    keeps = torch.linalg.svd(blocks.sum(2).T, full_matrices=True)[2]
    steps = keeps[int(torch.linalg.matrix_rank(blocks.sum(2))) :]
    slopes = torch.einsum("rij,ij->r", blocks, tied.log() - plain.log())
    yield "no tied weights are nearer to those of softmax", largest(steps @ slopes)
    for finer in ((2,), (6,), ()):
        yield f"groups of {finer} in the place of {groups} are nearer to softmax", max(0.0, float(far(weights(finer)) - far(tied)))
    flat = HierarchicalAttention(())(q, k, v) - attend(q, k, v)
    yield "a flat tree is softmax attention", largest(flat)
    moved = HierarchicalAttention(groups)(q, k + 1.0, eye)[0, 0] - tied
    yield "what all keys have in common changes nothing", largest(moved)
    places = torch.tensor([-1, 0, 1, 2, -1])
    padded = HierarchicalAttention((2,))(*(t[:, :, :5] for t in (q, k, v)), query_positions=places, key_positions=places)
    yield "what has no place reads nothing", largest(padded[:, :, [0, 4]])
    x = torch.zeros(1, 1, 4096, 4)
    nodes = _Nodes(x[..., 0], x, x, x, torch.ones(1, 1, 4096), torch.ones(1, 1, 4096))
    pairs, made = 0, HierarchicalAttention((8, 8, 8))
    for size in (8, 8, 8, 8):
        (own, _), nodes = made._family(nodes, size, 1.0)
        pairs += own.numel() * size
    yield "4096 tokens in groups of 8 have 585 families of 64 weights", float(abs(pairs - 585 * 64))


def _blocks(m: int, groups: Sequence[int]) -> Tensor:
    """(blocks, m, m): which pairs must share a weight, 1 or 0: those under the same two siblings."""
    found: dict[tuple[Any, ...], Tensor] = {}
    sizes = [1]
    for size in groups:
        sizes.append(sizes[-1] * size)
    for i in range(m):
        for j in range(m):
            under = next((s for s, above in zip(sizes, [*sizes[1:], m], strict=True) if i // above == j // above), 1)
            name = (under, i // under, j // under)
            found.setdefault(name, torch.zeros(m, m, dtype=torch.float64))[i, j] = 1.0
    return torch.stack(list(found.values()))
