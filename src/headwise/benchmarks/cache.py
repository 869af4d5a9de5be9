"""Decoding from pages: full caches, streaming heads, ragged budgets, shared prefixes, beside PyTorch; and prefill."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as cached
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from ..attention import attend
from ..attention.paged import Schedule, Segment, paged_attention
from ..card import Card
from ..stages.causal import Causal
from ..stages.sink import Sink
from ..stages.window import Window
from ._measure import Row, Table, collected, measured, milliseconds

CARD = Card(
    paper="Efficient Memory Management for Large Language Model Serving with PagedAttention",
    year=2023,
    room="bench",
    source="arXiv:2309.06180: keys and values in pages; DuoAttention's (arXiv:2410.10819) and ChunkAttention's (arXiv:2402.15220) "
    "settings; PyTorch's attention and FlexAttention run in the same process",
)
GPU_SHAPES = (
    "bfloat16, 32 query and 8 key/value heads of 128, one row unless said. Decoding: one new token, pages of 64 tokens in random "
    "order; launches of 4 layers, one after another, are recorded as a CUDA graph and played back; times are of one layer"
)
CPU_SHAPES = (
    "float32, 16 query and 4 key/value heads of 64, one row. Decoding: one new token, pages of 64 tokens, one after another"
)
PAGE = 64
LAYERS = 4  # of a graph: what one of them leaves in the GPU's cache, the next ones displace
SINK, RECENT = 64, 256  # tokens that a streaming head keeps
RAGGED = (0.02, 0.04, 0.08, 0.15, 0.25, 0.36, 0.50, 0.60)  # of the tokens, that a head keeps: a quarter on average
REQUESTS, PREFIX, PRIVATE = 64, 4096, 256
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "PyTorch's choice": None,
}  # fmt: skip
Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """Pools, a table and lengths of one layer, the query of one new token, and how the reading is cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    schedule: Schedule

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are read."""
        return int(self.lengths.sum()) * (self.k.shape[2] + self.v.shape[2]) * self.k.element_size()

    def read(self) -> Tensor:
        """Its attention."""
        out: Tensor = paged_attention(
            self.q, self.k, self.v, self.table, self.lengths, scale=self.q.shape[-1] ** -0.5, schedule=self.schedule
        )
        return out


def cache(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """Decoding from full, streaming, ragged and shared caches, and prefill with streaming heads.

    Args:
        quick: the shortest length only. report: is given each row when it is measured.
    """
    return collected("cache", device, GPU_SHAPES if device.type == "cuda" else CPU_SHAPES, _rows(device, quick), report)


def _rows(device: torch.device, quick: bool) -> Iterator[Row]:
    with torch.no_grad():
        if device.type == "cuda":
            for tokens in (32768,) if quick else (32768, 131072):
                yield from _decode_gpu(device, tokens)
                yield from _prefill(device, tokens)
            yield from _shared(device, REQUESTS // 8 if quick else REQUESTS)
            return
        for tokens in (1024,) if quick else (8192, 32768):
            yield from _decode_cpu(device, tokens)


def made(
    device: torch.device, lengths: Sequence[Sequence[int]], group: int, size: int, *, seed: int = 0, prefix: int = 0,
    mixed: bool = True,
) -> Layer:  # fmt: skip
    """A layer whose sequences (b, key/value heads) hold so many random tokens.

    Args:
        prefix: pages that all rows share, and that are read once. mixed: pages in random order, not one after another.
    """
    generator = torch.Generator(device).manual_seed(seed)
    held = torch.tensor(lengths)
    b, heads = held.shape
    need = -(-held // PAGE)
    own = need - (torch.arange(b) > 0)[:, None] * prefix
    count = int(own.sum())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) if mixed else torch.arange(count)
    slot = torch.arange(int(need.max()))
    table = torch.full((b, heads, len(slot)), -1)
    table[(slot < need[..., None]) & ((slot >= prefix) | (torch.arange(b) == 0)[:, None, None])] = order
    table[:, :, :prefix] = table[:1, :, :prefix]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k, v = (torch.randn(count, PAGE, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    q = torch.randn(b, heads * group, 1, size, device=device, dtype=dtype, generator=generator)
    segments = [Segment(0, b, head, 0, prefix) for head in range(heads)] if prefix else []
    schedule = Schedule.of(held, heads, page=PAGE, segments=segments, device=device)
    return Layer(q, k, v, table.view(b * heads, -1).int().to(device), held.view(-1).int().to(device), schedule)


def _mib(layers: Sequence[Layer]) -> float:
    """Of keys and values of one layer, in whole pages."""
    return sum(t.nbytes for layer in layers for t in (layer.k, layer.v)) / 2**20 / len(layers)


def _host(layer: Layer) -> float:
    """Milliseconds that making a schedule takes on the host."""
    lengths, heads = layer.lengths.cpu().view(len(layer.q), -1), layer.schedule.heads
    times = []
    for _ in range(20):
        began = time.perf_counter()
        Schedule.of(lengths, heads, page=PAGE, device=layer.q.device)
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def _played(measure: str, what: str, tokens: int, runs: Sequence[Run], device: torch.device, **options: Any) -> Row:
    """A row of one of several runs that are recorded as one CUDA graph; of a peer that cannot run, why."""
    base = options.pop("base", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peers that say at length why they cannot run
            row = measured(measure, what, tokens, runs[0], device, seconds=0.0, **options)
        if row.milliseconds is None:
            return row
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for run in runs:
                run()
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        took = milliseconds(graph.replay, device, 0.3, least=20) / len(runs)
    except Exception as error:  # a peer that cannot run this is a finding
        if not what.startswith("peer"):
            raise
        return Row(measure, what, tokens, None, note=f"does not run: {str(error).splitlines()[0][:100]}")
    return replace(row, milliseconds=took, ratio=None if base is None else took / base, note=f"{1000 * took:.1f} us")


def bandwidth(device: torch.device) -> float:
    """Bytes a millisecond that a copy of 1 GiB moves, read and written."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 0.3, least=20)


