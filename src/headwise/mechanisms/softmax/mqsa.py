"""Multi-query self-attention of MQSA-TED: queries pooled from the last few items, mixed with queries of the last item alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import layer_norm
from .._rotary import Rotary

CARD = Card(
    paper="Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential Recommendation",
    year=2023,
    room="softmax",
    source=(
        "arXiv:2311.01056 and the authors' code, which its one block is: a layer-normed mean of the last L items is the query and, "
        "in the place of the token, what is added to what was read; keys and values are of the items as they are; then layer norm, "
        "feed-forward layer and layer norm. Two such branches, with L and with 1, are mixed by alpha; `feed_forward=False` leaves "
        "both at what was read and added. The code mixes the branches' scores of items, which is the same. Its rows of padding "
        "read everything and are set to zero later; here they read nothing. Dropout, embeddings and their distillation (TED) are "
        "outside attention"
    ),
)
EPSILON = 1e-24


class _Memory(Cache):
    """Keys and values of one branch, and the last window - 1 tokens, zero where they were padding."""

    def __init__(self, window: int) -> None:
        self.read = KeyValues()
        self.window = window
        self.tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.read)

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return (*self.read.tensors(), self.tokens)

    def with_past(self, x: Tokens) -> Tokens:
        """x (b, n, width) after window - 1 tokens before it, zeros where there were none; the last ones are kept."""
        x = F.pad(x, (0, 0, self.window - 1, 0)) if self.tokens is None else torch.cat([self.tokens, x], 1)
        self.tokens = x[:, x.shape[1] - self.window + 1 :].clone()
        return x


class Memories(Cache):
    """What both branches keep."""

    def __init__(self, *branches: _Memory) -> None:
        self.branches = branches

    def __len__(self) -> int:
        return len(self.branches[0])

    def tensors(self) -> Iterable[Tensor | None]:
        """See `Cache.tensors`."""
        return [tensor for branch in self.branches for tensor in branch.tensors()]


class Branch(nn.Module):
    """One block: the layer-normed mean of the last `window` tokens reads, is added, and goes through a feed-forward layer."""

    def __init__(self, width: int, heads: int, window: int, feed_forward: bool) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query_norm = nn.LayerNorm(width, eps=EPSILON)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = (nn.Linear(width, width) if feed_forward else None for _ in range(2))
        self.middle_norm, self.last_norm = (nn.LayerNorm(width, eps=EPSILON) if feed_forward else None for _ in range(2))
        for linear in (self.q, self.k, self.v, self.up, self.down):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def pooled(self, x: Tokens, memory: _Memory) -> Tokens:
        """The sum of the last `window` tokens at each of x: their mean, but for a factor that the layer norm takes away."""
        past = memory.with_past(x).to(torch.promote_types(x.dtype, torch.float32))
        total = past[:, : x.shape[1]]
        for back in range(1, self.window):
            total = total + past[:, back : back + x.shape[1]]
        return total.to(x.dtype)

    def forward(self, x: Tokens, stages: tuple[Stage, ...], memory: _Memory, mask: Real | None, rotary: Rotary | None) -> Tokens:
        """(b, n, width) -> the same; memory is extended."""
        real = x if mask is None else torch.where(mask[..., None].bool(), x, 0)
        query = layer_norm(self.query_norm, self.pooled(real, memory))
        q, k, v = (f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, t in ((self.q, query), (self.k, x), (self.v, x)))
        seen = memory.read.extend(q, k, v, mask, rotary)
        out = query + attend(seen.q, seen.k, seen.v, *stages, **seen.places).transpose(1, 2).flatten(2)
        if self.up is None or self.down is None or self.middle_norm is None or self.last_norm is None:
            return out
        out = layer_norm(self.middle_norm, out)
        return layer_norm(self.last_norm, out + self.down(torch.relu(self.up(out))))


class Mqsa(Mixer):
    """Mixes two branches of attention: one whose queries are means of the last `window` tokens, and one whose are single tokens.

    Args:
        window: L. mix: alpha, the share of the branch of single tokens. feed_forward: the rest of a branch's block.
    """

    rotates = True

    def __init__(self, width: int, heads: int = 1, *, window: int = 3, mix: float = 0.5, feed_forward: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if window < 1 or not 0 <= mix <= 1:
            raise ShapeError(f"a window of {window} tokens must be at least 1, a share of {mix} between 0 and 1")
        self.width, self.mix = width, mix
        self.short, self.long = (Branch(width, heads, size, feed_forward) for size in (1, window))

    def forward(self, x: Tokens, *stages: Stage, cache: Memories | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        memories = (self.new_cache() if cache is None else cache).branches
        short, long = (
            branch(x, stages, memory, attention_mask, self.rotary)
            for branch, memory in zip((self.short, self.long), memories, strict=True)
        )
        out: Tensor = self.mix * short + (1 - self.mix) * long
        return out

    def new_cache(self, owner: Cache | None = None) -> Memories:
        """An empty cache for decoding: keys and values of both branches, and the last tokens of a window."""
        return Memories(_Memory(1), _Memory(self.long.window))


def oracle(mixer: Mqsa, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a query at a time."""

    def normed(norm: nn.LayerNorm | None, row: Tensor) -> Tensor:
        assert norm is not None
        centred = row - row.mean()
        return centred / torch.sqrt((centred**2).mean() + EPSILON) * norm.weight + norm.bias

    def read(branch: Branch, i: int) -> Tensor:
        recent = [x[i - back] for back in range(branch.window) if i - back >= 0]
        query = normed(branch.query_norm, torch.stack(recent).sum(0) / len(recent))
        q, parts = branch.q.weight @ query + branch.q.bias, []
        seen = visible[i].nonzero().flatten().tolist()
        for at in torch.arange(mixer.width).chunk(branch.heads):
            keys, values = ([(f.weight @ x[j] + f.bias)[at] for j in seen] for f in (branch.k, branch.v))
            e = torch.stack([torch.exp((q[at] * key).sum() / len(at) ** 0.5) for key in keys])
            parts.append(e / e.sum() @ torch.stack(values))
        out = query + torch.cat(parts)
        if branch.up is None or branch.down is None:
            return out
        out = normed(branch.middle_norm, out)
        hidden = branch.up.weight @ out + branch.up.bias
        hidden = torch.where(hidden > 0, hidden, 0.0)
        return normed(branch.last_norm, out + branch.down.weight @ hidden + branch.down.bias)

    return torch.stack([mixer.mix * read(mixer.short, i) + (1 - mixer.mix) * read(mixer.long, i) for i in range(len(x))])


