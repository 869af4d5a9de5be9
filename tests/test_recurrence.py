"""The operator of state mechanisms: three forms, states, documents, levels."""

import itertools

import pytest
import torch

from headwise.errors import BackendError, ShapeError
from headwise.recurrence import explain, recur, starts_of, weights

B, H, N, D, DV = 2, 3, 41, 6, 5
RULES = {
    "plain": {},
    "scalar": {"decay": (N,)},
    "channels": {"decay": (N, D)},
    "delta": {"write": (N,), "erase": (N,)},
    "gated_delta": {"decay": (N,), "write": (N,), "erase": (N,)},
    "channel_delta": {"decay": (N, D), "write": (N,), "erase": (N,)},
    "levels": {"decay": (N,), "levels": (N, 7)},
    "few_levels": {"decay": (N, D), "levels": (N, 4)},
    "levels_delta": {"decay": (N,), "write": (N,), "erase": (N,), "levels": (N, 7)},
}


def tensors(rule, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(B, H, *shape, generator=generator, dtype=dtype)

    found = {"q": noise(N, D), "k": torch.nn.functional.normalize(noise(N, D), dim=-1), "v": noise(N, DV)}
    for name, shape in RULES[rule].items():
        x = noise(*shape)
        found[name] = -torch.nn.functional.softplus(2 * x) if name == "decay" else torch.sigmoid(x)
    return {name: t.requires_grad_() for name, t in found.items()}


def gradients(out, given):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), list(given.values()))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_forms_agree(rule, documents):
    given = tensors(rule)
    starts = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.12 if documents else None
    wanted, state = recur(**given, starts=starts, form="recurrent")
    right = gradients(wanted, given)
    for form, chunk in [("parallel", 1), ("chunk", 1), ("chunk", 4), ("chunk", 16), ("chunk", 64)]:
        out, last = recur(**given, starts=starts, form=form, chunk=chunk)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
        torch.testing.assert_close(last, state, rtol=0, atol=1e-11)
        for mine, theirs in zip(gradients(out, given), right, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    shown = {name: t for name, t in given.items() if name != "v"}
    torch.testing.assert_close(weights(**shown, starts=starts) @ given["v"], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_goes_on_where_it_ended(rule):
    given = tensors(rule)
    whole, end = recur(**given, form="recurrent")
    for form, chunk in [("recurrent", 1), ("chunk", 8)] + ([("parallel", 1)] if "levels" not in given else []):
        state, at, outs = None, 0, []
        for size in (8, 1, 7, 16, 3, 6):
            piece = {name: t[:, :, at : at + size] for name, t in given.items()}
            out, state = recur(**piece, state=state, count=torch.full((B,), at), form=form, chunk=chunk)
            outs.append(out)
            at += size
        torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(state, end, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "levels" not in rule])
def test_gradients_reach_the_first_state(rule):
    given = tensors(rule)
    first = torch.randn(B, H, D, DV, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    right = None
    for form in ("recurrent", "parallel", "chunk"):
        out, last = recur(**given, state=first, form=form, chunk=16)
        found = torch.autograd.grad(out.square().sum() + (last**3).sum(), [first, *given.values()])
        right = found if right is None else right
        for mine, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_rows_that_have_read_different_numbers_of_tokens():
    given = tensors("levels_delta")
    whole = recur(**given, form="recurrent").out
    heads = [recur(**{k: t[i : i + 1, :, : 5 + 8 * i] for k, t in given.items()}, form="recurrent") for i in range(B)]
    rest = {k: torch.cat([t[i : i + 1, :, 5 + 8 * i : 25 + 8 * i] for i in range(B)]) for k, t in given.items()}
    count = torch.tensor([5 + 8 * i for i in range(B)])
    out = recur(**rest, state=torch.cat([head.state for head in heads]), count=count, chunk=4).out
    wanted = torch.stack([whole[i, :, 5 + 8 * i : 25 + 8 * i] for i in range(B)])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)


def test_documents_are_as_if_alone():
    for rule, form in itertools.product(RULES, ("recurrent", "parallel", "chunk")):
        given = {name: t[:1] for name, t in tensors(rule).items()}
        ends = torch.tensor([0, 7, 8, 8, 30, N])
        packed = recur(**given, starts=starts_of(ends), form=form, chunk=8)
        alone = [
            recur(**{name: t[:, :, a:b] for name, t in given.items()}, form=form, chunk=8)
            for a, b in itertools.pairwise(ends.tolist())
            if a < b
        ]
        torch.testing.assert_close(packed.out, torch.cat([each.out for each in alone], 2), rtol=0, atol=1e-11)
        torch.testing.assert_close(packed.state, alone[-1].state, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_padding_is_not_there(rule):
    given = tensors(rule)
    real = torch.rand(B, N, generator=torch.Generator().manual_seed(5)) < 0.6
    real[1, :4] = False
    real[0, -4:] = False
    loud = {
        name: t if name in ("q", "levels") else torch.where(real[:, None, :, None], t, 1e4) if t.dim() == 4 else t
        for name, t in given.items()
    }
    for form in ("recurrent", "parallel", "chunk"):
        out, state = recur(**loud, real=real, form=form, chunk=8)
        for row in range(B):
            alone = recur(**{name: t[row : row + 1][:, :, real[row]] for name, t in given.items()}, form="recurrent")
            torch.testing.assert_close(out[row][:, real[row]], alone.out[0], rtol=0, atol=1e-11)
            torch.testing.assert_close(state[row], alone.state[0], rtol=0, atol=1e-11)


def test_levels():
    given = tensors("levels_delta")
    base = {name: t for name, t in given.items() if name != "levels"}
    ones = torch.ones(B, H, N, 7, dtype=torch.float64)
    torch.testing.assert_close(recur(**base, levels=ones).out, recur(**base).out, rtol=0, atol=1e-11)
    near = ones.clone()
    near[..., 1:] = 0
    own = (given["q"] * given["k"]).sum(-1) * given["write"]
    torch.testing.assert_close(recur(**base, levels=near).out, own[..., None] * given["v"], rtol=0, atol=1e-11)
    within = ones.clone()
    within[..., 4:] = 0  # levels 0 to 3: the aligned eight
    restarted = recur(**base, starts=(torch.arange(N) % 8 == 0).expand(B, N))
    torch.testing.assert_close(recur(**base, levels=within).out, restarted.out, rtol=0, atol=1e-11)
    held = recur(**given).state.abs().amax((0, 1, 3, 4)) > 0
    assert held.tolist() == [bool(N >> bit & 1) for bit in range(6)]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_fast_decay_stays_finite_and_exact(dtype, allowed):
    given = {name: t.detach().to(dtype) for name, t in tensors("channel_delta").items()}
    given["decay"] = given["decay"] * 200
    given["decay"][:, :, 7] = -1e30
    given["decay"][:, :, 8:] *= 1e-3
    out = recur(**given).out
    exact = recur(**{name: t.double() for name, t in given.items()}, form="recurrent").out
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=allowed)


def test_grouped_keys_are_repeated_ones():
    given = tensors("gated_delta")
    shared = {name: t[:, :1] if name in "kv" else t for name, t in given.items()}
    repeated = {name: t.expand(-1, H, *[-1] * (t.dim() - 2)) for name, t in shared.items()}
    torch.testing.assert_close(recur(**shared).out, recur(**repeated).out)


def test_half_precision_is_computed_in_float32():
    given = {name: t.detach() for name, t in tensors("gated_delta", dtype=torch.float32).items()}
    low = {name: t.bfloat16() for name, t in given.items()}
    out, state = recur(**low)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(out, recur(**{name: t.float() for name, t in low.items()}).out.bfloat16(), rtol=0, atol=0)


def test_errors_say_what_was_expected():
    q = torch.zeros(1, 2, 4, 3)
    with pytest.raises(ShapeError, match="decay is"):
        recur(q, q, q, decay=torch.zeros(1, 2, 5))
    with pytest.raises(ShapeError, match="do not fit"):
        recur(q, q[:, :, :3], q)
    with pytest.raises(ShapeError, match="must be one of chunk, parallel, recurrent"):
        recur(q, q, q, form="scan")
    with pytest.raises(ShapeError, match="state is"):
        recur(q, q, q, state=torch.zeros(1, 2, 3, 4))
    with pytest.raises(ShapeError, match="count"):
        recur(q, q, q, levels=torch.zeros(1, 2, 4, 3), state=torch.zeros(1, 2, 2, 3, 3))
    with pytest.raises(ShapeError, match="cumulated"):
        starts_of(torch.tensor([1, 2]))
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        recur(q, q, q, backend="cuda")
    with pytest.raises(BackendError, match="'kernel' can't"):
        recur(q, q, q, backend="kernel")
    assert explain(q, q, q).backend == "torch"
