"""Cross-layer latent attention: groups of layers share one latent a token, which may be kept as four bits a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...mechanisms._mixer import largest
from ...mechanisms.cached._latent import FourBits, LatentAttention, LatentFollower, LatentProducer, Latents
from ..build import named
from ..transformer import Block, Transformer
from . import _slow
from .cla import grouped

CARD = Card(
    paper="Lossless KV Cache Compression to 2%",
    year=2024,
    room="cache",
    source=(
        "arXiv:2410.15252, by its abstract and summaries: no code was released and its equations were not at hand. The latent and "
        "the rotated key beside it are those of DeepSeek-V2's latent attention (arXiv:2405.04434); pairs of layers share them, "
        "and each layer has maps of its own from the latent to keys and values; int4 while training, too, with a straight-through "
        "gradient. Ours where nothing was found: no norm of the latent (`norm`), one rotated key for the whole group and for all "
        "heads, kept whole; a scale for each token and 64 channels, its largest magnitude / 7; the short group first. Queries of "
        "low rank are left out: they change no cache"
    ),
    status="equations as in latent attention, where the paper's own were not at hand",
)


@named
def clla(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    *,
    context: int = 1024,
    factor: int = 2,
    rank: int | None = None,
    rotary_dim: int | None = None,
    head_dim: int | None = None,
    bits: int | None = 4,
    channels: int = 64,
    norm: bool = False,
    **options: Any,
) -> Transformer:
    """A decoder in which each group of `factor` layers makes keys and values of one latent a token, that of its first layer.

    The cache holds, for each group, `rank` channels of `bits` bits with a scale for every `channels` of them, and `rotary_dim`
    numbers. If factor does not divide layers, the first group is the short one.

    Args:
        factor: layers that share. rank: of the latent, an eighth of the width by default. rotary_dim: of the part of queries and
            keys that is rotated, half of head_dim by default; 0 for none. head_dim: width / heads by default.
        bits: 4, or None to keep latents whole. norm: RMS-norms latents. options: as for `Transformer`.

    Raises: ShapeError for a factor below 1, or other bits.
    """
    if factor < 1 or bits not in (None, 4) or channels < 1:
        raise ShapeError(
            f"a sharing factor of {factor}, {bits} bits for groups of {channels}; give 1 layer at least, 4 or None, and 1 channel"
        )
    size = width // heads if head_dim is None else head_dim
    turned = size // 4 * 2 if rotary_dim is None else rotary_dim
    shared: dict[str, Any] = {"head_dim": head_dim, "rotary_dim": turned}
    rank = max(1, width // 8) if rank is None else rank
    owners = grouped(layers, factor)
    follows = {layer: max(o for o in owners if o < layer) for layer in range(layers) if layer not in owners}

    def mixer(layer: int) -> LatentAttention:
        if layer in follows:
            return LatentFollower(width, heads, rank, **shared)
        return LatentProducer(width, heads, rank, **shared, codec=None if bits is None else FourBits(channels), norm=norm)

    mixers = [mixer(layer) for layer in range(layers)]
    return Transformer(vocabulary, width, layers, heads, mixer=mixers, context=context, follows=follows, **options)


def oracle(model: Transformer, ids: Tensor) -> Tensor:
    """One sequence ids (n,): logits (n, vocabulary); keys and values of each head made of latents, a token at a time."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def mix(layer: int, at: int, x: Tensor) -> Tensor:
        mixer = cast(LatentAttention, _slow.mixer_of(model, at))
        base, r, d, n = _slow.base_of(mixer), mixer.rank, mixer.head_dim, len(x)
        if isinstance(mixer, LatentProducer):
            both = x @ mixer.down.weight.T
            c, key = both[:, :r], both[:, r:]
            if isinstance(mixer.norm, nn.RMSNorm):
                c = _slow.normed(c, mixer.norm)
            if mixer.codec is not None:
                c = torch.stack([_rounded(token, mixer.codec.group) for token in c])
            made[layer] = c, _slow.turned(key[:, None], base) if mixer.rotary_dim else key[:, None]
        c, key = made[model.follows.get(layer, layer)]
        q = (x @ mixer.q.weight.T).view(n, mixer.heads, -1)
        turned = _slow.turned(q[..., d:], base) if mixer.rotary_dim else q[..., d:]
        q = torch.cat([q[..., :d], turned], -1)
        k = torch.stack([mixer.to_keys.weight @ token for token in c]).view(n, mixer.heads, d)
        v = torch.stack([mixer.to_values.weight @ token for token in c]).view(n, mixer.heads, d)
        k = torch.cat([k, key.expand(-1, mixer.heads, -1)], -1)
        read = _slow.attention_rows(q, k, v, _slow.visible_to(model, at, n))
        return _slow.merged(read, mixer.out)

    return _slow.stack(model, ids, mix)


