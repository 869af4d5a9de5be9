"""Which kernels run what, on the CPU by Triton's interpreter: sizes that are no power of two, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch

from headwise.recurrence import explain, recur
from headwise.recurrence.kernels import refuses

CODE = """
import torch
from headwise.recurrence import recur
generator = torch.Generator().manual_seed(0)
noise = lambda *shape: torch.randn(1, 2, 37, *shape, generator=generator)
q, k, v, decay, channels, beta = noise(10), noise(10), noise(17), -noise().abs(), -noise(10).abs(), noise().sigmoid()
k = torch.nn.functional.normalize(k, dim=-1)
state = torch.randn(1, 2, 10, 17, generator=generator)
for given in ({}, {"decay": decay}, {"decay": channels}, {"write": beta, "erase": beta},
              {"decay": decay, "write": beta, "erase": beta}, {"decay": channels, "write": beta, "erase": beta},
              {"decay": decay, "write": beta}):
    found, wanted = (recur(q, k, v, **given, state=state, backend=backend) for backend in ("kernel", "torch"))
    print(max(float((a - b).abs().max()) for a, b in zip(found, wanted)) < 1e-4, end=" ")
levels = noise(7).abs()
found, wanted = (recur(q, k, v, decay=decay, levels=levels, last=False, backend=b).out for b in ("kernel", "torch"))
print(float((found - wanted).abs().max()) < 1e-4)
"""


def test_every_family_runs_in_the_interpreter():
    told = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["True"] * 8


def test_what_is_refused_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 2, 40, 16)
    assert explain(q, q, q, backend="kernel").backend == "kernel"
    assert explain(q, q, q).refused == {"kernel": "Triton's interpreter runs only where it is asked for"}
    wide = torch.zeros(1, 2, 40, 300)
    cases = {
        "float64": (q.double(), q.double(), q.double(), {}),
        "too few": (q[:, :, :3], q[:, :, :3], q[:, :, :3], {}),
        "larger than": (wide, wide, q, {}),
        "made by PyTorch": (q, q, q, {"levels": torch.zeros(1, 2, 40, 7)}),
    }
    for words, (a, b, c, given) in cases.items():
        assert words in explain(a, b, c, **given).refused["kernel"]
        assert torch.isfinite(recur(a, b, c, **given).out).all()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "NVIDIA GPU" in explain(q, q, q).refused["kernel"]
    assert refuses is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("size", [(20, 37), (64, 65), (16, 17), (96, 128)])
@pytest.mark.parametrize("rule", ["scalar", "delta", "gated"])
def test_sizes_on_a_gpu(size, rule):
    """Heads of any size, bfloat16, values and gradients against float64."""
    d, dv = size
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape):
        return torch.randn(2, 2, 300, *shape, device="cuda", generator=generator)

    given = {"q": noise(d).bfloat16(), "k": torch.nn.functional.normalize(noise(d), dim=-1).bfloat16(), "v": noise(dv).bfloat16()}
    if rule != "delta":
        given["decay"] = -noise().abs() / 4
    if rule != "scalar":
        given |= {"write": noise().sigmoid(), "erase": noise().sigmoid()}

    def run(dtype, backend):
        cast = {n: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for n, t in given.items()}
        out = recur(**cast, backend=backend).out
        return [
            out,
            *torch.autograd.grad(
                out, list(cast.values()), torch.cos(torch.arange(out.numel(), device="cuda")).view_as(out).to(out)
            ),
        ]

    for mine, right in zip(run(None, "kernel"), run(torch.float64, "torch"), strict=True):
        assert float((mine.double() - right).norm() / right.norm()) < 0.02
