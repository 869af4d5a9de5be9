"""TransNormerLLM's token mixer: decayed linear attention with LRPE, SimpleRMSNorm and a gate, decoded without overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...card import Card
from ...errors import ShapeError
from ...stages.causal import Causal
from .._mixer import largest, shake
from .._states import begin
from ._lightning import ACTIVATIONS, GatedNormAttention, log_decays

CARD = Card(
    paper="Scaling TransNormer to 175 Billion Parameters",
    year=2023,
    room="linear",
    source=(
        "arXiv:2307.14995, sec. 3, and the ablations printed again in arXiv:2405.17381, tables 4 to 8: LRPE-d scores "
        'q_t k_s lambda^(t - s) cos(theta (t - s)), in the first layer only ("mix"), SimpleRMSNorm over all heads together '
        "(with 1e-6), a gate without activation. lambda = exp(-8h/H (1 - l/L)) with h from 0 and l from 1, so that head 0 and "
        'the last layer never decay; the released code has ALiBi\'s slopes instead, `schedule="slopes"`. Its state is the '
        "robust recurrence, S = lambda S + k v^T. Left out: absolute positions, and the other norms of the ablation"
    ),
)
POSITIONS = ("mix", "lrpe-d", "decay", "lrpe")


class TransNormerLlm(GatedNormAttention):
    """out_t = SimpleRMSNorm(sum over s of q_t k_s lambda^(t - s) cos(theta (t - s)) v_s) * u_t.

    Args:
        heads: of width / heads. layer, layers: later layers decay more slowly, unless `temperature` is False.
        positions: "mix" (decay, and LRPE in layer 0), "lrpe-d" (both), "decay" or "lrpe" (one of them). schedule: of the decay,
            "paper" or "slopes"; see `CARD`. activation: of queries and keys, "swish", "1+elu" or "none". gate: whether there
            is one.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer: int = 0,
        layers: int = 12,
        *,
        positions: str = "mix",
        schedule: str = "paper",
        temperature: bool = True,
        activation: str = "swish",
        gate: bool = True,
    ) -> None:
        if positions not in POSITIONS:
            raise ShapeError(f"positions {positions!r} must be one of {', '.join(POSITIONS)}")
        if activation not in ACTIVATIONS:
            raise ShapeError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
        logs = log_decays(heads, layer, layers, schedule, temperature)
        turned = positions.startswith("lrpe") or (positions == "mix" and layer == 0)
        super().__init__(width, heads, [0.0] * heads if positions == "lrpe" else logs, turned, gate)
        self.activation = ACTIVATIONS[activation]
        self.named = activation


def oracle(mixer: TransNormerLlm, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every output a sum over the tokens before it, by the formula of its scores."""
    size, rows = mixer.size, []

    def features(z: Tensor) -> Tensor:
        if mixer.named == "swish":
            return z * torch.sigmoid(z)
        return torch.where(z > 0, 1 + z, torch.exp(z)) if mixer.named == "1+elu" else z

    q, k, v = (x @ f.weight.T for f in (mixer.q, mixer.k, mixer.v))
    q, k = features(q), features(k)
    for t in range(len(x)):
        read = []
        for head in range(mixer.heads):
            own, out = slice(head * size, (head + 1) * size), x.new_zeros(size)
            kept = torch.tensor(mixer.logs[head], dtype=x.dtype).exp()
            for s in range(len(x)):
                if visible[t, s]:
                    turned = 1.0 if mixer.lrpe is None else torch.cos(mixer.lrpe.theta[head] * (t - s))
                    out = out + kept ** (t - s) * (q[t, own] * k[s, own] * turned).sum() * v[s, own]
            read.append(out)
        row = torch.cat(read)
        row = row / torch.sqrt((row * row).mean() + 1e-6)
        rows.append(mixer.out.weight @ (row if mixer.u is None else row * (mixer.u.weight @ x[t])))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[TransNormerLlm]:
    """Settings that the conformance checks run."""
    made = [
        TransNormerLlm(heads * size, heads, 0, 4),
        TransNormerLlm(heads * size, heads // 2, 1, 4, positions="lrpe", activation="1+elu", gate=False),
        TransNormerLlm(heads * size, heads, 1, 3, positions="lrpe-d", schedule="slopes", activation="none"),
        TransNormerLlm(heads * size, heads, 1, 3, positions="decay", temperature=False),
    ]
    shake([mixer.lrpe.theta for mixer in made if mixer.lrpe is not None], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> TransNormerLlm:
    """The paper's: decay in every layer, LRPE in the first."""
    return TransNormerLlm(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 41, 32, dtype=torch.float64)

    def off(logs: list[float], wanted: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(logs, wanted, strict=True))

    yield "lambda = exp(-8h/H (1 - l/L)): 4 heads, second of 4 layers", off(TransNormerLlm(32, 4, 1, 4).logs, [0, -1, -2, -3])
    yield "without temperature: the same in each layer", off(TransNormerLlm(32, 4, 3, 4, temperature=False).logs, [0, -2, -4, -6])
    yield "the last layer does not decay", off(TransNormerLlm(32, 4, 3, 4).logs, [0.0] * 4)
    yield "LRPE alone does not decay", off(TransNormerLlm(32, 4, 1, 4, positions="lrpe").logs, [0.0] * 4)
    turned = [TransNormerLlm(32, 4, layer, 4, positions=name).lrpe is not None for name in POSITIONS for layer in (0, 1)]
    turned += [TransNormerLlm(32, 4, layer, 4).lrpe is not None for layer in (0, 1)]
    yield "which layers have LRPE", float(turned != [True, False, True, True, False, False, True, True, True, False])
    bare = TransNormerLlm(32, 4, 3, 4, gate=False).double()
    mixer = TransNormerLlm(32, 4, 1, 4, positions="lrpe-d").double()
    with torch.no_grad():
        q, k, v = bare.reading(x, begin(bare.new_cache(), x, (), None))[:3]
        sums = ((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2)
        normed = bare.out(sums / (sums.square().mean(-1, keepdim=True) + 1e-6).sqrt())
        yield "no decay, no gate: TransNormer's NormAttention", largest(bare(x, Causal()) - normed)
        shown = mixer.weights(x[:, :1].expand(-1, 41, -1), Causal())
        yield "scores depend on the distance only", largest(shown[..., 1:, 1:] - shown[..., :-1, :-1])
        given = mixer.reading(x, begin(mixer.new_cache(), x, (), None))
        place = torch.arange(41) * torch.tensor(mixer.logs, dtype=torch.float64)[:, None]
        grown = torch.einsum("bhnd,bhne,hn->bhnde", given.k, given.v, (-place).exp()).cumsum(2)
        naive = torch.einsum("bhnd,bhnde,hn->bhne", given.q, grown, place.exp())
        yield "few tokens: the recurrence that grows by lambda^-t and later overflows", largest(mixer.read(x, Causal()) - naive)
