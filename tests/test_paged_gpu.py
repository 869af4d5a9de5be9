"""Attention over pages on a GPU, at the lengths it is for, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_sequences import REAL, SCALE, Paged

from headwise.attention.paged import paged_attention
from headwise.attention.schedule import shared_pages
from headwise.benchmarks.cache import made

pytestmark = [pytest.mark.gpu, REAL]


def large(lengths, *, n=1, prefix=0, dtype=torch.bfloat16):
    """A layer of 32 query and 8 key/value heads of 128; what is behind the last token is NaN."""
    layer = made(torch.device("cuda"), lengths, 4, 128, prefix=prefix)
    q = torch.randn(len(lengths), 32, n, 128, device="cuda").to(dtype)
    k, v = layer.k.to(dtype), layer.v.to(dtype)
    for sequence, length in enumerate(layer.lengths.tolist()):
        if length % 64:
            for pool in (k, v):
                pool[layer.table[sequence, length // 64], length % 64 :] = torch.nan
    return replace(layer, q=q, k=k, v=v)


def error_of(layer, schedule, **options):
    """Of the kernel, beside a copy in float64: |difference| / |right|."""
    given = {"scale": 128**-0.5, "lse": True} | options
    out, lse = paged_attention(layer.q, layer.k, layer.v, layer.table, layer.lengths, backend="kernel", schedule=schedule, **given)
    again = paged_attention(layer.q, layer.k, layer.v, layer.table, layer.lengths, backend="kernel", schedule=schedule, **given)[0]
    assert torch.equal(out, again)
    given |= {"sinks": given["sinks"].double()} if "sinks" in given else {}
    exact = (t.double() for t in (layer.q, layer.k, layer.v))
    right, right_lse = paged_attention(*exact, layer.table, layer.lengths, backend="gather", **given)
    assert float((lse - right_lse).abs().max()) < (1e-5 if layer.q.dtype == torch.float32 else 1e-4) * float(right_lse.abs().max())
    return float((out - right).norm() / right.norm())


LONG = {
    "full": [[131072] * 8],
    "half of the heads stream": [[131072] * 4 + [320] * 4],
    "ragged": [[2621, 5243, 10486, 19661, 32768, 47186, 65536, 78643]],
    "rows": [[5000 + 700 * row + 13 * head for head in range(8)] for row in range(6)],
}


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_on_a_gpu(name, dtype, most):
    for n in (1, 4):
        layer = large(LONG[name], n=n, dtype=dtype)
        assert error_of(layer, layer.schedule) < most
        assert error_of(layer, None, sinks=torch.randn(32, device="cuda"), softcap=30.0) < most


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4e-3), (torch.float32, 2e-6)])
def test_a_shared_prefix_on_a_gpu(dtype, most):
    for n in (1, 3):
        layer = large([[4096 + 9 * row + head for head in range(8)] for row in range(40)], n=n, prefix=60, dtype=dtype)
        assert len(layer.schedule.wide)
        assert error_of(layer, layer.schedule) < most


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (192, 128), (256, 256), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_of_other_sizes_on_a_gpu(d, dv, dtype):
    x = Paged([[700, 65], [64, 1000]], d=d, dv=dv, page=64, device="cuda", dtype=dtype, prefix=64)
    segments = shared_pages(x.held, x.lengths, 64)
    right = x.expected(scale=d**-0.5)[0]
    for schedule in (None, x.schedule(segments=segments)):
        out, _ = x(backend="kernel", scale=d**-0.5, schedule=schedule)
        error = float((out.cpu().double() - right).norm() / right.norm())
        assert error < (4e-3 if dtype == torch.bfloat16 else 2e-6)


def test_a_recorded_graph_follows_lengths():
    """Nothing waits for the host: a recorded launch reads tokens that came later."""
    x = Paged([[60, 20], [300, 64]], page=64, device="cuda")
    lengths, schedule = x.lengths.view(-1).int().cuda(), x.schedule()
    few = torch.ones_like(lengths)

    def read():
        return paged_attention(x.q, x.k_pool, x.v_pool, x.table, few, scale=SCALE, schedule=schedule)

    read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = read()
    few.copy_(lengths)
    graph.replay()
    assert float((out.cpu().double() - x.expected()[0]).abs().max()) < 2e-5
