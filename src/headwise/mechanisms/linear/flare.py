"""FLARE: learned latents read all tokens by softmax, and tokens read the latents by the same scores."""

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
from .._caches import Cache
from .._mixer import Real, Tokens, largest, shake
from .._norms import layer_norm
from .._states import Pass, Reading, StateCache, StateMixer, begin
from ._carried import CarryCache
from ._prefix import prefix_softmax
from ._through import read_through

CARD = Card(
    paper="FLARE: Fast Low-rank Attention Routing Engine",
    year=2025,
    room="linear",
    source=(
        "arXiv:2508.12594 and vpuri3/FLARE.py, pdebench/models/flare.py: keys and values by residual networks of tanh-GELU layers "
        "(3 between the first and the last, as wide as the tokens), 32 latents a head, normal with deviation 0.1, scale 1 in "
        "both reads, maps normal with 0.02 and biases of 0, LayerNorms of latents and keys only if asked. The causal form is the "
        "authors' blog's, not the paper's: each latent reads what came so far. Padding is left out of the first read only. "
        "Networks of other widths, SiLU and RMS norms are left out"
    ),
)


def _small(linear: nn.Linear) -> nn.Linear:
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class Deep(nn.Module):
    """x + act(W x), `layers` more of them, and x + W x; for -1 layers just the last."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList([_small(nn.Linear(width, width)) for _ in range(layers + 2)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        *inner, last = self.maps
        for each in inner:
            x = x + F.gelu(each(x), approximate="tanh")
        mapped: Tensor = x + last(x)
        return mapped


class Flare(StateMixer):
    """y_t = sum_m softmax_m(k_t . l_m) z_m, z_m = sum_s softmax_s(k_s . l_m) v_s: over all tokens, or over those up to t.

    Args:
        heads: of width / heads. latents: l, of each head. layers: of the networks of keys and of values, -1 for linear maps.
        norm: whether latents and keys go through LayerNorms. scale: of scores.
    """

    def __init__(
        self, width: int, heads: int, latents: int = 32, *, layers: int = 3, norm: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        if latents < 1 or layers < -1:
            raise ShapeError(f"latents {latents} must be 1 or more, layers {layers} -1 or more")
        self.width, self.heads, self.scale = width, heads, scale
        self.latents = nn.Parameter(torch.randn(heads, latents, width // heads) * 0.1)
        self.keys, self.values = Deep(width, layers), Deep(width, layers)
        self.norms = nn.ModuleList([nn.LayerNorm(width // heads) for _ in range(2 if norm else 0)])
        self.out = _small(nn.Linear(width, width))

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        latents, k, v = self._parts(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = k.to(wide) @ latents.to(wide).mT * self.scale
        key, decay, _ = prefix_softmax(scores, now)
        return Reading(scores.softmax(-1), key, v, decay)

    def forward(self, x: Tokens, *stages: Stage, cache: StateCache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        return self.finish(self.read(x, *stages, cache=cache, attention_mask=attention_mask), x)

    def read(self, x: Tokens, *stages: Stage, cache: StateCache | None = None, attention_mask: Real | None = None) -> Tensor:
        """See `StateMixer.read`: of all tokens by two reads of softmax attention, else by a state."""
        if stages:
            return super().read(x, *stages, cache=cache, attention_mask=attention_mask)
        real = begin(self.new_cache(), x, stages, attention_mask).real
        latents, k, v = self._parts(x)
        return read_through(k, k, v, latents.expand(len(x), -1, -1, -1), real=real, scales=(self.scale, self.scale))

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(out.to(x.dtype).transpose(1, 2).flatten(2))
        return mapped

    def new_cache(self, owner: Cache | None = None) -> CarryCache:
        """An empty cache for decoding."""
        return CarryCache()

    def _parts(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (1, h, m, d), keys and values (b, h, n, d)."""
        k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.keys, self.values))
        latents: Tensor = self.latents[None]
        if len(self.norms):
            latents, k = (layer_norm(norm, t) for norm, t in zip(self.norms, (latents, k), strict=True))  # type: ignore[arg-type]
        return latents, k, v