def _rounded(c: Tensor, group: int) -> Tensor:
    """One token's latent (r,), each group in steps of a seventh of its largest magnitude; the gradient passes as if not."""
    parts = []
    for start in range(0, len(c), group):
        part = c[start : start + group].detach()
        step = float(part.abs().max()) / 7
        parts.append(torch.tensor([round(float(z) / step) * step if step else 0.0 for z in part], dtype=c.dtype))
    return c + (torch.cat(parts) - c.detach())


def examples() -> list[Transformer]:
    """Settings that the conformance checks run."""
    made = [
        clla(23, 32, 5, 4, rank=24, channels=16, factor=2, context=64),
        clla(23, 32, 4, 4, rank=16, bits=None, factor=4, norm=True, tied=False, context=64),
        clla(23, 32, 3, 4, rank=16, head_dim=6, rotary_dim=0, factor=3, windows=9, context=64),
    ]
    _slow.shake_norms(made)
    return made


def kept(model: Transformer, tokens: int) -> float:
    """Numbers that the caches hold after so many tokens, bytes of four-bit latents as parts of a number."""
    size = next(model.parameters()).element_size()
    return sum(_bytes(block.mixer, size) * _slow.slots(model, n, tokens) for n, block in model.layers()) / size


def _bytes(mixer: Any, size: int) -> float:
    """Bytes a token that a layer keeps, for numbers of `size` bytes."""
    if not isinstance(mixer, LatentProducer):
        return 0
    latent = mixer.rank * size if mixer.codec is None else -(-mixer.rank // 2) - (-mixer.rank // mixer.codec.group) * size
    return latent + mixer.rotary_dim * size


def sized(vocabulary: int, width: int, layers: int, heads: int, tokens: int, **options: Any) -> Transformer:
    """Pairs of layers, a latent of an eighth of the width in four bits, half of each head rotated."""
    return clla(vocabulary, width, layers, heads, **{"context": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the paper promises, and how far off it is."""
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 9))
    plain = Transformer(23, 32, 3, 4, positions="none").double()
    own = clla(23, 32, 3, 4, factor=1, rank=32, rotary_dim=0, bits=None, positions="none").double()
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    with torch.no_grad():
        given = own.state_dict()
        for name, tensor in plain.state_dict().items():
            left, found, right = name.partition(".mixer.projections.")
            to = {"k.weight": "to_keys.weight", "v.weight": "to_values.weight"}.get(right, right)
            given[f"{left}.mixer.{to}" if found else name] = tensor @ turn.T if to.startswith("to_") else tensor
        for layer in range(3):
            given[f"blocks.{layer}.mixer.down.weight"] = turn
        own.load_state_dict(given)
    yield "a latent of full rank, of each layer its own: multi-head attention", largest(own(ids) - plain(ids))

    for bits in (None, 4):
        model = clla(23, 32, 4, 4, bits=bits, norm=True).double()
        outs = []
        for absorbed in (True, False):
            for _, block in model.layers():
                cast(LatentAttention, block.mixer).absorbed = absorbed
            outs.append(model(ids))
        yield f"maps on queries and outputs are maps on latents, with {bits or 64} bits", largest(outs[0] - outs[1])

    x = torch.randn(50, 100, dtype=torch.float64) * torch.rand(50, 1, dtype=torch.float64) * 10
    codec = FourBits(64)
    packed, scales = codec.encode(x)
    off = (codec.decode(packed, scales, 100) - x).abs() - scales.repeat_interleave(64, -1)[:, :100] / 2
    yield "four bits are off by half a scale at most", float(off.max().clamp(min=0))
    tops = torch.stack([x[:, :64].abs().amax(1), x[:, 64:].abs().amax(1)], 1)
    yield "a scale is the largest magnitude of 64 channels / 7", largest(scales - tops / 7)

    with torch.device("meta"):
        wide = clla(32, 4096, 32, 32, rank=512, rotary_dim=64, hidden=0).bfloat16()
    part = 2 * kept(wide, 1) / (2 * 2 * 4096 * 32)
    held = (512 / 2 + 8 * 2 + 64 * 2) / 2
    yield (
        "at a width of 4096, a rank of 512: 1.22 % of the bytes of multi-head attention, below 2 %",
        abs(part - held / (2 * 2 * 4096)) + float(part >= 0.02),
    )
    model = clla(23, 64, 4, 4, rank=32, rotary_dim=8).bfloat16()
    caches = model.new_caches()
    model(ids, caches=caches)
    wanted = 2 * 9 * 2 * (32 // 2 + 2 + 8 * 2)
    latents = [cache for cache in caches.layers if isinstance(cache, Latents)]
    yield "real caches hold those bytes, in two of four layers", float(abs(caches.nbytes - wanted) + abs(len(latents) - 2))
    block = cast(Block, model.blocks[1])
    yield "layers that share have no map down", float(hasattr(block.mixer, "down"))
