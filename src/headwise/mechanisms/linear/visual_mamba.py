"""Visual Mamba: a state space layer that scans one way or both, seen as the matrices by which it mixes tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...attention.stage import Stage
from ...card import Card
from ...errors import ShapeError
from ...recurrence import recur, weights
from ...stages.causal import Causal
from .._mixer import Real, Tokens, largest, shake
from .._norms import rms_normed
from .._states import Pass, Reading, StateCache, StateMixer, begin
from ._matrices import foreground_auc, off_diagonal_rank
from ._scans import Told, Way, backwards

CARD = Card(
    paper="RNN as Linear Transformer: A Closer Investigation into Representational Potentials of Visual Mamba Models",
    year=2025,
    room="linear",
    source=(
        "arXiv:2511.18380, abstract, summaries, and yangtiming/Dino-Mamba, mamba2.py: maps of x shared by both ways; convolutions, "
        "A, bias of steps, D and gated RMS norm (1e-5) of each way; the mean of both mapped back. Its code has no matrices and no "
        "metric: matrices are derived here, and tell what the scan reads, before D, gates and norms. The rank that a state bounds "
        "is that of blocks beside the diagonal; a whole causal matrix has full rank, in linear attention too. How the paper's "
        "binary AUC takes maps from activations is not known for sure; here a ROC AUC of one map. Mamba-1, which the paper speaks "
        "of, as in Mamba and Vim: B, C and steps are made of the convolved tokens, no norm; Vim adds both ways, here their mean. "
        "One group. Grids, class tokens and positions are of the stack"
    ),
)
CORES = ("mamba2", "mamba1")


class VisualMamba(StateMixer):
    """A scan from the first token to the last, and one back, each gated and (Mamba-2) normed; their mean is mapped back.

    What `read` and `weights` give has the heads of the way on, then those of the way back, all in the order of the text.

    Args:
        heads: of expand * width / heads channels; Mamba-1 has one for each channel. core: "mamba2", one decay a head, or "mamba1",
            one for each number of a channel's state. both: whether it scans both ways. state: numbers that each channel keeps;
            default as many as a head has, 16 for Mamba-1. taps: of convolutions; 0 for none. rank: of the map that chooses the
            steps of Mamba-1; default width / 16.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        core: str = "mamba2",
        both: bool = True,
        expand: int = 2,
        state: int | None = None,
        taps: int = 4,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        inner = expand * width
        if core not in CORES or inner % heads:
            raise ShapeError(f"core {core!r} must be one of {', '.join(CORES)}, and {heads} heads divide expand * width = {inner}")
        self.width, self.core, self.both = width, core, both
        state = (inner // heads if core == "mamba2" else 16) if state is None else state
        rank = math.ceil(width / 16) if rank is None else rank
        self.u, self.gate = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        if core == "mamba2":
            self.b, self.c = nn.Linear(width, state, bias=False), nn.Linear(width, state, bias=False)
            self.step = nn.Linear(width, heads, bias=False)
        self.ways = nn.ModuleList(Way(core, inner, heads, state, taps, rank) for _ in range(1 + both))
        self.heads = self.way(0).heads
        self.back = nn.Linear(inner, width, bias=False)
        one, two = "it scans from the first token to the last", "it scans from the last token, too"
        self.cannot = {"causal": two, "decode": two} if both else {"full": one}

    def way(self, at: int) -> Way:
        """The way on, 0, or back, 1."""
        return cast(Way, self.ways[at])

    def _told(self, x: Tokens, now: Pass) -> list[tuple[Way, Told, Pass]]:
        if now.causal == self.both:
            given, wanted = ("with", "without") if self.both else ("without", "with")
            raise ShapeError(f"it was called {given} Causal(), and can only be {wanted}: {next(iter(self.cannot.values()))}")
        maps = {name: getattr(self, name)(x) for name in ("u", "b", "c", "step") if hasattr(self, name)}
        found = [(self.way(0), self.way(0).told(maps, now), now)]
        if self.both:
            then = backwards(now)
            found.append((self.way(1), self.way(1).told({name: t.flip(1) for name, t in maps.items()}, then), then))
        return found

    def reading(self, x: Tokens, now: Pass) -> Reading:
        """See `StateMixer.reading`: what is read forward and what backward, side by side as heads."""
        return self._joined([way.reading(told) for way, told, _ in self._told(x, now)])

    def _joined(self, each: list[Reading]) -> Reading:
        if len(each) == 1:
            return each[0]
        on, back = (reading[:5] for reading in each)
        return Reading(*(torch.cat([cast(Tensor, a), cast(Tensor, b).flip(2)], 1) for a, b in zip(on, back, strict=True)))

    def _read(
        self, x: Tokens, stages: tuple[Stage, ...], cache: StateCache | None, attention_mask: Real | None
    ) -> tuple[Tensor, Reading]:
        if cache is not None and self.both:
            raise ShapeError(f"there is nothing to keep in a cache: {self.cannot['decode']}")
        now = begin(self.new_cache() if cache is None else cache, x, stages, attention_mask)
        outs: list[Tensor] = []
        values: list[Tensor] = []
        for way, told, here in self._told(x, now):
            if way.diagonal and self.form == "chunk" and here.starts is None:
                out, v = way.scan(told, here), told.u.mT[..., None]
            else:
                given = way.reading(told)
                v = given.v
                out, here.cache.state = recur(
                    **given._asdict(), starts=here.starts, state=here.cache.state, real=here.real,
                    form=self.form, chunk=self.chunk, backend=self.backend, last=cache is not None,
                )  # fmt: skip
            outs.append(out.flip(2) if outs else out)
            values.append(v.flip(2) if values else v)
        out, v = torch.cat(outs, 1), torch.cat(values, 1)
        return out, Reading(out[..., :0], out[..., :0], v)

    def weights(self, x: Tokens, *stages: Stage, attention_mask: Real | None = None) -> Float[Tensor, "b h n n"]:
        """The matrix M of each head (Mamba-2) or channel (Mamba-1) and way: M u is what the scan reads, to which D u is added.

        u = `reading(x).v`, the tokens after the way's convolution, before gates. Those of the way back are upper triangular.
        """
        found: list[Tensor] = []
        for way, told, here in self._told(x, begin(self.new_cache(), x, stages, attention_mask)):
            q, k, _, decay, write, *_ = way.reading(told)
            one = weights(q, k, decay=decay, write=write, starts=here.starts, real=here.real)
            found.append(one.flip(2, 3) if found else one)
        return torch.cat(found, 1)

    def beside(self, out: Tensor, given: Reading) -> Tensor:
        """See `StateMixer.beside`: D of each head and way."""
        skip = torch.cat([cast(Way, way).skip for way in self.ways])
        return out + skip[:, None, None] * given.v

    def finish(self, out: Tensor, x: Tokens) -> Tokens:
        """See `StateMixer.finish`: gates and norms of each way, their mean, and the map back."""
        y = out.unflatten(1, (len(self.ways), -1)).transpose(2, 3).flatten(3)  # (b, ways, n, inner)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = y.to(wide) * F.silu(self.gate(x).to(wide))[:, None]
        if self.core == "mamba2":
            y = rms_normed(y, 1e-5) * torch.stack([cast(Way, way).weight for way in self.ways])[:, None].to(wide)
        mapped: Tensor = self.back(y.mean(1).to(x.dtype))
        return mapped


def oracle(mixer: VisualMamba, x: Tensor, visible: Tensor) -> Tensor:
    """One sequence (n, width): each way's recurrence, a token at a time, for each channel by itself."""
    n, total = len(x), torch.zeros_like(x)
    gate = x @ mixer.gate.weight.T
    gate = gate / (1 + torch.exp(-gate))
    for way, order in zip(cast(Any, mixer.ways), (range(n), range(n - 1, -1, -1)), strict=False):
        turned = x[list(order)]

        def near(name: str, way: Any = way, turned: Tensor = turned) -> Tensor:
            rows = turned @ getattr(mixer, name).weight.T
            if name in way.convolutions.weights:
                taps, bias = way.convolutions.weights[name], way.convolutions.biases[name]
                count = taps.shape[1]
                rows = torch.stack(
                    [bias + sum(taps[:, count - 1 - a] * rows[t - a] for a in range(min(t + 1, count))) for t in range(n)]
                )
            return rows / (1 + torch.exp(-rows))

        u = near("u")
        if mixer.core == "mamba1":
            rank, size = way.widen.weight.shape[1], way.rate.shape[1]
            chosen = u @ way.choose.weight.T
            step, b, c = chosen[:, :rank] @ way.widen.weight.T, chosen[:, rank : rank + size], chosen[:, rank + size :]
            rate, of_channel = torch.exp(way.rate), torch.arange(u.shape[1])
        else:
            step, b, c = turned @ mixer.step.weight.T, near("b"), near("c")
            of_channel = torch.arange(u.shape[1]) // (u.shape[1] // step.shape[1])
            rate = torch.exp(way.rate)[of_channel][:, None]
        step = torch.log(1 + torch.exp(step + way.bias))[:, of_channel]
        state, rows = torch.zeros(u.shape[1], b.shape[1], dtype=x.dtype), [x[0]] * n
        for t, place in enumerate(order):
            state = torch.exp(-rate * step[t][:, None]) * state + torch.outer(step[t] * u[t], b[t])
            y = (state @ c[t] + way.skip[of_channel] * u[t]) * gate[place]
            if mixer.core == "mamba2":
                y = y / torch.sqrt((y * y).sum() / len(y) + 1e-5) * way.weight
            rows[place] = mixer.back.weight @ y
        total = total + torch.stack(rows) / len(mixer.ways)
    return total


def _random(mixer: VisualMamba) -> VisualMamba:
    """With all vectors off their start, and steps large enough to matter."""
    shake((p for name, p in mixer.named_parameters() if p.dim() == 1 or name.endswith("rate")), seed=2)
    with torch.no_grad():
        for way in mixer.ways:
            cast(Way, way).bias.add_(2.0)
    return mixer


def examples(heads: int, size: int) -> list[VisualMamba]:
    """Settings that the conformance checks run."""
    width = heads * size
    return [
        _random(VisualMamba(width, heads)),
        _random(VisualMamba(width, heads // 2, both=False, expand=1, state=6, taps=0)),
        _random(VisualMamba(width, heads, core="mamba1", both=False, expand=1, state=3, taps=3)),
        _random(VisualMamba(width, heads, core="mamba1", expand=1, state=4, taps=2, rank=3)),
    ]


def sized(heads: int, size: int, tokens: int, **options: Any) -> VisualMamba:
    """The authors': Mamba-2 both ways, twice the width inside, a state as large as a head (64 and 64 at heads of 32)."""
    return VisualMamba(heads * size, heads, **options)


@torch.no_grad()
def identities() -> Iterator[tuple[str, float]]:
    """What the formula promises, and how far off it is."""
    torch.manual_seed(0)
    x = 4 * torch.randn(2, 24, 16, dtype=torch.float64)
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    for core in CORES:
        mixer = _random(VisualMamba(16, 4, core=core, both=False, state=4)).double()
        way, told, _ = mixer._told(x, begin(mixer.new_cache(), x, (Causal(),), None))[0]
        step, rate, given = way.steps(told).mT, way.rate.exp(), way.reading(told)
        passed = step.cumsum(-1)[..., None] - step.cumsum(-1)[:, :, None]  # (b, heads, t, s)
        kept = torch.exp(-passed.masked_fill(later, torch.inf)[..., None] * rate.view(1, way.heads, 1, 1, -1))
        found = torch.einsum("btm,bhtsm,bsm,bhs->bhts", told.c, kept.expand(-1, -1, -1, -1, 4), told.b, step)
        yield f"{core}: its matrix is C_t exp(A (steps between)) B_s step_s", largest(mixer.weights(x, Causal()) - found)
        scanned = mixer.beside(mixer.read(x, Causal()), given)
        mixed = found @ given.v + way.skip[:, None, None] * given.v
        yield f"{core}: the matrix times u, and D u, are the scan", largest(mixed - scanned)
        ranks = off_diagonal_rank(found, 8), torch.linalg.matrix_rank(found)
        told_of = f"{core}: blocks beside the diagonal have the rank of the state, the whole matrix full rank"
        yield told_of, float((ranks[0] - 4).abs().max() + (ranks[1] - 24).abs().max())
        way.rate.fill_(-800.0)
        for map_ in (mixer.step,) if core == "mamba2" else (way.widen,):
            map_.weight.zero_()
        way.bias.fill_(1.0).expm1_().log_()
        plain = (told.c @ told.b.mT).tril()[:, None]
        yield f"{core}: no decay and steps of one are causal linear attention", largest(mixer.weights(x, Causal()) - plain)
        both = _random(VisualMamba(16, 4, core=core, state=4)).double()
        turned = VisualMamba(16, 4, core=core, state=4).double()
        turned.load_state_dict(both.state_dict())
        turned.ways = nn.ModuleList([both.ways[1], both.ways[0]])
        yield (
            f"{core}: a text backwards, its ways exchanged, gives the same backwards",
            largest(turned(x.flip(1)).flip(1) - both(x)),
        )
    both = _random(VisualMamba(16, 4, core="mamba1", state=4, taps=0)).double()
    on, back = both.weights(x).chunk(2, 1)
    u, skip = F.silu(both.u(x)).mT[..., None], (both.way(0).skip + both.way(1).skip)[:, None, None]
    mixed = ((on + back) @ u + skip * u)[..., 0].mT / 2
    yield (
        "without convolutions, both ways are one matrix: half their sum",
        largest(both(x) - both.back(F.silu(both.gate(x)) * mixed)),
    )
    yield "which is lower triangular one way, upper the other", largest(torch.cat([on.triu(1), back.tril(-1)]))
    yield (
        "both ways do not raise the rank of blocks, for each has one way",
        float((off_diagonal_rank(on + back, 8) - 4).abs().max()),
    )

    mask = torch.rand(3, 5, 7) < 0.4
    noise = torch.randn(3, 5, 7, dtype=torch.float64).round(decimals=1)
    scores = torch.stack([foreground_auc(mask.double(), mask), 1 - foreground_auc(-mask.double(), mask)])
    yield "the mask as a map scores 1, its opposite 0", largest(scores - 1)
    pairs = [
        ((a[m][:, None] > a[~m]).double() + (a[m][:, None] == a[~m]).double() / 2).mean() for a, m in zip(noise, mask, strict=True)
    ]
    yield "it counts pairs in which the foreground has more, ties half", largest(foreground_auc(noise, mask) - torch.stack(pairs))
    with torch.device("meta"):
        small = sized(16, 32, 197)
    inward, each = 512 * (2 * 1024 + 2 * 64 + 16), (1024 + 2 * 64) * 5 + 3 * 16 + 1024
    counted = sum(p.numel() for p in small.parameters())
    yield "as many parameters as the authors' block of width 512", float(abs(counted - inward - 2 * each - 1024 * 512))
