"""TransNormer: linear attention with a norm in place of the denominator, and attention within blocks for the early layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens, largest, shake
from .._norms import rms_normed
from .._states import Pass, Reading, StateCache, StateMixer, begin
from ._diagonal import DiagAttention
from ._lightning import NormMaps
from ._parts import elu_plus_one

CARD = Card(
    paper="The Devil in Linear Transformer",
    year=2022,
    room="linear",
    source=(
        "arXiv:2210.10340, sec. 4, and OpenNLPLab/fairseq-evo, norm_linear_attention and norm_local_attention: the first half of "
        'the layers reads within blocks of 64 tokens ("diag"), others everything ("norm"). T1: signed ELU, ReLU of the scores '
        "within blocks and a norm; T2: 1 + ELU, softmax within blocks. LRPE is a fixed random reflection, then learned angles, "
        "the same for all heads. The norm has no weights and is over all heads together, x / sqrt(mean of squares + 1e-8); the "
        "code adds 1e-8 to the root. Masks come before the softmax, and a last block that is not full is read as it is: "
        "the code for the Long Range Arena masks after it, and lets padding of zeros share in it"
    ),
)
KINDS = ("T1", "T2")


class NormAttention(StateMixer):
    """Norm of sum_j phi(q_i) . phi(k_j) v_j: linear attention without denominator and scale."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.width, self.heads, self.kind = width, heads, kind
        self.maps = NormMaps(width, heads, 2**-0.5)

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = self.maps.split(x)
        q, k = (self.maps.lrpe(F.elu(t) if self.kind == "T1" else elu_plus_one(t), now.places) for t in (q, k))
        return Reading(q, k, v)

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        return self.maps.merge(out, x, normed=True)