def examples(heads: int, size: int) -> list[Mqsa]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [Mqsa(width, heads), Mqsa(width, window=5, mix=0.3), Mqsa(width, heads, window=60, mix=0.7, feed_forward=False)]
    shake((p for mixer in made for p in mixer.parameters()), seed=4, by=0.1)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Mqsa:
    """A window of 3, both branches alike; the paper's data had one head, here there are as many as asked for."""
    return Mqsa(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    single = Mqsa(16, 2, window=1).double()
    single.long.load_state_dict(single.short.state_dict())
    ends = [Mqsa(16, 2, mix=mix).double() for mix in (0.0, 1.0, 0.3)]
    for other in ends[1:]:
        other.load_state_dict(ends[0].state_dict())
    outs = [mixer(x, Causal()) for mixer in ends]
    yield "mixed branches are mixed outputs", largest(0.7 * outs[0] + 0.3 * outs[1] - outs[2])
    single.mix = 0.2
    before = single(x, Causal())
    single.mix = 1.0
    yield "a window of one token is the branch of single tokens", largest(single(x, Causal()) - before)
    longest = Mqsa(16, window=40).double().long
    running = longest.query_norm(x.cumsum(1) / torch.arange(1, 13)[:, None])
    yield "a window of all tokens is a running mean", largest(longest.query_norm(longest.pooled(x, _Memory(40))) - running)
    real = (torch.arange(12) >= 5).expand(2, -1)
    padded = ends[2](x, Causal(), attention_mask=real)[:, 5:]
    yield "missing items are in no mean", largest(padded - ends[2](x[:, 5:], Causal()))
    later = x.clone()
    later[:, 8:] += 1.0
    yield "no item is read before its time", largest((ends[2](later, Causal()) - outs[2])[:, :8])
    cache = ends[2].new_cache()
    ends[2](x, Causal(), cache=cache)
    yield "the cache holds 4 c numbers a token, and L - 1 tokens", float(abs(cache.nbytes - 2 * 8 * 16 * (4 * 12 + 2)))
    counted = [sum(parameter.numel() for parameter in module.parameters()) for module in (ends[0], ends[0].short)]
    yield "two branches of 5 c^2 + 11 c parameters", float(abs(counted[0] - 2 * counted[1]) + abs(counted[1] - 5 * 256 - 11 * 16))
