"""Gaussian adaptive attention: a gate for each feature of each token by how usual it is, without queries or keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._caches import Cache
from .._mixer import Mixer, Real, Tokens, largest

CARD = Card(
    paper="Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
    year=2024,
    room="softmax",
    source=(
        "arXiv:2401.11143, along time. `normalised`, as in the authors' code: unbiased variance, numbers for each head, weights "
        "that sum to one in a head's segment, here in the log domain, where the code divides by 1e-8 at the least. Otherwise, as "
        "in algorithm 1: biased variance, vectors, a variance in the place of c^2, nothing divides. The code counts padding as "
        "zeros and passes it through, here it is left out; for one token its variance is undefined, here zero; it refuses texts of "
        "fewer tokens than heads, here a head then has one token or none"
    ),
    status="the unnormalised form follows an account of the paper's algorithm 1",
)


class Gaam(Mixer):
    """Multiplies each feature by a Gaussian of it, about the mean of its segment of the text plus a learned offset.

    The text is cut into one segment for each head, the last one taking what is left over. It has no projections, and what it
    returns is x times the gate; a residual connection belongs around it.

    Args:
        heads: segments. gaussians: of each head, multiplied. normalised: whether a feature's gates sum to one over a segment.
    """

    READS = "means and variances are of the whole text"
    cannot = {"causal": READS, "decode": READS}

    def __init__(self, width: int, heads: int, *, gaussians: int = 1, normalised: bool = True) -> None:
        super().__init__()
        if heads < 1 or gaussians < 1:
            raise ShapeError(f"{heads} heads of {gaussians} Gaussians; there must be at least one of each")
        self.width, self.heads, self.normalised = width, heads, normalised
        shape = (heads, gaussians, 1 if normalised else width)
        self.offset = nn.Parameter(torch.zeros(shape))
        # c, whose square counts, or a variance xi
        self.spread = nn.Parameter(torch.randn(shape).exp() if normalised else torch.full(shape, 2.0))

    def forward(self, x: Tokens, *stages: Stage, cache: Cache | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`. What is padding becomes zero.

        Raises: ShapeError for stages and caches: statistics are of the whole text.
        """
        if stages or cache is not None:
            raise ShapeError(f"Gaussian attention reads a text of all {x.shape[1]} tokens at once: give no masks and no cache")
        return (x * self.gate(x, attention_mask)).to(x.dtype)

    def gate(self, x: Tokens, attention_mask: Real | None = None) -> Float[Tensor, "b n width"]:
        """What each feature is multiplied by, in float32 at least; 0 at padding."""
        wide = torch.promote_types(x.dtype, torch.float32)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        x = x.to(wide).masked_fill(~real[..., None], 0.0)
        segment = (real.sum(1, keepdim=True) // self.heads).clamp(min=1)
        head = ((real.cumsum(1) - 1).clamp(min=0) // segment).clamp(max=self.heads - 1)  # (b, n)
        member = nn.functional.one_hot(head, self.heads).to(wide) * real[..., None]

        def total(t: Tensor) -> Tensor:  # (b, n, c) -> (b, heads, c)
            return member.mT @ t

        def of_token(t: Tensor) -> Tensor:  # (b, heads, c) -> (b, n, c)
            return t.gather(1, head[..., None].expand(-1, -1, t.shape[-1]))

        number = member.sum(1)[..., None]
        away = x - of_token(total(x) / number.clamp(min=1))
        freedom, least = (number - 1, 1e-8) if self.normalised else (number, 1e-5)
        variance = of_token(total(away.square() * real[..., None]) / freedom.clamp(min=1)) + least
        precision, offset, rest = self._product(wide)
        log = -(precision[head] * (away - offset[head]).square() + rest[head]) / (2 * variance)
        if not self.normalised:
            return log.exp() * real[..., None]
        log = log.masked_fill(~real[..., None], -torch.inf)
        places = head[..., None].expand_as(log)
        top = torch.full_like(x[:, :1], -torch.inf).expand(-1, self.heads, -1).scatter_reduce(1, places, log.detach(), "amax")
        e = (log - of_token(top.masked_fill(top.isinf(), 0.0))).exp()
        return e / of_token(total(e)).clamp(min=torch.finfo(wide).tiny)

    def _product(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A head's Gaussians multiplied, which is one of them: precision and offset (heads, 1 or c), and what is left over."""
        offsets, spread = self.offset.to(dtype), self.spread.to(dtype)
        precisions = 1 / (spread.square() if self.normalised else spread)
        precision = precisions.sum(1)
        offset = (precisions * offsets).sum(1) / precision
        return precision, offset, (precisions * (offsets - offset[:, None]).square()).sum(1)

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """There is none.

        Raises: ShapeError.
        """
        raise ShapeError(f"there is no cache for Gaussian attention: {self.READS}; run all tokens at once")


def importance(gates: Float[Tensor, "... n width"]) -> Float[Tensor, "n width"]:
    """The importance factor: gates averaged over texts of a validation set, scaled to go from 0 to 1."""
    mean = gates.flatten(0, -3).mean(0) if gates.dim() > 2 else gates
    return (mean - mean.amin()) / (mean.amax() - mean.amin())


def oracle(mixer: Gaam, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time, with all Gaussians one by one."""
    n = len(x)
    size = max(1, n // mixer.heads)
    bounds = [min(n, h * size) for h in range(mixer.heads)] + [n]
    rows = []
    for head in range(mixer.heads):
        part = list(x[bounds[head] : bounds[head + 1]])
        if not part:
            continue
        mean = torch.stack(part).sum(0) / len(part)
        squares = torch.stack([(row - mean) ** 2 for row in part]).sum(0)
        freedom, least = (max(1, len(part) - 1), 1e-8) if mixer.normalised else (len(part), 1e-5)
        logs = []
        for row in part:
            log = torch.zeros_like(row)
            for offset, spread in zip(mixer.offset[head], mixer.spread[head], strict=True):
                y = (row - (mean + offset)) / torch.sqrt(squares / freedom + least)
                log = log - (y**2 / (2 * spread**2) + torch.log(spread) if mixer.normalised else y**2 / (2 * spread))
            logs.append(log)
        gates = torch.softmax(torch.stack(logs), 0) if mixer.normalised else torch.exp(torch.stack(logs))
        rows += [row * gate for row, gate in zip(part, gates, strict=True)]
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[Gaam]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        Gaam(width, heads),
        Gaam(width, 1, gaussians=3),
        Gaam(width, heads, normalised=False),
        Gaam(width, 3, gaussians=2, normalised=False),
    ]
    return [_random(one) for one in made]


def _random(made: Gaam) -> Gaam:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.offset.copy_(torch.randn(made.offset.shape, generator=generator) / 2)
        made.spread.copy_(torch.rand(made.spread.shape, generator=generator) + 0.8)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Gaam:
    """One Gaussian a head, as the authors' code normalises."""
    return Gaam(heads * size, **{"heads": heads, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formulas promise, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    code, paper = _random(Gaam(6, 3, gaussians=2)).double(), _random(Gaam(6, 3, normalised=False)).double()
    gates = code.gate(x)
    sums = torch.stack([gates[:, at].sum(1) for at in (slice(3), slice(3, 6), slice(6, None))])
    yield "in each segment the gates of a feature sum to one", largest(sums - 1)
    hole = torch.arange(11).expand(2, -1) != 5
    padding = torch.stack([form.gate(x, hole)[:, 5] for form in (code, paper)])
    yield "padding gets a gate of zero", largest(padding)
    one = Gaam(6, 1, gaussians=3).double()
    order = torch.randperm(11)
    yield "the order of tokens in a segment does not matter", largest(one(x[:, order]) - one(x)[:, order])
    far, near = 1e4 * x, -700 * (1e4 * x) + 5e5
    yield "without offsets the gates know no scale and no shift", largest(one.gate(far) - one.gate(near))
    merged, (precision, offset, _) = Gaam(6, 3).double(), code._product(torch.float64)
    with torch.no_grad():
        merged.offset[:, 0], merged.spread[:, 0] = offset, precision.rsqrt()
    yield "many Gaussians of a head are one", largest(merged(x) - code(x))
    with torch.no_grad():
        code.spread.fill_(1e9)
        paper.spread.fill_(1e18)
    sizes = torch.tensor([3.0] * 6 + [5.0] * 5, dtype=torch.float64)
    yield "endless variance weighs all alike", largest(code.gate(x) - 1 / sizes[:, None])
    yield "and where nothing divides, changes nothing", largest(paper(x) - x)
    yield "a head of one token lets it through", largest(Gaam(6, 20).double()(x) - x)
    planted, finder = x.clone(), Gaam(6, 1).double()
    nn.init.constant_(finder.offset, 1.5)
    others = torch.arange(11) != 4
    planted[:, 4] = planted[:, others].mean(1) + 1.5 * 11 / 10  # the mean, itself included, plus the offset
    best = importance(finder.gate(planted)[:1]).argmax(0)
    yield "the importance factor is highest where a feature is its mean plus the offset", float((best != 4).sum())
    scale = importance(finder.gate(planted)).detach()
    yield "it goes from 0 to 1", float(scale.amin().abs() + (scale.amax() - 1).abs())
    counts = [sum(p.numel() for p in made.parameters()) for made in (Gaam(96, 4, gaussians=3), Gaam(1024, 8, normalised=False))]
    yield "2 G heads numbers, or 2 heads width: 16384 for a width of 1024", float(abs(counts[0] - 24) + abs(counts[1] - 16384))
    try:
        code(x, Causal())
    except ShapeError:
        yield "a mask is refused", 0.0
    else:
        yield "a mask is refused", 1.0
