"""Checks for whole attentions: anything that mixes tokens. Its module may say more of it: `examples`, `oracle`, `neutral`,
`identities`, `adapter`; see docs/testing.md.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..attention import attend
from ..mechanisms import Rotary
from ..stages.causal import Causal
from ._build import built_anew, instances
from ._check import Item, Skipped, require
from ._groups import GroupedKernel, GroupedModule, require_repeated
from ._mixer_forms import require_bounded, require_documents_apart, require_forms_agree, require_weights_implied
from ._mixer_measures import (
    N,
    able,
    apart,
    baseline,
    each,
    first_position,
    heads_tensors,
    maps_of,
    noise,
    plain_twin,
    relative,
    require_slope,
    require_unchanged,
    run,
    snapshot,
    tokens,
    tolerance,
    way,
)
from ._mixer_padding import require_masked_rows_clean, require_padding_kept_out
from .adapters import HEADS, SIZE, Function, Runner, runner_for


def check_shape(item: Item) -> None:
    """One token, odd numbers of them: the shape, dtype and device of the input come back."""

    def body(runner: Runner) -> None:
        for dtype in (torch.float64, torch.float32):
            cast = runner.to(dtype)
            for b, n in ((1, 1), (3, 7), (1, 33)):
                x = tokens(runner, b, n, dtype=dtype)
                y = run(cast, x)
                require(y.shape == x.shape, f"{runner.about}: x {tuple(x.shape)} becomes {tuple(y.shape)}")
                require(y.dtype == dtype, f"{runner.about}: returns {y.dtype} for {dtype}")
                require(y.device == x.device, f"{runner.about}: returns a tensor on {y.device} for one on {x.device}")

    each(item, body)


def check_repeatable(item: Item) -> None:
    """In eval mode, running again gives the same bits; input, parameters and buffers stay as they were."""

    def body(runner: Runner) -> None:
        x = tokens(runner)
        run(runner, x)  # what is made at the first call may be made
        before, given = snapshot(runner.module), x.clone()
        first = run(runner, x)
        require(torch.equal(x, given), f"{runner.about}: changes its input in place, by {apart(x, given):.2g}")
        require_unchanged(runner, before, "a pass in eval mode")
        again = run(runner, x)
        require(torch.equal(first, again), f"{runner.about}: running again in eval mode differs by {apart(first, again):.2g}")

    each(item, body)


def _oracle_case(runner: Runner, oracle: Any, causal: bool, n: int, m: int, kv_heads: int) -> None:
    """Values and gradients of one case: tensors for a kernel, tokens for a module."""
    visible = torch.ones(n, m, dtype=torch.bool)
    visible = visible.tril(m - n) if causal else visible
    if runner.kernel is not None:
        about = runner.kernel.function if isinstance(runner.kernel, Function) else runner.kernel
        qkv = [t.requires_grad_() for t in heads_tensors(4, n, m, kv_heads)]
        inputs = {**dict(zip("qkv", qkv, strict=True)), **dict(runner.kernel.named_parameters())}
        out = runner.read(*qkv, causal)  # type: ignore[attr-defined]
        wanted = torch.stack([oracle(about, *(t[row] for t in qkv), visible) for row in range(2)])
    else:
        inputs = {"x": tokens(runner, 2, n, 4).requires_grad_(), **dict(runner.module.named_parameters())}
        out = runner.run(inputs["x"], causal=causal)
        wanted = torch.stack([oracle(runner.module, inputs["x"][row], visible) for row in range(2)])
    where = f"{way(causal)}, {n} queries of {m} keys" if n != m else f"{way(causal)}, {n} tokens"
    require(out.shape == wanted.shape, f"{runner.about}: returns {tuple(out.shape)}, its oracle {tuple(wanted.shape)}")
    allowed = tolerance(runner)
    error = apart(out.detach(), wanted.detach())
    places = (~((out - wanted).detach().abs() <= allowed)).any(-1).flatten(0, -2).any(0) if runner.kernel is not None else None
    at = "" if places is None or not bool(places.any()) else f", first at query {int(places.nonzero()[0])}"
    require(error <= allowed, f"{runner.about}: differs from its oracle by {error:.2g} ({where}{at})")
    if not wanted.requires_grad:
        return  # the oracle keeps no graph; `gradients` compares with numeric ones
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = list(inputs.values())
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves, allow_unused=True)
    ours = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) if out.requires_grad else [None] * len(leaves)
    for name, mine, right in zip(inputs, ours, theirs, strict=True):
        if right is None:
            continue
        error = apart(torch.zeros_like(right) if mine is None else mine, right)
        size = max(1.0, float(right.abs().max()))
        require(
            error <= 10 * allowed * size,
            f"{runner.about}: its gradient of {name} differs from its oracle's by {error:.2g} ({where})",
        )


def check_oracle(item: Item) -> None:
    """Values and gradients equal those of the paper's formula, written slowly and independently, in float64."""
    oracle = getattr(item.module, "oracle", None)
    if oracle is None and item.kind != "mechanism":
        raise Skipped("gives no oracle, so a wrong formula would pass unseen")
    require(oracle is not None, "its module has no oracle, and no other check can catch a wrong formula")

    def body(runner: Runner) -> None:
        for causal in runner.modes:
            cases = [(10, 10, HEADS) if causal else (7, 7, HEADS)]
            if runner.kernel is not None:
                cases = [(10, 10, HEADS), (7, 7, HEADS // 2)]
                if not getattr(runner.kernel, "past_queries", 0):
                    cases.append((3, 8, HEADS))
            for n, m, kv_heads in cases:
                _oracle_case(runner, oracle, causal, n, m, kv_heads)

    each(item, body)


def check_gradients(item: Item) -> None:
    """Analytic gradients of the input and of every parameter equal numeric ones; no parameter is left out."""

    def body(runner: Runner) -> None:
        x = tokens(runner, 1, 9, 5).requires_grad_()
        weight = tokens(runner, 1, 9, 6)
        exact = tolerance(runner) < 1e-8 * max(1.0, float(run(runner, tokens(runner)).abs().max()))

        def loss() -> Tensor:
            return (runner.run(x, causal=runner.modes[0]) * weight).sum()

        require(loss().requires_grad, f"{runner.about}: no gradient reaches its output")
        named = dict(runner.module.named_parameters())
        trained = [p for p in named.values() if p.requires_grad]
        used = torch.autograd.grad(loss(), [x, *trained], allow_unused=True)
        require(used[0] is not None, f"{runner.about}: no gradient reaches its input")
        missing = [name for name, p in named.items() if p.requires_grad and used[1 + _at(trained, p)] is None]
        require(not missing, f"{runner.about}: unused parameters: {', '.join(missing)}")
        for seed in (7, 8):
            require_slope(runner.about, "the input", loss, x, exact, seed)
        for seed, (name, parameter) in enumerate(named.items()):
            if parameter.requires_grad:
                require_slope(runner.about, f"the parameter {name}", loss, parameter, exact, seed)

    each(item, body)


def _at(tensors: list[Any], one: Tensor) -> int:
    return next(i for i, t in enumerate(tensors) if t is one)


def check_causality(item: Item) -> None:
    """Changing the future changes nothing before it, bit for bit, and no gradient comes from it."""

    def body(runner: Runner) -> None:
        able(runner, "causal")
        x = tokens(runner)
        before = run(runner, x, causal=True)
        found = []
        for at in (1, 8, 17, 33, N - 1):
            other = x.clone()
            other[:, at] = 2.0 - 3.0 * other[:, at]
            after = run(runner, other, causal=True)
            changed = (before[:, :at] != after[:, :at]).any(-1).any(0).nonzero().flatten().tolist()
            if changed:
                by = float((before[:, changed[0]] - after[:, changed[0]]).abs().max())
                found.append((changed[0], at, by))
        if found:
            place, at, by = min(found)
            ways = f"changing token {at} changes it by {by:.2g}"
            require(False, f"{runner.about}: leaks the future at position {place}: {ways}")
        for at in (9, 34):
            leaf = x.clone().requires_grad_()
            grad = torch.autograd.grad(runner.run(leaf, causal=True)[:, :at].square().sum(), leaf)[0]
            late = grad[:, at:].abs().amax((0, 2)).nonzero().flatten().tolist()
            require(not late, f"{runner.about}: a gradient from before position {at} reaches token {at + late[0] if late else ''}")

    each(item, body)


def check_decode(item: Item) -> None:
    """With its cache, token by token, in uneven pieces, and after a prompt, the outputs are those of one full pass."""

    def body(runner: Runner) -> None:
        able(runner, "causal", "decode")
        x = tokens(runner)
        whole, allowed = run(runner, x, causal=True), tolerance(runner)
        plans = {
            "token by token": [1] * N,
            "in uneven pieces": [3, 1, 8, 5, 2, 14, 7],
            "after a prompt of 21": [21] + [1] * (N - 21),
        }
        for how, sizes in plans.items():
            with torch.no_grad():
                out = runner.decode(x, sizes)
            require(out.shape == whole.shape, f"{runner.about}: decoded {how}, it returns {tuple(out.shape)} for {tuple(x.shape)}")
            wrong = first_position(out, whole, 10 * allowed)
            by = apart(out, whole)
            require(
                wrong is None,
                f"{runner.about}: cached decode ({how}) differs from the full pass from token {wrong}, by up to {by:.2g}",
            )

    each(item, body)


def check_batch(item: Item) -> None:
    """Rows of a batch do not meet, and a row alone is as in a batch."""

    def body(runner: Runner) -> None:
        x, allowed = tokens(runner, 3), tolerance(runner)
        for causal in runner.modes:
            out = run(runner, x, causal=causal)
            other = x.clone()
            other[1] = 5.0 - 9.0 * other[1]
            by = apart(run(runner, other, causal=causal)[[0, 2]], out[[0, 2]])
            require(
                by <= allowed, f"{runner.about}: rows of a batch meet: changing one changes another by {by:.2g} ({way(causal)})"
            )
            alone = torch.cat([run(runner, x[i : i + 1], causal=causal) for i in range(3)])
            by = apart(alone, out)
            require(by <= allowed, f"{runner.about}: a row alone differs from the same row in a batch by {by:.2g} ({way(causal)})")

    each(item, body)


def check_left_padding(item: Item) -> None:
    """Padding on the left changes nothing at real tokens, whatever it holds; nor in cached decode after it."""
    each(item, lambda runner: require_padding_kept_out(runner, left=True))


def check_right_padding(item: Item) -> None:
    """Padding on the right changes nothing at real tokens, whatever it holds."""
    each(item, lambda runner: require_padding_kept_out(runner, left=False))


def check_rotary(item: Item) -> None:
    """With a rotary embedding it reads otherwise, decodes as in one pass, and sees distances only: padding changes nothing."""

    def body(runner: Runner) -> None:
        if not getattr(runner.module, "rotates", False):
            raise Skipped("does not rotate queries and keys")
        x = tokens(runner)
        turned = runner.around(copy.deepcopy(runner.module))
        turned.module.rotary = Rotary(100.0)  # type: ignore[assignment]
        by = apart(run(turned, x), run(runner, x))
        require(by > 1e-6, f"{runner.about}: says that it rotates, and a rotary embedding changes nothing")
        if "decode" not in runner.cannot and "causal" not in runner.cannot:
            with torch.no_grad():
                by = apart(turned.decode(x, [3, 1, 8, 5, 2, 14, 7]), run(turned, x, causal=True))
            require(by <= 10 * tolerance(runner), f"{runner.about}: with a rotary embedding cached decode is off by {by:.2g}")
        if "padding" not in runner.cannot:
            require_padding_kept_out(turned, left=True)

    each(item, body)


def check_masked_rows(item: Item) -> None:
    """Rows that see nothing, and a row of padding only, give no NaN, forward or backward, and reach no other row."""
    each(item, require_masked_rows_clean)


def check_forms(item: Item) -> None:
    """A state's three forms agree: outputs, gradients and last states, whatever the chunk."""
    each(item, require_forms_agree)


def check_implied_weights(item: Item) -> None:
    """The weights that a state implies, times the values, are what the heads read."""
    each(item, require_weights_implied)


def check_documents(item: Item) -> None:
    """Documents packed into a row are each as if alone, where a state must be cleared for it."""
    each(item, require_documents_apart)


def check_bounded(item: Item) -> None:
    """A cache that says it does not grow with the tokens does not."""
    each(item, require_bounded)


def check_groups(item: Item) -> None:
    """Fewer key/value heads are as the same ones repeated for each of their group's queries; if not, says what they are."""

    def body(runner: Runner) -> None:
        if runner.kernel is None:
            maps = maps_of(runner.module)
            if maps.kv_heads >= maps.heads:
                raise Skipped(f"has as many key/value heads as queries, {maps.heads}")
            require_repeated(runner.about, GroupedModule(runner, maps), tolerance(runner))
            return
        kernel = GroupedKernel(runner, N)
        try:
            kernel.out({})
        except Exception as error:
            if item.kind == "mechanism":
                raise
            raise Skipped(f"takes as many key/value heads as queries only: {str(error).splitlines()[0][:90]}") from error
        require_repeated(runner.about, kernel, tolerance(runner))

    each(item, body)


def check_neutral(item: Item) -> None:
    """The settings that should be plain softmax attention are; the examples are something else."""
    make = getattr(item.module, "neutral", None)
    if make is None:
        raise Skipped("gives no neutral(heads, size), settings that equal plain softmax attention")

    def difference(runner: Runner, causal: bool) -> float:
        if runner.kernel is not None:
            q, k, v = heads_tensors(7, N, N)
            with torch.no_grad():
                usual = attend(q, k, v, *((Causal(),) if causal else ()))
                return apart(runner.read(q, k, v, causal), usual)  # type: ignore[attr-defined]
        x = tokens(runner)
        with torch.no_grad():
            return apart(run(runner, x, causal=causal), plain_twin(runner)(x, *((Causal(),) if causal else ())))

    def body(runner: Runner) -> None:
        if max(difference(runner, causal) for causal in runner.modes) <= tolerance(runner):
            plain.append(runner.about)

    plain: list[str] = []
    each(item, body)
    # another way to compute plain attention is one in all its settings, and its oracle says so
    meant = len(plain) == len(instances(item)) and hasattr(item.module, "oracle")
    require(not plain or meant, f"{plain[0] if plain else ''}: changes nothing: it is plain softmax attention")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = [runner_for(value, f"neutral setting {i + 1}") for i, value in enumerate(make(HEADS, SIZE))]
    require(bool(settings), "neutral(heads, size) returns none")
    for runner in settings:
        for causal in runner.modes:
            by = difference(runner, causal)
            require(by <= tolerance(runner), f"{runner.about}: differs from plain softmax attention by {by:.2g} ({way(causal)})")


def check_identities(item: Item) -> None:
    """The paper's own identities and limit cases hold."""
    tell = getattr(item.module, "identities", None)
    if tell is None:
        raise Skipped("gives no identities(), the paper's own identities and limit cases")
    told = list(tell())
    require(bool(told), "identities() gives none")
    for words, by in told:
        require(abs(float(by)) < 1e-9, f"{words}: off by {float(by):.2g}")


def check_half_precision(item: Item) -> None:
    """In bfloat16 at most twice as far from float64 as plain attention, plus a rounding; in float32 as exact as that allows."""

    def body(runner: Runner) -> None:
        inside = noise(runner, 1e-3)
        require(
            inside < 3e-5,
            f"{runner.about}: computes in less than float32 inside: in float64, rounding of {inside:.2g} of its size",
        )
        plain = baseline(runner)
        for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float32, 2**-17)):
            low = runner.to(dtype)
            exact = low.around(copy.deepcopy(low.module).double())
            x = tokens(runner, 2, N, 13).to(dtype)
            causal = runner.modes[0]
            error = relative(run(low, x, causal=causal), run(exact, x.double(), causal=causal))
            with torch.no_grad():
                stages = (Causal(),) if causal else ()
                lower = copy.deepcopy(plain).to(dtype)
                base = relative(lower(x, *stages), copy.deepcopy(lower).double()(x.double(), *stages))
            name = str(dtype).removeprefix("torch.")
            told = f"{runner.about}: in {name} it is off by {error:.2g} of its size, plain attention by {base:.2g}"
            require(error <= 2 * base + rounding, told)

    each(item, body)


