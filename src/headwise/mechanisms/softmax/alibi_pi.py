"""ALiBi at lengths beyond training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from ...attention import attend
from ...attention.stage import Bias, Places, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.alibi import Alibi
from ...stages.causal import Causal
from .._mixer import Keys, Mechanism, Outputs, Positions, Queries, Values, largest

CARD = Card(
    paper="Position Interpolation Improves ALiBi Extrapolation",
    year=2023,
    room="softmax",
    source=(
        "arXiv:2310.13017, by the authors' company's code: slopes divided by max(1, length / train_length), or by a fixed factor. "
        "The dynamic rule takes the length at hand, so that token by token decoding differs from one pass beyond train_length"
    ),
)


@dataclass(frozen=True, eq=False)
class _Shrunk(Bias):
    """Alibi whose slopes are divided by a ratio of each row of the batch. slopes: (heads,); ratio: (b,)."""

    slopes: Tensor
    ratio: Tensor
    per_head: ClassVar[tuple[str, ...]] = ("slopes",)

    def bias(self, places: Places) -> Tensor:
        slopes = places.of_head(self.slopes.to(places.dtype)) / self.ratio.to(places.dtype)[places.batch]
        return -slopes * places.distance().abs()


class AlibiPi(Mechanism):
    """ALiBi with its slopes divided by how much longer the text is than those of training: s_ij - (m_h / r) |i - j|.

    Args:
        heads: query heads. train_length: tokens a text had in training. factor: r; without it max(1, length / train_length)
        of each text.
    """

    slopes: Tensor

    positional = True

    def __init__(self, heads: int, train_length: int, factor: float | None = None) -> None:
        super().__init__()
        if factor is not None and factor < 1:
            raise ShapeError(f"factor {factor} would stretch distances; it must be at least 1, length / train_length")
        self.register_buffer("slopes", Alibi.geometric(heads).slopes)
        self.train_length, self.factor = train_length, factor

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`."""
        bias: Stage
        key_positions = places.get("key_positions")
        if self.factor is not None or key_positions is None:
            bias = Alibi(self.slopes / (self.factor or max(1.0, k.shape[2] / self.train_length)))
        else:  # texts of a batch have lengths of their own
            lengths = torch.atleast_2d(key_positions).amax(-1) + 1
            bias = _Shrunk(self.slopes, (lengths / self.train_length).clamp(min=1).expand(q.shape[0]))
        return attend(q, k, v, *stages, bias, **places)


def oracle(mechanism: AlibiPi, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), by positions divided by r; h must be a power of two."""
    h, n, d = q.shape
    m, group = k.shape[1], h // k.shape[0]
    ratio = mechanism.factor or max(1.0, m / mechanism.train_length)
    out = []
    for head in range(h):
        slope = 2 ** (-8 * (head + 1) / h)
        for i in range(n):
            seen = visible[i].nonzero().flatten()
            own, theirs = (m - n + i) / ratio, seen.to(q) / ratio
            scores = k[head // group, seen] @ q[head, i] / d**0.5 - slope * (own - theirs).abs()
            out.append(torch.softmax(scores, 0) @ v[head // group, seen])
    return torch.stack(out).view(h, n, -1)


def examples(heads: int, size: int) -> list[AlibiPi]:
    """Settings that the conformance checks run; the dynamic one stays within its length, where decoding is exact."""
    return [AlibiPi(heads, 16, factor=2.5), AlibiPi(heads, 512)]


def sized(heads: int, size: int, tokens: int, **options: Any) -> AlibiPi:
    """For a text that is as long as those of training."""
    return AlibiPi(heads, **{"train_length": tokens, **options})


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 32, 8, generator=generator, dtype=torch.float64)
    plain = attend(q, k, v, Causal(), Alibi.geometric(4))
    yield "within the trained length it is ALiBi", largest(AlibiPi(4, 32).double()(q, k, v, Causal()) - plain)
    dynamic, fixed = AlibiPi(4, 8).double(), AlibiPi(4, 8, factor=4.0).double()
    difference = dynamic(q, k, v, Causal()) - fixed(q, k, v, Causal())
    yield "the dynamic factor is length / trained length", largest(difference)
    places = torch.arange(32)[None]
    difference = dynamic(q, k, v, Causal(), query_positions=places, key_positions=places) - fixed(q, k, v, Causal())
    yield "the same where places are given", largest(difference)
    flat = AlibiPi(4, 8, factor=1e12).double()(q, k, v, Causal()) - attend(q, k, v, Causal())
    yield "a boundless factor is no position encoding", largest(flat)
