"""Titans: a memory network that learns from surprise with momentum and forgets, alone or together with attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur
from ...stages.causal import Causal
from ...stages.prefix import Prefix
from ...stages.window import Window
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Projections, Real, Tokens, largest, shake
from .._norms import Rms
from .._states import Pass
from ._memory import Held, Layer, MemoryCache, Network, begin_causal, clipped, in_blocks, spans, wide
from ._parts import ShortConvolutions, l2_normed

CARD = Card(
    paper="Titans: Learning to Memorize at Test Time",
    year=2024,
    room="linear",
    source=(
        "arXiv:2501.00663v1, sec. 3, 4 and app. C, and the later version, sec. 2, 3 and app. D to F, whose memory x + LN(MLP(x)) "
        "with GELU, chunk of 16, segment of 512, window of 2048, 128 persistent tokens and rates of each layer are used. "
        "The loss has no 1/2, as in the text, not as in app. F; forgetting is one number a head and layer, as in v1 (later one a "
        "channel). How rates are made of x is not said: sigmoids of linear maps, theta at most `rate`. Convolution, then SiLU. "
        "No code by the authors was found. Our own: heads; no weights in the memory's norm; MAG and MAC join as "
        "norm(y) * SiLU(norm(memory)), and a SiLU gate of x before the output map. MAC as written looks ahead inside a segment, "
        "so here a token reads the recalled tokens up to its own, one for each token of the segment, and the memory just after "
        "it has learned that token. MAL has no residual between memory and attention. Where rates begin, and `clip`, are our own, "
        "too. Decoding runs again what has begun of a chunk or, in MAC, of a segment"
    ),
)
VARIANTS = ("memory", "mag", "mal", "mac")


class Titans(Mixer):
    """A memory M with momentum S, read by M_t(q_t) after it has learned:

        S_t = eta_t S_(t-1) - theta_t grad |M(k_t) - v_t|^2
        M_t = (1 - alpha_t) M_(t-1) + S_t

    Args:
        heads: of width / heads, each with a memory of its own. variant: "memory" alone; "mag": times sliding-window attention;
            "mal": attention over what the memory gives; "mac": attention over segments and what the memory recalls for them, which
            is also what it learns.
        depth: layers of the memory. expand: their width inside. residual: x + layer norm of them. momentum: whether eta is not 0.
        chunk: tokens whose gradients are taken at the same weights; counted from the text's start.
        persistent: learned tokens before the text (mac: before each segment). window: of mag and mal. segment: of mac.
        taps: of the convolutions of queries, keys and values; 0 for none. rate: the largest theta.
        clip: the largest norm of one token's gradient of one layer's weights, None for any.
    """

    cannot = {"full": "its memory learns from tokens in their order"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        variant: str = "memory",
        depth: int = 2,
        expand: int = 4,
        residual: bool = True,
        momentum: bool = True,
        chunk: int = 16,
        persistent: int = 0,
        window: int = 2048,
        segment: int = 512,
        taps: int = 4,
        rate: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ShapeError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if chunk < 1 or window < 1 or persistent < 0:
            raise ShapeError(f"chunk {chunk} and window {window} must be 1 or more, persistent {persistent} 0 or more")
        if variant == "mac" and (segment < chunk or segment % chunk):
            raise ShapeError(f"a segment of {segment} tokens is no multiple of the memory's chunk of {chunk}")
        self.width, self.heads, self.size, self.variant = width, heads, width // heads, variant
        self.momentum, self.chunk, self.window, self.segment = momentum, chunk, window, segment
        self.rate, self.clip = rate, clip
        self.bounded, self.rotates = variant in ("memory", "mac"), variant != "memory"
        self.network = Network(self.size, depth, expand, residual)
        self.start = self.network.start(heads)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.convolutions = ShortConvolutions({"q": width, "k": width, "v": width}, taps)
        self.taps = max(taps, 1)
        self.theta, self.alpha = nn.Linear(width, heads * depth), nn.Linear(width, heads * depth)
        nn.init.constant_(self.theta.bias, -4.6)  # a hundredth
        nn.init.constant_(self.alpha.bias, -6.9)  # a thousandth: a norm after weights that shrink makes steps too large
        self.eta = nn.Linear(width, heads * depth) if momentum else None
        self.persistent = nn.Parameter(torch.randn(persistent, width) * width**-0.5) if persistent else None
        self.gate = nn.Linear(width, width, bias=False)
        self.norm = Rms(width)
        if variant != "memory":
            self.attention = Projections(width, heads)
        if variant in ("mag", "mac"):
            self.attention_norm = Rms(width)
        if variant != "mal":
            self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tokens, *stages: Stage, cache: MemoryCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        n = x.shape[1]
        cache, y = self.new_cache() if cache is None else cache, x
        if self.variant == "mac":
            now = begin_causal(cache, x, stages, attention_mask)
            found = in_blocks(wide(x), now, self.segment, self._first(x, tails=True), self._segment)
            y, memory = found.split(self.width, -1)
        else:
            x, now = self._after_persistent(x, stages, cache, attention_mask)
            memory = in_blocks(self._packed(x, self._along(x, now)), now, self.chunk, self._first(x), self._chunk)
            if self.variant == "mag":
                y = self._attended(x, now)
        gate, memory = F.silu(wide(self.gate(x))), self.norm(memory)
        if self.variant == "mal":
            return self._attended((gate * memory).to(x.dtype), now)[:, -n:]
        mixed = memory if self.variant == "memory" else self.attention_norm(y) * F.silu(memory)
        out: Tensor = self.out((gate * mixed).to(x.dtype)[:, -n:])
        return out

    def read(self, x: Tokens, *stages: Stage) -> Float[Tensor, "b h n d"]:
        """What the memory gives each token, before norms, gates and attention; without persistent tokens or segments."""
        now = begin_causal(MemoryCache(), x, stages, None)
        memory = in_blocks(self._packed(x, self._along(x, now)), now, self.chunk, self._first(x), self._chunk)
        return memory.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def new_cache(self, owner: Cache | None = None) -> MemoryCache:
        """An empty cache for decoding."""
        count = 0 if self.persistent is None else len(self.persistent)
        if self.variant == "mag":
            return MemoryCache(count, KeyValues(first=count, last=self.window))
        if self.variant == "mal":
            return MemoryCache(count, KeyValues(last=self.window))
        return MemoryCache(0 if self.variant == "mac" else count)

    def _after_persistent(
        self, x: Tokens, stages: tuple[Stage, ...], cache: MemoryCache, attention_mask: Real | None
    ) -> tuple[Tokens, Pass]:
        """x behind the persistent tokens, if the text begins here."""
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ShapeError(f"attention_mask is {tuple(attention_mask.shape)}, the new tokens are {tuple(x.shape[:2])}")
        if self.persistent is not None and cache.total == 0:
            ahead = self.persistent.expand(len(x), -1, -1)
            x = torch.cat([ahead.to(x.dtype), x], 1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(ahead.shape[:2]), attention_mask], 1)
        return x, begin_causal(cache, x, stages, attention_mask)

    def _attended(self, x: Tokens, now: Pass) -> Tokens:
        """Sliding-window attention; mag's also reads the persistent tokens."""
        cache = now.cache
        assert isinstance(cache, MemoryCache)
        assert isinstance(cache.attention, KeyValues)
        seen = cache.attention.extend(*self.attention.split(x), now.real, self.rotary)
        shown = Window(self.window) | Prefix(cache.ahead) if self.variant == "mag" and cache.ahead else Window(self.window)
        return self.attention.merge(attend(seen.q, seen.k, seen.v, Causal(), shown, **seen.places))

    def _first(self, x: Tokens, tails: bool = False) -> Held:
        """What is held before the first token: weights, their momentum, and of mac the rows before x and y."""
        weights = [wide(w).expand(len(x), -1, -1, -1) for w in self.start]
        momenta = [torch.zeros_like(w) for w in weights] if self.momentum else []
        rows = [wide(x).new_zeros(len(x), self.taps - 1, self.width)] * 2 if tails else []
        return (*weights, *momenta, *rows)

    def _along(self, x: Tokens, now: Pass) -> Callable[[str], Tensor]:
        return lambda name: self.convolutions(name, wide(getattr(self, name)(x)), now)

    def _behind(self, tail: Tensor, x: Tokens) -> Callable[[str], Tensor]:
        """The same for x behind the rows before it, without a cache."""
        both, n = torch.cat([tail, x], 1), x.shape[1]

        def near(name: str) -> Tensor:
            rows = _mapped(getattr(self, name), both)
            weight = self.convolutions.weights[name] if name in self.convolutions.weights else rows.new_ones(self.width, 1)
            return torch.stack([rows[:, a : a + n] * weight[:, a] for a in range(self.taps)]).sum(0)

        return near

    def _heads(self, x: Tokens) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _packed(self, x: Tokens, near: Callable[[str], Tensor]) -> Float[Tensor, "b n c"]:
        """All that the memory needs of each token: queries, keys, values, theta, log(1 - alpha), log eta."""
        q, k, v = (F.silu(near(name)).unflatten(-1, (self.heads, -1)) for name in "qkv")
        theta, keep = self.rate * wide(_mapped(self.theta, x)).sigmoid(), F.logsigmoid(-wide(_mapped(self.alpha, x)))
        last = [] if self.eta is None else [F.logsigmoid(wide(_mapped(self.eta, x)))]
        return torch.cat([l2_normed(q).flatten(2), l2_normed(k).flatten(2), v.flatten(2), theta, keep, *last], -1)

    def _chunk(self, rows: Tensor, held: Held) -> tuple[Tensor, Callable[[], Held]]:
        """One chunk: what its tokens read, and how to get weights and momenta after it."""
        depth = self.network.depth
        q, k, v = (self._heads(t) for t in rows[..., : 3 * self.width].split(self.width, -1))
        rates = rows[..., 3 * self.width :].unflatten(-1, (-1, self.heads, depth)).permute(2, 4, 0, 3, 1)[..., None]
        theta, keep = rates[0], rates[1]  # (depth, b, h, n, 1)
        layers, momenta = [], []
        for number, (a, g) in enumerate(self.network.signals(held[:depth], k, lambda found: 2 * (found - v))):
            g = g if self.clip is None else clipped(a, g, self.clip)
            kept, past, steps = keep[number].cumsum(2).exp(), spans(keep[number]), theta[number][:, :, None]
            if self.eta is None:
                layers.append(Layer(held[number], a, g, kept, past * steps))
                continue
            momentum, eta = held[depth + number], rates[2][number]
            decayed, all_of_it = spans(eta), eta.cumsum(2).exp()
            summed = (past[..., 0] @ decayed[..., 0])[..., None]
            carried = past[..., 0] @ all_of_it
            layers.append(Layer(held[number], a, g, kept, summed * steps, momentum, carried))
            momenta.append(Layer(momentum, a, g, all_of_it, decayed * steps))
        out = self.network.run(q, [layer.times for layer in layers]).transpose(1, 2).flatten(2)
        return out, lambda: tuple(layer.last() for layer in (*layers, *momenta))

    def _segment(self, x: Tensor, held: Held) -> tuple[Tensor, Callable[[], Held]]:
        """One segment of mac, in float32 at least: (b, r, 2 width), what attention gives and what the memory then gives for it."""
        memory, tail, y_tail, n = held[:-2], held[-2], held[-1], x.shape[1]
        q = l2_normed(self._heads(F.silu(self._behind(tail, x)("q"))))
        recalled = self.network.run(q, [lambda z, w=w: z @ w for w in memory[: self.network.depth]])  # type: ignore[misc]
        ahead = x[:, :0] if self.persistent is None else self.persistent.to(x.dtype).expand(len(x), -1, -1)
        rows = torch.cat([ahead, recalled.transpose(1, 2).flatten(2), x], 1)
        q, k, v = (self._heads(_mapped(part, rows)) for part in (self.attention.q, self.attention.k, self.attention.v))
        q, at, first = q[:, :, -n:], torch.arange(n, device=x.device), ahead.shape[1]
        if self.rotary is not None:
            places = torch.cat([torch.arange(first, device=x.device), first + at, first + self.segment + at])
            q, k = self.rotary(q, places[-n:]), self.rotary(k, places)
        keys = torch.cat([at.new_zeros(first), at, at])  # a recalled token is read from its own token on
        y = attend(q, k, v, Causal(), query_positions=at, key_positions=keys)
        y = _mapped(self.attention.out, y.transpose(1, 2).flatten(2))
        outs = []
        for part in self._packed(y, self._behind(y_tail, y)).split(self.chunk, 1):
            out, after = self._chunk(part, memory)
            outs.append(out)
            memory = after() if part.shape[1] == self.chunk else memory
        tails = [torch.cat([old, new], 1)[:, n:] for old, new in ((tail, x), (y_tail, y))]
        return torch.cat([y, torch.cat(outs, 1)], -1), lambda: (*memory, *tails)


