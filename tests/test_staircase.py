"""Codes that get coarser with age."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwise.caches import PAGE, LayerStore
from headwise.caches import arena as arena_module
from headwise.caches.rules.low_rank import LowRank
from headwise.caches.rules.offloaded import Offloaded
from headwise.caches.rules.quantized import Quantized
from headwise.caches.rules.snap_kv import SnapKv
from headwise.caches.rules.staircase import Staircase
from headwise.errors import PlanError
from headwise.models.inputs import text_rows
from headwise.models.subject import open_model
from headwise.plans import Plan
from headwise.plans.recipes.quantized import quantized
from headwise.stages.window import Window

D = 8

D = 8


@pytest.fixture(scope="module")
def gqa():
    return open_model("tiny-gqa", dtype="float64")


def directions(heads, d, rank, seed=0):
    return torch.linalg.qr(torch.randn(heads, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q[
        ..., :rank
    ]


@pytest.fixture
def pages_of_four(monkeypatch):
    monkeypatch.setattr(arena_module, "PAGE", 4)


class Marked(Quantized):
    """Says how often, and by which codec, a token was encoded: a digit more each time."""

    def encode(self, k, v):
        return {"k": k * 10 + self.bits, "v": v}

    def decode(self, parts, dtype):
        return parts["k"], parts["v"]


def stairs(ages=(6, 14), heads=2):
    return Staircase(ages, (Marked(8), Marked(4)))


def forms(store, rows, heads):
    """By row: (number, digits) of all tokens in the order in which they are read, from a further token that is taken back."""
    (view,) = store.extend(torch.zeros(rows, heads, 1, D, dtype=torch.float64), torch.zeros(rows, heads, 1, D, dtype=torch.float64))
    found = []
    for row in range(rows):
        number = view.number[row if len(view.number) > 1 else 0].tolist()
        own = [(n, int(x)) for n, x in zip(number, view.k[row, 0, :, 0].tolist(), strict=True) if n >= 0]
        assert view.k[row, 0].tolist() == view.k[row, heads - 1].tolist()
        found.append(own[:-1])
    store.rollback(store.seen - 1)
    return found


def take(store, count, rows=1, heads=2, pads=None):
    """Tokens whose keys are 1."""
    ones = torch.ones(rows, heads, count, D, dtype=torch.float64)
    views = store.extend(ones, ones, pads)
    store.settle(torch.zeros(rows, heads, count, D, dtype=torch.float64), 1.0, ())
    return views


def test_what_grows_old_moves_by_pages(pages_of_four):
    """After each token: the newest 6 to 9 are plain, 8 to 11 more have 8 bits, and the rest 4, once or after 8."""
    store = LayerStore([None] * 2, [((0, 1), stairs())])
    take(store, 37)
    # 37 - 14 = 23: five pages go straight to 4 bits; of the other 17, 11 are older than 6: two pages get 8 bits
    wanted = [14] * 20 + [18] * 8 + [1] * 9
    assert forms(store, 1, 2) == [list(enumerate(wanted))]
    for step in range(1, 30):
        take(store, 1)
        n = 37 + step
        plain = 6 + (n - 6) % 4
        eights = (n - 14) // 4 * 4
        wanted = [14] * 20 + [184] * (eights - 20) + [18] * (n - plain - eights) + [1] * plain
        assert forms(store, 1, 2) == [list(enumerate(wanted))]
        assert store.held()[0] == [list(range(n))] * 2
    (view,) = take(store, 1)
    assert view.ordered
    assert view.number.tolist() == [list(range(67))]


@pytest.mark.parametrize("chunks", [(37,), (5, 1, 1, 20, 10), (1,) * 37, (13, 24)])
def test_rows_age_by_their_own_tokens(pages_of_four, chunks):
    store = LayerStore([None] * 2, [((0, 1), stairs())])
    alone = LayerStore([None] * 2, [((0, 1), stairs())])
    for count in chunks:
        take(store, count, 2, pads=[0, 5])
    for count in (max(chunks[0] - 5, 0), *chunks[1:]):
        if chunks[0] >= 5 and count:
            take(alone, count)
    found = forms(store, 2, 2)
    assert [n for n, _ in found[0]] == list(range(37))
    assert [n for n, _ in found[1]] == list(range(5, 37))
    for own, n in zip(found, (37, 32), strict=True):
        digits = [form for _, form in own]
        plain = 6 + (n - 6) % 4
        assert digits[n - plain :] == [1] * plain
        assert all(form % 10 == 8 for form in digits[(n - 14) // 4 * 4 : n - plain])
        assert all(form % 10 == 4 for form in digits[: (n - 14) // 4 * 4])
    if chunks[0] > 5:
        assert [(n - 5, form) for n, form in found[1]] == forms(alone, 1, 2)[0]
    store.select(torch.tensor([1, 0, 1]))
    assert forms(store, 3, 2) == [found[1], found[0], found[1]]


def test_taking_back_reaches_into_what_was_encoded(pages_of_four):
    store = LayerStore([None] * 2, [((0, 1), stairs())])
    take(store, 37)
    assert store.croppable
    store.crop(12)
    assert forms(store, 1, 2) == [list(enumerate([14] * 20 + [18] * 5))]
    take(store, 9)  # 34: what lies behind a page that is not full moves on only with it
    digits = [form for _, form in forms(store, 1, 2)[0]]
    assert digits == [14] * 20 + [18] * 5 + [1] * 9
    take(store, 3)
    assert [form for _, form in forms(store, 1, 2)[0]] == [14] * 20 + [18] * 9 + [1] * 8


def test_what_is_newer_does_not_overtake(pages_of_four):
    """Behind a page that is not full, tokens go down step by step."""
    store = LayerStore([None] * 2, [((0, 1), stairs())])
    take(store, 37)
    store.crop(12)
    take(store, 30)
    assert forms(store, 1, 2) == [list(enumerate([14] * 20 + [184] * 4 + [18] * 25 + [1] * 6))]


def test_a_call_that_fails_after_moves_is_taken_back(pages_of_four):
    store = LayerStore([None] * 2, [((0, 1), stairs())])
    take(store, 37)
    before = [n for n, _ in forms(store, 1, 2)[0]]
    take(store, 12)
    store.rollback(37)
    assert [n for n, _ in forms(store, 1, 2)[0]] == before
    assert store.seen == 37
    store.rollback(0)
    assert store.seen == 0
    take(store, 3)
    assert forms(store, 1, 2) == [[(0, 1), (1, 1), (2, 1)]]


def test_bytes_by_age_are_those_allocated():
    """12 pages of 4 bits, 4 of 8, and the page and a half that stay plain."""
    store = LayerStore([None] * 2, [((0, 1), Staircase((64, 320), (Quantized(8, D), Quantized(4, D))))])
    take(store, 64 * 17 + 30)
    plain, eight, four = 2 * (2 * D * 8 + 4), 4 * (2 * (D + 4) + 4), 12 * (2 * (D // 2 + 4) + 4)
    assert store.bytes() == 2 * PAGE * (plain + eight + four)
    lengths = [int(sequences.lengths.max()) for sequences in store.sequences.values()]
    assert lengths == [94, 256, 768]


def test_steps_need_ages_and_heads_of_their_own(gqa):
    for ages, codecs in (((6,), (Quantized(), Quantized())), ((6, 6), (Quantized(),) * 2), ((), ()), ((-1, 3), (Quantized(),) * 2)):
        with pytest.raises(PlanError, match="ages in tokens that rise"):
            Staircase(ages, codecs)
    every, ids = gqa.main.exists(), text_rows(gqa, None, 1, 20)
    both = Plan.empty(gqa).use(every, Staircase(), SnapKv(8))
    with pytest.raises(PlanError, match="both Staircase and SnapKv"), both(gqa):
        gqa.model(ids)
    with pytest.raises(PlanError, match="a mask and Staircase"), Plan.empty(gqa).use(every, Staircase(), Window(8))(gqa):
        gqa.model(ids)
    with pytest.raises(PlanError, match="both Quantized and Offloaded"), quantized(gqa).use(every, Offloaded())(gqa):
        gqa.model(ids)
    rule = Staircase((3,), (LowRank(directions(4, 32, 5), directions(4, 32, 6)),))
    assert torch.equal(rule.select([2]).codecs[0].keys, rule.codecs[0].keys[2:3])
    with pytest.raises(Exception, match="4 entries for 8 heads"):
        Plan.empty(gqa).use(gqa.heads([(0, head) for head in range(8)]), rule)


def test_pages_that_were_handed_on_are_used_again(pages_of_four):
    arena = arena_module.Arena()
    sequences = arena_module.Sequences(arena, 2)
    sequences.begin(2)
    sequences.append((0, 1), {"x": torch.arange(11.0).expand(2, 2, 11).clone()}, [(0, 1)])
    sequences.shift((0, 1), np.array([[1, 2], [0, 1]]))
    assert sequences.lengths.tolist() == [[7, 3], [11, 7]]
    assert arena.held == 12 - 4
    found = sequences.read("x", (0, 1))
    for (row, head), start in (((0, 0), 4), ((0, 1), 8), ((1, 0), 0), ((1, 1), 4)):
        assert found[row, head, : 11 - start].tolist() == list(range(start, 11))
    sequences.trim([(0, 1)])
    assert len(arena.refs) == 8
    assert sequences.read("x", (1,))[0, 0, :3].tolist() == [8, 9, 10]
