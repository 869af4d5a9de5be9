"""Heads, HeadTable, Spans."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise import Heads, HeadTable, Spans
from headwise.errors import InputError, SelectionError
from headwise.types import parse_head

tables = st.integers(0, 2**20).map(lambda seed: Heads(torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)) < 0.4))


@pytest.mark.parametrize("text", ["L5H3", "l5h3", "5-3", "5.3", " L5H3 "])
def test_addresses(text):
    assert parse_head(text) == (5, 3)
    assert parse_head((5, 3)) == (5, 3)


@pytest.mark.parametrize("text", ["", "L5", "H3", "5", "L-1H3", "L5H3H4"])
def test_what_is_no_address(text):
    with pytest.raises(SelectionError, match="write it like L5H3"):
        parse_head(text)


def test_selections():
    heads = Heads.of("L0H1, L2H3", (3, 4))
    assert heads.list() == [(0, 1), (2, 3)]
    assert heads == Heads.of({0: [1], 2: [3]}, (3, 4)) == Heads.of([(0, 1), "L2H3"], (3, 4))
    assert "L2H3" in heads
    assert (1, 1) not in heads
    assert heads.names() == ["L0H1", "L2H3"]
    assert heads.layer(2) == [3]
    assert heads.whole_groups(2).names() == ["L0H0", "L0H1", "L2H2", "L2H3"]
    assert heads.expect(2) is heads
    with pytest.raises(SelectionError, match="selected 2 heads, expected 3"):
        heads.expect(3)
    with pytest.raises(SelectionError, match="L3H0 is out of range: decoder has layers 0-2 and heads 0-3"):
        Heads.of("L3H0", (3, 4))
    with pytest.raises(SelectionError, match="same stack"):
        heads | Heads.none((3, 4), "encoder")
    with pytest.raises(SelectionError, match="boolean"):
        Heads(torch.zeros(3, 4))


@given(tables, tables, tables)
def test_selections_are_a_boolean_algebra(a, b, c):
    assert ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert (a - b) == a & ~b
    assert a.count() + (~a).count() == 20
    assert set(a) == set(Heads.of(a.list(), (5, 4)))


@given(tables, st.integers(0, 1000))
def test_random_controls(heads, seed):
    others = ~heads
    count = min(heads.count(), others.count())
    drawn = others.random(count, seed)
    assert drawn.count() == count
    assert not (drawn & heads)
    assert drawn == others.random(count, seed)
    if all(len(others.layer(i)) >= len(heads.layer(i)) for i in range(5)):
        fair = others.random(heads.count(), seed, like=heads)
        assert [len(fair.layer(i)) for i in range(5)] == [len(heads.layer(i)) for i in range(5)]


def test_tables(tmp_path):
    table = HeadTable(
        torch.tensor([[0.1, 0.9], [0.5, math.nan]], dtype=torch.float64), "induction", unit="probability", about={"n": 1}
    )
    assert (table > 0.4).names() == ["L0H1", "L1H0"]
    assert (table <= 0.5).names() == ["L0H0", "L1H0"]
    assert table["L0H1"] == pytest.approx(0.9)
    assert table[1, 0] == 0.5
    assert table.heads().count() == 3
    assert table.top(1).names() == ["L0H1"]
    assert table.bottom(2).names() == ["L0H0", "L1H0"]
    assert [head for head, _ in table.ranking()] == [(0, 1), (1, 0), (0, 0)]
    with pytest.raises(SelectionError, match="out of range"):
        table["L2H0"]
    table.save(tmp_path / "t.json")
    again = HeadTable.load(tmp_path / "t.json")
    assert again.rows() == table.rows() == [[0.1, 0.9], [0.5, None]]
    assert (again.name, again.unit, again.about) == ("induction", "probability", {"n": 1})
    frame = table.to_dataframe()
    assert list(frame["name"]) == ["L0H0", "L0H1", "L1H0"]
    assert list(frame["induction"]) == [0.1, 0.9, 0.5]
    assert "L0H1 0.9" in repr(table)
    assert str(table).count("\n") == 3


def test_rank_correlation():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    table = HeadTable(values, "a")
    assert table.spearman(HeadTable(values.exp(), "b")) == pytest.approx(1.0)
    assert table.spearman(HeadTable(-values, "b")) == pytest.approx(-1.0)
    ties = HeadTable(torch.tensor([[1.0, 1.0, 2.0], [2.0, 3.0, 3.0]]), "c")
    assert table.spearman(ties) == pytest.approx(0.9561828874675149)  # scipy.stats.spearmanr
    assert math.isnan(table.spearman(HeadTable(torch.ones(2, 3), "d")))


def test_spans(tiny):
    text = "The password is river. Remember it."
    spans = Spans.find(tiny.tokenizer, text, {"password": "river", "rest": "Remember it"})
    (start, stop), *_ = spans.ranges["password"]
    ids = tiny.tokenizer(text)["input_ids"]
    assert tiny.tokenizer.decode(ids[start:stop]).strip() == "river"
    table = spans.indicator(len(ids))
    assert table.shape == (2, len(ids))
    assert table[0].nonzero().flatten().tolist() == list(range(start, stop))
    with pytest.raises(InputError, match="'ocean' is not in the text"):
        Spans.find(tiny.tokenizer, text, {"x": "ocean"})
    with pytest.raises(InputError, match="does not fit 3 tokens"):
        spans.indicator(3)
