"""Hedgehog: feature maps that learn to give softmax's own weights, so that trained attention can become linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attention_weights
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Attention, Tokens, largest, shake
from .._states import KernelAttention, Pass, Reading
from ._carried import CarryCache
from ._prefix import exp_reading

CARD = Card(
    paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    year=2024,
    room="linear",
    source=(
        "arXiv:2402.04347, sec. 4, and the authors' later library for conversions. Three published activations of the map's z: the "
        "paper's listing, [exp z, exp -z]; the authors' stable one, the default, a softmax of z and another of -z, at least 1e-12; "
        "another library's, one softmax over [2z, -2z]. Denominators have 1e-12 more; with exp they need none, as a running log of "
        "sums takes its place. Maps start as the identity (paper) and belong to query heads, whose keys are repeated first. "
        "Distillation is by cross entropy alone; the fine-tuning after it is not here"
    ),
)
ACTIVATIONS = ("softmax", "exp", "joint")


class Hedgehog(KernelAttention):
    """Linear attention by learned features: [f(z), f(-z)] of z = W x + b, one W and b a head for queries and one for keys.

    Args:
        activation: "softmax", "exp" or "joint", see the card. size: of z, as wide as a head by default. shift: whether there is b.
    """

    epsilon: float | None = 1e-12  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        activation: str = "softmax",
        size: int | None = None,
        shift: bool = True,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        if activation not in ACTIVATIONS:
            raise ShapeError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        if activation == "exp":
            self.epsilon = None
        d = self.projections.head_dim
        f = d if size is None else size
        self.maps = nn.ParameterDict({name: torch.eye(d, f).repeat(heads, 1, 1) for name in "qk"})
        self.shifts = nn.ParameterDict({name: torch.zeros(heads, 1, f) for name in "qk"} if shift else {})

    @staticmethod
    def of(attention: Attention, *, activation: str = "softmax", size: int | None = None, shift: bool = True) -> Hedgehog:
        """A softmax attention's projections with feature maps that are not fitted yet: see `distill`."""
        if attention.mechanism is not None:
            raise ShapeError("only plain attention becomes linear by Hedgehog; this one has a mechanism of its own")
        p = attention.projections
        given = {"kv_heads": p.kv_heads, "head_dim": p.head_dim, "activation": activation, "size": size, "shift": shift}
        made = Hedgehog(attention.width, p.heads, **given).to(p.q.weight)  # type: ignore[arg-type]
        made.projections, made.rotary = p, attention.rotary
        return made

    def mapped(self, name: str, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n f"]:
        """z of queries ("q") or keys ("k"), in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        z = x.to(wide) @ self.maps[name].to(wide)
        return z + self.shifts[name].to(wide) if name in self.shifts else z

    def features(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> tuple[Tensor, Tensor]:
        """See `KernelAttention.features`; with exp they overflow for large z, and are not used so."""
        found = []
        for z in (self.mapped("q", q), self.mapped("k", k)):
            if self.activation == "softmax":
                found.append(torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12))
            else:
                both = torch.cat([z, -z], -1)
                found.append(both.exp() if self.activation == "exp" else (2 * both).softmax(-1))
        return found[0], found[1]

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.projections.split(x)
        group = q.shape[1] // k.shape[1]
        k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
        q, k = now.rotated(q, self.rotary), now.rotated(k, self.rotary)
        if self.activation != "exp":
            return Reading(*self.features(q, k), v)
        zq, zk = self.mapped("q", q), self.mapped("k", k)
        return exp_reading(torch.cat([zq, -zq], -1), torch.cat([zk, -zk], -1), v, now)

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()

    def cross_entropy(self, weights: Float[Tensor, "b h n n"], x: Tokens, *stages: Stage) -> Tensor:
        """How far this layer's weights on x are from others': - sum_j P_ij log A_ij, its mean over rows, heads and queries."""
        mine = self.weights(x, *stages).clamp(min=1e-30).log()
        return -(weights * mine).sum(-1).mean()


def distill(
    teachers: Sequence[Attention],
    students: Sequence[Hedgehog],
    inputs: Sequence[Tokens],
    *stages: Stage,
    steps: int = 200,
    rate: float = 1e-2,
    rows: int | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Fits the feature maps, and nothing else, to softmax weights; returns the loss before each step: the mean over layers.

    Args:
        inputs: what each teacher was given, (b, n, width), with softmax in all layers below: see `heard`. stages: such as Causal().
        steps, rate: of AdamW, without weight decay. rows: of inputs in a step, one after the other; None for all.
    """
    if not len(teachers) == len(students) == len(inputs):
        raise ShapeError(f"{len(teachers)} teachers, {len(students)} students and {len(inputs)} inputs; there is one each a layer")
    inputs = [x.detach() for x in inputs]
    fitted = [p for student in students for part in (student.maps, student.shifts) for p in part.values()]
    optimizer, losses = torch.optim.AdamW(fitted, rate, weight_decay=0.0), []
    for step in range(steps):
        loss = torch.zeros(())
        for teacher, student, x in zip(teachers, students, inputs, strict=True):
            some = x if rows is None else x.roll(-step * rows, 0)[:rows]
            loss = loss + student.cross_entropy(softmax_weights(teacher, some, *stages), some, *stages) / len(inputs)
        for parameter, slope in zip(fitted, torch.autograd.grad(loss, fitted), strict=True):
            parameter.grad = slope
        optimizer.step()
        losses.append(float(loss.detach()))
        report(step, losses[-1])
    optimizer.zero_grad()
    return losses


@torch.no_grad()
def softmax_weights(attention: Attention, x: Tokens, *stages: Stage) -> Float[Tensor, "b h n n"]:
    """The weights of plain attention on x."""
    q, k, _ = attention.projections.split(x)
    if attention.rotary is not None:
        places = torch.arange(x.shape[1], device=x.device)
        q, k = attention.rotary(q, places), attention.rotary(k, places)
    return attention_weights(q, k, *stages)


@torch.no_grad()
def heard(run: Callable[[], Any], mixers: Sequence[nn.Module]) -> list[Tokens]:
    """What each of some mixers is given while `run` runs a model that they are layers of."""
    given: dict[int, Tensor] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda _, args, at=i: given.__setitem__(at, args[0]))  # type: ignore[misc]
        for i, mixer in enumerate(mixers)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [given[i] for i in range(len(mixers))]


