"""Enhanced multi-head attention: every query head scores every key head, and two small networks settle on one score a head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...attention import attend
from ...attention.stage import Block, RowScore, Stage
from ...card import Card
from ...errors import ShapeError
from ...stages.alibi import Alibi
from ...stages.causal import Causal
from .._mixer import Attention, Keys, Mechanism, Outputs, Positions, Queries, Values, largest, shake

CARD = Card(
    paper="EIT: Enhanced Interactive Transformer",
    year=2022,
    room="heads",
    source=(
        "arXiv:2212.10197: scores of all pairs of query and key heads, then two 1x1 convolutions within each query head "
        "(inner-subspace) and two over heads (cross-subspace), each pair with ReLU between; E-EIT has one of each. No code of the "
        "authors is public. Hidden sizes are those of an unofficial port, whose faults are left out: it has neither softmax nor "
        "mask, scales by the width and lets heads never meet. Not known: kernel sizes, and whether mask and softmax come last. It "
        "starts as plain attention, by units that carry +s and -s; the port starts at random"
    ),
    status="structure after the abstract and an unofficial port; the paper's hidden sizes and start are not known",
)


@dataclass(frozen=True, eq=False)
class Interaction(RowScore):
    """The scores of every query head with every key head, through both networks. Fields: see `Eit`; no cross_in: E-EIT."""

    inner_in: Tensor
    inner_bias: Tensor
    inner_out: Tensor | None
    middle_bias: Tensor | None
    cross_in: Tensor | None
    cross_bias: Tensor | None
    cross_out: Tensor

    def score_rows(self, scores: Tensor, block: Block) -> Tensor:
        q, k = block.query.to(scores), block.key.to(scores)
        hidden = torch.relu(self._inner(q, k) + self.inner_bias.to(q)[None, :, :, None, None])
        if self.inner_out is None or self.middle_bias is None or self.cross_in is None or self.cross_bias is None:
            return torch.einsum("gw,bwcm->bgcm", self.cross_out.to(q), hidden.flatten(1, 2))
        inner = torch.einsum("hu,bhucm->bhcm", self.inner_out.to(q), hidden) + self.middle_bias.to(q)[:, None, None]
        crossed = torch.einsum("wh,bhcm->bwcm", self.cross_in.to(q), inner) + self.cross_bias.to(q)[:, None, None]
        return torch.einsum("gw,bwcm->bgcm", self.cross_out.to(q), torch.relu(crossed))

    def _inner(self, q: Tensor, k: Tensor) -> Tensor:
        """(b, h, units, c, m): sum_j w_iuj q_i . k_j, by whichever order of sums takes fewer multiply-adds."""
        (heads, units, _), (_, _, rows, d) = self.inner_in.shape, q.shape
        weight, q = self.inner_in.to(q), q * d**-0.5
        if units * d * (rows + heads) < heads * rows * (d + units):  # mixing keys first
            return torch.einsum("bhcd,bhumd->bhucm", q, torch.einsum("huj,bjmd->bhumd", weight, k))
        return torch.einsum("huj,bhjcm->bhucm", weight, torch.einsum("bhcd,bjmd->bhjcm", q, k))


class Eit(Mechanism):
    """Lets every query head score every key head; a small network in each head and one over heads make one score of them.

    Args:
        heads: of queries. inner: hidden units of each head's network, default 8, or 2 if `efficient`; cross: of the one over heads,
            default 4 heads. efficient: one layer of each with ReLU between, in the place of two.
    """

    def __init__(self, heads: int, *, inner: int | None = None, cross: int | None = None, efficient: bool = False) -> None:
        super().__init__()
        units = (2 if efficient else 8) if inner is None else inner
        wide = heads * units if efficient else 4 * heads if cross is None else cross
        if efficient and cross is not None:
            raise ShapeError(f"the efficient form has no second hidden layer; leave cross={cross} out")
        if units < 2 or wide < 2 * heads:
            raise ShapeError(
                f"{units} units in a head and {wide} over {heads} heads; it needs 2 and {2 * heads} to start as attention"
            )
        self.heads = heads
        own = torch.eye(heads)
        self.inner_in = _random(heads, units, heads)
        self.inner_bias = nn.Parameter(torch.zeros(heads, units))
        # two units carry +s and -s of a head's own score, of which max(s, 0) - max(-s, 0) makes s again; what the others
        # find is not used at first
        with torch.no_grad():
            self.inner_in[:, 0], self.inner_in[:, 1] = own, -own
        pair = torch.zeros(heads, units)
        pair[:, 0], pair[:, 1] = 1.0, -1.0
        self.inner_out = self.middle_bias = self.cross_in = self.cross_bias = None
        if efficient:
            self.cross_out = nn.Parameter((own[:, :, None] * pair).flatten(1))
            return
        self.inner_out, self.middle_bias = nn.Parameter(pair), nn.Parameter(torch.zeros(heads))
        self.cross_in, self.cross_bias = _random(wide, heads), nn.Parameter(torch.zeros(wide))
        with torch.no_grad():
            self.cross_in[:heads], self.cross_in[heads : 2 * heads] = own, -own
        self.cross_out = nn.Parameter(torch.cat([own, -own, torch.zeros(heads, wide - 2 * heads)], 1))
        # the last layer's bias would be the same for all keys, which softmax does not see

    def forward(self, q: Queries, k: Keys, v: Values, *stages: Stage, **places: Unpack[Positions]) -> Outputs:
        """See `Mechanism.forward`. The caller's scores and biases come after the networks."""
        if q.shape[1] != self.heads:
            raise ShapeError(f"queries have {q.shape[1]} heads, the networks were made for {self.heads}; make it of as many")
        networks = (self.inner_out, self.middle_bias, self.cross_in, self.cross_bias, self.cross_out)
        return attend(q, k, v, Interaction(self.inner_in, self.inner_bias, *networks), *stages, **places)


