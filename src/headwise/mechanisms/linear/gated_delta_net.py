"""Gated DeltaNet: the delta rule on a state that every token lets decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import Tokens, largest, shake
from .._states import begin
from ._delta import GatedDelta, slowly
from ._fading import Fading
from .delta_net import DeltaNet

CARD = Card(
    paper="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    year=2024,
    room="linear",
    source=(
        "arXiv:2412.06464, sec. 3, and the authors' library: DeltaNet's queries, keys and values (short convolution, SiLU, unit "
        "length), alpha_t = exp(-exp(A) softplus(x W_a + b)) for each head as in Mamba-2, keys of 3/4 and values of 3/2 of the "
        "width together, outputs through an RMS norm by heads (1e-5) times SiLU(x W_g). The state decays before it is erased from. "
        "exp(A) starts even in (0, 16), as in the library; values of more heads than keys are not built"
    ),
)


class GatedDeltaNet(GatedDelta):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T: a state may be emptied as a whole, or of one key.

    Args:
        heads: of keys of `key_size`, default 3/4 width / heads. expand: values of so many times the keys' size.
        taps: of the convolutions of queries, keys and values; 0 for none. negative: lets beta go up to two.
    """

    def __init__(
        self, width: int, heads: int, *, key_size: int | None = None, expand: float = 2.0, taps: int = 4, negative: bool = False
    ) -> None:
        size = 3 * width / (4 * heads) if key_size is None else key_size
        if size != int(size) or size * expand != int(size * expand):
            raise ShapeError(f"heads of {size:g} channels of keys and {size * expand:g} of values; both must be whole numbers")
        super().__init__(width, heads, int(size), int(size * expand), taps=taps, negative=negative)
        self.alpha = nn.Linear(width, heads, bias=False)
        self.fading = Fading(heads, slowest=0.0)
        self.gate = nn.Linear(width, heads * self.value_size, bias=False)

    def decay(self, x: Tokens) -> Tensor:
        """log alpha, (b, h, n)."""
        decay: Tensor = self.fading(self.alpha(x))[0]
        return decay

    def gated(self, x: Tokens) -> Tensor:
        """See `GatedDelta.gated`."""
        return F.silu(self.gate(x))


def oracle(mixer: GatedDeltaNet, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time."""
    speed = torch.log(1 + torch.exp(x @ mixer.alpha.weight.T + mixer.fading.bias))
    alpha = torch.exp(-torch.exp(mixer.fading.rate) * speed)[:, :, None].expand(-1, -1, mixer.key_size)
    gate = x @ mixer.gate.weight.T
    return slowly(mixer, x, alpha, gate / (1 + torch.exp(-gate)))


def examples(heads: int, size: int) -> list[GatedDeltaNet]:
    """Settings that the conformance checks run."""
    width = heads * size
    made = [GatedDeltaNet(width, heads), GatedDeltaNet(width, heads // 2, key_size=4, expand=1.5, taps=0, negative=True)]
    for mixer in made:
        shake([mixer.norm.weight, mixer.fading.bias], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> GatedDeltaNet:
    """The paper's: keys of 3/4 and values of 3/2 of the width together, convolutions of 4 tokens, beta below one."""
    return GatedDeltaNet(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    mixer = GatedDeltaNet(32, 4, key_size=8, expand=1).double()
    plain = DeltaNet(32, 4).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    rate = mixer.fading.rate.detach().clone()
    with torch.no_grad():
        mixer.fading.rate.fill_(-80.0)
        yield "alpha of one: DeltaNet", largest(mixer.read(x, Causal()) - plain.read(x, Causal()))
        mixer.fading.rate.fill_(80.0)
        q, k, v, _, beta, *_ = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))
        assert beta is not None
        own = beta[..., None] * (q * k).sum(-1, keepdim=True) * v
        yield "alpha of zero: each token reads its own value only", largest(mixer.read(x, Causal()) - own)
        mixer.fading.rate.copy_(rate)
        mixer.alpha.weight.zero_()
        cache = mixer.new_cache()
        mixer(x, Causal(), cache=cache)
        assert cache.state is not None
        before = cache.state
        mixer.beta.weight.copy_(-1e9 * x[0, :1].expand(4, -1))
        mixer(x[:1, :1].expand(2, -1, -1), Causal(), cache=cache)
        left = torch.exp(-rate.exp() * F.softplus(mixer.fading.bias))[None, :, None, None]
        yield "beta of zero: the state only decays", largest(cache.state - left * before)
    made = sized(4, 16, 1)
    maps = sum(part.weight.numel() for part in (made.q, made.k, made.v, made.gate, made.back))
    yield "its large maps have 6 width^2 weights", float(maps - 6 * 64**2)
