"""Attention with biases, caps and sparse weights, and every mechanism, beside fused softmax attention and FlexAttention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .. import registry
from ..attention import attend
from ..attention.stage import Stage
from ..card import Card
from ..mechanisms import Attention, Mechanism
from ..stages.alibi import Alibi
from ..stages.causal import Causal
from ..stages.entmax import Entmax
from ..stages.low_rank_bias import LowRankBias
from ..stages.relative_bias import RelativeBias
from ..stages.softcap import Softcap
from ._measure import Row, Table, collected, measured

CARD = Card(
    paper="Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
    year=2024,
    room="bench",
    source="arXiv:2412.05496: scores edited one by one, in a fused kernel; it runs in the same process, as its users call it",
)
GPU_SHAPES = (
    "bfloat16, causal. biases: 32 query and 8 key/value heads of 128; relative bias, low rank and entmax: 16 heads of 64; "
    "mechanisms: 8 heads of 64, width 512. training: forward and backward"
)
CPU_SHAPES = "float32, causal, 8 heads of 64, width 512. training: forward and backward"
CAP = 30.0
Tensors = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], Any]


def attention(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """Edited scores, learned biases, low-rank biases, sparse weights, and each mechanism of the inventory, by length.

    Args:
        quick: the shortest length only. report: is given each row when it is measured.
    """
    return collected("attention", device, GPU_SHAPES if device.type == "cuda" else CPU_SHAPES, _rows(device, quick), report)


def _rows(device: torch.device, quick: bool) -> Iterator[Row]:
    gpu = device.type == "cuda"
    for tokens in ((8192,) if quick else (8192, 32768)) if gpu else (1024,) if quick else (1024, 4096):
        yield from _edited(device, tokens)
    yield from _relative(device, 8192 if gpu else 1024)
    for tokens in ((8192,) if quick else (8192, 32768)) if gpu else (1024,) if quick else (1024, 4096):
        yield from _low_rank(device, tokens)
        yield from _sparse(device, tokens)
    for tokens in ((2048,) if quick else (8192,)) if gpu else (512,) if quick else (512, 2048):
        yield from _mechanisms(device, tokens)


def _tensors(device: torch.device, heads: int, kv: int, tokens: int, size: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(1, h, tokens, size, device=device, dtype=dtype, generator=generator) for h in (heads, kv, kv))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _plain(x: Tensors) -> Tensor:
    """What the planner makes of a plain causal read: the fastest of PyTorch's kernels."""
    return attend(*x, Causal())


def _both(
    measure: str, what: str, x: Tensors, read: Callable[[], Tensor], more: tuple[Tensor, ...] = ()
) -> list[tuple[str, str, Run]]:
    """Forward alone, and forward with backward."""
    inputs = (*x, *more)

    def forward() -> Tensor:
        with torch.no_grad():
            return read()

    def train() -> tuple[Tensor, ...]:
        out = read()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return [(f"{measure}, forward", what, forward), (f"{measure}, training", what, train)]


def _measure(device: torch.device, tokens: int, runs: list[tuple[str, str, Run]], **options: Any) -> Iterator[Row]:
    """Rows; the ratio of each is to the first of its measure."""
    base: dict[str, float | None] = {}
    goals, notes = options.get("goals", {}), options.get("notes", {})
    for measure, what, run in sorted(runs, key=lambda r: r[0]):
        seconds = 0.3 if device.type == "cuda" else 1.0
        try:
            row = measured(
                measure, what, tokens, run, device, base=base.get(measure), goal=goals.get((measure, what)),
                note=notes.get(what, ""), seconds=seconds,
            )  # fmt: skip
        except Exception as error:  # a peer that cannot run this is a finding, and no reason to measure nothing
            if not what.startswith("peer"):
                raise
            row = Row(measure, what, tokens, None, note=f"does not run: {str(error).splitlines()[0][:100]}")
        base.setdefault(measure, row.milliseconds)
        yield row


# ---- FlexAttention, as its users call it -----------------------------------------------------------------------------


@cache
def _flex(score_mod: Any, tokens: int) -> Any:
    """Compiled for itself: many kinds of score and shape in one would run into the compiler's limit, and then uncompiled."""

    flexible: Any = flex_attention

    def alone(*tensors: Any, **options: Any) -> Any:
        return flexible(*tensors, score_mod=score_mod, **options)

    compiled = torch.compile(alone, dynamic=False)

    def call(*tensors: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            return compiled(*tensors, **options)

    return call


@cache
def _causal_blocks(tokens: int, device: torch.device) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=str(device))


def _flexed(x: Tensors, score_mod: Any, options: Any = None) -> Tensor:
    q, k, v = x if torch.is_grad_enabled() else (t.detach() for t in x)
    blocks = _causal_blocks(q.shape[2], q.device)
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _flex(score_mod, q.shape[2])(q, k, v, block_mask=blocks, enable_gqa=grouped, kernel_options=options)
    return out


# What FlexAttention is asked for besides its own choice, which does not always fit the GPU's shared memory.
TILES: tuple[dict[str, int], ...] = (
    {"num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_stages": 1},
)


def _trains(device: torch.device, runs: list[tuple[str, str, Run]]) -> list[tuple[str, str, Run]]:
    """Without training on a CPU, where FlexAttention has no backward pass."""
    return runs if device.type == "cuda" else [run for run in runs if "training" not in run[0]]


# ---- the groups ------------------------------------------------------------------------------------------------------


