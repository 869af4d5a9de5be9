"""Keeps keys and values in a few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...card import Card
from ...errors import GeometryError, PlanError
from ..rule import Codec, Parts

CARD = Card(
    paper="FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU",
    year=2023,
    room="cache",
    source=(
        "arXiv:2303.06865, sec. 5, and the authors' code: min-max codes of groups of channels of each token, 4 bits, two to a "
        "byte, with scale and minimum in float16; the paper's groups have 64 channels. KIVI (arXiv:2402.02750) groups keys along "
        "tokens instead and leaves the last ones plain: here tokens stay apart, so that each can be evicted alone. 8 and 2 bits, "
        "symmetric codes and scales that are widened until the error bound holds are our own. Keys are taken with their rotary "
        "positions. Reads decode all that a head holds; there is no kernel that reads codes"
    ),
)


@dataclass(frozen=True, eq=False)
class Quantized(Codec):
    """Codes of `bits` (8, 4 or 2) for each channel; `group` channels of a token share a scale, and unless symmetric a minimum.

    What is read back is off by half a scale at most. half: whether scales are kept in float16, which holds numbers up to
    65504, rather than in the keys' dtype.

    Raises: PlanError for other settings; GeometryError, when keys come, for a head size that does not fill bytes.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    half: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise PlanError(f"keys and values cannot be kept in {self.bits} bits; use 8, 4 or 2")
        if self.group < 1:
            raise PlanError(f"a group of {self.group} channels holds nothing; give a number from 1 on")

    @property
    def top(self) -> int:
        """The largest code: 2^bits - 1, or for symmetric codes, which are kept as code + top / 2, one less."""
        return 2**self.bits - 1 - int(self.symmetric)

    def encode(self, k: Tensor, v: Tensor) -> Parts:
        """Codes, scales and unless symmetric minima of both, for tokens (b, heads, c, d)."""
        return {f"{name}.{part}": value for name, x in (("k", k), ("v", v)) for part, value in self._encode(x).items()}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in the dtype given."""
        k, v = ({part: parts[f"{name}.{part}"] for part in self._names} for name in "kv")
        return self._decode(k, dtype), self._decode(v, dtype)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("codes", "scale") if self.symmetric else ("codes", "scale", "low")

    def _encode(self, x: Tensor) -> Parts:
        d, per = x.shape[-1], 8 // self.bits
        if d % per:
            raise GeometryError(f"heads of size {d} do not fill bytes with codes of {self.bits} bits; use {8 // _twos(d)} or more")
        kept = torch.float16 if self.half else x.dtype
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = self._grouped(wide)
        low, scale = self._scales(grouped, kept)
        start, step = (value.to(wide.dtype)[..., None] for value in (low, scale))
        codes = ((grouped - start) / step.where(step > 0, 1.0)).round().clamp(0, self.top).to(torch.uint8)
        found = {"codes": _packed(codes.flatten(-2)[..., :d], self.bits), "scale": scale}
        return found if self.symmetric else found | {"low": low}

    def _grouped(self, x: Tensor) -> Tensor:
        """(..., groups, group): a last group that is not full repeats its last channel."""
        missing = -x.shape[-1] % self.group
        return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1).unflatten(-1, (-1, self.group))

    def _scales(self, x: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
        """(..., groups) what code 0 stands for, and the step, both as kept: no entry is more than half a step from a code."""
        limits = torch.finfo(kept)
        high = x.abs().amax(-1) if self.symmetric else x.amax(-1)
        least = -high if self.symmetric else x.amin(-1)
        low = least if self.symmetric else least.clamp(limits.min, limits.max).to(kept).to(x.dtype)
        wanted = torch.maximum((high - low) / self.top, 2 * (low - least))
        scale = wanted.clamp(max=limits.max).to(kept)
        step = scale.to(x.dtype)
        short = ((self.top + 0.5) * step < high - low) | (step < 2 * (low - least))  # rounded away
        more = (wanted * (1 + limits.eps) + limits.smallest_normal * limits.eps).clamp(max=limits.max).to(kept)
        scale = torch.where(short, more, scale)
        return (-self.top // 2 * scale.to(x.dtype) if self.symmetric else low.to(kept)), scale

    def _decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        codes = _unpacked(parts["codes"], self.bits).to(wide)
        d = codes.shape[-1]
        scale = parts["scale"].to(wide)[..., None]
        low = -self.top // 2 * scale if self.symmetric else parts["low"].to(wide)[..., None]
        return (self._grouped(codes) * scale + low).flatten(-2)[..., :d].to(dtype)


def _twos(d: int) -> int:
    """How many codes of one size fill whole bytes of a head of size d: 1, 2 or 4."""
    return 4 if d % 4 == 0 else 2 if d % 2 == 0 else 1


def _packed(codes: Tensor, bits: int) -> Tensor:
    """(..., d) codes -> (..., d * bits / 8) bytes, earlier codes in lower bits."""
    if bits == 8:
        return codes
    each = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (each << shifts).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def example(heads: int) -> Quantized:
    """8 bits, in groups that do not divide a head's size."""
    return Quantized(8, group=24)
