"""The convolution-attention block of Tiny-Sepformer: some channels go through attention, the others through a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import attend
from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from .._caches import Cache, KeyValues
from .._mixer import Attention, Mixer, Real, Tokens, largest, shake
from .._norms import layer_norm

CARD = Card(
    paper="Tiny-Sepformer: A Tiny Time-Domain Transformer Network for Speech Separation",
    year=2022,
    room="heads",
    source=(
        "arXiv:2206.13689, the convolution-attention block. No code of the authors is public: order of norms and sums, sinusoids "
        "before the split and the 1x1 convolution after the depthwise one are as in a third party's port; how many channels each "
        "path gets and the size of the kernel are open, here half and 31. What is added to the result (what was given, with its "
        "sinusoids) and the feed-forward layer are a stack's; sharing layers is using one block several times"
    ),
    status="block structure after a third party's port; split and kernel size of the paper are not known",
)
BASE = 10000.0


class ConvolutionPath(nn.Module):
    """norm(x + pointwise(depthwise(x))) along the tokens, which read (kernel - 1) / 2 tokens to each side."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tokens) -> Tokens:
        """(b, n, channels) -> the same."""
        return layer_norm(self.norm, x + self.pointwise(self.depthwise(x.transpose(1, 2)).transpose(1, 2)))


class AttentionPath(nn.Module):
    """norm(x + attention(x))."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.back = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tokens, stages: tuple[Stage, ...], mask: Real | None) -> Tokens:
        """(b, n, channels) -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = KeyValues().extend(q, k, v, mask)
        out = attend(read.q, read.k, read.v, *stages, **read.places)
        return layer_norm(self.norm, x + self.back(out.transpose(1, 2).flatten(2)))


class ConvAttention(Mixer):
    """Sends the first channels through multi-head attention and the others through a depthwise convolution, each with its own norm.

    Args:
        heads: of the attention. attention: how many channels it gets, a multiple of heads; default half, 0 for none.
            kernel: tokens that the convolution reads, odd. positions: sinusoids are added before all.
    """

    cannot = {
        "causal": "its convolution reads later tokens",
        "decode": "its convolution reads later tokens",
    }

    def __init__(self, width: int, heads: int, *, attention: int | None = None, kernel: int = 31, positions: bool = True) -> None:
        super().__init__()
        attention = width // 2 // heads * heads if attention is None else attention
        if not 0 <= attention <= width or attention % heads:
            raise ShapeError(f"{attention} of {width} channels for {heads} heads; give a multiple of {heads}, at most {width}")
        if kernel % 2 == 0:
            raise ShapeError(f"a convolution over {kernel} tokens has no middle; the number must be odd")
        if positions and width % 2:
            raise ShapeError(f"sinusoids come in pairs, and a width of {width} is odd; leave positions out")
        self.width, self.split, self.positions = width, attention, positions
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = AttentionPath(attention, heads) if attention else None
        self.convolution = ConvolutionPath(width - attention, kernel) if attention < width else None

    def forward(self, x: Tokens, *stages: Stage, cache: None = None, attention_mask: Real | None = None) -> Tokens:
        """See `Mixer.forward`. It has no cache."""
        places = KeyValues().places_of_next(x, attention_mask)
        if self.positions:
            x = x + self._sinusoids(x, places)
        normed = layer_norm(self.norm, x)
        if attention_mask is not None:
            normed = torch.where(attention_mask[..., None].bool(), normed, 0)  # as the convolution sees beyond both ends
        parts = []
        if self.attention is not None:
            parts.append(self.attention(normed[..., : self.split], stages, attention_mask))
        if self.convolution is not None:
            parts.append(self.convolution(normed[..., self.split :]))
        return torch.cat(parts, -1)

    def _sinusoids(self, x: Tokens, places: Tensor | None) -> Tensor:
        """(b or 1, n, width): sines, then cosines, of places."""
        wide = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(x.shape[1], device=x.device)[None] if places is None else places.clamp(min=0)
        half = self.width // 2
        rates = BASE ** -(torch.arange(half, device=x.device, dtype=wide) / half)
        angles = at.to(wide)[..., None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)

    def new_cache(self, owner: Cache | None = None) -> Cache:
        """It has none."""
        raise NotImplementedError(self.cannot["decode"])