def _mapped(part: nn.Linear, x: Tensor) -> Tensor:
    """The linear map in x's dtype."""
    return F.linear(x, part.weight.to(x.dtype), None if part.bias is None else part.bias.to(x.dtype))


class _Slow:
    """The memory of one head, a token at a time, its gradients by automatic differentiation."""

    def __init__(self, mixer: Titans, head: int) -> None:
        self.mixer, self.count = mixer, 0
        self.weights = [w[head] for w in mixer.start]
        self.momenta = [torch.zeros_like(w) for w in self.weights]
        self.before = self.weights

    def ask(self, weights: list[Tensor], x: Tensor) -> Tensor:
        z = x
        for number, weight in enumerate(weights):
            z = (0.5 * z * (1 + torch.erf(z / 2**0.5)) if number else z) @ weight
        if not self.mixer.network.residual:
            return z
        return x + (z - z.mean()) / torch.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)

    def learn(self, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor) -> None:
        if self.count % self.mixer.chunk == 0:
            self.before = self.weights
        weights = [w + 0.0 for w in self.before]  # of their own: k and v may come from the same ones
        slopes = torch.autograd.grad(((self.ask(weights, k) - v) ** 2).sum(), weights, create_graph=True)
        if self.mixer.clip is not None:
            slopes = tuple(u * torch.clamp(self.mixer.clip / u.norm(), max=1.0) for u in slopes)
        self.momenta = [e * s - t * u for e, s, t, u in zip(eta, self.momenta, theta, slopes, strict=True)]
        self.weights = [(1 - a) * w + s for a, w, s in zip(alpha, self.weights, self.momenta, strict=True)]
        self.count += 1


