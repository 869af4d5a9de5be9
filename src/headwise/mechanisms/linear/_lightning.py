"""Parts of TransNormer and lightning attention: decays of heads by layer, LRPE, and the mixers that their papers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ShapeError
from ...stages.alibi import Alibi
from .._mixer import Tokens
from .._norms import rms_normed
from .._states import Pass, Reading, StateMixer
from ._parts import elu_plus_one

SCHEDULES = ("slopes", "paper")


def unchanged(x: Tensor) -> Tensor:
    """No activation."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "1+elu": elu_plus_one, "none": unchanged}


def log_decays(heads: int, layer: int, layers: int, schedule: str = "slopes", temperature: bool = True) -> list[float]:
    """The logarithm of lambda for each head, zero or less, and slower in later layers.

    schedule: "slopes": ALiBi's slopes times 1 - layer / (layers - 1) + 1e-5, as in the authors' code; "paper":
    8 head / heads * (1 - (layer + 1) / layers), heads from 0. temperature: False leaves out the factor of the layer.

    Raises: ShapeError for a schedule or a layer that there is not.
    """
    if schedule not in SCHEDULES:
        raise ShapeError(f"schedule {schedule!r} must be one of {', '.join(SCHEDULES)}")
    if not 0 <= layer < layers:
        raise ShapeError(f"layer {layer} must be 0 or more, and less than the {layers} layers")
    if schedule == "slopes":
        factor = 1 - layer / max(layers - 1, 1) + 1e-5 if temperature else 1.0
        return [-slope * factor for slope in Alibi.geometric(heads).slopes.double().tolist()]
    factor = 1 - (layer + 1) / layers if temperature else 1.0
    return [-8 * head / heads * factor for head in range(heads)]


def decay_of(logs: Sequence[float], x: Tokens) -> Tensor:
    """The same decay at every token of x (b, n, width): (b, heads, n), in float32 at least."""
    decay = torch.tensor(logs, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    return decay[None, :, None].expand(len(x), -1, x.shape[1])


class Lrpe(nn.Module):
    """Linearised relative positions: x -> (x cos(theta place), x sin(theta place)), so that q k becomes q k cos(theta (i - j)).

    theta: (heads, size), learned; at first 10000^(-2 c / (heads size)) with c counting the channels of all heads.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        channels = torch.arange(heads * size) / (heads * size)
        self.theta = nn.Parameter((10000 ** (-2 * channels)).view(heads, size))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (b, h, n, d) at places (b, n): (b, h, n, 2d)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = places[:, None, :, None].to(wide) * self.theta.to(wide)[:, None]
        return torch.cat([x * angles.cos(), x * angles.sin()], -1)


class GatedNormAttention(StateMixer):
    """S_t = lambda S_(t-1) + k_t v_t^T, read by S_t^T q_t: normed over all heads together, times a linear gate, mapped back."""

    cannot = {"full": "its decay takes tokens in their order"}

    def __init__(self, width: int, heads: int, logs: Sequence[float], lrpe: bool, gated: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads, self.size, self.logs = width, heads, width // heads, list(logs)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.u = nn.Linear(width, width, bias=False) if gated else None
        self.lrpe = Lrpe(heads, self.size) if lrpe else None
        self.activation: Callable[[Tensor], Tensor] = F.silu

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.activation(q), self.activation(k)
        if self.lrpe is not None:
            q, k = self.lrpe(q, now.places), self.lrpe(k, now.places)
        return Reading(q, k, v, decay_of(self.logs, x))

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        normed = rms_normed(out.transpose(1, 2).flatten(2))
        if self.u is not None:
            normed = normed * self.u(x)
        mapped: Tensor = self.out(normed.to(x.dtype))
        return mapped


class Turned(nn.Module):
    """LRPE with a reflection: x - 2 (x . v) v, then pairs of channels turned by theta times place, as scores know distances."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size % 2:
            raise ShapeError(f"LRPE turns pairs of channels, and a head has {size}")
        self.theta = nn.Parameter(10000 ** (-2 * torch.arange(size // 2) / size))
        self.mirror: Tensor
        self.register_buffer("mirror", F.normalize(torch.randn(size), dim=0))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (..., n, d) at places (b, n) or (n,), in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, mirror = x.to(wide), F.normalize(self.mirror.to(wide), dim=0)
        x = x - 2 * (x @ mirror)[..., None] * mirror
        angles = places[..., None, :, None].to(wide) * self.theta.to(wide)
        cos, sin, first, second = angles.cos(), angles.sin(), x[..., ::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


class NormMaps(nn.Module):
    """The linear maps of a layer and its LRPE; the norm over all heads together."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        for each in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(each.weight, gain)
        nn.init.xavier_uniform_(self.out.weight)
        self.lrpe = Turned(width // heads)

    def split(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, h, n, d)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def merge(self, out: Tensor, x: Tokens, normed: bool) -> Tokens:
        """What the heads read, normed if so, and mapped back."""
        row = out.transpose(1, 2).flatten(2)
        mapped: Tensor = self.out((rms_normed(row, 1e-8) if normed else row).to(x.dtype))
        return mapped
