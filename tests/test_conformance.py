"""Every item of the inventory against every check of its kind. Nothing here changes when something is added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from headwise import registry
from headwise.attention.stage import Output
from headwise.card import Card
from headwise.testing import _check, check, checks_for
from headwise.testing._check import Item

ITEMS = _check.everything()


def name_of(function):
    return function.__name__.removeprefix("check_")


def cases():
    """(item, check), where an exemption on the item's card is a strict expected failure: it fails once the check passes."""
    found = []
    for item in ITEMS:
        for function in checks_for(item.kind):
            reason = (item.card.exempt if item.card else {}).get(name_of(function))
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            found.append(pytest.param(item, function, id=f"{item.kind}-{item.name}-{name_of(function)}", marks=marks))
    return found


@pytest.mark.parametrize(("item", "function"), cases())
def test_conformance(item, function):
    check_holds = function
    check_holds(item)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{item.kind}-{item.name}")
def test_cards(item):
    """Everything carries a card, and says on its first line what it does."""
    card = registry.card(item.kind, item.name)
    assert card.paper.strip() == card.paper != ""
    assert 1950 < card.year < 2100
    assert card.room
    assert card.source
    assert card.status
    assert len((item.value.__doc__ or "").strip().splitlines()[0]) > 20
    assert set(card.exempt) <= {name_of(function) for function in checks_for(item.kind)}
    assert all(len(reason) > 10 for reason in card.exempt.values())


def test_the_inventory_is_checked_whole():
    kinds = set(registry.kinds()) - {"benchmark"}  # which measures, and has nothing to conform to
    assert {(item.kind, item.name) for item in ITEMS} == {(kind, name) for kind in kinds for name in registry.names(kind)}
    assert all(len(checks_for(kind)) >= 2 for kind in kinds)
    assert all(function.__doc__ for kind in kinds for function in checks_for(kind))


# ---- the checks themselves: each must catch what it is for -------------------------------------------------------------


@dataclass(frozen=True)
class Doubled(Output):
    """A stage whose oracle says otherwise: twice the output, where the formula asks for three times."""

    def output(self, out, value):
        return 2 * out

    def select(self, heads):
        return self


def broken(exempt):
    def oracle(stage, row, head):
        return [3 * x for x in row]

    card = Card("A paper", 2024, "heads", "nowhere", exempt=exempt)
    module = SimpleNamespace(CARD=card, examples=lambda heads, size: [Doubled()], oracle=oracle, __name__="mine")
    return Item("stage", "doubled", Doubled, module)


def test_a_wrong_formula_is_caught_and_exemptions_expire():
    results = {result.check: result for result in check(broken({}))}
    assert results["oracle"].outcome == "failed"
    assert "differs from its oracle" in results["oracle"].message
    assert not results["oracle"].ok
    assert all(result.ok for name, result in results.items() if name != "oracle")
    results = {result.check: result for result in check(broken({"oracle": "its paper is wrong", "batch": "no reason at all"}))}
    assert results["oracle"].outcome == "exempt"
    assert results["oracle"].ok
    assert results["oracle"].message.startswith("its paper is wrong: ")
    assert results["batch"].outcome == "expired"
    assert not results["batch"].ok


@pytest.mark.parametrize(
    ("fault", "check_name", "message"),
    [
        (lambda out: out + out.mean(2, keepdim=True), "causality", "leaks the future at position 0"),
        (lambda out: out + out.mean(0, keepdim=True), "batch", "depends on the other rows"),
        (lambda out: out * torch.arange(out.shape[2])[:, None], "decode", "decoding 1 at a time differs"),
        (lambda out: out / (out.abs() > 0), "masked_rows", "NaN in a row that sees no key"),
        (lambda out: out * 1e36 * out.abs(), "extremes", "not finite"),
        (lambda out: out, "neutral", "changes nothing"),
        (lambda out: out.detach(), "gradients", "wrong gradient"),
    ],
)
def test_faults_are_named(fault, check_name, message):
    item = broken({})

    class Faulty(Doubled):
        """Doubled, with a fault."""

        def output(self, out, value):
            return fault(out)

    item = replace(item, module=SimpleNamespace(**{**vars(item.module), "examples": lambda heads, size: [Faulty()]}))
    found = {result.check: result for result in check(item)}[check_name]
    assert found.outcome == "failed"
    assert message in found.message