def oracle(mixer: Titans, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    h, d, depth, first = mixer.heads, mixer.size, mixer.network.depth, 0
    ahead = x[:0] if mixer.persistent is None else mixer.persistent
    if mixer.variant != "mac":
        x, first = torch.cat([ahead, x]), len(ahead)
    memories = [_Slow(mixer, head) for head in range(h)]

    def sigmoid(z: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-z))

    def normed(row: Tensor, weight: Tensor) -> Tensor:
        return row / torch.sqrt((row * row).mean() + 1e-6) * weight

    def near(name: str, rows: list[Tensor], t: int) -> Tensor:
        weight, out = getattr(mixer, name).weight, 0.0 * rows[0]
        taps = mixer.convolutions.weights[name] if name in mixer.convolutions.weights else torch.ones_like(x[:1].T)
        for back in range(min(taps.shape[1], t + 1)):
            out = out + taps[:, -1 - back] * (weight @ rows[t - back])
        return out * sigmoid(out)

    def unit(row: Tensor) -> Tensor:
        return row / torch.sqrt((row * row).sum() + 1e-6)

    def remember(rows: list[Tensor], t: int) -> Tensor:
        """Learns the row at t, and reads it."""
        q, k, v = (near(name, rows, t) for name in "qkv")
        theta, alpha = mixer.rate * sigmoid(mixer.theta(rows[t])), sigmoid(mixer.alpha(rows[t]))
        eta = torch.zeros_like(alpha) if mixer.eta is None else sigmoid(mixer.eta(rows[t]))
        read = []
        for head, memory in enumerate(memories):
            own, rates = slice(head * d, head * d + d), slice(head * depth, head * depth + depth)
            memory.learn(unit(k[own]), v[own], theta[rates], alpha[rates], eta[rates])
            read.append(memory.ask(memory.weights, unit(q[own])))
        return torch.cat(read)

    def attention(row: Tensor, keys: list[Tensor]) -> Tensor:
        q = mixer.attention.q.weight @ row
        k, v = (torch.stack([part.weight @ key for key in keys]) for part in (mixer.attention.k, mixer.attention.v))
        read = []
        for head in range(h):
            own = slice(head * d, head * d + d)
            read.append(torch.softmax(k[:, own] @ q[own] / d**0.5, 0) @ v[:, own])
        return mixer.attention.out.weight @ torch.cat(read)

    outs: list[Tensor] = []
    rows, made, past = list(x), [], []  # type: ignore[var-annotated]
    for t in range(len(x)):
        gate = mixer.gate.weight @ x[t]
        gate = gate * sigmoid(gate)
        if mixer.variant == "mac":
            begins = t // mixer.segment * mixer.segment
            if t == begins:
                past, recalled = [memory.weights for memory in memories], []
            query = near("q", rows, t)
            asked = (
                memory.ask(w, unit(query[i * d : i * d + d])) for i, (memory, w) in enumerate(zip(memories, past, strict=True))
            )
            recalled.append(torch.cat(list(asked)))
            made.append(attention(x[t], [*ahead, *recalled, *x[begins : t + 1]]))
            found = normed(remember(made, t), mixer.norm.weight)
        else:
            found = normed(remember(rows, t), mixer.norm.weight)
            made.append(gate * found if mixer.variant == "mal" else x[t])
        if mixer.variant == "mal":
            outs.append(attention(made[t], made[max(0, t + 1 - mixer.window) :]))
            continue
        if mixer.variant == "mag":
            shown = [s for s in range(t + 1) if s < first or t - s < mixer.window]
            made[t] = attention(x[t], [x[s] for s in shown])
        if mixer.variant != "memory":
            found = normed(made[t], mixer.attention_norm.weight) * found * sigmoid(found)
        outs.append(mixer.out.weight @ (gate * found))
    return torch.stack(outs[first:])


