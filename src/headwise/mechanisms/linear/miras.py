"""Miras: memories made of four choices, a network, a loss, what is retained of it, and gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import Rms
from .._states import Pass
from ._memory import Held, Layer, MemoryCache, Network, begin_causal, clipped, in_blocks, spans, wide
from ._parts import ShortConvolutions, l2_normed

CARD = Card(
    paper="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization",
    year=2025,
    room="linear",
    source=(
        "arXiv:2504.13173, sec. 5, by a third party's transcription of its equations; the authors' code was not found. Chosen: the "
        "L2 loss has a factor 1/2 and Yaad turns at the error's length, which make its slope continuous for one value; Moneta's "
        "map is the paper's A / |A|_q^(q - 2), of each matrix, not the exact mirror map; softmax goes over the weights of each "
        "output; elastic net is the form that accumulates (A decays and learns, W = A with a soft threshold), with a fixed "
        "threshold. The paper skips norms and softmax inside a chunk; here only gradients are old, and W_t is exact. Rates are "
        "sigmoids of low-rank maps, one for each output channel of a layer; delta is one a head. Our own: heads, weights to begin "
        "with that are learned, the 1e-6 in norms, SiLU as the gate before the output map, `clip`. Momentum, f-divergences other "
        "than KL and the loss for shifted values are not built"
    ),
)
LOSSES = ("l2", "lp", "huber", "huber_norm", "yaad", "dot")
RETENTIONS = ("decay", "q_norm", "softmax", "elastic")
PRESETS: dict[str, dict[str, Any]] = {
    "moneta": {"loss": "lp", "retention": "q_norm", "p": 3.0, "q": 4.0},
    "yaad": {"loss": "yaad", "retention": "decay"},
    "memora": {"loss": "l2", "retention": "softmax"},
}


class Miras(Mixer):
    """A_t = alpha_t A_(t-1) - eta_t grad loss(W; k_t, v_t), W_t = map(A_t), read by M(W_t, q_t); W is that before t's chunk.

    Args:
        heads: of width / heads, each with a memory of its own.
        memory: "mlp", x + layer norm of two layers, or "linear", x W. expand: width inside the mlp.
        loss: with error e = M(k) - v: "l2", |e|^2 / 2; "lp", the sum of |e|^p; "huber" of each channel; "huber_norm" of e's
            length; "yaad", l2 for errors shorter than delta, else delta times l1; "dot", -M(k) . v.
        retention: the map: "decay", none; "q_norm", A / |A|_q^(q - 2); "softmax", of each output's weights, times `mass`, where A
            are logs of W, which is the retention of a KL divergence; "elastic", A brought nearer to 0 by `threshold`.
        sharpness: of tanh in place of signs in lp and yaad, and |x| as sqrt(x^2 + 1e-6); None for exact ones.
        channels: whether alpha and eta are numbers of each output channel, by maps of `rank`; else of each head and layer.
        chunk: tokens whose gradients are taken at the same weights; counted from the text's start. taps: of the convolutions of
            queries, keys and values; 0 for none. rate: the largest eta.
        clip: the largest norm of one token's gradient of one layer's weights, None for any.
    """

    cannot = {"full": "its memory learns from tokens in their order"}
    bounded = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        memory: str = "mlp",
        loss: str = "l2",
        retention: str = "decay",
        p: float = 3.0,
        q: float = 4.0,
        mass: float = 1.0,
        threshold: float = 0.01,
        sharpness: float | None = 10.0,
        channels: bool = True,
        rank: int = 32,
        expand: int = 4,
        chunk: int = 16,
        taps: int = 4,
        rate: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        for what, given, known in (
            ("memory", memory, ("mlp", "linear")),
            ("loss", loss, LOSSES),
            ("retention", retention, RETENTIONS),
        ):
            if given not in known:
                raise ShapeError(f"{what} {given!r} must be one of {', '.join(known)}")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if chunk < 1 or p < 1 or q < 1:
            raise ShapeError(f"chunk {chunk}, p {p:g} and q {q:g} must be 1 or more")
        self.width, self.heads, self.size, self.chunk, self.rate, self.clip = width, heads, width // heads, chunk, rate, clip
        self.loss, self.retention, self.p, self.norm_power, self.mass = loss, retention, p, q, mass
        self.threshold, self.sharpness = threshold, sharpness
        self.network = Network(self.size, 2 if memory == "mlp" else 1, expand, memory == "mlp")
        self.start = self.network.start(heads)
        if retention == "softmax":  # logs: flatter ones would make all outputs alike, and a layer norm noise of them
            for weight in self.start:
                nn.init.normal_(weight, std=2.0)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convolutions = ShortConvolutions({"q": width, "k": width, "v": width}, taps)
        self.outputs = [w.shape[-1] if channels else 1 for w in self.start]  # rates of each layer
        count = heads * sum(self.outputs)
        self.alpha, self.eta = (_rates(width, count, rank if channels else None) for _ in range(2))
        nn.init.constant_(_last(self.alpha).bias, 6.9)  # all but a thousandth: steps grow where weights before a norm shrink
        nn.init.constant_(_last(self.eta).bias, -5.8)
        self.delta = nn.Linear(width, heads) if loss in ("huber", "huber_norm", "yaad") else None
        self.norm = Rms(width)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: MemoryCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        memory = self.read(x, *stages, cache=cache, attention_mask=attention_mask).transpose(1, 2).flatten(2)
        out: Tensor = self.out((self.norm(memory) * F.silu(wide(self.gate(x)))).to(x.dtype))
        return out

    def read(
        self, x: Tokens, *stages: Stage, cache: MemoryCache | None = None, attention_mask: Real | None = None
    ) -> Float[Tensor, "b h n d"]:
        """What the memory gives each token, before the norm, the gate and the map back."""
        now = begin_causal(self.new_cache() if cache is None else cache, x, stages, attention_mask)
        start = tuple(wide(w).expand(len(x), -1, -1, -1) for w in self.start)
        return self._heads(in_blocks(self.packed(x, now), now, self.chunk, start, self._chunk))

    def new_cache(self, owner: Cache | None = None) -> MemoryCache:
        """An empty cache for decoding."""
        return MemoryCache()

    def _heads(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def packed(self, x: Tokens, now: Pass) -> Float[Tensor, "b n c"]:
        """All that the memory needs of each token: queries, keys, values, eta, log alpha, delta."""
        q, k, v = (self.convolutions(name, wide(getattr(self, name)(x)), now) for name in "qkv")
        q, k = (l2_normed(t.unflatten(-1, (self.heads, -1))).flatten(2) for t in (q, k))
        delta = [] if self.delta is None else [F.softplus(wide(self.delta(x)))]
        return torch.cat([q, k, v, self.rate * wide(self.eta(x)).sigmoid(), F.logsigmoid(wide(self.alpha(x))), *delta], -1)

    def parts(self, packed: Float[Tensor, "b n c"]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
        """Queries, keys and values (b, h, n, d); of each layer eta, and log alpha, (b, h, n, channels); delta (b, h, n, 1)."""
        rates = [self.heads * o for o in self.outputs]
        found = packed.split([*[self.width] * 3, *rates, *rates, *([] if self.delta is None else [self.heads])], -1)
        heads = [self._heads(t) for t in found]
        layers = len(rates)
        return heads[:3], heads[3 : 3 + layers], heads[3 + layers : 3 + 2 * layers], None if self.delta is None else heads[-1]

    def _chunk(self, rows: Tensor, held: Held) -> tuple[Tensor, Callable[[], Held]]:
        """One chunk: what its tokens read, and how to get what is held after it."""
        (q, k, v), eta, keep, delta = self.parts(rows)
        pairs = self.network.signals([self._map(a) for a in held], k, lambda found: self._slope(found, v, delta))
        layers = []
        for start, (a, g), rate, logs in zip(held, pairs, eta, keep, strict=True):
            g = g if self.clip is None else clipped(a, g, self.clip)
            layers.append(Layer(start, a, g, logs.cumsum(2).exp(), spans(logs) * rate[:, :, None]))
        out = self.network.run(q, [layer.times if self.retention == "decay" else self._product(layer) for layer in layers])
        last: Callable[[Layer], Tensor] = lambda layer: layer.last()  # noqa: E731
        if self.retention == "softmax":
            last = lambda layer: layer.last().log_softmax(-2)  # noqa: E731
        return out.transpose(1, 2).flatten(2), lambda: tuple(last(layer) for layer in layers)

    def _product(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        return lambda z: (z[:, :, :, None] @ self._map(layer.each()))[:, :, :, 0]

    def _map(self, a: Float[Tensor, "... i o"]) -> Float[Tensor, "... i o"]:
        """Weights, of what is held."""
        if self.retention == "q_norm":
            size = (a.abs() ** self.norm_power).sum((-2, -1), keepdim=True) + 1e-6
            return a * size ** ((2 - self.norm_power) / self.norm_power)
        if self.retention == "softmax":
            return self.mass * a.softmax(-2)
        return F.softshrink(a, self.threshold) if self.retention == "elastic" else a

    def _slope(self, found: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The loss's gradient at what the memory gives."""
        if self.loss == "dot":
            return -v.expand_as(found)
        e = found - v
        if self.loss == "l2":
            return e
        if self.loss == "lp":
            size = e.abs() if self.sharpness is None else torch.sqrt(e.square() + 1e-6)
            return self.p * self._sign(e) * size ** (self.p - 1)
        assert delta is not None
        if self.loss == "huber":
            return torch.maximum(torch.minimum(e, delta), -delta)
        length = e.square().sum(-1, keepdim=True)
        if self.loss == "huber_norm":
            return e * delta * torch.maximum(length, delta.square()).clamp(min=1e-30).rsqrt()
        return torch.where(length <= delta.square(), e, delta * self._sign(e))

    def _sign(self, e: Tensor) -> Tensor:
        return e.sign() if self.sharpness is None else torch.tanh(self.sharpness * e)


