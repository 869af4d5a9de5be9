"""Attention free transformer: each channel's values are averaged by its keys and position biases; queries gate what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache, KeyValues
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._states import Pass, begin
from ._carried import CarryCache, carried_of
from ._pooling import Pool, biased_pool, near_pool, running_pool, whole_pool

CARD = Card(
    paper="An Attention Free Transformer",
    year=2021,
    room="linear",
    source=(
        "arXiv:2105.14103, eq. 2-7; the authors' code is not public. Position biases are products u_t . v_s of learned vectors, "
        "normal with standard deviation 0.01 (the paper's 10^-2 may be a variance); far of a window they are 0, not -inf. Maps "
        "have no biases. conv: one key a head and token, kernels scale (w - mean) / std + shift (of all weights, not one less), "
        "scale and shift at first 0; over a grid as the paper, or along a line, centred or, with Causal, of tokens before, "
        "which is our own. Public ports multiply keys by biases or overflow, and were not followed"
    ),
)
VARIANTS = ("full", "simple", "local", "conv")


class Aft(Mixer):
    """sigmoid(q_t) * sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts), for each channel.

    Args:
        variant: "full", any w; "simple", none; "local", w within a window; "conv", w_ts by the offset s - t, for each of `heads`,
            which share a key. tokens: the longest text of full and local. rank: of w. window: w is 0 from that distance on.
        taps: of a kernel, odd. grid: (rows, columns) of the tokens of conv, read both ways; None for a line of tokens.
    """

    def __init__(
        self,
        width: int,
        variant: str = "local",
        *,
        tokens: int | None = None,
        rank: int = 64,
        window: int = 32,
        heads: int | None = None,
        taps: int = 15,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ShapeError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
        if variant in ("full", "local") and tokens is None:
            raise ShapeError(f"AFT-{variant} has biases of places; give tokens, the longest text")
        if heads is not None and (variant != "conv" or width % heads):
            raise ShapeError(f"heads are of AFT-conv, and divide the width; got {heads} for {variant} and width {width}")
        if window < 1 or taps < 3 or not taps % 2:
            raise ShapeError(f"window {window} must be 1 or more, taps {taps} odd and 3 or more")
        if grid is not None and variant != "conv":
            raise ShapeError(f"a grid is of AFT-conv, not of {variant}")
        self.width, self.variant, self.tokens, self.window, self.taps, self.grid = width, variant, tokens, window, taps, grid
        self.heads = width if heads is None else heads
        self.gate, self.keys, self.values = (nn.Linear(width, size, bias=False) for size in (width, self.heads, width))
        self.out = nn.Linear(width, width, bias=False)
        self.bounded = variant != "full"
        if tokens is not None and variant in ("full", "local"):
            self.places_q, self.places_k = (nn.Parameter(torch.randn(tokens, rank) * 0.01) for _ in range(2))
        if variant == "conv":
            self.kernel = nn.Parameter(torch.randn(self.heads, *([taps] if grid is None else [taps, taps])) * 0.01)
            self.scale, self.shift = (nn.Parameter(torch.zeros(self.heads)) for _ in range(2))
        if grid is not None:
            self.cannot = dict.fromkeys(("causal", "padding", "decode"), "a grid is read as a whole")

    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        cache = self.new_cache() if cache is None else cache
        wide = torch.promote_types(x.dtype, torch.float32)
        k, v = self.keys(x).to(wide), self.values(x).to(wide).unflatten(-1, (self.heads, -1))
        if isinstance(cache, KeyValues):
            mean = self._full(k, v, any(isinstance(stage, Causal) for stage in stages), stages, cache, attention_mask)
        else:
            now = begin(cache, x, stages, attention_mask)
            if now.ids is not None and not (now.causal and self.variant == "simple"):
                raise ShapeError("packed documents can be read by AFT-simple with Causal() only: the others have biases of places")
            if self.grid is not None:
                mean = self._of_grid(k, v, now)
            else:
                mean = self._simple(k, v, now) if self.variant == "simple" else self._windowed(k, v, now)
        mixed: Tensor = self.out((torch.sigmoid(self.gate(x).to(wide)) * mean.flatten(2)).to(x.dtype))
        return mixed

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """An empty cache for decoding: keys and values for "full", else sums, and the tokens of the window."""
        return KeyValues() if self.variant == "full" else CarryCache()

    def offsets(self) -> Tensor:
        """Biases of a kernel, (heads, taps) or (heads, taps, taps)."""
        w = self.kernel.flatten(1)
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        normed = (wide - wide.mean(1, keepdim=True)) / wide.std(1, correction=0, keepdim=True)
        return (self.scale[:, None] * normed + self.shift[:, None]).view_as(self.kernel)

    def _simple(self, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        if not now.causal:
            return whole_pool(k, v, now.real).mean
        cache = carried_of(now)
        z = cache.carried.get("log sum")
        pool, cache.carried["log sum"], cache.state = running_pool(k, v, now.real, now.starts, z, cache.state)
        return pool.mean

    def _full(self, k: Tensor, v: Tensor, causal: bool, stages: tuple[Stage, ...], cache: KeyValues, mask: Real | None) -> Tensor:
        if any(not isinstance(stage, Causal) for stage in stages):
            raise ShapeError(f"AFT-full can obey Causal() only; got {', '.join(map(repr, stages))}")
        seen = cache.extend(k[:, None], k[:, None], v.flatten(2)[:, None], mask)
        m, n = seen.k.shape[2], k.shape[1]
        at = torch.arange(m, device=k.device)[None] if seen.key_positions is None else seen.key_positions
        own = at[:, m - n :] if seen.query_positions is None else seen.query_positions
        places = self._known(at)
        u, keys = self.places_q[self._known(own)].to(k.dtype), self.places_k[places].to(k.dtype)
        real = (at >= 0).expand(len(k), -1)
        return biased_pool(seen.k[:, 0], seen.v[:, 0].unflatten(-1, (self.heads, -1)), real, u, keys, causal).mean

    def _known(self, places: Tensor) -> Tensor:
        """Places for which there are biases; those of padding are not read."""
        if self.tokens is not None and places.numel() and int(places.max()) >= self.tokens:
            raise ShapeError(f"a text of {int(places.max()) + 1} tokens or more, and biases of places are for {self.tokens}")
        return places.clamp(min=0)

    def _windowed(self, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        """Near tokens by pairs, those before and behind them by running sums."""
        if self.variant == "local":
            self._known(now.places)
            first, last = 1 - self.window, 0 if now.causal else self.window - 1
        else:
            first, last = (1 - self.taps, 0) if now.causal else (-(self.taps // 2), self.taps // 2)
        back, h = 1 - first, self.heads
        there = torch.ones_like(k[..., :1]) if now.real is None else now.real[..., None].to(k.dtype)
        cache = carried_of(now)
        count = now.count[:1] if cache.counted is None else now.count  # where nothing was padding, all rows are alike

        def f(rows: Tensor) -> Tensor:
            n = rows.shape[1] - back
            if not now.causal:
                rows = F.pad(rows, (0, 0, 0, last + 1))
            real, keys, values = rows[..., 0] > 0, rows[..., 1 : h + 1], rows[..., h + 1 :].unflatten(-1, (h, -1))
            own = real[:, back : back + n]
            w = self._of_window(count, n, first, last) if self.variant == "local" else self.offsets().to(k.dtype)
            part = slice(1, 1 + n + last - first)
            pool = near_pool(keys[:, part], values[:, part], real[:, part], w.expand(len(k), n, h, -1))
            far, z, state = running_pool(
                keys[:, :n], values[:, :n], real[:, :n] & own, None, cache.carried.get("log sum"), cache.state
            )
            pool = pool.joined(far)
            if now.causal:
                cache.carried["log sum"], cache.state = z, state
                return pool.mean
            behind, *_ = running_pool(*(t[:, back + last + 1 :].flip(1) for t in (keys, values, real)))
            return pool.joined(Pool(*(t.flip(1) for t in behind))).mean

        return now.kept("rows", back, torch.cat([there, k, v.flatten(2)], -1), f)

    def _of_window(self, count: Tensor, n: int, first: int, last: int) -> Tensor:
        """Biases (b, n, 1, near) of the tokens from count on, for offsets first, ..., last of keys."""
        last_place = len(self.places_q) - 1
        at = count[:, None] + torch.arange(first, n + last, device=count.device)
        u, keys = self.places_q[at[:, -first : n - first].clamp(max=last_place)], self.places_k[at.clamp(0, last_place)]
        return torch.stack([(u * keys[:, i : i + n]).sum(-1) for i in range(last - first + 1)], -1)[:, :, None]

    def _of_grid(self, k: Tensor, v: Tensor, now: Pass) -> Tensor:
        """All of exp(k), and a convolution with exp(w) - 1 of it."""
        assert self.grid is not None
        if now.causal or now.real is not None or k.shape[1] != self.grid[0] * self.grid[1]:
            raise ShapeError(f"a grid {self.grid} is read both ways and has no padding; got {k.shape[1]} tokens")
        share = (k - k.detach().amax(1, keepdim=True)).exp()[..., None]
        rows = torch.cat([share, share * v], -1).permute(0, 3, 2, 1)  # (b, 1 + g, h, n)
        kernel = self.offsets()[:, None].to(k.dtype).expm1()
        near = F.conv2d(rows.flatten(0, 1).unflatten(-1, self.grid), kernel, padding=self.taps // 2, groups=self.heads)
        total = (near.flatten(2).view_as(rows) + rows.sum(-1, keepdim=True)).permute(0, 3, 2, 1)
        return total[..., 1:] / total[..., :1]


def oracle(mixer: Aft, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every pair of tokens by itself, for each channel."""
    q, k, v = (x @ part.weight.T for part in (mixer.gate, mixer.keys, mixer.values))
    n, shared, rows = len(x), mixer.width // mixer.heads, []
    causal = not bool(visible[0, n - 1]) if n > 1 else True
    if mixer.variant == "conv":
        kernel: Tensor = mixer.kernel
        mean = kernel.mean(1, keepdim=True)
        deviation = torch.sqrt(((kernel - mean) ** 2).mean(1, keepdim=True))
        kernel = mixer.scale[:, None] * (kernel - mean) / deviation + mixer.shift[:, None]
    for t in range(n):
        seen, weights = [s for s in range(n) if visible[t, s]], []
        for s in seen:
            w = torch.zeros(mixer.heads, dtype=x.dtype)
            if mixer.variant == "full" or (mixer.variant == "local" and abs(t - s) < mixer.window):
                w = w + mixer.places_q[t] @ mixer.places_k[s]
            tap = s - t + (mixer.taps - 1 if causal else mixer.taps // 2)
            if mixer.variant == "conv" and 0 <= tap < mixer.taps:
                w = w + kernel[:, tap]
            weights.append(torch.exp(k[s] + w).repeat_interleave(shared))
        pooled = sum(weight * v[s] for weight, s in zip(weights, seen, strict=True)) / sum(weights)
        rows.append(mixer.out.weight @ (pooled / (1 + torch.exp(-q[t]))))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Aft]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Aft(width, "full", tokens=48, rank=5),
        Aft(width, "simple"),
        Aft(width, tokens=48, rank=5, window=4),
        Aft(width, "conv", heads=heads, taps=5),
    ]
    for mixer in made:
        shake([p for name, p in mixer.named_parameters() if "." not in name], seed=2, by=0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Aft:
    """The paper's for text: AFT-local, a window of 32."""
    return Aft(heads * size, **{"tokens": tokens, **options})


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x, n = torch.randn(2, 40, 16, dtype=torch.float64), 40
    full = Aft(16, "full", tokens=n, rank=3).double()
    shake([full.places_q, full.places_k], seed=1, by=0.7)
    full.keys.weight.mul_(300)  # exp of such keys is beyond all floating point numbers
    usual = sized(4, 16, 50)
    yield "for text: a window of 32, biases of rank 64", float((usual.variant, usual.window) != ("local", 32))
    yield "of deviation 0.01", max(0.0, abs(float(usual.places_k.std()) - 0.01) - 0.001)

    def twin(variant: str, **options: Any) -> Aft:
        made = Aft(16, variant, **options).double()
        made.load_state_dict(full.state_dict() if variant in ("full", "local") else {**made.state_dict(), **_maps(full)})
        return made

    def read(mixer: Aft, w: Tensor, *stages: Stage) -> Tensor:
        """Softmax attention with a head of one channel for each of the mixer's, biases added, and a gate."""
        bias = w.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf) if stages else w
        k, v = mixer.keys(x).mT[..., None], mixer.values(x).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(torch.ones_like(k), k, v, attn_mask=bias, scale=1.0)
        found: Tensor = mixer.out(mixer.gate(x).sigmoid() * out.transpose(1, 2).flatten(2))
        return found

    at = torch.arange(n)
    w, simple, local = full.places_q @ full.places_k.T, twin("simple"), twin("local", tokens=n, rank=3, window=4)
    near = (at[:, None] - at).abs() < 4
    line = Aft(16, "conv", heads=4, taps=5).double()
    grid = Aft(16, "conv", heads=4, taps=3, grid=(5, 8)).double()
    start = line(x)
    yield "conv starts as simple", largest(start - read(line, torch.zeros(n, n, dtype=torch.float64)))
    for each in (line, grid):
        shake([each.kernel, each.scale, each.shift], seed=3)
    for stages, way in (((), "both ways"), ((Causal(),), "causal")):
        yield f"{way}: full is softmax attention of heads of one channel", largest(full(x, *stages) - read(full, w, *stages))
        yield f"{way}: simple is that without biases", largest(simple(x, *stages) - read(full, 0 * w, *stages))
        yield f"{way}: local has biases of zero far away", largest(local(x, *stages) - read(full, w * near, *stages))
        whole = twin("local", tokens=n, rank=3, window=n)
        yield f"{way}: a window of all tokens is full", largest(whole(x, *stages) - full(x, *stages))
        band = _band(line.offsets(), at - at[:, None] + (4 if stages else 2))
        yield f"{way}: conv has biases of offsets", largest(line(x, *stages) - read(line, band, *stages))
        other = twin("full", tokens=n, rank=3)
        other.places_q[:, 0], other.places_k[:, 0] = torch.randn(n), 1.0
        plain = twin("full", tokens=n, rank=3)
        plain.places_q[:, 0], plain.places_k[:, 0] = 0.0, 1.0
        yield f"{way}: what is added to a row changes nothing", largest(other(x, *stages) - plain(x, *stages))
        flat = twin("simple")
        flat.keys.weight.zero_()
        means = flat.values(x).cumsum(1) / (at + 1)[:, None] if stages else flat.values(x).mean(1, keepdim=True)
        yield f"{way}: keys all alike: a mean", largest(flat(x, *stages) - flat.out(flat.gate(x).sigmoid() * means))
    rows, columns = (at // 8 - at[:, None] // 8 + 1), (at % 8 - at[:, None] % 8 + 1)
    inside = (rows >= 0) & (rows < 3) & (columns >= 0) & (columns < 3)
    flat_index = (rows.clamp(0, 2) * 3 + columns.clamp(0, 2)).where(inside, 9)
    yield "over a grid: biases of rows and columns", largest(grid(x) - read(grid, _band(grid.offsets().flatten(1), flat_index)))
    kernel = line.offsets()
    yield (
        "kernels have mean shift and deviation scale",
        largest(kernel.mean(1) - line.shift) + largest(kernel.std(1, correction=0) - line.scale.abs()),
    )


def _maps(mixer: Aft) -> dict[str, Tensor]:
    return {name: value for name, value in mixer.state_dict().items() if "." in name}


def _band(kernel: Tensor, index: Tensor) -> Tensor:
    """Kernels (h, taps) by the index of each pair (n, n), 0 beyond: (h, n, n)."""
    taps = kernel.shape[1]
    return F.pad(kernel, (0, 1))[:, index.where((index >= 0) & (index < taps), taps)]