class TransNormer(Mixer):
    """A layer of TransNormer.

    Args:
        heads: of width / heads, an even number. layer: "norm" (NormAttention) or "diag" (DiagAttention). kind: "T1" or "T2"; see
            `CARD`. block: tokens of a block of DiagAttention.
    """

    bounded = True

    def __init__(self, width: int, heads: int, layer: str = "norm", *, kind: str = "T2", block: int = 64) -> None:
        super().__init__()
        if layer not in ("norm", "diag"):
            raise ShapeError(f"layer {layer!r} must be norm or diag")
        if kind not in KINDS:
            raise ShapeError(f"kind {kind!r} must be one of {', '.join(KINDS)}")
        if width % heads or block < 1:
            raise ShapeError(f"width {width} must be a multiple of {heads} heads, and block {block} be 1 or more")
        self.width, self.heads, self.layer, self.kind, self.block = width, heads, layer, kind, block
        made = NormAttention(width, heads, kind) if layer == "norm" else DiagAttention(width, heads, kind, block)
        self.attention: NormAttention | DiagAttention = made

    def forward(self, x: Tokens, *stages: Stage, cache: Any = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        mixed: Tensor = self.attention(x, *stages, cache=cache, attention_mask=attention_mask)
        return mixed

    def new_cache(self, owner: Cache | None = None) -> StateCache:
        """An empty cache for decoding: a state, or the block that has begun."""
        return self.attention.new_cache()


def oracle(mixer: TransNormer, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every pair of tokens by itself."""
    maps, n, first = mixer.attention.maps, len(x), mixer.kind == "T1"
    size, norm, rows = mixer.width // mixer.heads, mixer.layer == "norm", []

    def turned(z: Tensor, place: int) -> Tensor:
        mirror = maps.lrpe.mirror / (maps.lrpe.mirror * maps.lrpe.mirror).sum().sqrt()
        z = z - 2 * (z * mirror).sum() * mirror
        found = []
        for c in range(size // 2):
            cos, sin = torch.cos(maps.lrpe.theta[c] * place), torch.sin(maps.lrpe.theta[c] * place)
            found += [z[2 * c] * cos - z[2 * c + 1] * sin, z[2 * c + 1] * cos + z[2 * c] * sin]
        return torch.stack(found)

    def features(z: Tensor) -> Tensor:
        return torch.where(z > 0, z, torch.exp(z) - 1) + (0 if first else 1) if norm else z

    q, k, v = (x @ f.weight.T + f.bias for f in (maps.q, maps.k, maps.v))
    for i in range(n):
        read = []
        for head in range(mixer.heads):
            own, seen = slice(head * size, (head + 1) * size), [j for j in range(n) if visible[i, j]]
            if not norm:
                seen = [j for j in seen if j // mixer.block == i // mixer.block]
            query = turned(features(q[i, own]), i)
            scores = torch.stack([(query * turned(features(k[j, own]), j)).sum() for j in seen])
            if not norm:
                scores = scores / size**0.5
                scores = torch.where(scores > 0, scores, 0.0) if first else torch.exp(scores) / torch.exp(scores).sum()
            read.append(scores @ v[seen, own])
        row = torch.cat(read)
        if norm or first:
            row = row / torch.sqrt((row * row).mean() + 1e-8)
        rows.append(maps.out.weight @ row + maps.out.bias)
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[TransNormer]:
    """Settings that the conformance checks run."""
    made = [
        TransNormer(heads * size, heads),
        TransNormer(heads * size, heads // 2, kind="T1"),
        TransNormer(heads * size, heads, "diag", block=6),
        TransNormer(heads * size, heads // 2, "diag", kind="T1", block=4),
    ]
    for mixer in made:
        shake([mixer.attention.maps.lrpe.theta], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> TransNormer:
    """The paper's second setting, a later layer: NormAttention with 1 + ELU; blocks of 64 in layers that are "diag"."""
    return TransNormer(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    other = x.clone()
    other[:, 3] += 1.0
    at = torch.arange(40)
    usual = TransNormer(32, 4)
    yield (
        "by default NormAttention of the second kind, blocks of 64",
        float((usual.layer, usual.kind, usual.block) != ("norm", "T2", 64)),
    )
    start = torch.tensor([10000 ** (-c / 4) for c in range(4)])
    yield "angles at first: 10000^(-2c / size)", float(largest(usual.attention.maps.lrpe.theta - start) > 1e-6)
    diag = TransNormer(32, 4, "diag", block=8).double()
    maps = diag.attention.maps
    with torch.no_grad():
        q, k, v = maps.split(x)
        same = at[:, None] // 8 == at // 8
        whole = F.scaled_dot_product_attention(maps.lrpe(q, at), maps.lrpe(k, at), v, attn_mask=same)
        yield (
            "DiagAttention: softmax attention with a mask of blocks",
            largest(diag(x) - maps.out(whole.transpose(1, 2).flatten(2))),
        )
        for kind in KINDS:
            near = TransNormer(32, 4, "diag", kind=kind, block=8).double()
            yield f"{kind}: a token changes nothing outside its block", largest((near(other) - near(x))[:, 8:])
            far = TransNormer(32, 4, kind=kind).double()
            assert isinstance(far.attention, NormAttention)
            given = far.attention.reading(x, begin(far.new_cache(), x, (), None))
            row = ((given.q @ given.k.mT) @ given.v).transpose(1, 2).flatten(2)
            row = row / (row.square().mean(-1, keepdim=True) + 1e-8).sqrt()
            yield f"{kind}: NormAttention in the order of softmax attention", largest(far(x) - far.attention.maps.out(row))
            for name, mixer in (("norm", far), *([("diag", near)] if kind == "T1" else [])):
                values = mixer.attention.maps.v
                sizes = []
                for _ in range(2):
                    values.weight.mul_(1e5)
                    values.bias.mul_(1e5)
                    sizes.append(mixer(x, Causal()))
                yield f"{kind}, {name}: values of another size change nothing", largest(sizes[1] - sizes[0])
    yield from _gradients()


def _gradients() -> Iterator[tuple[str, float]]:
    """The paper's case against denominators: their gradient grows without bound as scores become small, the norm's does not."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(12, dtype=torch.float64, generator=generator)
    values = torch.randn(12, 8, dtype=torch.float64, generator=generator)

    def slope(f: Any, at: Tensor) -> Tensor:
        found: Tensor = torch.autograd.functional.jacobian(f, at)
        return found

    def divided(s: Tensor) -> Tensor:
        return s / s.sum() @ values

    small = slope(divided, scores * 1e-9) * 1e-9
    yield (
        "scores a billion times smaller: a denominator's gradients a billion times larger",
        largest(small - slope(divided, scores)),
    )
    steepest = float(torch.linalg.matrix_norm(values, 2)) / 1e-8**0.5
    over = [
        float(torch.linalg.matrix_norm(slope(lambda s: rms_normed(s @ values, 1e-8), scores * by), 2)) for by in (1e-9, 1e-4, 1.0)
    ]
    yield "the norm's: never above those of the scores over the root of epsilon", max(0.0, max(over) - steepest)
