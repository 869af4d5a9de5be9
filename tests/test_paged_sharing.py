"""Pages that rows share are read once, and work is cut evenly: against reading each sequence alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from paged_sequences import SCALE, WAYS, P, Paged

from headwise.attention import paged_torch
from headwise.attention.paged import Schedule, Segment, merge, shared_attention
from headwise.attention.schedule import OPEN, shared_pages
from headwise.errors import ShapeError

SHARED = {
    "some pages": ([[70, 50], [33, 64], [40, 90]], 32, 1),
    "new tokens in the shared pages": ([[64, 64], [64, 66], [65, 70]], 64, 4),
    "rows end within them": ([[40, 50], [60, 43]], 48, 1),
    "one row ends with them": ([[32, 33], [50, 32]], 32, 1),
}


@WAYS
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("programs", [1, 20])
def test_what_rows_share_is_read_once(name, programs, backend, device):
    lengths, prefix, n = SHARED[name]
    x = Paged(lengths, prefix=prefix, n=n, device=device)
    rows, kv = len(lengths), len(lengths[0])
    segments = shared_pages(x.held, x.lengths, P)
    assert segments == [Segment(0, rows, head, 0, prefix // P) for head in range(kv)]
    schedule = x.schedule(segments=segments, programs=programs)
    assert len(schedule.wide)
    out, lse = x.check(backend=backend, schedule=schedule)
    plain = x(backend=backend)
    assert float((out - plain[0]).abs().max()) < 1e-5
    assert float((lse - plain[1]).abs().max()) < 1e-5
    again = x(backend=backend, schedule=schedule)
    assert torch.equal(again[0], out)
    given = shared_attention(
        x.q, x.k_pool, x.v_pool, x.table, x.lengths.view(-1).to(device), segments, scale=SCALE, backend=backend, lse=True
    )
    assert float((given[0] - plain[0]).abs().max()) < 1e-5


@WAYS
def test_a_tree_of_shared_pages(backend, device):
    """All four rows share a page, two of them one more, and two heads differ."""
    x = Paged([[70, 40], [60, 40], [50, 40], [80, 40]], prefix=16, device=device)
    for t in (x.k, x.v):
        t[2, 0, 16:32] = t[1, 0, 16:32]
    x.held[2, 0, 1] = x.held[1, 0, 1]
    x.table = x.held.view(8, -1).to(device)
    segments = shared_pages(x.held, x.lengths, P)
    assert segments == [Segment(0, 4, 0, 0, 1), Segment(1, 3, 0, 1, 1), Segment(0, 4, 1, 0, 1)]
    sinks = torch.tensor([0.5, -3.0, 2.0, 9.0], device=device)
    for programs in (1, 30):
        x.check(backend=backend, schedule=x.schedule(segments=segments, programs=programs), sinks=sinks)
    middle = [Segment(1, 3, 0, 1, 1)]  # private pages before and behind it
    x.check(backend=backend, schedule=x.schedule(segments=middle, programs=30))


@WAYS
def test_more_rows_share_than_a_program_takes(backend, device):
    x = Paged([[40 + row] for row in range(19)], group=4, n=3, prefix=32, device=device)
    x.check(backend=backend, schedule=x.schedule(segments=shared_pages(x.held, x.lengths, P), programs=50))


def test_long_shared_pages_are_read_in_chunks(monkeypatch):
    """By the CPU's path: each chunk has a part for every row."""
    monkeypatch.setattr(paged_torch, "CHUNK", 16)
    x = Paged([[70, 50], [33, 64], [40, 90]], prefix=32)
    x.check(backend="each", schedule=x.schedule(segments=shared_pages(x.held, x.lengths, P)))


def test_shared_work_is_cut_for_the_programs_that_it_takes():
    lengths = [[64 * 70]] * 32
    schedule = Schedule.of(lengths, 1, segments=[Segment(0, 32, 0, 0, 64)], programs=8)
    assert len(schedule.wide) == 4  # each is two programs of 16 sequences
    assert schedule.runs.known.tolist() == [64] + [6] * 32
    assert schedule.parts == 4 * 32 + len(schedule.narrow)


