"""The embedded models do what their cards say, and show the field's claims."""

from __future__ import annotations

import json
import re
from statistics import median

import numpy as np
import pytest
import torch
from safetensors import safe_open

from headwise import Plan, duo, evaluate, measure, probe, zoo
from headwise.models import subject as subject_module
from headwise.models.cache import cache_bytes, cache_of
from headwise.probes.ablation_importance import AblationImportance
from headwise.probes.gate_importance import GateImportance
from headwise.prompts import needle_prompts, recall_prompts, repeated_rows
from headwise.tasks.needle import Needle
from headwise.tasks.perplexity import Perplexity
from headwise.tasks.repeat import Repeat

MODELS = ["tiny", "tiny_gqa"]
both = pytest.mark.parametrize("name", MODELS)


def run(task, subject):
    return task.run(subject, None, lambda _: None)


@both
def test_folders(name):
    folder = zoo.path(name)
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 20_000_000
    with safe_open(weights, "pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 2048
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (8, 8)
    assert config["num_key_value_heads"] == (8 if name == "tiny" else 2)
    for word in ("license", "Training", "Figures", "Limits"):
        assert word in (folder / "README.md").read_text(), word


@both
def test_card_figures(name, request):
    """Every figure of the card's table is measured again here."""
    subject = request.getfixturevalue(name)
    card = (zoo.path(name) / "README.md").read_text()
    told = {row[0].strip(): row[1].strip() for row in re.findall(r"^\| ([^|]+)\|([^|]+)\|$", card, re.MULTILINE)}
    found = measure(subject, ["previous_token", "induction"], show_progress=False)
    previous, induction = found["previous_token"], found["induction"]
    assert float(previous.values.max()) >= 0.9
    assert (induction >= 0.7).count() >= 2
    assert float(told["previous-token score of the best head"]) == pytest.approx(float(previous.values.max()), abs=0.01)
    assert told["heads with an induction score of 0.7 or more"] == str((induction >= 0.7).count())
    repeat = run(Repeat(rows=8, length=1024), subject)["repeat_accuracy"]
    assert repeat >= 0.98
    assert float(told["next-token accuracy on repeated random tokens"]) == pytest.approx(repeat, abs=0.001)
    needle = run(Needle(count=4), subject)["needle"]
    assert needle >= 0.98
    assert float(told["exact needle recall, 2048 tokens, depths 5-90 %"]) == pytest.approx(needle, abs=0.001)
    bits = run(Perplexity(rows=16), subject)["bits_per_byte"]
    assert float(told["bits per byte on the shipped held-out text"]) == pytest.approx(bits, abs=0.001)
    parameters = sum(p.numel() for p in subject.model.parameters())
    assert told["parameters"] == f"{parameters:,}"


def test_retrieval_heads_are_few_and_causal(scanned):
    """Fewer than a quarter of the heads; without exactly them no needle is found, without as many others nearly all are."""
    _, found = scanned
    heads = found.tables["retrieval"] > 0.1
    assert 0 < heads.count() < 16
    shown = found.causality
    assert list(shown.heads) == heads.names()
    assert shown.base >= 0.98
    assert shown.chosen < 0.2
    assert len(shown.random) >= 20
    assert median(shown.random) == shown.random_median > 0.9


def test_duo_frees_most_of_the_cache(scanned):
    """Full caches where the gates ask for them: bytes fall by 60 % or more, needles within 0.02, bits per byte within 3 %."""
    _, found = scanned
    before, after = found.evaluation.without, found.evaluation.under_plan
    assert before["kv_tokens"] == 2048
    assert after["kv_bytes"] <= 0.4 * before["kv_bytes"]
    assert after["needle"] >= before["needle"] - 0.02
    assert after["bits_per_byte"] <= 1.03 * before["bits_per_byte"]
    assert len(found.plan.about["full"]) < 16
    others = found.notes["random_plan_needle"]  # the same budget, given to random heads
    assert len(others) >= 3
    assert median(others) < 0.5


def test_duo_on_grouped_heads_keeps_whole_groups(tiny_gqa):
    plan = duo(tiny_gqa, show_progress=False)
    full = tiny_gqa.main.exists() - plan.heads()
    assert full == tiny_gqa.main.key_value_groups(full)
    found = evaluate(tiny_gqa, plan, [Needle(), "kv_bytes"], show_progress=False)
    assert found.under_plan["kv_bytes"] <= 0.4 * found.without["kv_bytes"]
    assert found.under_plan["needle"] >= found.without["needle"] - 0.02


def test_generation_under_duo_finds_the_needle(tiny, scanned):
    """Not one forward pass but generate, token by token, with the freed cache."""
    plan = scanned[1].plan
    prompts = Needle(depths=(0.1, 0.6), count=2).prompts(tiny, None)
    found = 0
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        with plan(tiny), torch.no_grad():
            out = tiny.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=len(prompt.answer),
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=2,
            )
        found += out.sequences[0, len(prompt.input_ids) :].tolist() == list(prompt.answer)
        assert cache_bytes(cache_of(out)) < 0.4 * 64 * 2048 * 2 * 32 * 4
    assert found == len(prompts)