def oracle(mixer: Flare, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), latent by latent."""
    d, rows = mixer.width // mixer.heads, []

    def deep(network: Deep, row: Tensor) -> Tensor:
        maps: list[Any] = list(network.maps)
        *inner, last = maps
        for each in inner:
            y = each.weight @ row + each.bias
            row = row + y / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        return row + last.weight @ row + last.bias

    def normed(which: int, row: Tensor) -> Tensor:
        if not len(mixer.norms):
            return row
        norm: Any = mixer.norms[which]
        middle = row - row.mean()
        return middle / torch.sqrt((middle * middle).mean() + 1e-5) * norm.weight + norm.bias

    keys, values = (torch.stack([deep(network, row) for row in x]) for network in (mixer.keys, mixer.values))
    for t in range(len(x)):
        seen, read = visible[t].nonzero().flatten().tolist(), []
        for head in range(mixer.heads):
            own = slice(head * d, (head + 1) * d)
            k = {s: normed(1, keys[s, own]) for s in {t, *seen}}
            latents = [normed(0, latent) for latent in mixer.latents[head]]
            shares = [torch.exp(mixer.scale * (k[t] @ latent)) for latent in latents]
            out = torch.zeros(d, dtype=x.dtype)
            for share, latent in zip(shares, latents, strict=True):
                e = {s: torch.exp(mixer.scale * (k[s] @ latent)) for s in seen}
                out = out + share / sum(shares) * sum(e[s] * values[s, own] for s in seen) / sum(e.values())
            read.append(out)
        rows.append(mixer.out.weight @ torch.cat(read) + mixer.out.bias)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Flare]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [Flare(width, heads, 5, layers=1), Flare(width, heads // 2, 3, layers=-1, norm=True, scale=0.7)]
    for mixer in made:
        shake([mixer.latents, *(p for p in mixer.parameters() if p.dim() == 1)], seed=2, by=0.4)
        shake([mixer.out.weight], seed=3)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Flare:
    """The code's: 32 latents a head, networks of 3 layers between the first and the last."""
    return Flare(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    mixer = Flare(32, 4, 6).double()
    usual = sized(4, 8, 40)
    yield "32 latents, 5 maps to keys and to values", float((usual.latents.shape[1], len(usual.keys.maps)) != (32, 5))
    yield "latents start with a deviation of 0.1", float(abs(float(usual.latents.std()) - 0.1) > 0.01)
    yield "maps with one of 0.02", float(abs(float(usual.out.weight.std()) - 0.02) > 0.002)
    shake([mixer.latents], seed=1, by=0.6)
    latents, k, v = mixer._parts(x)
    scores = latents @ k.mT
    both = scores.mT.softmax(-1) @ scores.softmax(-1)
    yield "one dense matrix", largest(mixer.read(x) - both @ v)
    yield "which a state implies, too", largest(mixer.weights(x) - both)
    yield "its rows sum to one", largest(both.sum(-1) - 1)
    yield "its rank is no more than the number of latents", largest(torch.linalg.svdvals(both)[..., 6:])
    root = scores.exp().sum(2).sqrt()
    even = both * root[..., None] / root[..., None, :]
    spectrum = torch.linalg.eigvalsh(even)
    yield "symmetric, but for what each token's scores sum to", largest(even - even.mT)
    yield "so its eigenvalues are real, and from 0", largest(spectrum.clamp(max=0.0))
    yield "to one", largest(spectrum[..., -1] - 1)
    causal = mixer.weights(x, Causal())
    yield "causal: rows sum to one", largest(causal.sum(-1) - 1)
    yield (
        "causal: what a later half reads of an earlier one has as low a rank",
        largest(torch.linalg.svdvals(causal[..., 20:, :20])[..., 6:]),
    )
    yield "causal: the last token reads what it reads of all", largest((mixer.read(x, Causal()) - mixer.read(x))[:, :, -1])
    one = Flare(32, 4, 1).double().read(x)
    yield "one latent: all tokens read the same", largest(one - one[:, :, :1])
    mixer.latents.zero_()
    yield "latents of zero: the mean of values", largest(mixer.read(x) - v.mean(2, keepdim=True))