def test_shared_pages_are_those_that_rows_use():
    table = torch.tensor([[[0, 1, -1]], [[0, 1, -1]], [[0, 2, 3]]])
    assert shared_pages(table, [[32], [30], [40]], P) == [Segment(0, 3, 0, 0, 1), Segment(0, 2, 0, 1, 1)]
    assert shared_pages(table, [[32], [16], [40]], P) == [Segment(0, 3, 0, 0, 1)]
    assert shared_pages(table, [[0], [30], [40]], P) == [Segment(1, 3, 0, 0, 1)]
    assert shared_pages(table[:1], [[32]], P) == []


def test_segments_that_cannot_be_are_refused():
    lengths = [[64, 64], [64, 30]]
    wrong = [
        [Segment(0, 2, 0, 0, 2), Segment(0, 2, 0, 1, 1)],  # overlap
        [Segment(0, 2, 0, 0, 2), Segment(0, 2, 0, 1, 2)],
        [Segment(0, 2, 1, 0, 3)],  # a row has only two
        [Segment(0, 3, 0, 0, 1)],
        [Segment(0, 2, 2, 0, 1)],
        [Segment(1, 1, 0, 0, 1)],
        [Segment(0, 2, 0, 0, 0)],
    ]
    for segments in wrong:
        with pytest.raises(ShapeError, match="Segment"):
            Schedule.of(lengths, 2, page=P, segments=segments)
    Schedule.of(lengths, 2, page=P, segments=[Segment(0, 2, 0, 0, 2), Segment(0, 2, 0, 2, 2), Segment(0, 2, 1, 0, 2)])


# ---- merging and cutting ---------------------------------------------------------------------------------------------


def test_merge_is_attention_over_all_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, m, 8, dtype=torch.float64, generator=generator) for m in (3, 40, 40))
    scores = q @ k.mT
    cuts = [0, 7, 7, 30, 40]  # one part is empty
    outs = [scores[..., a:b].softmax(-1) @ v[:, a:b] for a, b in pairwise(cuts)]
    lses = [scores[..., a:b].logsumexp(-1) for a, b in pairwise(cuts)]
    out, lse = merge(outs, lses)
    assert float((out - scores.softmax(-1) @ v).abs().max()) < 1e-13
    assert float((lse - scores.logsumexp(-1)).abs().max()) < 1e-13
    nothing = torch.full((2, 2, 3), -torch.inf, dtype=torch.float64)
    out, lse = merge(torch.zeros(2, 2, 3, 8, dtype=torch.float64), nothing)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def work(schedule):
    """{sequence: the pages that its items have, in the order of its parts}, of items that one sequence reads."""
    found = {}
    for sequence, first, pages, *_ in schedule.narrow.tolist():
        found.setdefault(sequence, []).append((first, pages))
    return {sequence: sorted(items) for sequence, items in found.items()}


def test_items_are_even_and_cover_every_page_once():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 20000, (4, 8), generator=generator)
    lengths[0, 0] = 130_000
    schedule = Schedule.of(lengths, 8, programs=264)
    pages = -(-lengths.view(-1) // 64)
    sizes = []
    for sequence, items in work(schedule).items():
        own = int(pages[sequence])
        ends = [first + (own - first if count == OPEN else count) for first, count in items]
        assert [first for first, _ in items] == [0, *ends[:-1]]
        assert ends[-1] == own
        assert items[-1][1] == OPEN
        assert all(count != OPEN for _, count in items[:-1])
        sizes += [end - first for (first, _), end in zip(items, ends, strict=True)]
    assert max(sizes) == schedule.longest
    assert len(sizes) <= 264
    assert max(sizes) <= 1.2 * int(pages.sum()) / 264
    order = [min(count, schedule.longest) for _, _, count, *_ in schedule.narrow.tolist() if count != OPEN]
    assert order == sorted(order, reverse=True)


def test_more_sequences_than_programs_are_cut_where_they_are_long():
    schedule = Schedule.of([[64 * 512] + [64 * 8] * 299], 300, programs=100)
    counts = {sequence: len(items) for sequence, items in work(schedule).items()}
    assert counts[0] > 8
    assert all(counts[sequence] == 1 for sequence in range(1, 300))


def test_a_schedule_is_stale_once_sequences_have_grown():
    schedule = Schedule.of([[6400, 640]], 2, programs=10)  # 110 pages: items of 10
    assert schedule.longest == 13 - 1
    assert not schedule.stale([[6400, 640]])
    assert not schedule.stale([[100, 640 + 64 * 4]])
    assert schedule.stale([[6400, 640 + 64 * 4 + 1]])
    assert schedule.stale([[6400]])