def test_pruning_curve(scanned):
    """Importance orders heads better than chance: more can go before the loss rises by 3 and 10 %."""
    curve = scanned[1].curve.to_dict()
    assert curve["by"] == "ablation_importance"
    for rise in ("3%", "10%"):
        assert curve["removable"][rise] >= 1
        assert curve["removable"][rise] > curve["removable_random"][rise]
    assert curve["removable"]["1%"] <= curve["removable"]["3%"] <= curve["removable"]["10%"]


def test_cheap_importance_agrees_with_exact(tiny, scanned):
    """On the same rows the gradient ranks heads as leaving each out does: a rank correlation above 0.6, and it is reported."""
    _, found = scanned
    exact = found.tables["ablation_importance"]
    assert AblationImportance().rows == GateImportance().rows == 16  # with half of them chance still hides it
    correlation = found.tables["gate_importance"].spearman(exact)
    assert correlation > 0.6
    assert any(finding["numbers"].get("spearman") == correlation for finding in found.findings)
    assert probe(GateImportance(per="token"), tiny, show_progress=False).spearman(exact) > 0.6


def test_large_vocabularies_change_no_importance(tiny, monkeypatch):
    """Where the logits of few rows fit at once, fewer heads and rows run together, and the tables stay the same."""
    probes = [AblationImportance(rows=4, length=64), GateImportance(rows=4, length=64)]
    whole = measure(tiny, probes, show_progress=False)
    for rows in (32, 9, 3, 1):
        monkeypatch.setattr(subject_module, "CHUNK_LOGITS_CPU", rows * 64 * tiny.vocabulary_size)
        parts = measure(tiny, probes, show_progress=False)
        for name, table in whole.items():
            torch.testing.assert_close(parts[name].values, table.values, rtol=1e-3, atol=2e-6)


def test_first_order_is_exact_for_the_last_layers_scale(tiny):
    """The gate's gradient is the derivative: a small closing of the gate changes the loss by it."""
    from headwise import Gate

    head = tiny.heads("L7H7")
    ids = torch.tensor([[0, *tiny.encode(zoo.heldout_text())[:255]]])
    with torch.no_grad():
        losses = {}
        for value in (1 - 1e-2, 1 + 1e-2):
            with Plan.empty(tiny).use(head, Gate(torch.tensor([value])))(tiny):
                losses[value] = float(tiny.token_losses(ids).double().mean())
    slope = (losses[1 + 1e-2] - losses[1 - 1e-2]) / 2e-2
    table = probe(GateImportance(rows=1), tiny, text=tiny.tokenizer.decode(ids[0, 1:]), show_progress=False)
    assert table["L7H7"] == pytest.approx(abs(slope), rel=0.05)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_repeated_rows():
    ids, periods = repeated_rows(np.arange(3, 4096), 16, 300, begin=(0,), seed=4)
    assert ids.shape == (16, 300)
    assert len(set(periods.tolist())) > 8
    for row, period in zip(ids, periods, strict=True):
        assert (row[-period:] == row[-2 * period : -period]).all()
        assert row[0] == 0
        assert len(set(row.tolist())) == 300 - period  # nothing else repeats
    with pytest.raises(ValueError, match="no room for a repeat"):
        repeated_rows(np.arange(3, 99), 1, 5)


@pytest.mark.parametrize("readable", [True, False])
def test_needles(tiny, readable):
    straw = tiny.encode(zoo.heldout_text())
    made = needle_prompts(
        straw,
        400,
        [0.0, 0.5, 1.0],
        encode=tiny.encode_raw if readable else None,
        vocabulary=tiny.vocabulary,
        begin=(0,),
        count=3,
        seed=1,
    )
    assert len(made) == 9
    for prompt in made:
        start, stop = prompt.needle
        assert prompt.input_ids[start:stop] == prompt.answer
        assert len(prompt.input_ids) + len(prompt.answer) == 400
        pieces = tiny.tokenizer.decode(prompt.answer).split() if readable else list(prompt.answer)
        assert len(set(pieces)) == len(pieces) == 5
        question = prompt.input_ids[-3:] if readable else prompt.input_ids[-2:]
        assert prompt.input_ids[start - len(question) : start] == question
    if readable:
        text = tiny.tokenizer.decode(made[0].input_ids)
        assert text.count("The password of the") == 5  # needle, three distractors, question
    with pytest.raises(ValueError, match="leaves no room"):
        needle_prompts(straw, 60, [0.5], encode=tiny.encode_raw)


def test_recall_prompts():
    for prompt in recall_prompts(np.arange(3, 200), 5, 20, 10, begin=(0,), seed=2):
        pairs = dict(zip(prompt.input_ids[1:41:2], prompt.input_ids[2:41:2], strict=True))
        assert len(pairs) == 20
        for place, answer in zip(prompt.queries, prompt.answers, strict=True):
            assert pairs[prompt.input_ids[place]] == answer == prompt.input_ids[place + 1]
