"""Trainings on a GPU: recorded steps are the plain ones, and runs go on. Run by hand: `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.training import Settings, compare, problem_of, sizing, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SETTINGS = Settings(steps=60, batch=16, rows=64, points=6, device="cuda")


def trained(name="softmax", settings=SETTINGS, **options):
    problem = problem_of("associative_recall")
    model = sizing.equal(sizing.parse([name]), sizing.Sizes(problem.vocabulary, problem.context, 64, 2, 4))[0].build(0)
    return model, train(model, problem, settings, show_progress=False, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_give_what_plain_ones_give(dtype):
    settings = replace(SETTINGS, dtype=dtype)
    one, recorded = trained(settings=settings)
    two, plain = trained(settings=replace(settings, capture=False))
    assert recorded.captured, recorded.why
    assert not plain.captured
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4 if dtype == "float32" else 2e-2)
    losses = [[point["train_loss"] for point in found.curve] for found in (recorded, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if dtype == "float32" else 3e-2)
    assert recorded.peak_bytes > 0


def test_an_interrupted_run_goes_on(tmp_path):
    whole, expected = trained()
    seen = []

    def interrupt(count):
        seen.append(count)
        if len(seen) == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(file=tmp_path / "c", advance=interrupt)
    again, found = trained(file=tmp_path / "c")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-2)  # the steps before recording are launched otherwise
    assert [point["step"] for point in found.curve] == [point["step"] for point in expected.curve]
    assert found.captured


def test_every_mechanism_is_recorded_or_says_why():
    """None fails for want of a graph; those that can't be recorded run as written."""
    problem = problem_of("associative_recall")
    for name in ("softmax", "gqa", "cope", "mta", "rela", "selective_self_attention", "moh"):
        entry = compare(problem, [name], seeds=1, settings=replace(SETTINGS, steps=12, points=2), show_progress=False).entries[0]
        print(name, entry.captured, entry.why_not_captured, f"{entry.tokens_per_second:,.0f} tokens/s")
        assert entry.captured or entry.why_not_captured
        assert entry.metric.mean >= 0
