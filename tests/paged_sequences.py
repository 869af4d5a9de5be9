"""Sequences in pages that lie anywhere, and a softmax of each query alone in float64."""

from __future__ import annotations

import os

import pytest
import torch

from headwise.attention.paged import Schedule, paged_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REAL = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = [pytest.mark.gpu, REAL]
KERNEL = pytest.param("kernel", "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"))
WAYS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gather", "cpu"),
        ("each", "cpu"),
        KERNEL,
        pytest.param("kernel", "cuda", marks=GPU),
        pytest.param("each", "cuda", marks=GPU),
    ],
)
P = 16
SCALE = 0.4


class Paged:
    """Sequences of random tokens in pages that lie anywhere in a pool, between and behind them nothing but NaN."""

    def __init__(self, lengths, *, group=2, n=1, d=16, dv=None, page=P, device="cpu", dtype=torch.float32, prefix=0, order=None):
        self.lengths = torch.tensor(lengths)  # (b, kv heads)
        self.b, self.kv = self.lengths.shape
        generator = torch.Generator().manual_seed(int(self.lengths.sum()) + n)
        dv = d if dv is None else dv
        most = int(self.lengths.max())
        self.q = torch.randn(self.b, self.kv * group, n, d, generator=generator).to(device, dtype)
        k, v = (torch.randn(self.b, self.kv, most, size, generator=generator).to(device, dtype) for size in (d, dv))
        for t in (k, v):
            t[1:, :, :prefix] = t[:1, :, :prefix]  # what all rows share
        self.k, self.v = k, v
        need = -(-self.lengths // page)
        shared = prefix // page
        count = int(need.sum()) + 3
        free = iter(torch.randperm(count, generator=generator).tolist() if order is None else order)
        self.table = torch.full((self.b, self.kv, int(need.max()) + 1), -1, dtype=torch.int32)
        self.k_pool = torch.full((count, page, d), torch.nan, device=device, dtype=dtype)
        self.v_pool = torch.full((count, page, dv), torch.nan, device=device, dtype=dtype)
        for row in range(self.b):
            for head in range(self.kv):
                for at in range(int(need[row, head])):
                    own = row == 0 or at >= shared
                    place = next(free) if own else int(self.table[0, head, at])
                    self.table[row, head, at] = place
                    stop = min((at + 1) * page, int(self.lengths[row, head]))
                    self.k_pool[place, : stop - at * page] = k[row, head, at * page : stop]
                    self.v_pool[place, : stop - at * page] = v[row, head, at * page : stop]
        self.held = self.table
        self.table = self.table.view(self.b * self.kv, -1).to(device)

    def __call__(self, **options):
        options = {"scale": SCALE, "lse": True} | options
        lengths = self.lengths.view(-1).int().to(self.q.device)
        return paged_attention(self.q, self.k_pool, self.v_pool, self.table, lengths, **options)

    def schedule(self, **options):
        return Schedule.of(self.lengths, self.kv, page=self.k_pool.shape[1], device=self.q.device, **options)

    def expected(self, scale=SCALE, softcap=None, sinks=None):
        """A softmax of each query of each sequence, in float64."""
        b, heads, n, _ = self.q.shape
        out = torch.zeros(b, heads, n, self.v.shape[3], dtype=torch.float64)
        lse = torch.full((b, heads, n), -torch.inf, dtype=torch.float64)
        q, k, v = (t.double().cpu() for t in (self.q, self.k, self.v))
        for row in range(b):
            for head in range(heads):
                kv = head // (heads // self.kv)
                for t in range(n):
                    stop = int(self.lengths[row, kv]) - (n - 1 - t)
                    if stop <= 0:
                        continue
                    s = scale * k[row, kv, :stop] @ q[row, head, t]
                    s = s if softcap is None else softcap * torch.tanh(s / softcap)
                    values = v[row, kv, :stop]
                    if sinks is not None:
                        s, values = (
                            torch.cat([s, sinks[head].double().cpu().view(1)]),
                            torch.cat([values, torch.zeros(1, values.shape[1])]),
                        )
                    out[row, head, t] = s.softmax(0) @ values
                    lse[row, head, t] = s.logsumexp(0)
        return out, lse

    def check(self, tolerance=None, **options):
        out, lse = self(**options)
        asked = {name: options[name] for name in ("scale", "softcap", "sinks") if name in options}
        right, right_lse = self.expected(**asked)
        tolerance = tolerance or {torch.float64: 1e-12, torch.float32: 2e-5}[self.q.dtype]
        assert out.dtype == self.q.dtype
        assert out.shape == right.shape
        assert torch.equal(lse.cpu().isinf(), right_lse.isinf())
        assert float((out.cpu().double() - right).abs().max()) < tolerance
        assert float((lse.cpu().double() - right_lse).nan_to_num(0.0).abs().max()) < tolerance
        return out, lse
