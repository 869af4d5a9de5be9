"""Knocking heads: queries, keys and values of all heads go through the same small matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest, shake

CARD = Card(
    paper="Knocking-Heads Attention",
    year=2025,
    room="heads",
    source=(
        "arXiv:2510.23052, sec. 3: the linear variant, and the gated one, which is for values only. The defaults are those of its "
        "largest model: the gated one on values, queries and keys as they are. No code of the authors is known. The paper does "
        "not say where the matrices stand beside a norm of queries and keys; here there is none, and they come before the "
        "rotation, the only place where they fold into the projections"
    ),
)
VALUES = ("linear", "gated", "none")


class GatedKnock(nn.Module):
    """2 (v W_up * sigmoid(v W_gate)) W_down, which starts as v: up and down are identities, the gate is zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(size, size, bias=False) for _ in range(3))
        nn.init.eye_(self.up.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.eye_(self.down.weight)

    def forward(self, v: Tensor) -> Tensor:
        """(..., size) -> the same."""
        out: Tensor = self.down(2 * self.up(v) * torch.sigmoid(self.gate(v)))
        return out


def _linear(size: int) -> nn.Linear:
    made = nn.Linear(size, size, bias=False)
    nn.init.eye_(made.weight)
    return made


class KnockingHeads(Mixer):
    """Attention whose heads share a matrix for queries, one for keys, and one or a gated pair for values; it starts as plain.

    Args:
        heads, kv_heads, head_dim, bias: as for `Attention`. queries, keys: whether those have a matrix. values: "linear" for a
            matrix, "gated", or "none".
    """

    rotates = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        queries: bool = False,
        keys: bool = False,
        values: str = "gated",
    ) -> None:
        super().__init__()
        if values not in VALUES:
            raise ShapeError(f"values={values!r} is no way for heads to knock; there are: {', '.join(VALUES)}")
        self.width = width
        self.projections = Projections(width, heads, kv_heads, head_dim, bias)
        size = self.projections.head_dim
        self.knock_q = _linear(size) if queries else None
        self.knock_k = _linear(size) if keys else None
        self.knock_v = GatedKnock(size) if values == "gated" else _linear(size) if values == "linear" else None

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        knocks = (self.knock_q, self.knock_k, self.knock_v)
        q, k, v = (t if knock is None else knock(t) for t, knock in zip(self.projections.split(x), knocks, strict=True))
        seen = (self.new_cache() if cache is None else cache).extend(q, k, v, attention_mask, self.rotary)
        return self.projections.merge(attend(seen.q, seen.k, seen.v, *stages, **seen.places))

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding; it keeps keys and values as they are read, after their matrices."""
        return KeyValues()

    def fold(self) -> Attention:
        """The same as a plain attention, with its matrices multiplied into the projections.

        Raises: ShapeError if its values are gated, for then no matrix is the same.
        """
        if isinstance(self.knock_v, GatedKnock):
            raise ShapeError('gated values are no matrix, and fold into none; only values="linear" or "none" do')
        of = self.projections
        folded = Attention(
            self.width, of.heads, kv_heads=of.kv_heads, head_dim=of.head_dim, bias=of.q.bias is not None, rotary=self.rotary
        )
        folded.projections = copy.deepcopy(of)
        folded.train(self.training)
        with torch.no_grad():
            for name, knock in zip("qkv", (self.knock_q, self.knock_k, self.knock_v), strict=True):
                if knock is None:
                    continue
                for parameter in getattr(folded.projections, name).parameters():  # (heads d, width), and the bias (heads d,)
                    rows = parameter.view(-1, of.head_dim, *parameter.shape[1:])
                    parameter.copy_(torch.einsum("ed,hd...->he...", knock.weight, rows).reshape(parameter.shape))
        return folded


def oracle(mixer: KnockingHeads, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a head at a time, a query at a time."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads

    def head_of(t: nn.Linear, head: int, token: Tensor) -> Tensor:
        rows = slice(head * d, head * d + d)
        return t.weight[rows] @ token + (0 if t.bias is None else t.bias[rows])  # type: ignore[index]

    def value(v: Tensor) -> Tensor:
        if mixer.knock_v is None or isinstance(mixer.knock_v, nn.Linear):
            return v if mixer.knock_v is None else mixer.knock_v.weight @ v
        up, gate, down = (f.weight for f in (mixer.knock_v.up, mixer.knock_v.gate, mixer.knock_v.down))
        return 2 * (down @ ((up @ v) / (1 + torch.exp(-(gate @ v)))))

    def known(knock: nn.Linear | None, t: Tensor) -> Tensor:
        return t if knock is None else torch.stack([sum(knock.weight[i, j] * t[j] for j in range(d)) for i in range(d)])  # type: ignore[misc]

    keys = [[known(mixer.knock_k, head_of(p.k, kv, token)) for token in x] for kv in range(p.kv_heads)]
    values = [[value(head_of(p.v, kv, token)) for token in x] for kv in range(p.kv_heads)]
    rows = []
    for i in range(len(x)):
        seen, joined = visible[i].nonzero().flatten().tolist(), []
        for head in range(p.heads):
            q, kv = known(mixer.knock_q, head_of(p.q, head, x[i])), head // group
            e = torch.exp(torch.stack([q @ keys[kv][j] / d**0.5 for j in seen]))
            joined.append(sum(e[at] / e.sum() * values[kv][j] for at, j in enumerate(seen)))
        rows.append(p.out.weight @ torch.cat(joined) + (0 if p.out.bias is None else p.out.bias))  # type: ignore[arg-type]
    return torch.stack(rows)


def _random(mixer: KnockingHeads) -> KnockingHeads:
    shake((p for name, p in mixer.named_parameters() if name.startswith("knock")), seed=5)
    return mixer


def examples(heads: int, size: int) -> list[KnockingHeads]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        _random(KnockingHeads(width, heads)),
        _random(KnockingHeads(width, heads, kv_heads=heads // 2, queries=True, keys=True, values="linear", bias=True)),
        _random(KnockingHeads(width, heads, kv_heads=heads // 2, queries=True, values="gated")),
        _random(KnockingHeads(width, heads, keys=True, values="none")),
    ]


def neutral(heads: int, size: int) -> list[KnockingHeads]:
    """Settings that are plain attention: all of them, at the start of training."""
    width = heads * size
    return [KnockingHeads(width, heads), KnockingHeads(width, heads, queries=True, keys=True, values="linear")]


def sized(heads: int, size: int, tokens: int, **options: Any) -> KnockingHeads:
    """Gated values, as in the paper's largest model."""
    return KnockingHeads(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    linear: dict[str, Any] = {"queries": True, "keys": True, "values": "linear"}
    for kv_heads in (4, 2):
        mixer = _random(KnockingHeads(32, 4, kv_heads=kv_heads, bias=True, **linear)).double()
        yield (
            f"with {kv_heads} key/value heads, it folds into the projections",
            largest(mixer(x, Causal()) - mixer.fold()(x, Causal())),
        )
    turned = KnockingHeads(32, 4, queries=True, keys=True, values="none").double()
    plain, turn = turned.fold(), torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    with torch.no_grad():
        for knock in (turned.knock_q, turned.knock_k):
            knock.weight.copy_(turn)  # type: ignore[union-attr]
    yield "one turn for queries and keys changes no score", largest(turned(x, Causal()) - plain(x, Causal()))

    mixer = _random(KnockingHeads(32, 4, queries=True, keys=True)).double()
    swapped = copy.deepcopy(mixer)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name in "qkv":
            weight = getattr(swapped.projections, name).weight
            weight.copy_(weight.unflatten(0, (4, 8))[order].flatten(0, 1))
        weight = swapped.projections.out.weight
        weight.copy_(weight.unflatten(1, (4, 8))[:, order].flatten(1))
    yield "heads in another order give the same", largest(mixer(x, Causal()) - swapped(x, Causal()))

    base = sum(w.numel() for w in Attention(32, 4).parameters())
    for name, made in (("linear", KnockingHeads(32, 4, **linear)), ("gated", KnockingHeads(32, 4))):
        made = made.double()
        yield f"{name}: 3 d^2 parameters more", float(abs(sum(w.numel() for w in made.parameters()) - base - 3 * 8**2))
        cache = made.new_cache()
        made(x, Causal(), cache=cache)
        yield f"{name}: it keeps what plain attention keeps", float(abs(cache.nbytes - 2 * 9 * 2 * 32 * 8))
        matrices = [w for n, w in made.named_parameters() if n.startswith("knock")]
        grads = torch.autograd.grad(made(x, Causal()).square().sum(), matrices)
        still = min(float((g - torch.diag(g.diagonal())).abs().max()) for g in grads)
        yield f"{name}: what is off the diagonal learns from the start", float(still == 0.0)
    yield "6 L c^2 / h operations more for a text of L", float(abs(_operations(linear) - 6 * 9 * 32**2 / 4))


def _operations(options: dict[str, Any]) -> float:
    """How many operations (a multiplication and an addition are two) the matrices add to a text of 9 tokens."""
    counts = []
    for mixer in (KnockingHeads(32, 4, **options), Attention(32, 4)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, 9, 32), Causal())
        counts.append(counter.get_total_flops())
    return float(counts[0] - counts[1])
