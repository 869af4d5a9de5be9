"""Checks for architectures, whose modules give `examples()`, `oracle`, `kept`, `sized` and `identities()`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn import Caches, LanguageModel, from_pretrained
from ._check import Item, Skipped, require

N = 40  # more than 32, where many kernels begin another block
PIECES = (7, 1, 1, 9, 2, 1, 14, 1, 4)


class Example(NamedTuple):
    """A model in float64, and how it is called in messages."""

    model: LanguageModel
    about: str


def _examples(item: Item) -> Iterator[Example]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models: list[LanguageModel] = item.module.examples()
    require(bool(models), "examples() gives none")
    for number, model in enumerate(models, 1):
        yield Example(model.double().eval(), f"example {number}" if len(models) > 1 else item.name)


def _ids(model: LanguageModel, rows: int = 2, tokens: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.vocabulary, (rows, tokens), generator=generator)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max().nan_to_num(torch.inf))


def _run(model: LanguageModel, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options)


def _causal(model: LanguageModel) -> bool:
    return bool(getattr(model, "causal", True))


def _decoders(item: Item) -> list[Example]:
    """The examples that read backwards only.

    Raises: Skipped if there is none.
    """
    found = [example for example in _examples(item) if _causal(example.model)]
    if not found:
        raise Skipped("reads both sides, so it keeps nothing and generates nothing")
    return found


def _decode(model: LanguageModel, ids: Tensor, pieces: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Caches]:
    caches, outs, start = model.new_caches(), [], 0
    for size in pieces:
        at = slice(start, start + size)
        outs.append(_run(model, ids[:, at], caches=caches, attention_mask=None if mask is None else mask[:, at]))
        start += size
    return torch.cat(outs, 1), caches


def check_shape(item: Item) -> None:
    """Token numbers (b, n) become finite logits (b, n, vocabulary), for one token and odd numbers of them."""
    for model, about in _examples(item):
        for rows, tokens in ((1, 1), (3, 7), (1, 33)):
            out = _run(model, _ids(model, rows, tokens))
            require(out.shape == (rows, tokens, model.vocabulary), f"{about}: {rows, tokens} tokens become {tuple(out.shape)}")
            require(bool(out.isfinite().all()), f"{about}: logits are not finite")


def check_oracle(item: Item) -> None:
    """Logits, and gradients of every parameter, equal those of the paper's formulas, written slowly and independently."""
    for model, about in _examples(item):
        ids = _ids(model, 1, 11, 3)
        out, wanted = model(ids)[0], item.module.oracle(model, ids[0])
        require(out.shape == wanted.shape, f"{about}: logits {tuple(out.shape)}, its oracle's {tuple(wanted.shape)}")
        by = _apart(out.detach(), wanted.detach())
        require(by < 1e-10 * max(1.0, float(wanted.detach().abs().max())), f"{about}: differs from its oracle by {by:.2g}")
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        named = dict(model.named_parameters())
        ours = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
        theirs = torch.autograd.grad((wanted * weight).sum(), list(named.values()), allow_unused=True)
        for name, mine, right in zip(named, ours, theirs, strict=True):
            if right is not None:
                by = _apart(torch.zeros_like(right) if mine is None else mine, right)
                size = max(1.0, float(right.abs().max()))
                require(by < 1e-9 * size, f"{about}: its gradient of {name} differs from its oracle's by {by:.2g}")


def check_gradients(item: Item) -> None:
    """Every parameter takes part: a gradient reaches it, and it is not zero everywhere."""
    for model, about in _examples(item):
        named = dict(model.named_parameters())
        loss = model(_ids(model, 2, 17)).square().sum()
        found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
        unused = [name for name, grad in found.items() if grad is None or not bool(grad.any())]
        require(not unused, f"{about}: no gradient reaches {', '.join(unused)}")


def check_causality(item: Item) -> None:
    """Changing the future changes nothing before it, bit for bit; what reads both sides does."""
    for model, about in _examples(item):
        ids = _ids(model)
        before = _run(model, ids)
        for at in (1, 9, 33, N - 1):
            other = ids.clone()
            other[:, at:] = (other[:, at:] + 1) % model.vocabulary
            changed = (_run(model, other)[:, :at] != before[:, :at]).any(-1).any(0).nonzero().flatten().tolist()
            if _causal(model):
                require(not changed, f"{about}: token {at} changes position {changed[0] if changed else ''} before it")
            else:
                require(bool(changed), f"{about}: reads both sides, and token {at} changes nothing before it")