def oracle(mixer: ConvAttention, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    n, half, normed = len(x), mixer.width // 2, []

    def norm(layer: nn.LayerNorm, row: Tensor) -> Tensor:
        centred = row - row.mean()
        return centred / torch.sqrt((centred**2).mean() + layer.eps) * layer.weight + layer.bias

    for i in range(n):
        row = x[i]
        if mixer.positions:
            angles = [torch.tensor(i / 10000.0 ** (pair / half), dtype=x.dtype) for pair in range(half)]
            row = row + torch.stack([torch.sin(a) for a in angles] + [torch.cos(a) for a in angles])
        normed.append(norm(mixer.norm, row))
    rows = []
    for i in range(n):
        out = []
        if mixer.attention is not None:
            a, read, own = mixer.attention, [], [row[: mixer.split] for row in normed]
            seen = visible[i].nonzero().flatten().tolist()
            for at in torch.arange(mixer.split).split(mixer.split // a.heads):
                q, *_ = _projected(a, own[i], at)
                keys, values = zip(*(_projected(a, own[j], at)[1:] for j in seen), strict=True)
                e = torch.stack([torch.exp((q * key).sum() / len(at) ** 0.5) for key in keys])
                read.append(e / e.sum() @ torch.stack(values))
            out.append(norm(a.norm, own[i] + a.back.weight @ torch.cat(read) + a.back.bias))
        if mixer.convolution is not None:
            c, own = mixer.convolution, [row[mixer.split :] for row in normed]
            kernel = c.depthwise.weight[:, 0]
            mixed = torch.zeros_like(own[i])
            for tap in range(kernel.shape[1]):
                j = i + tap - kernel.shape[1] // 2
                if 0 <= j < n:
                    mixed = mixed + kernel[:, tap] * own[j]
            out.append(norm(c.norm, own[i] + c.pointwise.weight @ mixed + c.pointwise.bias))
        rows.append(torch.cat(out))
    return torch.stack(rows)


def _projected(path: AttentionPath, x: Tensor, at: Tensor) -> list[Tensor]:
    """Query, key and value of one token in the head that has the channels `at`."""
    rows = [at + part * len(x) for part in range(3)]
    return [path.qkv.weight[row] @ x + path.qkv.bias[row] for row in rows]


def examples(heads: int, size: int) -> list[ConvAttention]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [
        ConvAttention(width, heads, kernel=5),
        ConvAttention(width, heads, attention=heads, kernel=3, positions=False),
        ConvAttention(width, heads, attention=width),
    ]
    shake((p for mixer in made for p in mixer.parameters()), seed=6, by=0.1)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> ConvAttention:
    """Half of the channels for attention."""
    return ConvAttention(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the block promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    block = examples(4, 8)[0].double()
    only = ConvAttention(32, 4, attention=32, positions=False).double()
    plain = Attention(32, 4, bias=True).double()
    assert only.attention is not None
    with torch.no_grad():
        for name, weight, bias in zip("qkv", only.attention.qkv.weight.chunk(3), only.attention.qkv.bias.chunk(3), strict=True):
            getattr(plain.projections, name).weight.copy_(weight)
            getattr(plain.projections, name).bias.copy_(bias)
    plain.projections.out = only.attention.back
    own = only.norm(x)
    yield "all channels for attention is multi-head attention", largest(only(x) - only.attention.norm(own + plain(own)))
    convolution = ConvAttention(32, 4, attention=0, kernel=5, positions=False).double()
    other = x.clone()
    other[:, 7] += torch.randn(32, dtype=torch.float64)
    changed = (convolution(other) - convolution(x)).abs().amax((0, 2))
    yield "without attention a token reaches (kernel - 1) / 2 to each side", largest(torch.cat([changed[:5], changed[10:]]))
    path = convolution.convolution
    assert path is not None
    with torch.no_grad():
        path.depthwise.weight.zero_()
        path.depthwise.weight[:, 0, 2] = 1.0
        path.pointwise.weight.copy_(torch.eye(32))
        path.pointwise.bias.zero_()
    twice = path.norm(2 * convolution.norm(x))
    yield "a kernel that is one in the middle, and no mixing of channels, doubles", largest(convolution(x) - twice)
    counted = sum(parameter.numel() for parameter in block.parameters())
    attention, rest = 4 * 16 * 16 + 4 * 16, 16 * 5 + 16 * 16 + 16
    yield "4 d_a^2 + d_c^2 + 5 d_c weights, biases and norms", float(abs(counted - attention - rest - 2 * 32 - 2 * 32))
    shared = sum(parameter.numel() for parameter in nn.ModuleList([block] * 8).parameters())
    yield "eight passes through one block have its parameters once", float(abs(shared - counted))