def oracle(mixer: Hedgehog, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), weight by weight."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads

    def feature(name: str, head: int, t: Tensor) -> Tensor:
        z = t @ mixer.maps[name][head] + (mixer.shifts[name][head, 0] if name in mixer.shifts else 0.0)
        e, inverse = torch.exp(z), torch.exp(-z)
        if mixer.activation == "exp":
            return torch.cat([e, inverse])
        if mixer.activation == "joint":
            return torch.cat([e**2, inverse**2]) / (e**2 + inverse**2).sum()
        return torch.cat([e / e.sum(), inverse / inverse.sum()])

    rows = []
    for i in range(len(x)):
        read = []
        for head in range(p.heads):
            own, shared = (slice(at * d, at * d + d) for at in (head, head // group))
            query = feature("q", head, p.q.weight[own] @ x[i])
            total, out = torch.zeros((), dtype=x.dtype), torch.zeros(d, dtype=x.dtype)
            for j in visible[i].nonzero().flatten().tolist():
                weight = (query * feature("k", head, p.k.weight[shared] @ x[j])).sum()
                total, out = total + weight, out + weight * (p.v.weight[shared] @ x[j])
            read.append(out / total)
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Hedgehog]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Hedgehog(width, heads),
        Hedgehog(width, heads, activation="exp", kv_heads=heads // 2, shift=False),
        Hedgehog(width, heads, activation="joint", size=size // 2),
    ]
    for mixer in made:
        shake([*mixer.maps.values(), *mixer.shifts.values()], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Hedgehog:
    """The authors' stable map, as wide as a head."""
    return Hedgehog(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    for activation in ACTIVATIONS:
        mixer = Hedgehog(32, 4, activation=activation).double()
        shake([*mixer.maps.values()], seed=3)
        weights = mixer.weights(x, Causal())
        yield f"{activation}: rows of weights sum to one", largest(weights.sum(-1) - 1)
        yield f"{activation}: no weight is negative", largest(weights.clamp(max=0.0))
        if activation == "exp":
            q, k, _ = mixer.projections.split(x)
            z = mixer.mapped("q", q)[:, :, :, None] + mixer.mapped("k", k)[:, :, None]
            kernel = torch.cosh(z).sum(-1).tril()
            yield "exp: weights are sums of cosh(z_q + z_k)", largest(weights - kernel / kernel.sum(-1, keepdim=True))
        with torch.no_grad():
            for each in mixer.maps.values():
                each.neg_()
        yield f"{activation}: turning the signs of both maps changes nothing", largest(mixer.weights(x, Causal()) - weights)
        with torch.no_grad():
            mixer.maps["k"].zero_()
        even = torch.ones(11, 11, dtype=torch.float64).tril()
        yield f"{activation}: keys mapped to zero are read alike", largest(mixer.weights(x, Causal()) - even / even.sum(-1, True))
    plain = Attention(32, 4, kv_heads=2).double()
    yield "one channel, softmax: every feature is one", largest(Hedgehog.of(plain, size=1).weights(x) - 1 / 11)
    exp, joint = (Hedgehog.of(plain, activation=name) for name in ("exp", "joint"))
    with torch.no_grad():
        joint.maps["q"].div_(2)
    queries, keys = torch.randn(2, 4, 11, 8, dtype=torch.float64), torch.rand(16, 11, dtype=torch.float64)
    one, other = (f.features(queries, queries)[0] @ keys for f in (exp, joint))
    apart = one / one.sum(-1, keepdim=True) - other / other.sum(-1, keepdim=True)
    yield "queries by exp, and by joint with maps of half the size: what a row has in common goes", largest(apart)
