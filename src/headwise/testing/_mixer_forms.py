"""Measures behind the checks for mixers that keep a state: their forms, packed documents, the weights that they imply."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor

from ..mechanisms._states import StateMixer, begin
from ..stages.causal import Causal
from ..stages.documents import Documents
from ._check import Skipped, require
from ._mixer_measures import N, apart, tokens, tolerance
from .adapters import Runner

FORMS = (("parallel", 1), ("chunk", 1), ("chunk", 5), ("chunk", 16), ("chunk", 64))
ENDS = (0, 13, 14, 29, N)


def _mixer(runner: Runner) -> StateMixer:
    if not isinstance(runner.module, StateMixer):
        raise Skipped("is no StateMixer, which has the forms parallel, chunk and recurrent")
    if "causal" in runner.cannot:
        raise Skipped(runner.cannot["causal"])
    return runner.module


def require_forms_agree(runner: Runner) -> None:
    """Outputs, gradients of the input and of every parameter, last states: the same in each form, whatever the chunk."""
    mixer = copy.deepcopy(_mixer(runner))
    allowed = 10 * tolerance(runner)

    def results(form: str, chunk: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        mixer.form, mixer.chunk = form, chunk
        x, cache = tokens(runner).requires_grad_(), mixer.new_cache()
        out = mixer(x, Causal(), cache=cache)
        weight = tokens(runner, seed=6)
        leaves = [x, *(p for p in mixer.parameters() if p.requires_grad)]
        require(cache.state is not None, f"{runner.about}: keeps no state")
        assert cache.state is not None
        return out, cache.state, list(torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True))

    wanted, state, right = results("recurrent", 1)
    for form, chunk in FORMS:
        name = f"{form}, {chunk} tokens" if form == "chunk" else form
        out, last, found = results(form, chunk)
        require(apart(out, wanted) <= allowed, f"{runner.about}: {name}: differs from recurrent by {apart(out, wanted):.2g}")
        size = max(1.0, float(state.detach().abs().max()))
        by = apart(last, state)
        require(by <= allowed * size, f"{runner.about}: {name}: its last state differs from recurrent's by {by:.2g}")
        for mine, theirs in zip(found, right, strict=True):
            if mine is None or theirs is None:
                require(mine is theirs, f"{runner.about}: {name}: another gradient is missing than in recurrent")
                continue
            by, size = apart(mine, theirs), max(1.0, float(theirs.abs().max()))
            require(by <= 10 * allowed * size, f"{runner.about}: {name}: a gradient differs from recurrent's by {by:.2g}")


def require_weights_implied(runner: Runner) -> None:
    """`weights` times the values are what the heads read, both ways of reading."""
    if not isinstance(runner.module, StateMixer):
        raise Skipped("is no StateMixer, so it implies no weights")
    mixer, x = runner.module, tokens(runner)
    for causal in runner.modes:
        stages = (Causal(),) if causal else ()
        with torch.no_grad():
            values = mixer.reading(x, begin(mixer.new_cache(), x, stages, None)).v
            shown, out = mixer.weights(x, *stages), mixer.read(x, *stages)
        values = values.repeat_interleave(shown.shape[1] // values.shape[1], 1)
        size = max(1.0, float(out.abs().max()))
        by = apart(shown @ values, out)
        require(
            by <= 10 * tolerance(runner) * size, f"{runner.about}: its weights times values differ from what it reads by {by:.2g}"
        )
        future = float(shown.triu(1).abs().max()) if causal else 0.0
        require(future == 0, f"{runner.about}: its weights read the future, by {future:.2g}")


def require_documents_apart(runner: Runner) -> None:
    """Documents packed into a row are each as if alone, also decoded piece by piece."""
    mixer, x = _mixer(runner), tokens(runner, 1)
    ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(ENDS))])
    with torch.no_grad():
        alone = torch.cat([mixer(x[:, a:b], Causal()) for a, b in pairwise(ENDS)], 1)
        by = apart(mixer(x, Causal(), Documents(ids)), alone)
        require(by <= 10 * tolerance(runner), f"{runner.about}: packed documents meet: they differ from each alone by {by:.2g}")
        cache = mixer.new_cache()
        pieces = [mixer(x[:, a:b], Causal(), Documents(ids), cache=cache) for a, b in pairwise((0, 5, 13, 20, N))]
        by = apart(torch.cat(pieces, 1), alone)
    require(
        by <= 10 * tolerance(runner), f"{runner.about}: packed documents, decoded in pieces, differ from each alone by {by:.2g}"
    )


def require_bounded(runner: Runner) -> None:
    """The bytes of its cache are the same after 10 tokens and after 40, and all tokens were counted."""
    mixer = runner.module
    if not getattr(mixer, "bounded", False):
        raise Skipped("keeps more the more it reads")
    if "causal" in runner.cannot or "decode" in runner.cannot:
        raise Skipped(runner.cannot.get("decode", runner.cannot.get("causal", "")))
    cache, x = mixer.new_cache(), tokens(runner)  # type: ignore[operator]
    with torch.no_grad():
        mixer(x[:, :10], Causal(), cache=cache)
        early = cache.nbytes
        mixer(x[:, 10:], Causal(), cache=cache)
    require(len(cache) == N, f"{runner.about}: its cache has counted {len(cache)} tokens of {N}")
    require(early > 0, f"{runner.about}: its cache holds nothing after 10 tokens")
    require(
        cache.nbytes == early, f"{runner.about}: its cache grows from {early} bytes after 10 tokens to {cache.nbytes} after {N}"
    )
