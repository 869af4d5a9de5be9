"""Per-head stores against the simplest model of them: keep every token, and say which may be forgotten."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise.caches import PAGE, Keep, LayerStore
from headwise.caches import arena as arena_module
from headwise.errors import PlanError

D = 3


def tokens(rows, heads, start, count, seed=0):
    """Keys that name themselves: every value is drawn from (row, head, number)."""
    number = torch.arange(start, start + count, dtype=torch.float64)
    key = (
        number[None, None, :, None]
        + 1000 * torch.arange(rows)[:, None, None, None]
        + 100000 * torch.arange(heads)[None, :, None, None]
    )
    return key.expand(rows, heads, count, D).clone(), -key.expand(rows, heads, count, D).clone()


keeps = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(1, 6)).map(lambda p: Keep(*p))), min_size=1, max_size=4
)


@pytest.fixture(params=[2, 64])
def growth(request, monkeypatch):
    """Blocks that are smaller than a ring, and larger."""
    monkeypatch.setattr(arena_module, "PAGE", request.param)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keeps, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.data())
def test_a_store_holds_what_may_still_be_read(growth, keeps, chunks, pads, data):
    """Chunks of any size, left padding, and rows reordered in between: every view holds all that its mask shows, rightly named."""
    store = LayerStore(keeps)
    rows, seen = len(pads), 0
    pads = [min(p, chunks[0] - 1) for p in pads]
    for count in chunks:
        k, v = tokens(rows, len(keeps), seen, count)
        views = store.extend(k, v, pads)
        seen += count
        assert sorted(h for view in views for h in view.heads) == list(range(len(keeps)))
        for view in views:
            for head_place, head in enumerate(view.heads):
                keep = keeps[head]
                for row in range(rows):
                    number = view.number[row if view.number.shape[0] > 1 else 0]
                    held = {int(n): i for i, n in enumerate(number.tolist()) if n >= 0}
                    for query in range(seen - count, seen):
                        position = query - pads[row]
                        wanted = [
                            n for n in range(pads[row], query + 1)
                            if keep is None or n - pads[row] < keep.sink or position - (n - pads[row]) < keep.recent
                        ]  # fmt: skip
                        assert set(wanted) <= set(held), (keep, query, held)
                    for n, i in held.items():
                        assert float(view.k[row, head_place, i, 0]) % 1000 == n
                        assert float(view.v[row, head_place, i, 0]) == -float(view.k[row, head_place, i, 0])
        if data.draw(st.booleans()):
            chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)))
            store.select(chosen)
            pads = [pads[i] for i in chosen.tolist()]
            rows = len(chosen)
    assert store.seen == seen


def test_views_of_one_new_token_are_exact():
    store = LayerStore([Keep(2, 3), None])
    store.extend(*tokens(1, 2, 0, 20))
    ring, full = store.extend(*tokens(1, 2, 20, 1))
    assert ring.exact
    assert sorted(ring.number[0].tolist()) == [0, 1, 18, 19, 20]
    assert full.ordered
    assert full.k.shape[2] == 21


PER_TOKEN = 2 * D * 8 + 4  # key, value and number


def test_bytes_are_those_allocated():
    many = LayerStore([None] * 4)
    some = LayerStore([Keep(2, 6), None, Keep(2, 6), Keep(2, 6)])
    for store in (many, some):
        store.extend(*tokens(1, 4, 0, 1000))
    pages = -(-1000 // PAGE)
    assert many.bytes() == 4 * pages * PAGE * PER_TOKEN
    assert some.bytes() == (pages + 3) * PAGE * PER_TOKEN
    before = some.bytes()
    for i in range(20):
        some.extend(*tokens(1, 4, 1000 + i, 1))
    assert some.bytes() == before  # still within the pages that were allocated


def test_short_texts_allocate_little():
    """No more than a page over what is held, and a sixteenth, however long the window may get."""
    store = LayerStore([Keep(4, 1000), None])
    store.extend(*tokens(1, 2, 0, 10))
    assert store.bytes() == 2 * PAGE * PER_TOKEN
    for start in range(10, 1500, 10):
        store.extend(*tokens(1, 2, start, 10))
        held = min(start + 10, 1004)
        assert store.bytes() <= (held + start + 10 + 2 * PAGE) * 17 / 16 * PER_TOKEN
    ring, _ = store.extend(*tokens(1, 2, 1500, 1))
    assert sorted(ring.number[0].tolist()) == [0, 1, 2, 3, *range(501, 1501)]


def test_cropping_where_nothing_was_freed():
    store = LayerStore([None, None])
    store.extend(*tokens(1, 2, 0, 10))
    assert store.croppable
    store.crop(4)
    (view,) = store.extend(*tokens(1, 2, 6, 1))
    assert view.k[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    ring = LayerStore([Keep(1, 2)])
    ring.extend(*tokens(1, 1, 0, 10))
    assert not ring.croppable
    with pytest.raises(PlanError, match="cannot take back 1 tokens"):
        ring.crop(1)
    ring.crop(0)
