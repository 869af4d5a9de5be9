"""Masks: one definition, asked for as a predicate, a table, tiles, key lists and block masks, against brute force."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import Causal, Documents, Sink, Window, attend
from headwise.attention.backends import flex
from headwise.attention.mask import And, Mask, Not, Or
from headwise.attention.read import Operands
from headwise.errors import ShapeError
from headwise.stages.block_table import BlockTable
from headwise.stages.blocks import Blocks
from headwise.stages.dilated import Dilated
from headwise.stages.per_head import PerHead
from headwise.stages.prefix import Prefix
from headwise.stages.strided import Strided

HEADS = 3
tables = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda bits: BlockTable(torch.tensor(bits).view(1, 3, 4), 3))
leaves = st.one_of(
    st.just(Causal()),
    st.integers(1, 9).map(Window),
    st.integers(0, 5).map(Sink),
    st.integers(1, 6).map(Strided),
    st.tuples(st.integers(1, 4), st.integers(1, 3)).map(lambda p: Dilated(*p)),
    st.integers(1, 7).map(Blocks),
    st.integers(0, 6).map(Prefix),
    st.lists(st.integers(0, 2), min_size=32, max_size=32).map(lambda ids: Documents(torch.tensor(ids))),
    tables,
)
joined = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        inner.map(lambda p: ~p),
    ),
    max_leaves=4,
)
per_head = st.tuples(joined, joined, st.lists(st.integers(0, 1), min_size=HEADS, max_size=HEADS)).map(
    lambda p: PerHead((p[0], p[1]), torch.tensor(p[2]))
)
masks = st.one_of(joined, per_head, st.tuples(per_head, joined).map(lambda p: p[0] & p[1]))


def shown(mask: Mask, head: int, i: int, j: int) -> bool:
    """By the oracles of the parts alone."""
    if isinstance(mask, And):
        return all(shown(part, head, i, j) for part in mask.parts)
    if isinstance(mask, Or):
        return any(shown(part, head, i, j) for part in mask.parts)
    if isinstance(mask, Not):
        return not shown(mask.part, head, i, j)
    if isinstance(mask, PerHead):
        return shown(mask.masks[int(mask.which[head])], head, i, j)
    return bool(importlib.import_module(type(mask).__module__).oracle(mask, i, j))


def brute(mask: Mask, n: int, m: int) -> torch.Tensor:
    rows = [[[shown(mask, head, m - n + i, j) for j in range(m)] for i in range(n)] for head in range(HEADS)]
    return torch.tensor(rows)


@settings(max_examples=120, deadline=None)
@given(masks, st.integers(1, 14), st.integers(0, 7))
def test_every_form_says_the_same(mask, n, past):
    m = n + past
    table = brute(mask, n, m)
    dense = mask.dense(n, m, HEADS).expand(1, HEADS, n, m)[0]
    assert torch.equal(dense, table)
    tiles = mask.tiles(n, m, 4, HEADS)
    some, every = (part.expand(1, HEADS, -1, -1)[0] for part in (tiles.some, tiles.all))
    for head in range(HEADS):
        for r in range(some.shape[1]):
            for c in range(some.shape[2]):
                tile = table[head, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
                assert bool(some[head, r, c]) or not bool(tile.any())
                assert not bool(every[head, r, c]) or bool(tile.all())
    for i in (0, n // 2, n - 1):
        listed = mask.keys(past + i, m, HEADS)
        assert listed.tolist() == table[:, i].any(0).nonzero().flatten().tolist()
        inside = torch.zeros(m, dtype=torch.bool)
        for start, stop in mask.reach(past + i, past + i + 1):
            inside[max(0, start) : min(m, stop)] = True
        assert not (table[:, i].any(0) & ~inside).any()
    g = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, HEADS, length, 4, generator=g, dtype=torch.float64) for length in (n, m, m))
    scores = (q @ k.mT / 2).masked_fill(~table, -torch.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v
    for backend in ("reference", "chunked", "sdpa"):
        torch.testing.assert_close(attend(q, k, v, mask, backend=backend), expected, rtol=0, atol=1e-12)
    last = attend(q[:, :, -1:], k, v, mask)  # one query reads just its listed keys
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Window(5),
        Window(1),
        Sink(3),
        Strided(3),
        Strided(7),
        Blocks(4),
        Blocks(3),
        Prefix(6),
        Documents(torch.arange(64) // 5),
    ],
    ids=str,
)
def test_tiles_of_plain_masks_are_tight(mask):
    """No tile is asked pair by pair that could be skipped or read whole."""
    table, tiles = mask.dense(24, 24)[0, 0], mask.tiles(24, 24, 4)
    blocks = table.view(6, 4, 6, 4)
    assert torch.equal(tiles.some[0, 0], blocks.any(3).any(1))
    if not isinstance(mask, Strided):
        assert torch.equal(tiles.all[0, 0], blocks.all(3).all(1))


def test_block_masks_come_from_tiles_and_are_kept():
    q = torch.zeros(2, 4, 300, 16)
    x = Operands.of(q, q, q)
    mask = Causal() & (Window(70) | Sink(2))
    made = flex.block_mask(mask, x)
    assert made is flex.block_mask(Causal() & (Window(70) | Sink(2)), x)  # equal masks are one
    assert made.shape[-2:] == (300, 300)
    some = mask.tiles(300, 300, 128).some[0, 0]
    assert torch.equal(made.to_dense()[0, 0].bool(), some)
    ids = Documents(torch.arange(300) // 100)
    first = flex.block_mask(ids, x)
    assert flex.block_mask(ids, x) is first
    ids.ids[:] = 0  # changed in place: the old tiles no longer hold
    assert flex.block_mask(ids, x) is not first


def test_masks_of_other_heads_are_refused():
    q = torch.zeros(1, 4, 5, 8)
    with pytest.raises(ShapeError, match="which has 3 entries for 4 heads"):
        attend(q, q, q, Causal() & PerHead((Causal(), Window(2)), torch.tensor([0, 1, 1])))
    with pytest.raises(ShapeError, match="must give each head a number below 2"):
        PerHead((Causal(), Window(2)), torch.tensor([0, 2]))
    with pytest.raises(ShapeError, match="booleans"):
        BlockTable(torch.ones(1, 2, 2), 4)


def test_prefixes_differ_by_row():
    q, k, v = torch.randn(3, 2, 1, 8, 4, dtype=torch.float64)
    out = attend(q, k, v, Causal() | Prefix(torch.tensor([2, 6])))
    for row, length in enumerate((2, 6)):
        alone = attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], Causal() | Prefix(length))
        torch.testing.assert_close(out[row : row + 1], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(out[1, :, 0], v[1, :, 0])  # the first query reads its whole prefix
