"""Affine-scaled attention: softmax weights scaled by the token that reads, plus a bias that is alike for all it may read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend, attention_weights
from ...attention.mask import Mask
from ...attention.stage import Output, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from ...stages.gate import Gate
from ...stages.window import Window
from .._caches import Cache, KeyValues, Seen
from .._mixer import Attention, Mixer, Projections, Real, Tokens, largest

CARD = Card(
    paper="Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
    year=2026,
    room="softmax",
    source=(
        "arXiv:2602.23057, eq. 6 to 11: alpha = phi(W x), beta = (average - alpha) / N, phi linear clipping (sec. 6, better than "
        "the sigmoid), average of momentum 0.9 from zero. No code was published. N, the key length, is here how many keys the "
        "query may read, so that padding and later tokens change nothing; the average is one of each head, over the real tokens "
        "of all rows, of the batches before, without gradient, and is not shared between processes. beta='free' is ours"
    ),
    status="the axes and the time of the moving average are not in the paper; see source",
)


@dataclass(frozen=True, eq=False)
class Affine(Output):
    """scale * out + shift. scale: (b, h, n, 1). shift: (b, h, n, dv)."""

    scale: Tensor
    shift: Tensor

    def output(self, out: Tensor, own_value: Tensor | None) -> Tensor:
        return (self.scale * out + self.shift).to(out.dtype)


class AffineScaled(Mixer):
    """Reads with alpha softmax + beta in the place of softmax: alpha and beta of each head are chosen by the token that reads.

    Never holds weights: it is alpha times what attention reads, plus beta times the sum of all values that may be read.

    Args:
        heads, kv_heads, head_dim: as for `Attention`. beta: "tied", a moving average of alpha less alpha, shared out evenly, so
            that weights sum to that average; or "free", a learned map of the token, shared out evenly.
        scaling: "clip" (0.1 x + 0.5 within 0..1) or "sigmoid", what makes alpha. momentum: of the average, which moves in
            training mode only. bias: whether the maps to alpha and beta have a bias, which the paper's has not.
    """

    rotates = True
    average: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        beta: str = "tied",
        scaling: str = "clip",
        momentum: float = 0.9,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if beta not in ("tied", "free") or scaling not in ("clip", "sigmoid"):
            raise ShapeError(f"beta {beta!r} must be 'tied' or 'free', scaling {scaling!r} 'clip' or 'sigmoid'")
        if not 0 <= momentum <= 1:
            raise ShapeError(f"momentum {momentum} must be between 0 and 1")
        self.width, self.scaling, self.momentum = width, scaling, momentum
        self.projections = Projections(width, heads, kv_heads, head_dim)
        self.alpha = nn.Linear(width, heads, bias=bias)
        self.free = nn.Linear(width, heads, bias=bias) if beta == "free" else None
        self.register_buffer("average", torch.zeros(heads))
        for parameter in self.free.parameters() if self.free is not None else ():
            nn.init.zeros_(parameter)

    def forward(self, x: Tokens, *stages: Stage, cache: KeyValues | None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`."""
        seen = (self.new_cache() if cache is None else cache).extend(*self.projections.split(x), attention_mask, self.rotary)
        scale = self._scale(x)
        total = self.average.to(scale) - scale if self.free is None else self.free(x).to(scale)  # beta, all of it
        if self.training and self.free is None:
            self._follow(scale.detach(), attention_mask)
        scale, total = (t.transpose(1, 2)[..., None] for t in (scale, total))
        shift = total * mean_of_visible(seen, stages)
        out = attend(seen.q, seen.k, seen.v, Affine(scale, shift), *stages, **seen.places)
        return self.projections.merge(out)

    def _scale(self, x: Tokens) -> Tensor:
        """(b, n, h), in float32 at least: alpha."""
        logits: Tensor = self.alpha(x)
        wide = logits.to(torch.promote_types(x.dtype, torch.float32))
        return torch.sigmoid(wide) if self.scaling == "sigmoid" else (0.1 * wide + 0.5).clamp(0, 1)

    @torch.no_grad()
    def _follow(self, scale: Tensor, attention_mask: Real | None) -> None:
        """Moves the average towards this batch's, which the batches after it will use: no token tells earlier ones of itself."""
        real = scale.flatten(0, 1) if attention_mask is None else scale[attention_mask.bool()]
        if len(real):
            self.average.lerp_(real.mean(0).to(self.average), 1 - self.momentum)

    def new_cache(self, owner: Cache | None = None) -> KeyValues:
        """An empty cache for decoding."""
        return KeyValues()


