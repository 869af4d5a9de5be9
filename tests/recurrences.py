"""What the tests of kernels for states share: by_kernel(given, starts) -> (outputs, last state) is what each of them is about."""

from __future__ import annotations

import os

import pytest
import torch

from headwise.recurrence import recur, starts_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
GPU = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ALLOWED = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def heads(noise, b, n, h, d, dv, device, dtype):
    """q, k and v as layers make them: views of (b, n, h, ...)."""
    found = {"q": noise(b, n, h, d), "k": torch.nn.functional.normalize(noise(b, n, h, d), dim=-1), "v": noise(b, n, h, dv)}
    return {name: t.to(device, dtype).transpose(1, 2) for name, t in found.items()}


def leaves(found):
    return {name: t.detach().requires_grad_() for name, t in found.items()}


def documents_of(starts):
    return None if starts is None else starts.long().cumsum(1)


def gradients(out, last, given, of_last=True):
    """Of a weighted sum of outputs, and of the last state, if there is one."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    total = (out * weight).sum(dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
    if of_last and last is not None:
        total = total + (last * torch.randn(last.shape, generator=generator).to(last.device)).sum()
    return torch.autograd.grad(total, list(given.values()))


def exact(given, starts):
    """The inputs in float64, what PyTorch makes of them, and its gradients."""
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    found = recur(**wide, starts=starts, backend="torch")
    return found, gradients(*found, wide)


def apart(mine, theirs):
    """The distance of two tensors, of the size of the second."""
    return float((mine.double() - theirs).norm() / theirs.norm())


def check_same(by_kernel, given, starts, allowed=2e-5, of_last=True, wide=False):
    """As PyTorch's form, values and gradients; wide: that in float64."""
    out, last = by_kernel(given, starts)
    theirs = {name: t.detach().double().requires_grad_() for name, t in given.items()} if wide else given
    wanted = recur(**theirs, starts=starts, backend="torch")
    torch.testing.assert_close(out.to(wanted.out), wanted.out, rtol=allowed, atol=allowed)
    torch.testing.assert_close(last.to(wanted.state), wanted.state, rtol=allowed, atol=allowed)
    right = gradients(*wanted, theirs, of_last)
    for name, mine, other in zip(given, gradients(out, last, given, of_last), right, strict=True):
        torch.testing.assert_close(
            mine.to(other), other, rtol=allowed, atol=10 * allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_only_what_is_wanted(by_kernel, given):
    """Each input alone gets its gradient."""
    for name in given:
        alone = {other: t if other == name else t.detach() for other, t in given.items()}
        (mine,) = torch.autograd.grad(by_kernel(alone, None)[0].square().sum(), [alone[name]])
        (theirs,) = torch.autograd.grad(recur(**alone, backend="torch", last=False).out.square().sum(), [alone[name]])
        torch.testing.assert_close(mine, theirs, rtol=5e-4, atol=5e-4)


def check_grouped_and_half(by_kernel, given):
    """Keys and values of two heads for four, and bfloat16."""
    shared = {name: t[:, :2] if name in "kv" else t for name, t in given.items()}
    wanted = recur(**shared, backend="torch")
    repeated = {name: t.repeat_interleave(2, 1) if name in "kv" else t for name, t in shared.items()}
    torch.testing.assert_close(by_kernel(repeated, None)[0], wanted.out, rtol=2e-5, atol=2e-5)
    low = {name: t.detach().bfloat16() if name in "qkv" else t.detach() for name, t in given.items()}
    out, _ = by_kernel(low, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, recur(**low, backend="torch").out, rtol=2e-2, atol=2e-2)


def check_documents_apart(by_kernel, given, end):
    """Enormous values of the document that ends there change nothing after it, nor any gradient; those are returned."""
    starts = starts_of(torch.tensor([0, end, given["q"].shape[2]]))
    loud = {name: t.detach().clone() for name, t in given.items()}
    loud["v"][:, :, :end] = 1e30
    loud = {name: t.requires_grad_() for name, t in loud.items()}
    (wanted, last), (out, same) = by_kernel(given, starts), by_kernel(loud, starts)
    assert torch.equal(out[:, :, end:], wanted[:, :, end:])
    assert torch.equal(last, same)
    right = gradients(wanted, last, given)
    for mine, theirs in zip(gradients(out, same, loud), right, strict=True):
        assert torch.equal(mine[:, :, end:], theirs[:, :, end:])
    return dict(zip(given, right, strict=True))


def check_on_a_gpu(by_kernel, given, starts, allowed, loose=()):
    """Near what float64 gives; gradients of what is `loose` are allowed more."""
    wanted, right = exact(given, starts)
    out, last = by_kernel(given, starts)
    assert apart(out, wanted.out) < allowed
    assert apart(last, wanted.state) < allowed
    for leaf, mine, theirs in zip(given, gradients(out, last, given), right, strict=True):
        assert apart(mine, theirs) < (5 if leaf in loose else 2) * allowed, leaf


def check_repeats(by_kernel, given, starts):
    """Three runs give the same bits, outputs, states and gradients; the first's gradients are returned."""
    runs = []
    for _ in range(3):
        out, last = by_kernel(given, starts)
        runs.append((out, last, *gradients(out, last, given)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    return runs[0][2:]
