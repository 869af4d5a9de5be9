"""Stacks on a GPU give what they give on a CPU: logits and gradients of every parameter. Run by hand: `pytest -m gpu`."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from headwise import registry
from headwise.nn import Transformer, mixer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
IDS = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(0))
# What chooses among heads or experts may choose otherwise after another rounding
CHOOSES = {"umoe", "umoe_stack", "moh", "chai", "lte"}
# What bfloat16 moves that much on a CPU, too: one inverts sums of outer products of keys (there 0.30 of the logits and a cosine of
# 0.84), the other divides scores by their deviation in a row, of early ones by almost nothing (there parameters that are rounded,
# and nothing else, move the gradient of its bias by a third).
SENSITIVE = {"local_linear_attention": 0.35, "normalized_attention": 0.2}
NAMES = [(kind, name) for kind in ("mechanism", "architecture") for name in registry.names(kind) if name not in CHOOSES]


def made(kind, name):
    torch.manual_seed(0)
    if kind == "architecture":
        return importlib.import_module(registry.load(kind, name).__module__).sized(50, 64, 4, 4, 64)
    return Transformer(50, 64, 2, 4, mixer=name, context=64, causal="causal" not in mixer(name, 64, 4, 64).cannot)


def logits_and_gradients(model, ids):
    logits = model(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return logits.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_as_on_a_cpu(kind, name, dtype):
    """In bfloat16 products, as training computes them, too: then directions of gradients must agree."""
    ours = made(kind, name)
    theirs = copy.deepcopy(ours).cuda()
    logits, gradients = logits_and_gradients(ours, IDS)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, moved = logits_and_gradients(theirs, IDS.cuda())
    allowed = 1e-3 if dtype == torch.float32 else SENSITIVE.get(name, 0.1)
    assert (found.float() - logits).norm() < allowed * logits.norm()
    assert moved.keys() == gradients.keys()
    whole = torch.cat([gradients[key].flatten() for key in gradients])
    theirs_whole = torch.cat([moved[key].flatten().float() for key in gradients])
    assert torch.nn.functional.cosine_similarity(whole, theirs_whole, dim=0) > 1 - allowed
    if dtype == torch.float32:
        off = {key: float((moved[key] - value).norm()) for key, value in gradients.items()}
        assert max(off.values()) < 1e-3 * float(whole.norm()), max(off, key=off.get)