def _edited(device: torch.device, tokens: int) -> Iterator[Row]:
    x = _tensors(device, 32, 8, tokens, 128) if device.type == "cuda" else _tensors(device, 8, 8, tokens, 64)
    alibi = Alibi(Alibi.geometric(x[0].shape[1]).slopes.to(device))
    slopes = alibi.slopes

    def add_distance(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j)

    def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)

    runs = _both("scores", "softmax attention", x, lambda: _plain(x))
    runs += _both("scores", "ALiBi", x, lambda: attend(*x, Causal(), alibi))
    runs += _trains(device, _both("scores", "peer: ALiBi by FlexAttention", x, lambda: _flexed(x, add_distance)))
    runs += _both("scores", "softcap", x, lambda: attend(*x, Causal(), Softcap(CAP)))
    runs += _trains(device, _both("scores", "peer: softcap by FlexAttention", x, lambda: _flexed(x, cap)))
    yield from _measure(device, tokens, runs)


def _relative(device: torch.device, tokens: int) -> Iterator[Row]:
    """A learned number for each head and distance, trained, beside FlexAttention with its own choice of tiles and with others."""
    x = _tensors(device, 16 if device.type == "cuda" else 8, 16 if device.type == "cuda" else 8, tokens, 64)
    table = torch.randn(x[0].shape[1], 2 * tokens - 1, device=device, requires_grad=True)
    middle = tokens - 1

    def by_distance(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[h, i - j + middle]

    def dense() -> Tensor:
        i = torch.arange(tokens, device=device)
        bias = table[:, (i[:, None] - i) + middle].masked_fill(i[:, None] < i, -torch.inf)
        return F.scaled_dot_product_attention(*x, attn_mask=bias[None].to(x[0].dtype))

    def read() -> Tensor:
        return attend(*x, Causal(), RelativeBias(table))

    def flexed(options: Any) -> Tensor:
        return _flexed(x, by_distance, options)

    peers = []
    for options in (None, *TILES) if device.type == "cuda" else ():
        about = "as it chooses" if options is None else ", ".join(f"{k} {v}" for k, v in options.items())
        peers += _both("relative bias", f"peer: FlexAttention, {about}", x, partial(flexed, options), (table,))
    whole = _both("relative bias", "peer: a table of all pairs", x, dense, (table,))
    ours = _both("relative bias", "relative bias", x, read, (table,))
    runs = ours + peers + whole
    notes = {what: _repeats(run) for measure, what, run in runs if "training" in measure}
    yield from _measure(device, tokens, runs, notes=notes)


def _repeats(train: Run) -> str:
    """Whether gradients come out the same twice."""
    try:
        first, second = train(), train()
    except Exception:  # the row says why
        return ""
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return "gradients the same bits twice" if same else "gradients differ from run to run"


def _low_rank(device: torch.device, tokens: int) -> Iterator[Row]:
    heads = 16 if device.type == "cuda" else 8
    x = _tensors(device, heads, heads, tokens, 64)
    generator = torch.Generator(device).manual_seed(1)
    own, theirs = torch.randn(2, 1, heads, tokens, 8, device=device, dtype=x[0].dtype, generator=generator)
    runs = _both("low rank", "softmax attention", x, lambda: _plain(x))
    runs += _both("low rank", "bias of rank 8", x, lambda: attend(*x, Causal(), LowRankBias(own, theirs)))

    def dense() -> Tensor:
        bias = (own @ theirs.mT).masked_fill_(_later(tokens, device), -torch.inf)
        return F.scaled_dot_product_attention(*x, attn_mask=bias)

    runs += _both("low rank", "peer: a table of all pairs", x, dense)
    yield from _measure(device, tokens, runs, goals={("low rank, forward", "bias of rank 8"): 1.15})


def _later(tokens: int, device: torch.device) -> Tensor:
    place = torch.arange(tokens, device=device)
    return place[:, None] < place


def _sparse(device: torch.device, tokens: int) -> Iterator[Row]:
    heads = 16 if device.type == "cuda" else 8
    x = _tensors(device, heads, heads, tokens, 64)
    sharp = (x[0].detach() * 6).requires_grad_(), x[1], x[2]  # scores so far apart that few keys have weight
    runs = _both("sparse", "softmax attention", x, lambda: _plain(x))
    runs += _both("sparse", "entmax of 1.5", x, lambda: attend(*x, Causal(), Entmax(1.5)))
    runs += _both("sparse", "entmax of 1.5, sharp scores", sharp, lambda: attend(*sharp, Causal(), Entmax(1.5)))
    yield from _measure(device, tokens, runs)


def _mechanisms(device: torch.device, tokens: int, heads: int = 8, size: int = 64) -> Iterator[Row]:
    """Each mechanism as a mixer, projections included, beside plain attention of the same width."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    made = {"softmax attention": Attention(heads * size, heads)}
    for name in registry.names("mechanism"):
        module = importlib.import_module(registry.load("mechanism", name).__module__)
        one = module.sized(heads, size, tokens)
        made[name] = Attention(heads * size, heads, one) if isinstance(one, Mechanism) else one
    x = torch.randn(1, tokens, heads * size, device=device, dtype=dtype)
    runs: list[tuple[str, str, Run]] = []
    for name, mixer in made.items():
        mixer.to(device=device, dtype=dtype)
        runs += _mixed(name, mixer, x, () if "causal" in mixer.cannot else (Causal(),))
    yield from _measure(device, tokens, runs)


def _mixed(name: str, mixer: Any, x: Tensor, stages: tuple[Stage, ...]) -> list[tuple[str, str, Run]]:
    read = partial(mixer, x, *stages)
    parameters = tuple(p for p in mixer.parameters() if p.requires_grad)

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = read()
        return out

    def train() -> Any:
        out = read()
        return torch.autograd.grad(out, parameters, torch.ones_like(out), allow_unused=True)

    return [("mechanism, forward", name, forward), ("mechanism, training", name, train)]
