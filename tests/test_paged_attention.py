"""Attention over pages: every backend against a softmax of each sequence alone in float64, however pages lie.

On a machine without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from paged_sequences import INTERPRETED, WAYS, P, Paged

from headwise import registry
from headwise.attention import paged_torch as module
from headwise.attention.paged import Schedule, paged_attention
from headwise.benchmarks import _measure
from headwise.benchmarks.cache import made
from headwise.errors import BackendError, ShapeError

LENGTHS = {
    "one token": [[1]],
    "around a page": [[P - 1, P], [P + 1, 2 * P]],
    "nothing": [[0, 0]],
    "nothing in some": [[0, 33], [P, 0]],
    "ragged": [[1, 150, 40], [97, 3, 64]],
    "even": [[70, 70], [70, 70]],
}
SHAPES = {
    "grouped": {"group": 3},
    "one query head each": {"group": 1},
    "several new tokens": {"group": 2, "n": 5},
    "as many new tokens as kernels take at once": {"group": 2, "n": 16},
    "narrow values": {"d": 24, "dv": 8},
    "wide values": {"d": 8, "dv": 40},
}


@WAYS
@pytest.mark.parametrize("lengths", LENGTHS)
def test_any_lengths(lengths, backend, device):
    Paged(LENGTHS[lengths], device=device).check(backend=backend)


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(shape, backend, device):
    Paged([[37, 4], [16, 90]], device=device, **SHAPES[shape]).check(backend=backend)


@WAYS
def test_one_key_head_of_many(backend, device):
    """More query rows than a program takes."""
    Paged([[50], [7]], group=20, n=4, device=device).check(backend=backend)


@WAYS
def test_sinks_and_softcaps(backend, device):
    x = Paged([[37, 0], [5, 90]], device=device)
    sinks = torch.tensor([0.5, -3.0, 2.0, 9.0], device=device)
    x.check(backend=backend, softcap=1.5, scale=2.0)
    out, _ = x.check(backend=backend, sinks=sinks)
    assert bool((out[0, 2:] == 0).all())
    x.check(backend=backend, sinks=sinks, softcap=0.7)
    x.check(backend=backend, sinks=sinks, schedule=x.schedule(programs=9))
    several = Paged([[37, 2], [5, 90]], n=3, device=device)
    for programs in (1, 9):
        several.check(backend=backend, sinks=sinks, schedule=several.schedule(programs=programs))
    far = Paged([[37, 20]], device=device)
    far.q.mul_(200)  # scores of hundreds of thousands: nothing may overflow, or vanish in all parts
    far.check(backend=backend, schedule=far.schedule(programs=9), tolerance=2e-2)


@WAYS
@pytest.mark.parametrize("programs", [1, 2, 5, 13, 40])
def test_any_schedule(programs, backend, device):
    x = Paged([[1, 150, 40], [97, 3, 64]], n=2, device=device)
    schedule = x.schedule(programs=programs)
    assert schedule.single == (programs == 1)
    x.check(backend=backend, schedule=schedule)


@WAYS
def test_a_schedule_outlives_its_lengths(backend, device):
    """It was made for fewer, or for more tokens, even for none."""
    x = Paged([[100, 40], [3, 77]], n=2, device=device)
    for lengths in ([[60, 40], [3, 17]], [[300, 40], [80, 77]], [[0, 0], [0, 0]]):
        for programs in (1, 12):
            x.check(backend=backend, schedule=Schedule.of(torch.tensor(lengths), 2, page=P, programs=programs, device=device))


@WAYS
@pytest.mark.parametrize("page", [16, 32, 64])
def test_pages_of_other_sizes(page, backend, device):
    Paged([[1, 64], [130, 65]], page=page, device=device).check(backend=backend)


@WAYS
def test_where_pages_lie_does_not_matter(backend, device):
    lengths = [[50, 17], [33, 64]]
    x = [Paged(lengths, device=device, order=order) for order in (range(16), range(15, -1, -1), None)]
    first, *others = (each(backend=backend) for each in x)
    for out, lse in others:
        assert torch.equal(out, first[0])
        assert torch.equal(lse, first[1])


@WAYS
def test_the_same_bits_twice(backend, device):
    x = Paged([[100, 40], [3, 77]], n=2, device=device)
    schedule = x.schedule(programs=7)
    once, again = (x(backend=backend, schedule=schedule) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


@WAYS
def test_queries_and_pools_may_lie_otherwise_in_memory(backend, device):
    x = Paged([[37, 4], [16, 90]], n=3, device=device)
    right = x(backend=backend)[0]
    x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.stack([x.k_pool, x.v_pool], 1)
    x.k_pool, x.v_pool = both[:, 0], both[:, 1]
    x.table = torch.cat([x.table, x.table], 1)[:, : x.table.shape[1]]
    assert torch.equal(x(backend=backend)[0], right)


@pytest.mark.parametrize("backend", ["gather", "each"])
def test_float64(backend):
    x = Paged([[700, 512], [1300, 1024]], dtype=torch.float64, page=64)
    x.check(backend=backend, sinks=torch.randn(4, dtype=torch.float64), softcap=2.0)
    x = Paged([[700, 30], [690, 44]], n=7, dtype=torch.float64, page=64)
    x.check(backend=backend)


def test_pages_in_order_are_read_in_place():
    pool = torch.arange(6 * 16 * 2).view(6, 16, 2)
    there = module._run(pool, [2, 3, 4], 40)
    assert there.data_ptr() == pool[2].data_ptr()
    assert torch.equal(there, pool[2:5].flatten(0, 1)[:40])
    assert torch.equal(module._run(pool, [4, 2, 3], 40), pool[[4, 2, 3]].flatten(0, 1)[:40])


def test_sequences_alike_are_read_together(monkeypatch):
    """Equally long and equally far apart; others one by one, also where the last would reach beyond the pool."""
    alone = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *arguments: (alone.append(1), run(*arguments))[1])
    for lengths, others in (([[40] * 3] * 2, 0), ([[40, 20, 40]], 1), ([[40, 100, 40]], 3), ([[33, 40], [40, 40]], 1)):
        x = Paged(lengths, order=range(40))
        alone.clear()
        x.check(backend="each")
        assert len(alone) == 2 * others
    Paged([[40, 40, 40]], order=[0, 1, 2, 4, 3, 5, 6, 7, 8]).check(backend="each")
    Paged([[40, 40]], order=[0, 2, 4, 1, 3, 5]).check(backend="each")


def test_gradients_go_through_the_copy():
    x = Paged([[20, 5]], dtype=torch.float64)
    x.q.requires_grad_()
    out, _ = x()
    (grad,) = torch.autograd.grad(out.sum(), x.q)
    step = torch.randn_like(x.q, generator=torch.Generator().manual_seed(0)) * 1e-6
    x.q = x.q.detach() + step
    more = float(x()[0].sum())
    x.q = x.q - 2 * step
    assert more - float(x()[0].sum()) == pytest.approx(2 * float((grad * step).sum()), rel=1e-5)


def test_what_does_not_fit_is_refused():
    x = Paged([[37, 4], [16, 90]])
    with pytest.raises(BackendError, match="there is no backend 'magic'"):
        x(backend="magic")
    for name, wrong in {
        "k_pool": x.k_pool[:-1], "table": x.table[:3], "q": x.q[:, :3], "v_pool": x.v_pool.double(),
    }.items():  # fmt: skip
        with pytest.raises(ShapeError):
            replaced(x, **{name: wrong})()
    for size in (8, 24):
        pools = {name: getattr(x, name).repeat(1, 2, 1)[:, :size] for name in ("k_pool", "v_pool")}
        with pytest.raises(ShapeError, match="power of two"):
            replaced(x, **pools)()
    with pytest.raises(ShapeError, match="sinks"):
        x(sinks=torch.zeros(3))
    with pytest.raises(ShapeError, match="schedule"):
        x(schedule=Schedule.of([[37, 4]], 2, page=P))
    with pytest.raises(ShapeError, match="schedule"):
        x(schedule=Schedule.of(x.lengths, 2, page=2 * P))
    double = replaced(x, q=x.q.double(), k_pool=x.k_pool.double(), v_pool=x.v_pool.double())
    with pytest.raises(BackendError, match="float64" if INTERPRETED else "GPU"):
        double(backend="kernel")
    nobody = replaced(x, q=x.q[:0], table=x.table[:0], lengths=x.lengths[:0])
    assert nobody(scale=1.0)[0].shape == (0, 4, 1, 16)


def replaced(x, **attributes):
    other = object.__new__(Paged)
    other.__dict__.update(x.__dict__ | attributes)
    return other


def test_the_benchmark_says_what_is_kept(monkeypatch):
    monkeypatch.setattr(_measure, "milliseconds", lambda run, device, seconds: run() is None or 2.0)
    rows = {row.what: row for row in registry.load("benchmark", "cache")(torch.device("cpu"), quick=True).rows}
    kept = {what: float(row.note.split("KV ")[1].split(" MiB")[0]) for what, row in rows.items() if "KV" in row.note}
    whole = 2 * 4 * 1024 * 64 * 4 / 2**20  # keys and values, heads, tokens, size, bytes
    assert kept["full cache"] == whole
    assert kept["half of the heads stream"] == round((whole + whole * 320 / 1024) / 2, 1)
    assert whole / 4 <= kept["a quarter, ragged"] <= whole / 4 + 4 * 64 * 64 * 2 * 4 / 2**20
    assert all(row.ratio == 1.0 for what, row in rows.items() if "choice" not in what)


def test_layers_of_the_benchmark_hold_what_they_say():
    cpu = torch.device("cpu")
    plain, mixed = (made(cpu, [[130, 64], [200, 1]], 2, 16, mixed=mixed) for mixed in (False, True))
    assert plain.table.tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7], [8, -1, -1, -1]]
    assert sorted(mixed.table[mixed.table >= 0].tolist()) == list(range(9))
    assert plain.nbytes == (130 + 64 + 200 + 1) * 2 * 16 * 4
    shared = made(cpu, [[130, 128], [200, 192]], 2, 16, prefix=2)
    assert torch.equal(shared.table[:2, :2], shared.table[2:, :2])
    assert len(shared.k) == 3 + 2 + 2 + 1
    given = {"lse": True, "scale": 0.25}
    for layer in (plain, mixed, shared):
        x = layer.q, layer.k, layer.v, layer.table, layer.lengths
        assert float((layer.read() - paged_attention(*x, backend="gather", **given)[0]).abs().max()) < 1e-6