def _rates(width: int, count: int, rank: int | None) -> nn.Module:
    return nn.Linear(width, count) if rank is None else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, count))


def _last(part: nn.Module) -> nn.Linear:
    return [m for m in part.modules() if isinstance(m, nn.Linear)][-1]


def oracle(mixer: Miras, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time, its gradients by automatic differentiation."""
    n, h, d = len(x), mixer.heads, mixer.size

    def near(name: str, t: int) -> Tensor:
        out, weight = torch.zeros_like(x[0]), getattr(mixer, name).weight
        taps = mixer.convolutions.weights[name] if name in mixer.convolutions.weights else torch.ones_like(x[:1].T)
        for back in range(min(taps.shape[1], t + 1)):
            out = out + taps[:, -1 - back] * (weight @ x[t - back])
        return out

    def unit(row: Tensor) -> Tensor:
        return row / torch.sqrt((row * row).sum() + 1e-6)

    def ask(weights: list[Tensor], key: Tensor) -> Tensor:
        if len(weights) == 1:
            return key @ weights[0]
        z = key @ weights[0]
        z = (0.5 * z * (1 + torch.erf(z / math.sqrt(2)))) @ weights[1]
        return key + (z - z.mean()) / torch.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)

    def sign(e: Tensor) -> Tensor:
        return torch.sign(e) if mixer.sharpness is None else torch.tanh(mixer.sharpness * e)

    def gradients(weights: list[Tensor], key: Tensor, value: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
        given = ask(weights, key)
        e = given - value
        length = torch.sqrt((e * e).sum())
        if mixer.loss == "lp":
            size = torch.abs(e) if mixer.sharpness is None else torch.sqrt(e * e + 1e-6)
            return torch.autograd.grad(given, weights, mixer.p * sign(e) * size ** (mixer.p - 1), create_graph=True)
        if mixer.loss == "yaad":
            assert delta is not None
            return torch.autograd.grad(given, weights, e if length <= delta else delta * sign(e), create_graph=True)
        loss = -(given * value).sum() if mixer.loss == "dot" else 0.5 * length**2
        if mixer.loss.startswith("huber"):
            assert delta is not None
            sizes = length[None] if mixer.loss == "huber_norm" else torch.abs(e)
            loss = torch.stack([0.5 * s**2 if s <= delta else delta * (s - 0.5 * delta) for s in sizes]).sum()
        return torch.autograd.grad(loss, weights, create_graph=True)

    def rates(part: Any, t: int) -> list[list[Tensor]]:
        """Of each head, of each layer."""
        found = torch.sigmoid(part(x[t])).split([h * o for o in mixer.outputs])
        return [[layer.view(h, -1)[head] for layer in found] for head in range(h)]

    held = [[w[head] for w in mixer.start] for head in range(h)]
    if mixer.retention == "softmax":
        held = [[torch.log(torch.softmax(a, 0)) for a in own] for own in held]

    def shown(a: Tensor) -> Tensor:
        if mixer.retention == "q_norm":
            return a / (torch.abs(a) ** mixer.norm_power).sum().add(1e-6) ** ((mixer.norm_power - 2) / mixer.norm_power)
        if mixer.retention == "softmax":
            return mixer.mass * torch.exp(a)
        if mixer.retention == "elastic":
            return torch.sign(a) * torch.clamp(torch.abs(a) - mixer.threshold, min=0)
        return a

    rows, before = [], held
    for t in range(n):
        if t % mixer.chunk == 0:
            before = held
        q, k, v = (near(name, t) for name in "qkv")
        eta, alpha = rates(mixer.eta, t), rates(mixer.alpha, t)
        delta = None if mixer.delta is None else torch.log(1 + torch.exp(mixer.delta(x[t])))
        read, after = [], []
        for head in range(h):
            own = slice(head * d, head * d + d)
            weights = [shown(a) for a in before[head]]
            slopes = gradients(weights, unit(k[own]), v[own], None if delta is None else delta[head])
            if mixer.clip is not None:
                slopes = tuple(u * torch.clamp(mixer.clip / u.norm(), max=1.0) for u in slopes)
            new = [a * old - mixer.rate * e * u for a, old, e, u in zip(alpha[head], held[head], eta[head], slopes, strict=True)]
            if mixer.retention == "softmax":
                new = [torch.log(torch.softmax(a, 0)) for a in new]
            after.append(new)
            read.append(ask([shown(a) for a in new], unit(q[own])))
        held = after
        memory = torch.cat(read)
        memory = memory / torch.sqrt((memory * memory).mean() + 1e-6) * mixer.norm.weight
        gate = mixer.gate.weight @ x[t]
        rows.append(mixer.out.weight @ (memory * gate / (1 + torch.exp(-gate))))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Miras]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Miras(width, heads, **PRESETS["moneta"], chunk=4, rank=3, expand=2, clip=1.0),
        Miras(width, heads // 2, **PRESETS["yaad"], chunk=5, channels=False, expand=1, taps=2, rate=0.02, clip=1.0),
        Miras(width, heads, **PRESETS["memora"], chunk=4, rank=3, expand=2, mass=2.0, clip=2.0),
        Miras(width, heads, memory="linear", loss="huber", retention="elastic", chunk=3, rank=2, threshold=0.1, taps=0),
        Miras(width, heads, memory="linear", loss="huber_norm", chunk=4, rank=2, rate=0.5),
        Miras(width, heads, memory="linear", loss="dot", chunk=4, channels=False),
        Miras(width, heads, memory="linear", loss="lp", sharpness=None, channels=False, chunk=4, clip=1.0),
    ]
    for mixer in made:
        rates = [_last(part).bias for part in (mixer.alpha, mixer.eta)]
        shake([mixer.norm.weight, *rates], seed=2)
        with torch.no_grad():
            rates[0].sub_(4.0)
            rates[1].add_(3.0)
            if mixer.loss == "yaad":  # so that errors are of both kinds
                mixer.delta.bias.fill_(4.2)  # type: ignore[union-attr]
    return made


def sized(heads: int, size: int, tokens: int, preset: str = "moneta", **options: Any) -> Miras:
    """The paper's: a two-layer memory four times as wide, chunks of 16, and one of its presets: moneta, yaad or memora."""
    if preset not in PRESETS:
        raise ShapeError(f"preset {preset!r} must be one of {', '.join(PRESETS)}")
    return Miras(heads * size, heads, **{**PRESETS[preset], **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32, dtype=torch.float64)

    def linear(seed: int = 0, **options: Any) -> Miras:
        torch.manual_seed(seed)
        made = Miras(32, 4, memory="linear", **{"channels": False, "chunk": 1, **options}).double()
        for part in (made.alpha, made.eta):
            nn.init.zeros_(_last(part).bias)
        return made

    def keeping(mixer: Miras) -> Miras:
        nn.init.zeros_(_last(mixer.alpha).weight)
        nn.init.constant_(_last(mixer.alpha).bias, 100.0)
        return mixer

    def parts(mixer: Miras) -> Any:
        return mixer.parts(mixer.packed(x, begin_causal(MemoryCache(), x, (Causal(),), None)))

    def apart(one: Miras, other: Miras) -> float:
        return largest(one.read(x, Causal()) - other.read(x, Causal()))

    with torch.no_grad():
        mixer = keeping(linear())
        (q, k, v), (eta,), _, _ = parts(mixer)
        start, eta = mixer.start[0].expand(2, -1, -1, -1), eta[..., 0]
        found = recur(q, k, v, write=eta, erase=eta, state=start).out
        yield "linear, l2, alpha of 1: the delta rule", largest(mixer.read(x, Causal()) - found)
        mixer = linear()
        (q, k, v), (eta,), (logs,), _ = parts(mixer)
        eta, logs = eta[..., 0], logs[..., 0]
        found = recur(q, k, v, decay=logs, write=eta, erase=eta / logs.exp(), state=start).out
        yield "linear, l2: what is erased has not decayed, unlike Gated DeltaNet", largest(mixer.read(x, Causal()) - found)
        for chunk in (1, 7):
            mixer = linear(loss="dot", chunk=chunk)
            found = recur(q, k, v, decay=logs, write=eta, state=start).out
            yield f"linear, dot, chunks of {chunk}: decayed linear attention", largest(mixer.read(x, Causal()) - found)
        for form, bias in (("huber", 1e6), ("huber_norm", 1e6), ("yaad", 1e6), ("huber", -20.0)):
            huber = linear(loss=form, chunk=5)
            nn.init.constant_(huber.delta.bias, bias)  # type: ignore[union-attr, arg-type]
            if bias > 0:
                yield f"{form} far from delta: l2", apart(huber, linear(chunk=5))
                continue
            (q, k, v), (eta,), (logs,), delta = parts(huber)
            errors = (k[:, :, :5] @ start - v[:, :, :5]).sign() * delta[:, :, :5]
            wanted = recur(q[:, :, :5], k[:, :, :5], -errors, decay=logs[:, :, :5, 0], write=eta[:, :, :5, 0], state=start).out
            yield "huber of a small delta: delta times l1", largest(huber.read(x[:, :5], Causal()) - wanted)
        half = linear(loss="lp", p=2.0, sharpness=None, rate=0.5, chunk=5)
        yield "p of 2, half the rate: l2", apart(half, linear(chunk=5))
        yield "q of 2: decay alone", apart(linear(retention="q_norm", q=2.0, chunk=5), linear(chunk=5))
        yield "no threshold: decay alone", apart(linear(retention="elastic", threshold=0.0, chunk=5), linear(chunk=5))
        still = keeping(linear(retention="softmax", rate=0.0, chunk=5, mass=3.0))
        q = parts(still)[0][0]
        yield (
            "softmax that learns nothing and keeps all: as it began",
            largest(still.read(x, Causal()) - 3.0 * q @ still.start[0].softmax(1)),
        )
        mixer = linear(retention="softmax", channels=True, rank=4)
        cache = mixer.new_cache()
        mixer.read(x[:, :1], Causal(), cache=cache)
        (_, k, v), (eta,), (logs,), _ = parts(mixer)
        eta, keep = (t[:, :, 0, None] for t in (eta, logs.exp()))
        old, new = mixer.start[0].log_softmax(1), cache.held[""][0]
        slope = k[:, :, 0, :, None] * (k[:, :, :1] @ old.exp() - v[:, :, :1])
        flat = slope + keep / eta * (new - old) + (1 - keep) / eta * new  # of loss, KL divergence and entropy
        yield "softmax: the step is the minimum over weights that sum to one", largest(flat - flat.mean(-2, keepdim=True))
        yield "and they do", largest(new.exp().sum(-2) - 1)