# ---- peers -----------------------------------------------------------------------------------------------------------


@cached
def _flex() -> Any:
    flexible: Any = flex_attention
    return torch.compile(flexible, dynamic=False)


def _peers(x: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[str, list[Run]]]:
    """PyTorch's ways to decode from keys (b, key/value heads, tokens, size) that lie next to each other."""
    for name, backend in BACKENDS.items():

        def one(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = backend) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        yield f"peer: SDPA, {name}", [lambda each=each, one=one: one(*each) for each in x]  # type: ignore[misc]
    folded = [(q.view(*k.shape[:2], -1, q.shape[-1]), k, v) for q, k, v in x]
    yield "peer: SDPA, heads of a group as rows", [lambda e=each: F.scaled_dot_product_attention(*e) for each in folded]  # type: ignore[misc]
    if x[0][0].is_cuda:
        yield "peer: FlexAttention", [lambda e=each: _flex()(*e, enable_gqa=True) for each in x]  # type: ignore[misc]


def _dense(device: torch.device, b: int, tokens: int, heads: int, group: int, size: int, layers: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(b, heads * group, 1, size), (b, heads, tokens, size), (b, heads, tokens, size)]
    return [tuple(torch.randn(*s, device=device, dtype=dtype, generator=generator) for s in shapes) for _ in range(layers)]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def _decode_gpu(device: torch.device, tokens: int) -> Iterator[Row]:
    def row(what: str, lengths: Sequence[int], **options: Any) -> tuple[Row, list[Layer]]:
        layers = [made(device, [[*lengths[i:], *lengths[:i]]], 4, 128, seed=i) for i in range(LAYERS)]
        found = _played("decode", what, tokens, [layer.read for layer in layers], device, **options)
        assert found.milliseconds is not None
        rate = layers[0].nbytes / found.milliseconds / 1e9
        return replace(found, note=f"{found.note}; KV {_mib(layers):,.1f} MiB, read at {rate:.2f} TB/s"), layers

    full, layers = row("full cache", [tokens] * 8)
    whole = _mib(layers)
    yield full
    del layers
    best = None
    for what, runs in _peers(_dense(device, 1, tokens, 8, 4, 128, LAYERS)):  # type: ignore[arg-type]
        peer = _played("decode", what, tokens, runs, device, base=full.milliseconds)
        yield peer
        if peer.milliseconds is not None and (best is None or best.milliseconds is None or peer.milliseconds < best.milliseconds):
            best = peer
    del runs
    duo, layers = row(
        "half of the heads stream", [tokens] * 4 + [SINK + RECENT] * 4, base=full.milliseconds, goal=round(1 / 1.8, 3)
    )
    beside = "" if best is None else f", {best.milliseconds / duo.milliseconds:.2f} x as fast as the {best.what}"  # type: ignore[operator]
    yield replace(duo, note=f"{duo.note}, {whole / _mib(layers):.2f} x fewer{beside}")
    del layers
    copy = bandwidth(device)
    lengths = [round(tokens * part) for part in RAGGED]
    floor = 2 * sum(lengths) * 128 * 2 / copy
    ragged, layers = row("a quarter, ragged", lengths, base=floor, goal=1.35)
    note = f"{ragged.note}, {whole / _mib(layers):.2f} x fewer; ratio to reading them at a copy's {copy / 1e9:.2f} TB/s"
    yield replace(ragged, note=note)
    yield Row("decode", "its schedule, on the host", tokens, _host(layers[0]), note=f"{len(layers[0].schedule.narrow)} items")


