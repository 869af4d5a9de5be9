"""The operator against formulas that others wrote: flash-linear-attention's slow references, values and gradients."""

import importlib
import inspect
import warnings

import pytest
import torch

from headwise.recurrence import recur

B, H, N, D, DV = 2, 3, 64, 8, 8


def theirs(room, name):
    pytest.importorskip("fla", reason="needs fla-core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no GPU
        return getattr(importlib.import_module(f"fla.ops.{room}.naive"), name)


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def inputs():
    k = torch.nn.functional.normalize(noise(1, B, H, N, D), dim=-1)
    log = torch.nn.functional.logsigmoid(noise(3, B, H, N))
    made = {"q": noise(0, B, H, N, D), "k": k, "v": noise(2, B, H, N, DV), "decay": log, "write": noise(4, B, H, N).sigmoid()}
    made["channels"] = torch.nn.functional.logsigmoid(noise(5, B, H, N, D) + 1)
    made["levels"] = torch.nn.functional.softplus(noise(6, B, H, N, 7))
    return {name: t.requires_grad_() for name, t in made.items()}


def swapped(t):
    """(b, h, n, ...) <-> (b, n, h, ...), the order of theirs."""
    return t.transpose(1, 2)


CASES = {
    "decay of a head": ("simple_gla", "naive_recurrent_simple_gla", {"g": "decay"}, {"decay": "decay"}, True),
    "decay of channels": ("gla", "naive_recurrent_gla", {"gk": "channels"}, {"decay": "channels"}, True),
    "delta rule": ("delta_rule", "delta_rule_recurrence", {"beta": "write"}, {"write": "write", "erase": "write"}, False),
    "gated delta rule": (
        "gated_delta_rule",
        "naive_recurrent_gated_delta_rule",
        {"g": "decay", "beta": "write"},
        {"decay": "decay", "write": "write", "erase": "write"},
        True,
    ),
    "delta rule with decay of channels": (
        "kda",
        "naive_recurrent_kda",
        {"g": "channels", "beta": "write"},
        {"decay": "channels", "write": "write", "erase": "write"},
        True,
    ),
    "levels": (
        "log_linear_attn",
        "naive_log_linear_attn",
        {"g": "decay", "level_scales": "levels"},
        {"decay": "decay", "levels": "levels"},
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_as_an_independent_reference_says(case):
    room, name, their_names, our_names, tokens_first = CASES[case]
    reference, given = theirs(room, name), inputs()
    order = swapped if tokens_first else (lambda t: t)
    options = {theirs: order(given[ours]) for theirs, ours in their_names.items()}
    if "scale" in inspect.signature(reference).parameters:
        options["scale"] = 1.0
        scale = 1.0
    else:
        scale = D**-0.5
    found = reference(*(order(given[name]) for name in "qkv"), **options)
    wanted = order(found[0] if isinstance(found, tuple) else found)
    used = [given[name] for name in dict.fromkeys(["q", "k", "v", *our_names.values()])]
    weight = noise(9, B, H, N, DV)
    right = torch.autograd.grad((wanted.float() * weight).sum(), used)
    for form in ("chunk", "parallel", "recurrent"):
        ours = {name: given[at] for name, at in our_names.items()}
        out = recur(given["q"] * scale, given["k"], given["v"], **ours, form=form, chunk=16).out
        torch.testing.assert_close(out, wanted.float(), rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad((out * weight).sum(), used)
        for mine, other in zip(gradients, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
