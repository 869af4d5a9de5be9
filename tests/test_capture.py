"""Statistics of whole models: in one pass, under padding and windows, long rows, and without touching the model."""

from __future__ import annotations

import pytest
import torch
from families import ALL, inputs

import headwise
from headwise import Causal, Subject, Window, capture
from headwise.attention.statistic import HorizonMass, PositionMass, SegmentMass
from headwise.errors import InputError
from headwise.models import masks
from headwise.models.call import Call

FAMILIES = {family.name: family for family in ALL}
WANT = ("entropy", "max_weight", "distance", "key_mass", "log_sum_exp")


def padded(family, side):
    given = inputs("decoder", rows=2, length=24)
    mask = torch.ones_like(given["input_ids"])
    if side == "left":
        mask[0, :7] = 0
    else:
        mask[0, 17:] = 0
    return {**given, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bert", "qwen2"])
def test_masks_of_models_are_recognised_and_mean_the_same(name, side, monkeypatch):
    """Padding and sliding windows come as tables; read in their simple form they give the table's statistics."""
    family = FAMILIES[name]
    subject = Subject(family.model())
    given = padded(family, side)
    simple = capture(subject, WANT, inputs=given)[subject.main.name]
    tables: list[object] = []
    found: list[object] = []
    search = masks._search

    def searched(*args):
        tables.append(args[0])
        found.append(search(*args))
        return found[-1]

    monkeypatch.setattr(masks, "_search", searched)
    capture(subject, WANT, inputs=given)
    assert tables, "the model brought no table"
    assert all(item is not None for item in found), "a table was not recognised"
    assert len(tables) <= 2, "layers with the same table search it once"
    monkeypatch.setattr(masks, "_search", lambda *_: None)
    dense = capture(subject, WANT, inputs=given)[subject.main.name]
    real = given["attention_mask"].bool()
    for key in WANT:
        a, b = simple[key], dense[key]
        if key != "key_mass":
            a, b = (t.masked_fill(~real[None, :, None], 0.0) for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_table_without_a_simple_form_is_left_alone():
    table = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    places = torch.arange(9)[None]
    assert masks.recognise(table, places, places, True, {}).stages == (Causal(),)
    windowed = table & ~torch.ones(9, 9, dtype=torch.bool).tril(-3)
    assert masks.recognise(windowed, places, places, True, {}).stages == (Causal(), Window(3))
    table[0, 5, 2] = False
    assert masks.recognise(table, places, places, True, {}) is None


def test_means_are_over_real_tokens():
    subject = Subject(FAMILIES["llama"].model())
    given = padded(FAMILIES["llama"], "left")
    rows = capture(subject, WANT, inputs=given)["decoder"]
    mean = capture(subject, WANT, inputs=given, mean=True)["decoder"]
    real = given["attention_mask"].bool()
    for key in ("entropy", "max_weight", "distance"):
        by_head = rows[key].transpose(1, 2)[:, :, real]
        torch.testing.assert_close(mean[key], by_head.double().mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean["key_mass"], rows["key_mass"].double().sum(1), rtol=1e-6, atol=1e-6)


def test_one_pass_of_the_model_and_the_same_outputs(tiny):
    """Statistics need no pass of their own, and outputs under them are the model's own bits."""
    ids = torch.tensor([tiny.encode("def f(x):\n    return x + 1\n" * 8)])
    with torch.no_grad():
        own = tiny.model(ids).logits
        calls: list[Call] = []

        def tap(call, out):
            calls.append(call)
            call.statistics({"entropy": headwise.attention.statistic.NAMED["entropy"]})

        with tiny.tap(tap):
            seen = tiny.model(ids).logits
    assert torch.equal(own, seen)
    assert len(calls) == 8


def test_long_rows_hold_no_square(tiny, largest):
    """Every statistic of every head at the full context, and nothing of n x n elements is ever allocated."""
    segments = SegmentMass(torch.arange(2048) // 100, 21)
    want = {
        "entropy": headwise.attention.statistic.NAMED["entropy"],
        "segments": segments,
        "sink": PositionMass(0, 4),
        "horizon": HorizonMass(10, 100),
    }
    with largest:
        found = capture(tiny, want, length=2048, mean=True)["decoder"]
    assert found["segments"].shape == (8, 8, 21)
    torch.testing.assert_close(found["segments"].sum(-1), torch.ones(8, 8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert largest.size <= 16 * 2**20  # one head's weights are 16 MiB, a layer's 128


def test_scan_reads_rows_as_long_as_asked(tiny, tmp_path):
    """The whole context in a row, and an error with both numbers beyond it."""
    found = headwise.scan(tiny, tmp_path, probes=["mean_distance", "sink_mass"], length=2048, show_progress=False)
    short = headwise.measure(tiny, ["mean_distance"], show_progress=False)
    assert float(found.tables["mean_distance"].values.max()) > 1.5 * float(short["mean_distance"].values.max())
    with pytest.raises(InputError, match="4096 tokens do not fit the context of tiny, 2048 tokens"):
        headwise.scan(tiny, probes=["sink_mass"], length=4096, show_progress=False)
    with pytest.raises(InputError, match="no statistic 'x'"):
        capture(tiny, ["x"])
