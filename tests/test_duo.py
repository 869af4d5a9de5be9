"""Heads chosen by a quantile of DuoAttention's gates, the recipe on top, and the whole training with its needles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from headwise import duo, evaluate, open_model, probe
from headwise.errors import GeometryError, InputError, PlanError
from headwise.models.subject import Subject, as_subject
from headwise.plans.gates import above_quantile, spread, train_gates
from headwise.report.experiments import random_duo
from headwise.tasks.needle import Needle
from headwise.types import Heads, HeadTable

RETRIEVAL = [(6, 5), (6, 6), (7, 1), (7, 2), (7, 3), (7, 6)]  # of the embedded model, by its probe


@pytest.fixture(scope="module")
def small() -> Subject:
    """Two layers of four heads, two share keys; random, in float64, without a tokenizer."""
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return as_subject(StableLmForCausalLM(config).double().eval())


# ---- heads chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(small):
    return small.main


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_the_quantile_is_of_all_layers_together(stack, sparsity):
    values = torch.tensor([0.9, 0.2, 0.7, 0.5], dtype=torch.float64)
    table = spread(stack, values.split(2), "t", "", {})
    full = above_quantile(table, stack, sparsity)
    wanted = values.numpy() >= (2 if sparsity == 1 else np.quantile(values.numpy(), sparsity) - 1e-5)
    assert full.mask[:, ::2].flatten().tolist() == wanted.tolist()
    assert torch.equal(full.mask[:, ::2], full.mask[:, 1::2])


def test_a_group_counts_by_its_largest_head(stack):
    values = torch.tensor([[0.0, 0.9, 0.3, 0.3], [0.4, 0.4, 0.2, 0.8]], dtype=torch.float64)
    full = above_quantile(HeadTable(values, "t"), stack, 0.5)
    assert full.list() == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_ties_are_broken_by_the_seed(stack):
    for size in (1.0, 1e-9, 0.0):
        table = HeadTable(torch.full((2, 4), size), "t")
        chosen = [above_quantile(table, stack, 0.5, seed) for seed in range(12)]
        assert all(heads.count() == 4 for heads in chosen)
        assert len(set(chosen)) > 2
        assert above_quantile(table, stack, 0.5, 3) == chosen[3]
    close = HeadTable(torch.tensor([[0.5, 0.5, 0.5 + 1e-5, 0.5 + 1e-5], [0.1, 0.1, 0.2, 0.2]]).double(), "t")
    assert all(above_quantile(close, stack, 0.75, seed).list() == [(0, 2), (0, 3)] for seed in range(12))
    tiny_values = HeadTable(close.values * 1e-8, "t")
    assert all(above_quantile(tiny_values, stack, 0.75, seed).list() == [(0, 2), (0, 3)] for seed in range(12))


def test_heads_without_a_value_come_last(stack):
    values = torch.full((2, 4), torch.nan, dtype=torch.float64)
    values[1] = torch.tensor([-0.9, -0.9, 0.3, 0.3])
    assert above_quantile(HeadTable(values, "t"), stack, 0.5).list() == [(1, 0), (1, 1), (1, 2), (1, 3)]
    with pytest.raises(InputError, match=r"sparsity is 1\.5"):
        above_quantile(HeadTable(values, "t"), stack, 1.5)
    with pytest.raises(InputError, match="sparsity is nan"):
        above_quantile(HeadTable(values, "t"), stack, float("nan"))


def test_layers_of_fewer_heads_have_no_number(stack):
    uneven = replace(stack, sites=(stack.sites[0], replace(stack.sites[1], heads=2, key_value_heads=1)))
    table = spread(uneven, [torch.tensor([0.9, 0.2]), torch.tensor([0.5])], "t", "", {})
    assert torch.equal(table.values.nan_to_num(-1.0), torch.tensor([[0.9, 0.9, 0.2, 0.2], [0.5, 0.5, -1, -1]]).double())
    assert above_quantile(table, uneven, 0.5).list() == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_duo_with_a_share_of_heads(small):
    table = spread(small.main, torch.tensor([0.9, 0.2, 0.7, 0.5]).split(2), "duo_gates", "share", {})
    plan = duo(small, table, sparsity=0.5, sink=1, recent=4)
    assert plan.about["full"] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert plan.about["sparsity"] == 0.5
    assert plan.about["streaming"] == 4
    assert plan.about["by"] == "duo_gates"
    assert "sparsity" not in duo(small, table, threshold=0.6).about
    assert duo(small, table, threshold=0.6).about["full"] == plan.about["full"]


def test_duo_trains(small, monkeypatch):
    seen = {}

    def trained(subject, **options):
        seen.update(options)
        return spread(small.main, torch.tensor([0.0, 0.2, 0.7, 1.0]).split(2), "duo_gates", "share", {})

    monkeypatch.setattr("headwise.plans.recipes.duo.train_gates", trained)
    plan = duo(small, train=True, steps=7, seed=5, show_progress=False)
    assert seen == {"steps": 7, "seed": 5, "show_progress": False}
    assert plan.about["sparsity"] == 0.5
    assert plan.about["full"] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    assert duo(small, train=True, sparsity=0.75).about["full"] == ["L1H2", "L1H3"]


def test_duo_says_what_is_wrong(small):
    table = HeadTable(torch.zeros(3, 4), "other")
    with pytest.raises(GeometryError, match=r"3 layers x 4 heads of decoder, the decoder of .* has 2 x 4"):
        duo(small, table)
    with pytest.raises(GeometryError, match="of vision"):
        duo(small, HeadTable(torch.zeros(2, 4), "other", "vision"))
    with pytest.raises(PlanError, match="leave one of them out"):
        duo(small, small.main.exists(), train=True)
    with pytest.raises(PlanError, match="sparsity chooses heads by the values of a table"):
        duo(small, Heads.none((2, 4)), sparsity=0.5)


# ---- the whole of it -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trained_gates_find_the_needle():
    """The whole training: with a quarter of the heads full, needles are found; with as many random ones they are not."""
    subject = open_model("tiny")
    table = train_gates(subject, show_progress=False)
    assert table.spearman(probe("duo_gate", subject, show_progress=False)) > 0.3
    assert set(RETRIEVAL) <= set(table.top(16).list())
    task = Needle(depths=(0.05, 0.25, 0.5, 0.75, 0.9))
    plan = duo(subject, table, sparsity=0.75, sink=24, recent=96)
    assert plan.about["streaming"] == 48
    result = evaluate(subject, plan, [task], show_progress=False)
    assert result.under_plan is not None
    assert result.under_plan["needle"] >= result.without["needle"] - 0.2
    assert max(random_duo(subject, plan, task=task, show_progress=False)) < 0.3
