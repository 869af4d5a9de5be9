"""TNL's token mixer: lightning attention with decay, LRPE in the first layer, a norm without weights and a linear gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...stages.causal import Causal
from .._mixer import largest, shake
from .._states import begin
from ._lightning import GatedNormAttention, log_decays

CARD = Card(
    paper="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    room="linear",
    source=(
        "arXiv:2405.17381, secs. 3 and 4, algorithm 5, and the modelling file of the released models: O = SRMSNorm(Q K^T V) * U, "
        "swish on queries and keys, none on values and the gate; SRMSNorm over all heads together, with 1e-6 as in the authors' "
        "kernels; LRPE in the first layer only, which doubles the state there. Decays as in the released code, ALiBi's slopes "
        'times 1 - l / (L - 1) + 1e-5; `schedule="paper"` is eq. 10, exp(-8h/H (1 - l/L)) with h from 0 and l from 1, another '
        "one. Blocks of as many tokens as a head has channels, as the paper chooses. The channel mixer (SGLU) is no part of it"
    ),
)


class LightningAttentionTnl(GatedNormAttention):
    """S_t = lambda S_(t-1) + k_t v_t^T; SRMSNorm(S_t^T q_t) * u_t.

    Args:
        heads: of width / heads. layer, layers: later layers decay more slowly. schedule: "slopes" or "paper"; see `CARD`.
        lrpe: whether queries and keys are turned by learned angles; default in layer 0 only. block: tokens within which the
            quadratic form is used, default width / heads; any number gives the same.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer: int = 0,
        layers: int = 12,
        *,
        schedule: str = "slopes",
        lrpe: bool | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(width, heads, log_decays(heads, layer, layers, schedule), layer == 0 if lrpe is None else lrpe)
        self.chunk = self.size if block is None else block


def oracle(mixer: LightningAttentionTnl, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width), a token at a time, with complex states that turn as they decay."""
    size, rows = mixer.size, []
    states = [torch.zeros(size, size, dtype=torch.complex128) for _ in range(mixer.heads)]

    def swish(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    assert mixer.u is not None
    for t in range(len(x)):
        q, k, v, u = (f.weight @ x[t] for f in (mixer.q, mixer.k, mixer.v, mixer.u))
        read = []
        for head in range(mixer.heads):
            own = slice(head * size, (head + 1) * size)
            angle = torch.zeros(size, dtype=x.dtype) if mixer.lrpe is None else mixer.lrpe.theta[head]
            turn = torch.complex(torch.cos(angle), torch.sin(angle))
            kept = torch.tensor(mixer.logs[head], dtype=x.dtype).exp()
            states[head] = kept * turn[:, None] * states[head] + torch.outer(swish(k[own]), v[own])
            read.append(swish(q[own]) @ states[head].real)
        row = torch.cat(read)
        rows.append(mixer.out.weight @ (row / torch.sqrt((row * row).mean() + 1e-6) * u))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LightningAttentionTnl]:
    """Settings that the conformance checks run."""
    made = [
        LightningAttentionTnl(heads * size, heads, 0, 4),
        LightningAttentionTnl(heads * size, heads // 2, 2, 4, block=5),
        LightningAttentionTnl(heads * size, heads, 1, 3, schedule="paper", lrpe=True),
    ]
    shake([mixer.lrpe.theta for mixer in made if mixer.lrpe is not None], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> LightningAttentionTnl:
    """The paper's: blocks of width / heads, LRPE in the first layer."""
    return LightningAttentionTnl(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    first, second = (LightningAttentionTnl(32, 4, layer, 3).double() for layer in (0, 1))
    assert first.lrpe is not None
    yield "only the first layer has LRPE", float(second.lrpe is not None)
    wanted = [-0.50001 * 2.0**-power for power in (2, 4, 6, 8)]
    yield "slopes of 4 heads in the middle layer", max(abs(a - b) for a, b in zip(second.logs, wanted, strict=True))
    start = [10000 ** (-2 * c / 32) for c in range(32)]
    yield (
        "angles at first: 10000^(-2c / width), c over all heads' channels",
        float((first.lrpe.theta.detach().flatten() - torch.tensor(start, dtype=torch.float64)).abs().max() > 1e-6),
    )
    yield "blocks of width / heads tokens", float(first.chunk != 8)
    with torch.no_grad():
        same = x[:, :1].expand(-1, 41, -1)
        shown = first.weights(same, Causal())
        yield "LRPE: weights depend on the distance only", largest(shown[..., 1:, 1:] - shown[..., :-1, :-1])
        given = second.reading(x, begin(second.new_cache(), x, (), None))
        first.load_state_dict({**second.state_dict(), "lrpe.theta": torch.zeros(4, 8)})
        first.logs = second.logs
        yield "angles of zero: no positions", largest(first(x, Causal()) - second(x, Causal()))
        second.logs = [0.0] * 4
        plain = (given.q @ given.k.mT).tril() @ given.v
        yield "no decay: causal linear attention", largest(second.read(x, Causal()) - plain)
        second.logs = [-50.0] * 4
        alone = (given.q * given.k).sum(-1, keepdim=True) * given.v
        yield "a fast decay: each token reads itself", largest(second.read(x, Causal()) - alone)
        second.v.weight.mul_(1e6)
        before = second(x, Causal())
        second.v.weight.mul_(1e3)
        yield "SRMSNorm: values of another size change nothing", largest(second(x, Causal()) - before)
