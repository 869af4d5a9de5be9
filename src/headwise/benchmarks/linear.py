"""State mechanisms beside the loop over tokens, softmax attention, and the library of kernels that others use for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attend
from ..card import Card
from ..recurrence import explain, recur
from ..stages.causal import Causal
from ._measure import Row, Table, collected, measured, milliseconds

CARD = Card(
    paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    year=2024,
    room="bench",
    source="arXiv:2406.06484, whose authors' library, flash-linear-attention, is the peer on a GPU where it is installed",
)
GPU_SHAPES = (
    "bfloat16, 16 heads of 128; 4 rows of 4096 tokens, or 1 row of 16384 or 131072. training: forward and backward. Launches are "
    "recorded as a CUDA graph and played back, ours and the peers', so that what is measured is the card and not the host"
)
CPU_SHAPES = "float32, 4 heads of 64, one row. training: forward and backward"
# rule -> what governs its state
RULES: dict[str, tuple[str, ...]] = {
    "decay of a head": ("decay",),
    "decay of channels": ("channels",),
    "delta rule": ("beta",),
    "gated delta rule": ("decay", "beta"),
    "delta rule, decay of channels": ("channels", "beta"),
    "levels": ("decay", "levels"),
}
GOALS = {"decay of a head": 1.0, "decay of channels": 1.0, "delta rule": 1.0, "gated delta rule": 1.25,
         "delta rule, decay of channels": 1.25}  # fmt: skip
# rule -> module and function of the peer, and the name under which it takes each
PEERS = {
    "decay of a head": ("simple_gla", "chunk_simple_gla", {"decay": "g"}),
    "decay of channels": ("gla", "chunk_gla", {"channels": "g"}),
    "delta rule": ("delta_rule", "chunk_delta_rule", {"beta": "beta"}),
    "gated delta rule": ("gated_delta_rule", "chunk_gated_delta_rule", {"decay": "g", "beta": "beta"}),
    "delta rule, decay of channels": ("kda", "chunk_kda", {"channels": "g", "beta": "beta"}),
    "levels": ("log_linear_attn", "chunk_log_linear_attn", {"decay": "g", "levels": "level_scales"}),
}
Tensors = dict[str, Tensor]
Run = Callable[[], Tensor]


def linear(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """Six rules of a state, forward and training, by length.

    Args:
        quick: the shortest length only. report: is given each row when it is measured.
    """
    return collected("linear", device, GPU_SHAPES if device.type == "cuda" else CPU_SHAPES, _rows(device, quick), report)


def _rows(device: torch.device, quick: bool) -> Iterator[Row]:
    if device.type == "cuda":
        for rows, tokens in ((4, 4096),) if quick else ((4, 4096), (1, 16384), (1, 131072)):
            yield from _on_gpu(device, rows, tokens)
        return
    for tokens in (256,) if quick else (4096,):
        yield from _on_cpu(device, tokens)


def tensors(device: torch.device, rows: int, tokens: int, heads: int, size: int, seed: int = 0) -> Tensors:
    """Inputs as layers make them: (rows, heads, tokens, ...) over memory in the order (rows, tokens, heads, ...)."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, tokens, heads, *shape, device=device, generator=generator).transpose(1, 2)

    unit = {name: F.normalize(noise(size), dim=-1).to(dtype) for name in ("q", "k")}
    levels = tokens.bit_length()
    made = {
        **unit,
        "v": noise(size).to(dtype),
        "decay": F.logsigmoid(noise() + 3),
        "channels": F.logsigmoid(noise(size) + 3),
        "beta": torch.sigmoid(noise()),
        "levels": F.softplus(noise(levels)),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


def ours(rule: str, x: Tensors, **options: Any) -> Tensor:
    """The rule by `recur`."""
    options = {"last": False, **governs(rule, x), **options}
    return recur(x["q"], x["k"], x["v"], **options).out


def governs(rule: str, x: Tensors) -> dict[str, Any]:
    """What governs the state under a rule, as arguments of `recur`."""
    names = {"decay": "decay", "channels": "decay", "levels": "levels"}
    found = {names[name]: x[name] for name in RULES[rule] if name != "beta"}
    return found | ({"write": x["beta"], "erase": x["beta"]} if "beta" in RULES[rule] else {})


def peer(rule: str) -> Callable[[Tensors], Tensor]:
    """The rule by flash-linear-attention, which takes tokens before heads.

    Raises: ImportError if it is not installed.
    """
    module, name, given = PEERS[rule]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)

    def run(x: Tensors) -> Tensor:
        swapped = {each: x[each].transpose(1, 2) for each in ("q", "k", "v", *given)}
        q, k, v = (swapped.pop(each) for each in "qkv")
        out: Tensor = function(q, k, v, **{given[each]: t for each, t in swapped.items()}, scale=1.0)[0]
        return out

    return run