def _prefill(device: torch.device, tokens: int) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, 128, device=device, dtype=torch.bfloat16, generator=generator) for h in (32, 8, 8))

    def streaming() -> tuple[Tensor, Tensor]:
        first = attend(q[:, :16], k[:, :4], v[:, :4], Causal())
        return first, attend(q[:, 16:], k[:, 4:], v[:, 4:], Window(RECENT) | Sink(SINK), Causal())

    base = measured("prefill", "causal attention", tokens, lambda: attend(q, k, v, Causal()), device)
    yield base
    yield measured(
        "prefill", "half of the heads stream", tokens, streaming, device, base=base.milliseconds, goal=round(1 / 1.7, 3)
    )  # fmt: skip


def _shared(device: torch.device, requests: int) -> Iterator[Row]:
    tokens, layers = PREFIX + PRIVATE, 2
    lengths = [[tokens] * 8] * requests

    def row(what: str, found: list[Layer], **options: Any) -> Row:
        played = _played(f"{requests} requests", what, tokens, [layer.read for layer in found], device, **options)
        return replace(played, note=f"{played.note}; KV {_mib(found):,.0f} MiB")

    base = row("pages of their own", [made(device, lengths, 4, 128, seed=i) for i in range(layers)])
    yield base
    for what, runs in _peers(_dense(device, requests, tokens, 8, 4, 128, layers)):  # type: ignore[arg-type]
        yield _played(f"{requests} requests", what, tokens, runs, device, base=base.milliseconds)
    runs = []
    found = [made(device, lengths, 4, 128, seed=i, prefix=PREFIX // PAGE) for i in range(layers)]
    plain = Schedule.of(lengths, 8, page=PAGE, device=device)
    yield row("a shared prefix, read by each", [replace(layer, schedule=plain) for layer in found], base=base.milliseconds)
    yield row("a shared prefix, read once", found, base=base.milliseconds, goal=0.25)
    yield Row(f"{requests} requests", "its schedule, on the host", tokens, _host(found[0]), note=f"{len(plain.narrow)} items")


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def _decode_cpu(device: torch.device, tokens: int) -> Iterator[Row]:
    base = None
    for what, runs in _peers(_dense(device, 1, tokens, 4, 4, 64, 1)):  # type: ignore[arg-type]
        if "choice" in what or "rows" in what:
            row = measured("decode", what, tokens, runs[0], device, base=base)
            base = base or row.milliseconds
            yield row
    parts = {
        "full cache": [1.0] * 4,
        "half of the heads stream": [1.0, 1.0, (SINK + RECENT) / tokens, (SINK + RECENT) / tokens],
        "a quarter, ragged": [RAGGED[0], RAGGED[3], RAGGED[4], 1 - sum((RAGGED[0], RAGGED[3], RAGGED[4]))],
    }
    for what, kept in parts.items():
        layer = made(device, [[round(part * tokens) for part in kept]], 4, 64, mixed=False)
        row = measured("decode", what, tokens, layer.read, device, base=base)
        yield replace(row, note=f"KV {_mib([layer]):,.1f} MiB, read at {layer.nbytes / (row.milliseconds or 1.0) / 1e6:.1f} GB/s")