def mean_of_visible(seen: Seen, stages: Sequence[Stage]) -> Tensor:
    """(b, h, n, dv): the mean of the values that each query may read, by the masks among the stages; zero where there are none."""
    masks = [stage for stage in stages if isinstance(stage, Mask)]
    n, m, dtype = seen.q.shape[2], seen.v.shape[2], torch.promote_types(seen.v.dtype, torch.float32)
    if seen.key_positions is None and seen.query_positions is None and masks == [Causal()] and n <= m:
        count = torch.arange(1, m + 1, device=seen.v.device, dtype=dtype)
        means = (seen.v.cumsum(2, dtype=dtype) / count[:, None])[:, :, m - n :]
        return means.repeat_interleave(seen.q.shape[1] // means.shape[1], dim=1)
    return attend(torch.zeros_like(seen.q), seen.k, seen.v, *masks, **seen.places)  # equal scores: the mean


def oracle(mixer: AffineScaled, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a weight at a time."""
    p = mixer.projections
    d, group = p.head_dim, p.heads // p.kv_heads
    rows = []
    for i in range(len(x)):
        read, seen = [], visible[i].nonzero().flatten().tolist()
        for head in range(p.heads):
            own, kv = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            q = p.q.weight[own] @ x[i]
            s = torch.stack([q @ (p.k.weight[kv] @ x[j]) / d**0.5 for j in seen])
            weights = torch.exp(s) / torch.exp(s).sum()
            logit = mixer.alpha.weight[head] @ x[i] + (0 if mixer.alpha.bias is None else mixer.alpha.bias[head])
            if mixer.scaling == "sigmoid":
                alpha = 1 / (1 + torch.exp(-logit))
            else:
                alpha = logit * 0 if logit <= -5 else 0.1 * logit + 0.5 if logit < 5 else logit * 0 + 1
            if mixer.free is None:
                beta = (mixer.average[head] - alpha) / len(seen)
            else:
                offset = 0 if mixer.free.bias is None else mixer.free.bias[head]
                beta = (mixer.free.weight[head] @ x[i] + offset) / len(seen)
            total = torch.zeros(d, dtype=x.dtype)
            for at, j in enumerate(seen):
                total = total + (alpha * weights[at] + beta) * (p.v.weight[kv] @ x[j])
            read.append(total)
        rows.append(p.out.weight @ torch.cat(read))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[AffineScaled]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        AffineScaled(width, heads),
        AffineScaled(width, heads, kv_heads=heads // 2, scaling="sigmoid", bias=True),
        AffineScaled(width, heads, beta="free", bias=True),
    ]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mixer in made:
            mixer.average.copy_(torch.rand(heads, generator=generator))
            for part in (mixer.alpha, mixer.free):
                for parameter in part.parameters() if part is not None else ():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> AffineScaled:
    """The tied form with linear clipping."""
    return AffineScaled(heads * size, heads, **options)


def neutral(heads: int, size: int) -> list[AffineScaled]:
    """Settings that are plain attention: alpha one, and beta zero or an average of one."""
    made = [AffineScaled(heads * size, heads, beta=beta, bias=True) for beta in ("tied", "free")]
    for mixer in made:
        mixer.average.fill_(1.0)
        nn.init.zeros_(mixer.alpha.weight)
        nn.init.constant_(mixer.alpha.bias, 5.0)
    return made


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    tied, _, free = (mixer.double().eval() for mixer in examples(4, 8))
    p = tied.projections
    q, k, v = p.split(x)
    weights = attention_weights(q, k, Window(3), Causal())
    alpha = (0.1 * tied.alpha(x) + 0.5).clamp(0, 1).transpose(1, 2)[..., None]
    visible = weights > 0
    edited = visible * (alpha * weights + (tied.average[:, None, None] - alpha) / visible.sum(-1, keepdim=True))
    yield "it is reading with the edited weights", largest(p.merge(edited @ v) - tied(x, Window(3), Causal()))
    yield "whose rows sum to the moving average", largest(edited.sum(-1) - tied.average[:, None])
    first = p.merge(tied.average[:, None, None] * v[:, :, :1])
    yield "the first token reads the average times its own value", largest(tied(x, Causal())[:, :1] - first)
    both, hidden = Seen(q, k, v, None, None), Seen(q, k, v, torch.arange(9)[None], torch.arange(9)[None])
    by_sums = mean_of_visible(both, [Causal()])
    yield "the mean of values is that of a read with equal scores", largest(by_sums - mean_of_visible(hidden, [Causal()]))
    nn.init.zeros_(free.alpha.weight)
    nn.init.constant_(free.alpha.bias, -9.0)
    nn.init.zeros_(free.free.weight)  # type: ignore[union-attr]
    nn.init.ones_(free.free.bias)  # type: ignore[union-attr]
    v = free.projections.split(x)[2]
    yield (
        "alpha of zero, and a free beta of 1 / N, read means",
        largest(free(x) - free.projections.merge(v.mean(2, keepdim=True).expand_as(v))),
    )
    yield from _of_training()
    made = AffineScaled(2048, 32, head_dim=1)
    added = sum(p.numel() for p in made.parameters()) - sum(p.numel() for p in made.projections.parameters())
    yield "2^16 parameters in a layer of 32 heads and width 2048, 1.0 million in 16 layers", float(added - 2**16)
    closed = tied(x, Causal(), Gate(torch.zeros(4)))
    yield "a head that is closed reads nothing, no mean either", largest(closed)
    kept = []
    for mixer in (tied, Attention(32, 4).double()):
        cache = mixer.new_cache()
        mixer(x, Causal(), cache=cache)
        kept.append(cache.nbytes)
    yield "the cache holds no more than that of plain attention", float(kept[0] - kept[1])


def _of_training() -> Iterator[tuple[str, float]]:
    mixer = AffineScaled(32, 4).double().train()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    mean = (0.1 * mixer.alpha(x) + 0.5)[real].mean(0)
    yield "at first nothing is known of alpha: weights sum to zero", largest(mixer(x[:, :1], Causal(), attention_mask=real[:, :1]))
    mixer.average.zero_()
    for _ in range(3):
        mixer(x, Causal(), attention_mask=real)
    yield "three batches in training leave 1 - 0.9^3 of their mean alpha", largest(mixer.average - (1 - 0.9**3) * mean)
    before = mixer.average.clone()
    mixer.eval()(x, Causal(), attention_mask=real)
    yield "and one outside of it changes nothing", largest(mixer.average - before)