def check_decode(item: Item) -> None:
    """With its caches, token by token and in pieces, the logits are those of one pass."""
    for model, about in _decoders(item):
        ids = _ids(model)
        whole = _run(model, ids)
        allowed = 1e-10 * max(1.0, float(whole.abs().max()))
        for how, pieces in (("token by token", (1,) * N), ("in pieces", PIECES)):
            by = _apart(_decode(model, ids, pieces)[0], whole)
            require(by < allowed, f"{about}: cached decode ({how}) differs from one pass by {by:.2g}")


def check_batch(item: Item) -> None:
    """Rows of a batch do not meet, and a row alone is as in a batch."""
    for model, about in _examples(item):
        ids = _ids(model, 3)
        out = _run(model, ids)
        for row in range(3):
            by = _apart(_run(model, ids[row : row + 1])[0], out[row])
            require(by < 1e-10 * max(1.0, float(out.abs().max())), f"{about}: a row alone differs from it in a batch by {by:.2g}")


def check_padding(item: Item) -> None:
    """Padding on the left changes nothing at tokens, whatever it holds; nor in cached decode after it."""
    for model, about in _examples(item):
        ids = _ids(model, 3)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, :7] = False
        mask[2, :13] = False
        outs = {"one pass": _run(model, ids, attention_mask=mask)}
        if _causal(model):
            outs["cached decode"] = _decode(model, ids, (20, 1, 1, 1, 12, 1, 4), mask)[0]
        for row, pad in enumerate((0, 7, 13)):
            alone = _run(model, ids[row : row + 1, pad:])[0]
            for how, out in outs.items():
                by = _apart(out[row, pad:], alone)
                require(by < 1e-9 * max(1.0, float(alone.abs().max())), f"{about}: {pad} of padding change {how} by {by:.2g}")


def check_bytes(item: Item) -> None:
    """Its caches hold just the numbers that the paper's layout asks for, by the storages behind their tensors."""
    require(hasattr(item.module, "kept"), "its module has no kept(model, tokens)")
    for model, about in _decoders(item):
        for pieces in ((N,), (20,) + (1,) * 11):
            tokens = sum(pieces)
            held = _decode(model, _ids(model, 1, tokens), pieces)[1].nbytes / 8
            wanted = item.module.kept(model, tokens)
            require(held == wanted, f"{about}: caches hold {held:g} numbers after {tokens} tokens, the layout asks for {wanted}")


def check_saved(item: Item) -> None:
    """Saved and loaded, and built anew by its name, it gives the same bits."""
    for model, about in _examples(item):
        require(model.config["architecture"] == item.name, f"{about}: its config names {model.config['architecture']!r}")
        ids = _ids(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            by = _apart(_run(from_pretrained(folder), ids), _run(model, ids))
        require(by == 0, f"{about}: saved and loaded, its logits differ by {by:.2g}")


def check_generate(item: Item) -> None:
    """Generation gives the likeliest tokens of full passes, in a batch behind left padding too."""
    for model, about in _decoders(item):
        ids, mask = _ids(model, 2, 12), torch.ones(2, 12, dtype=torch.bool)
        mask[1, :5] = False
        made = model.generate(ids, 8, attention_mask=mask)
        for row, pad in ((0, 0), (1, 5)):
            text = ids[row : row + 1, pad:]
            for step in range(8):
                text = torch.cat([text, _run(model, text)[:, -1].argmax(-1, keepdim=True)], 1)
                wanted = int(text[0, -1])
                got = int(made[row, step])
                require(got == wanted, f"{about}: row {row} generates {got}, not {wanted}, at {step}")


def check_sized(item: Item) -> None:
    """`sized` builds the paper's settings at given sizes, and by its name with the same arguments."""
    for layers in (2, 6):
        model = item.module.sized(29, 32, layers, 4, 48)
        require(isinstance(model, LanguageModel), f"sized gives a {type(model).__name__}, not a LanguageModel")
        out = _run(model.eval(), _ids(model, 1, 48))
        require(out.shape == (1, 48, 29), f"sized(29, 32, {layers}, 4, 48) gives logits {tuple(out.shape)} for 48 tokens")


def check_identities(item: Item) -> None:
    """The paper's own identities and limit cases hold, and its cost is as it says."""
    told = list(item.module.identities())
    require(bool(told), "identities() gives none")
    for words, by in told:
        require(abs(float(by)) < 1e-9, f"{words}: off by {float(by):.2g}")