def _runs(read: Callable[[Tensors], Tensor], x: Tensors, used: list[Tensor]) -> dict[str, Run]:
    def forward() -> Tensor:
        with torch.no_grad():
            return read(x)

    def train() -> Any:
        out = read(x)
        return torch.autograd.grad(out, used, torch.ones_like(out))

    return {"forward": forward, "training": train}


def _on_gpu(device: torch.device, rows: int, tokens: int) -> Iterator[Row]:
    x = tensors(device, rows, tokens, 16, 128)
    qkv = [x[name] for name in "qkv"]
    for way, run in _runs(lambda x: attend(x["q"], x["k"], x["v"], Causal()), x, qkv).items():
        if tokens <= 16384 or way == "forward":
            yield _played(f"softmax, {way}", "softmax attention", tokens, run, device)
    for rule, names in RULES.items():
        used = [*qkv, *(x[name] for name in names)]
        mine = _runs(partial(ours, rule), x, used)
        plan = explain(*qkv, **governs(rule, x), last=False)
        try:
            theirs = _runs(peer(rule), x, used)
        except ImportError as error:
            theirs = {}
            yield Row(rule, "peer: flash-linear-attention", tokens, None, note=f"not installed: {error}")
        for way, run in mine.items():
            base = None
            if way in theirs:
                row = _peer(f"{rule}, {way}", tokens, theirs[way], device)
                base = row.milliseconds
                yield row
            note = f"by {plan.backend}; {rows} rows"
            yield _played(f"{rule}, {way}", rule, tokens, run, device, base=base, goal=GOALS.get(rule), note=note)


def _peer(measure: str, tokens: int, run: Run, device: torch.device) -> Row:
    what = "peer: flash-linear-attention"
    try:
        return _played(measure, what, tokens, run, device)
    except Exception as error:  # a peer that cannot run this is a finding
        return Row(measure, what, tokens, None, note=f"does not run: {str(error).splitlines()[0][:100]}")


def _played(measure: str, what: str, tokens: int, run: Run, device: torch.device, **options: Any) -> Row:
    """A row of a run that is recorded as a CUDA graph; memory is that of the run itself."""
    row = measured(measure, what, tokens, run, device, seconds=0.0, **options)
    if row.milliseconds is None:
        return row
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    took = milliseconds(graph.replay, device, 0.3)
    base = options.get("base")
    return replace(row, milliseconds=took, ratio=None if base is None else took / base)


def _on_cpu(device: torch.device, tokens: int) -> Iterator[Row]:
    """The chunk form beside the loop over tokens."""
    x = tensors(device, 1, tokens, 4, 64)
    for rule, names in RULES.items():
        used = [x[name] for name in ("q", "k", "v", *names)]
        loop, chunk = (_runs(partial(ours, rule, form=form), x, used) for form in ("recurrent", "chunk"))
        for way in loop:
            base = measured(f"{rule}, {way}", "a token at a time", tokens, loop[way], device)
            yield base
            yield measured(f"{rule}, {way}", rule, tokens, chunk[way], device, base=base.milliseconds, goal=0.1)