def _random(*shape: int) -> nn.Parameter:
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def oracle(mechanism: Eit, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One sequence, q (h, n, d), k and v (hk, m, d): (h, n, d), by explicit loops over pairs of heads."""
    h, n, d = q.shape
    group = h // k.shape[0]
    settled = []
    for i in range(h):
        maps = [q[i] @ k[j // group].T / d**0.5 for j in range(h)]
        units = []
        for u in range(mechanism.inner_in.shape[1]):
            total = mechanism.inner_bias[i, u] + sum(mechanism.inner_in[i, u, j] * maps[j] for j in range(h))
            units.append(torch.where(total > 0, total, 0.0))
        settled.append(units)
    if mechanism.cross_in is None or mechanism.cross_bias is None:
        hidden = [unit for units in settled for unit in units]
    else:
        assert mechanism.inner_out is not None
        assert mechanism.middle_bias is not None
        inner = [
            mechanism.middle_bias[i] + torch.stack([mechanism.inner_out[i, u] * unit for u, unit in enumerate(units)]).sum(0)
            for i, units in enumerate(settled)
        ]
        hidden = []
        for row, bias in zip(mechanism.cross_in, mechanism.cross_bias, strict=True):
            total = bias + sum(row[i] * inner[i] for i in range(h))
            hidden.append(torch.where(total > 0, total, 0.0))
    out = []
    for i in range(h):
        scores = torch.stack([mechanism.cross_out[i, w] * unit for w, unit in enumerate(hidden)]).sum(0)
        rows = []
        for t in range(n):
            seen = visible[t].nonzero().flatten()
            e = torch.exp(scores[t, seen] - scores[t, seen].max().detach())
            rows.append((e / e.sum()) @ v[i // group, seen])
        out.append(torch.stack(rows))
    return torch.stack(out)


def examples(heads: int, size: int) -> list[Eit]:
    """Settings that the conformance checks run."""
    return [_shaken(Eit(heads)), _shaken(Eit(heads, inner=2, cross=2 * heads)), _shaken(Eit(heads, efficient=True))]


def _shaken(made: Eit) -> Eit:
    shake(made.parameters(), seed=5)
    return made


def sized(heads: int, size: int, tokens: int, **options: Any) -> Eit:
    """Two layers in each head and two over heads."""
    return Eit(heads, **options)


def neutral(heads: int, size: int) -> list[Eit]:
    """Settings that are plain attention: at the start of training."""
    return [Eit(heads), Eit(heads, efficient=True)]


def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 40, 8, dtype=torch.float64)
    eit, efficient = _shaken(Eit(4)).double(), _shaken(Eit(4, efficient=True)).double()
    alone = torch.cat([efficient(q[:, :, t : t + 1], k, v) for t in range(40)], 2)
    yield "mixing keys first, for many queries, or scores, for one, is the same", largest(efficient(q, k, v) - alone)
    stage = Interaction(efficient.inner_in, efficient.inner_bias, None, None, None, None, efficient.cross_out)
    block = Block(q, k, *(torch.arange(40),) * 2, *(torch.arange(40)[None],) * 2)
    scores = q @ k.mT
    with FlopCounterMode(display=False) as counter:
        stage.score_rows(scores, block)
    pairs = 2 * 40 * 40  # of 2 rows of the batch
    spent = 2 * 4 * (pairs * (8 + 4) + 4 * 2 * 40 * 8)
    yield (
        "the efficient form takes 2 h (d + h) multiply-adds a pair, and 2 h^2 d a key",
        float(abs(counter.get_total_flops() / 2 - spent)),
    )
    slopes = Alibi(torch.tensor([0.5, 0.25, 0.1, 0.0]))
    yield "a caller's bias comes after", largest(Eit(4).double()(q, k, v, slopes) - attend(q, k, v, slopes))
    order = torch.tensor([2, 0, 3, 1])
    moved = copy.deepcopy(eit)
    with torch.no_grad():
        moved.inner_in.copy_(eit.inner_in[:, :, order])
    yield "key heads may be reordered with the weights that read them", largest(moved(q, k[:, order], v) - eit(q, k, v))
    opened = copy.deepcopy(eit)
    assert opened.cross_in is not None
    assert opened.cross_bias is not None
    with torch.no_grad():
        opened.inner_bias.fill_(1e3)
        opened.cross_bias.fill_(1e5)
        mixed = torch.einsum("hu,huj,bjmd->bhmd", opened.inner_out, opened.inner_in, k)  # which W_K could hold
        heads = opened.cross_out @ opened.cross_in
        scores = torch.einsum("gh,bhnm->bgnm", heads, q @ mixed.mT / 8**0.5)  # talking heads before softmax
    yield "with every ReLU open, key heads and then scores are mixed linearly", largest(opened(q, k, v) - scores.softmax(-1) @ v)
    later = k.clone()
    later[:, :, 25:] += 1.0
    yield "no key is read before its time", largest((eit(q, later, v, Causal()) - eit(q, k, v, Causal()))[:, :, :25])
    counted = sum(parameter.numel() for parameter in Eit(12).parameters())
    inner, cross = 12 * 8 * 12 + 12 * 8 + 12 * 8 + 12, 48 * 12 + 48 + 12 * 48
    yield (
        "h h_isi + h_isi + 2 h h_csi weights and their biases: 2556 in a layer of 12 heads",
        float(abs(counted - inner - cross) + abs(counted - 2556)),
    )
    caches = []
    for mechanism in (None, Eit(4)):
        mixer = Attention(32, 4, mechanism)
        cache = mixer.new_cache()
        mixer(torch.randn(1, 9, 32), Causal(), cache=cache)
        caches.append(cache.nbytes)
    yield "it keeps what plain attention keeps", float(abs(caches[0] - caches[1]))
