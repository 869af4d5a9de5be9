"""Lightning Attention-2: decayed linear attention in tiles, quadratic within a tile and a state between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur
from ...stages.causal import Causal
from .._mixer import Tokens, largest, shake
from .._norms import layer_norm
from .._states import Pass, Reading, StateMixer, begin
from ._lightning import decay_of, log_decays

CARD = Card(
    paper="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    year=2024,
    room="linear",
    source=(
        "arXiv:2401.04658, sec. 3, and OpenNLPLab/lightning-attention, whose example of a layer this is: SiLU on queries, keys "
        "and values, layer norm over all heads together, a sigmoid gate of low rank. Its decays are ALiBi's slopes times "
        '1 - l / (L - 1) + 1e-5; `schedule="paper"` is exp(-8h/H (1 - l/L)) instead, another one. With one layer, by whose '
        "number minus one the code divides, the factor is that of the first. Tiles of 64. No scale, no normaliser"
    ),
)


class LightningAttention2(StateMixer):
    """S_t = lambda S_(t-1) + k_t v_t^T, read by S_t^T q_t, with one fixed lambda for each head.

    Args:
        heads: of width / heads. layer, layers: later layers decay more slowly. schedule: "slopes" or "paper"; see `CARD`.
        tile: tokens between which the quadratic form is used; any number gives the same.
    """

    cannot = {"full": "its decay takes tokens in their order"}

    def __init__(
        self, width: int, heads: int, layer: int = 0, layers: int = 12, *, schedule: str = "slopes", tile: int = 64
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"width {width} is no multiple of {heads} heads")
        self.width, self.heads, self.chunk = width, heads, tile
        self.logs = log_decays(heads, layer, layers, schedule)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Sequential(nn.Linear(width, width // heads, bias=False), nn.Linear(width // heads, width, bias=False))

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`."""
        q, k, v = (F.silu(f(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return Reading(q, k, v, decay_of(self.logs, x))

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`."""
        mapped: Tensor = self.out(layer_norm(self.norm, out.transpose(1, 2).flatten(2)) * torch.sigmoid(self.gate(x)))
        return mapped


def oracle(mixer: LightningAttention2, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): every output a sum over the tokens before it."""
    n, size = len(x), mixer.width // mixer.heads

    def swish(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    q, k, v = (swish(x @ f.weight.T) for f in (mixer.q, mixer.k, mixer.v))
    rows = []
    for i in range(n):
        read = []
        for head in range(mixer.heads):
            own, kept = slice(head * size, (head + 1) * size), torch.tensor(mixer.logs[head], dtype=x.dtype).exp()
            parts = [kept ** (i - j) * (q[i, own] @ k[j, own]) * v[j, own] for j in range(n) if visible[i, j]]
            read.append(sum(parts[1:], parts[0]))
        row = torch.cat(read)
        centred = row - row.mean()
        normed = centred / torch.sqrt((centred * centred).mean() + 1e-5) * mixer.norm.weight + mixer.norm.bias
        gate = 1 / (1 + torch.exp(-(mixer.gate[1].weight @ (mixer.gate[0].weight @ x[i]))))  # type: ignore[operator]
        rows.append(mixer.out.weight @ (normed * gate))
    return torch.stack(rows)


def examples(heads: int, size: int) -> list[LightningAttention2]:
    """Settings that the conformance checks run."""
    made = [
        LightningAttention2(heads * size, heads, 1, 4),
        LightningAttention2(heads * size, heads // 2, 2, 3, tile=5),
        LightningAttention2(heads * size, heads, 0, 2, schedule="paper"),
    ]
    for mixer in made:
        shake([mixer.norm.weight, mixer.norm.bias], seed=2)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> LightningAttention2:
    """The paper's: tiles of 64."""
    return LightningAttention2(heads * size, heads, **options)


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = torch.randn(2, 45, 32, dtype=torch.float64)

    first, last = (LightningAttention2(32, 4, layer, 5) for layer in (0, 4))
    wanted = [-(2.0 ** (-2 * h)) for h in (1, 2, 3, 4)]
    yield (
        "4 heads of the first layer: slopes of 1/4, 1/16, 1/64, 1/256",
        max(abs(a - 1.00001 * b) for a, b in zip(first.logs, wanted, strict=True)),
    )
    yield "the last layer: a hundred thousandth of them", max(abs(a - 1e-5 * b) for a, b in zip(last.logs, wanted, strict=True))
    half = LightningAttention2(32, 4, 1, 4, schedule="paper").logs
    yield "the paper's: exp(-8h/H (1 - l/L))", max(abs(a + b) for a, b in zip(half, (0.0, 1.0, 2.0, 3.0), strict=True))
    six = LightningAttention2(48, 6, 0, 5).logs
    more = [-1.00001 * 2.0**-power for power in (2, 4, 6, 8, 1, 3)]
    yield "6 heads: the slopes of 4 and every second one of 8", max(abs(a - b) for a, b in zip(six, more, strict=True))
    mixer = LightningAttention2(32, 4, 1, 4).double()
    with torch.no_grad():
        given = mixer.reading(x, begin(mixer.new_cache(), x, (), None))
        q, k, v = given.q, given.k, given.v
        mixer.logs = [0.0] * 4
        yield "no decay: causal linear attention", largest(mixer.read(x, Causal()) - (q @ k.mT).tril() @ v)
        mixer.logs = [-50.0] * 4
        yield "a fast decay: each token reads itself", largest(mixer.read(x, Causal()) - (q * k).sum(-1, keepdim=True) * v)
        rate, tile = torch.tensor([-0.3, -0.1, -0.02, 0.0], dtype=torch.float64), 16
        state, outs = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
        place = torch.arange(1, tile + 1)
        for at in range(0, 48, tile):  # the paper's algorithm, with its own powers of lambda
            a, b, c = (F.pad(t, (0, 0, 0, 3))[:, :, at : at + tile] for t in (q, k, v))
            inside = (a @ b.mT) * (rate[:, None, None] * (place[:, None] - place)).exp().tril()
            outs.append(inside @ c + (rate[:, None, None] * place[:, None]).exp() * (a @ state))
            left = (rate[:, None, None] * (tile - place)[:, None]).exp()
            state = (tile * rate[:, None, None]).exp() * state + (left * b).mT @ c
        tiled = torch.cat(outs, 2)[:, :, :45]
        mixer.logs = rate.tolist()
        yield "the paper's tiles of 16: the same", largest(mixer.read(x, Causal()) - tiled)
    yield "the paper's backward pass: the gradients", _backward_off(q, k, v, rate)


def _backward_off(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> float:
    """How far the paper's gradients, computed in its tiles of 9, are from those of the recurrence; all (b, h, 45, d)."""
    n, tile = q.shape[2], 9
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = recur(*leaves, decay=rate[None, :, None].expand(2, -1, n)).out
    given = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    right = torch.autograd.grad((out * given).sum(), leaves)
    place, rate = torch.arange(1, tile + 1), rate[:, None, None]
    mask = (rate * (place[:, None] - place)).exp().tril()
    ahead, left = (rate * place[:, None]).exp(), (rate * (tile - place)[:, None]).exp()
    parts = [[t[:, :, at : at + tile] for t in (q, k, v, given)] for at in range(0, n, tile)]
    dq: list[Tensor] = []
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    state = torch.zeros_like(q[:, :, :8].mT @ v[:, :, :8])
    for _, b, c, g in parts:
        dq.append(((g @ c.mT) * mask) @ b + ahead * (g @ state.mT))
        state = (tile * rate).exp() * state + (left * b).mT @ c
    state = torch.zeros_like(state)
    for a, b, c, g in reversed(parts):
        dk.insert(0, ((g @ c.mT) * mask).mT @ a + left * (c @ state.mT))
        dv.insert(0, ((a @ b.mT) * mask).mT @ g + left * (b @ state))
        state = (tile * rate).exp() * state + (ahead * a).mT @ g
    return max(largest(torch.cat(mine, 2) - theirs) for mine, theirs in zip((dq, dk, dv), right, strict=True))