def examples(heads: int, size: int) -> list[Titans]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Titans(width, heads, chunk=4, persistent=2, expand=2, clip=3.0),
        Titans(
            width, heads // 2, variant="mag", depth=1, residual=False, momentum=False, chunk=5, persistent=3, window=6, rate=0.3
        ),
        Titans(width, heads, variant="mal", depth=1, chunk=3, persistent=2, window=7, taps=0),
        Titans(width, heads, variant="mac", expand=1, chunk=4, persistent=2, segment=8, taps=2, clip=1.0),
    ]
    for mixer in made:
        norms = [mixer.norm.weight] if mixer.variant in ("memory", "mal") else [mixer.norm.weight, mixer.attention_norm.weight]
        shake([*norms, mixer.theta.bias, mixer.alpha.bias], seed=2)
        with torch.no_grad():
            mixer.alpha.bias.add_(4.0)
            mixer.theta.bias.add_(2.0)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Titans:
    """The paper's: two layers four times as wide, chunks of 16; with attention, 128 persistent tokens."""
    alone = options.get("variant", "memory") == "memory"
    return Titans(heads * size, heads, **{"persistent": 0 if alone else 128, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32, dtype=torch.float64)

    def linear(**options: Any) -> Titans:
        return Titans(32, 4, depth=1, residual=False, **options).double()

    def parts(mixer: Titans) -> tuple[Tensor, ...]:
        packed = mixer._packed(x, mixer._along(x, begin_causal(MemoryCache(), x, (Causal(),), None)))
        q, k, v, rates = packed.split([32, 32, 32, packed.shape[-1] - 96], -1)
        return (*(mixer._heads(t) for t in (q, k, v)), *rates.mT.unflatten(1, (-1, 4)).unbind(1))

    with torch.no_grad():
        mixer = linear(chunk=1, momentum=False)
        q, k, v, theta, keep = parts(mixer)
        start = mixer.start[0].expand(2, -1, -1, -1)
        found = recur(q, k, v, decay=keep, write=2 * theta, erase=2 * theta / keep.exp(), state=start).out
        yield "linear, no momentum: the delta rule that erases before it decays", largest(mixer.read(x, Causal()) - found)
        mixer.alpha.weight.zero_()
        mixer.alpha.bias.fill_(-100.0)
        found = recur(q, k, v, write=2 * theta, erase=2 * theta, state=start).out
        yield "nor forgetting: the delta rule, beta of 2 theta", largest(mixer.read(x, Causal()) - found)
        mixer = linear(chunk=7, rate=0.0)
        q, k, v, theta, keep, stay = parts(mixer)
        found = keep.cumsum(2)[..., None].exp() * (q @ mixer.start[0])
        yield "theta of 0: it only forgets", largest(mixer.read(x, Causal()) - found)
        mixer = linear(chunk=20)
        mixer.alpha.weight.zero_()
        mixer.alpha.bias.fill_(100.0)
        q, k, v, theta, keep, stay = parts(mixer)
        errors = theta[..., None] * 2 * (k @ mixer.start[0] - v)
        found = recur(q, k, -errors, decay=stay).out
        yield (
            "alpha of 1: it holds the surprise alone, which is a decayed sum of gradients",
            largest(mixer.read(x, Causal()) - found),
        )
        mixer = Titans(32, 4, chunk=4, depth=2, persistent=2, variant="mag", window=100).double()
        mixer.norm.weight.zero_()
        yield "mag: a memory whose norm is 0 closes the gate", largest(mixer(x, Causal()))
        mixer = Titans(32, 4, chunk=4, variant="mac", persistent=2, segment=8).double()
        mixer.attention.v.weight.zero_()
        yield "mac: where attention gives 0, there is nothing to learn or give", largest(mixer(x, Causal()))
