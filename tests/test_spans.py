"""Spans against sums over all pairs, and texts whose spans are known."""

from __future__ import annotations

import pytest
import torch

from headwise.attention import attend
from headwise.caches.spans import find_spans, retrieve, span_scores, span_vectors
from headwise.errors import ShapeError
from headwise.stages.causal import Causal


def blocks(lengths, inside=0.2, outside=0.0):
    table = torch.full((sum(lengths), sum(lengths)), outside, dtype=torch.float64)
    start = 0
    for length in lengths:
        table[start : start + length, start : start + length] = inside
        start += length
    return table.tril()


def ends(lengths):
    stops = torch.tensor(lengths).cumsum(0).tolist()
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


def test_scores_are_sums_over_the_triangle():
    n, threshold = 11, 0.13
    weights = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    scores = span_scores(weights, threshold)
    for x in range(n):
        for y in range(n):
            if y < x:
                assert scores[x, y] == -torch.inf
                continue
            own = sum(float(weights[i, j]) - threshold for i in range(x, y + 1) for j in range(x, i + 1))
            assert float(scores[x, y]) == pytest.approx(own, abs=1e-12)
    assert torch.equal(span_scores(weights.tril(), threshold), scores)  # later keys do not count


@pytest.mark.parametrize("lengths", [(7, 8, 15), (1, 2, 3, 4), (20,), (5, 5, 5)])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_blocks_of_equal_weights_are_found_exactly(lengths, share):
    assert find_spans(blocks(lengths), 0.2 * share) == ends(lengths)


def test_a_low_threshold_joins_blocks():
    assert find_spans(blocks((7, 8, 15)), 0.2 * 0.1) != ends((7, 8, 15))


def test_rows_that_sum_to_one_need_a_threshold_between():
    """Softmax blocks of equal length l: exact for 1 / (l + 1) < threshold < 1 / l only."""
    length = 6
    table = torch.block_diag(*[torch.ones(length, length, dtype=torch.float64).tril()] * 3)
    table /= table.sum(1, keepdim=True)
    assert find_spans(table, (1 / length + 1 / (length + 1)) / 2) == ends((length,) * 3)
    assert find_spans(table, 1.5 / length) != ends((length,) * 3)


def test_what_is_between_spans_is_a_span():
    table = torch.zeros(20, 20)
    table[3:8, 3:8] = 0.3
    table[12:16, 12:16] = 0.3
    assert find_spans(table.tril(), 0.2) == [(0, 3), (3, 8), (8, 12), (12, 16), (16, 20)]
    assert find_spans(torch.zeros(5, 5), 0.1) == [(0, 5)]


def test_better_spans_suppress_those_that_overlap():
    table = torch.zeros(10, 10)
    table[0:5, 0:5], table[3:8, 3:8] = 0.30, 0.36
    apart = find_spans(table.tril(), 0.2)
    assert (3, 8) in apart
    assert [stop for _, stop in apart[:-1]] == [start for start, _ in apart[1:]]  # a partition
    assert (apart[0][0], apart[-1][1]) == (0, 10)
    assert len(find_spans(table.tril(), 0.2, overlap=0.9)) > len(apart)
    every = find_spans(blocks((8,)), 0.1, overlap=1.0)  # spans within spans leave no gaps between them
    assert every == [(x, y) for x in range(8) for y in range(x + 1, 9)]
    assert (0, 5) in find_spans(table.tril(), 0.2, overlap=0.25)  # two tokens of eight are common to both
    assert (0, 5) not in find_spans(table.tril(), 0.2, overlap=0.24)


def test_no_span_is_longer_than_allowed():
    spans = find_spans(blocks((12, 12)), 0.1, longest=5)
    assert max(stop - start for start, stop in spans) == 5
    assert sorted(token for start, stop in spans for token in range(start, stop)) == list(range(24))


def test_a_span_is_retrieved_by_its_key_and_the_budget_holds():
    keys = torch.eye(6, dtype=torch.float64).repeat_interleave(4, 0)
    spans = ends((4,) * 6)
    vectors = span_vectors(keys, spans)
    assert torch.equal(vectors, torch.eye(6, dtype=torch.float64))
    for i in range(6):
        assert retrieve(vectors[i], vectors, spans, 4) == [spans[i]]
    query = torch.tensor([0.1, 0.9, 0.0, 0.5, 0.2, 0.3], dtype=torch.float64)
    assert retrieve(query, vectors, spans, 11) == [spans[1], spans[3]]
    order = [4, 2, 0, 5, 3, 1]
    assert retrieve(query, vectors[order], [spans[i] for i in order], 12) == retrieve(query, vectors, spans, 12)
    long = [(0, 3), (3, 20), (20, 24)]
    assert retrieve(query, span_vectors(keys, long), long, 8) == [(0, 3), (20, 24)]  # the best does not fit


def test_vectors_are_means_of_keys():
    keys = torch.arange(12.0).view(6, 2)
    assert torch.equal(span_vectors(keys, [(0, 1), (1, 4)]), torch.tensor([[0.0, 1.0], [4.0, 5.0]]))


def test_all_spans_retrieved_are_full_attention():
    """In whatever order they are loaded, at their true positions."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 3, 4, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, 1, 20, 4, generator=g, dtype=torch.float64)
    spans = find_spans(blocks((5, 9, 6)), 0.15)
    chosen = retrieve(q[0, 0, 0], span_vectors(k[0, 0], spans), spans, 20)
    assert chosen == spans
    tokens = torch.cat([torch.arange(*span) for span in reversed(chosen)])
    found = attend(
        q, k[:, :, tokens], v[:, :, tokens], Causal(), query_positions=torch.arange(17, 20)[None], key_positions=tokens[None]
    )
    torch.testing.assert_close(found, attend(q, k, v, Causal()), rtol=1e-12, atol=1e-14)


def test_tables_that_are_not_square_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 4\)"):
        span_scores(torch.zeros(3, 4), 0.1)
