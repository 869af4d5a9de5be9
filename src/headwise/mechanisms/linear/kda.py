"""Kimi Delta Attention: the delta rule on a state whose channels each decay at a speed of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur
from ...stages.causal import Causal
from .._mixer import Tokens, largest, shake
from .._states import begin
from ._delta import GatedDelta, slowly
from ._fading import Fading, LowRank
from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet

CARD = Card(
    paper="Kimi Linear: An Expressive, Efficient Attention Architecture",
    year=2025,
    room="linear",
    source=(
        "arXiv:2510.26692, sec. 3 and 4, and flash-linear-attention: DeltaNet's queries, keys and values; the state's key channels "
        "decay by exp(-exp(A) softplus(x W_down W_up + b)), A for each head, b for each channel, then the delta rule; outputs go "
        "through an RMS norm by heads (1e-5) times sigmoid(x G_down G_up + c). The paper leaves the decay's function open: it is "
        "the library's, its steps starting as Mamba-2's. Low ranks are the size of a head. The whole model, three such layers to "
        "one of full attention without positions, is a list of mixers in headwise.nn. A gate with a lower bound is not built"
    ),
)


class Kda(GatedDelta):
    """S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_(t-1) + beta_t k_t v_t^T: each channel of keys decays first, then one is erased.

    Args:
        heads: of width / heads. rank: of the maps to decays and gates, default the size of a head. taps: of the convolutions of
            queries, keys and values; 0 for none. negative: lets beta go up to two.
    """

    def __init__(self, width: int, heads: int, *, rank: int | None = None, taps: int = 4, negative: bool = False) -> None:
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        size = width // heads
        super().__init__(width, heads, size, size, taps=taps, negative=negative)
        rank = size if rank is None else rank
        self.alpha = LowRank(width, rank, width)
        self.fading = Fading(heads, size)
        self.gate = LowRank(width, rank, width, bias=True)

    def decay(self, x: Tokens) -> Tensor:
        """log alpha, (b, h, n, key_size)."""
        decay: Tensor = self.fading(self.alpha(x))[0]
        return decay

    def gated(self, x: Tokens) -> Tensor:
        """See `GatedDelta.gated`."""
        return torch.sigmoid(self.gate(x))


def oracle(mixer: Kda, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    low = x @ mixer.alpha.down.weight.T @ mixer.alpha.up.weight.T
    speed = torch.log(1 + torch.exp(low.view(len(x), *mixer.fading.bias.shape) + mixer.fading.bias))
    alpha = torch.exp(-torch.exp(mixer.fading.rate)[:, None] * speed)
    gate = x @ mixer.gate.down.weight.T @ mixer.gate.up.weight.T + mixer.gate.up.bias
    return slowly(mixer, x, alpha, 1 / (1 + torch.exp(-gate)))


def examples(heads: int, size: int) -> list[Kda]:
    """Settings that the conformance checks run."""
    made = [Kda(heads * size, heads), Kda(heads * size, heads // 2, rank=3, taps=2, negative=True)]
    for mixer in made:
        shake([mixer.norm.weight, mixer.fading.bias], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Kda:
    """The paper's: convolutions of 4 tokens, low ranks of a head's size, beta below one."""
    return Kda(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    mixer = Kda(32, 4).double()
    q, k, v, decay, beta, _, _ = given = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
    assert decay is not None
    assert beta is not None
    total = decay.cumsum(2)
    fade = (total[:, :, :, None] - total[:, :, None]).exp()
    gla = torch.einsum("bhid,bhijd,bhjd->bhij", q, fade, k).tril() @ (beta[..., None] * v)
    without = recur(**given._replace(erase=None)._asdict()).out
    yield "without the erasure: gated linear attention of values times beta", largest(without - gla)

    scalar, plain = GatedDeltaNet(32, 4, key_size=8, expand=1).double(), DeltaNet(32, 4).double()
    down, up = mixer.alpha.down.weight, mixer.alpha.up.weight
    up.copy_(up[::8].repeat_interleave(8, 0))
    mixer.fading.bias.copy_(mixer.fading.bias[:, :1].expand(-1, 8))
    own = mixer.state_dict()
    shared = {name: own[name] for name in scalar.state_dict() if name in own and "alpha" not in name and "fading" not in name}
    scalar.load_state_dict(shared, strict=False)
    scalar.alpha.weight.copy_(up[::8] @ down)
    scalar.fading.rate.copy_(mixer.fading.rate)
    scalar.fading.bias.copy_(mixer.fading.bias[:, 0])
    yield "one decay for all channels of a head: Gated DeltaNet", largest(mixer.read(x, Causal()) - scalar.read(x, Causal()))

    mixer.fading.rate.fill_(-80.0)
    plain.load_state_dict(own, strict=False)
    yield "no decay: DeltaNet", largest(mixer.read(x, Causal()) - plain.read(x, Causal()))