def check_extremes(item: Item) -> None:
    """Tiny and large inputs stay finite, in float32."""

    def body(runner: Runner) -> None:
        low = runner.to(torch.float32)
        for scale in (1e-4, 1e3):
            for causal in runner.modes:
                out = run(low, tokens(runner, dtype=torch.float32, scale=scale), causal=causal)
                require(bool(out.isfinite().all()), f"{runner.about}: not finite for inputs of size {scale:g}")

    each(item, body)


def check_saved(item: Item) -> None:
    """Its state_dict, loaded into one that was built anew, gives the same bits."""
    if not built_anew(item):
        raise Skipped("is an instance, so a second one can't be built; give examples(heads, size)")
    for old, new in zip(instances(item, seed=0), instances(item, seed=1), strict=True):
        new.module.load_state_dict(old.module.state_dict())
        x = tokens(old)
        by = apart(run(old, x), run(new, x))
        require(
            by == 0,
            f"{old.about}: saved and loaded, its output differs by {by:.2g}: its state_dict does not hold all that matters",
        )


def check_state(item: Item) -> None:
    """No state is left by a sequence, nor by a change to train mode and back."""

    def body(runner: Runner) -> None:
        first, second = tokens(runner, 1, N, 14), tokens(runner, 1, N, 15)
        fresh = runner.around(copy.deepcopy(runner.module))
        wanted = run(fresh, second)
        run(runner, first)
        by = apart(run(runner, second), wanted)
        require(by == 0, f"{runner.about}: a sequence leaves state: the next one's output differs by {by:.2g}")
        if "decode" not in runner.cannot and "causal" not in runner.cannot:
            with torch.no_grad():
                fresh = runner.around(copy.deepcopy(runner.module))
                wanted = fresh.decode(second, [7, 1, 32])
                runner.decode(first, [7, 1, 32])
                by = apart(runner.decode(second, [7, 1, 32]), wanted)
            require(by == 0, f"{runner.about}: decoding a sequence leaves state: the next one's output differs by {by:.2g}")
        before = run(runner, second)
        runner.module.train()
        runner.module.eval()
        by = apart(run(runner, second), before)
        require(by == 0, f"{runner.about}: train() and eval() change its output by {by:.2g}")

    each(item, body)
