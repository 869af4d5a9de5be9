"""Problems ask what their rows imply, and guessing gets what they say it gets."""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from headwise import zoo
from headwise.errors import InputError, RegistryError
from headwise.testing import _check
from headwise.testing import problems as checks
from headwise.training import IGNORE, Tally, problem_of

CPU = torch.device("cpu")


def rows(problem, count=512, seed=0, make="batch"):
    return getattr(problem, make)(count, torch.Generator().manual_seed(seed), CPU)


def oracle(problem):
    return importlib.import_module(type(problem).__module__).oracle


def assert_oracle_agrees(problem, count=200):
    made = rows(problem, count)
    for ids, targets in zip(made.ids.tolist(), made.targets.tolist(), strict=True):
        assert oracle(problem)(problem, ids) == targets


def broken(problem, **changes):
    """An item whose batches are changed: check_... must notice."""

    def batch(rows, generator, device):
        made = problem.batch(rows, generator, device)
        return made._replace(**{field: change(made) for field, change in changes.items()})

    made = type(problem).__name__
    fields = {"batch": lambda self, *given: batch(*given), "heldout": lambda self, *given: batch(*given)}
    return SimpleNamespace(value=type(made, (type(problem),), fields), module=sys.modules[type(problem).__module__])


@pytest.mark.parametrize(
    ("check", "field", "change", "told"),
    [
        ("check_oracle", "targets", lambda made: torch.where(made.targets >= 0, made.ids[:, :1], IGNORE), "the oracle differs"),
        ("check_tokens", "ids", lambda made: made.ids + 1, "tokens 1 to 32 of 32"),
        ("check_tokens", "targets", lambda made: torch.full_like(made.targets, 40), "targets 40 to 40 of 32"),
        ("check_repeatable", "ids", lambda made: torch.randint_like(made.ids, 32), "the same seed makes other rows"),
        ("check_caller", "ids", lambda made: torch.randint_like(made.ids, 32), "torch's own random numbers"),
        ("check_chance", "targets", lambda made: torch.where(made.targets >= 0, 20, IGNORE), "always saying 20 gets 1.000"),
        ("check_places", "targets", lambda made: torch.where(torch.arange(32) == 30, 20, made.targets), "asked in every row"),
    ],
)
def test_checks_notice(check, field, change, told):
    with pytest.raises(_check.CheckFailed, match=told):
        getattr(checks, check)(broken(problem_of("associative_recall"), **{field: change}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("associative_recall", {"pairs": 4, "length": 33, "keys": 4, "values": 9, "power": 1.0}),
        ("needle", {"needles": 1, "length": 31, "shortest": 6}),
        ("needle", {"needles": 6, "questions": 1, "length": 16, "shortest": 15, "keys": 6, "values": 6}),
        ("copy", {"noise": 0, "shortest": 1, "longest": 5}),
        ("brackets", {"kinds": 2, "depth": 2, "length": 7}),
        ("brackets", {"kinds": 3, "depth": 12, "length": 100}),
        ("counting", {"variables": 1, "length": 6, "shortest": 6}),
        ("counting", {"variables": 5, "raises": 50.0, "passes": 1.0, "length": 200}),
        ("flip_flop", {"ignore": 0.0, "length": 4}),
        ("flip_flop", {"ignore": 0.98, "length": 256, "shortest": 7}),
        ("two_letters", {"answer": "first", "letters": 6}),
        ("two_letters", {"answer": "last", "block": 2, "letters": 3, "blocks": 40, "fewest": 1}),
        ("distractors", {"distractors": 200, "asked": 1, "keys": 2, "values": 2}),
    ],
)
def test_other_sizes(name, options):
    assert_oracle_agrees(problem_of(name, options))


def test_each_key_is_asked_once_and_noise_is_values():
    problem = problem_of("associative_recall")
    made = rows(problem)
    counts = torch.zeros(512, problem.keys).scatter_add_(1, made.ids.clamp(max=problem.keys - 1), (made.ids < problem.keys).float())
    assert torch.equal((counts == 2).sum(1), torch.full((512,), problem.pairs))
    assert torch.equal((counts > 0).sum(1), torch.full((512,), problem.pairs))
    assert torch.equal((made.targets != IGNORE).sum(1), torch.full((512,), problem.pairs))
    first = (made.ids < problem.keys).long().argmax(1)
    assert sorted(first.unique().tolist()) == list(range(problem.offset + 1))


def test_gaps_follow_the_power():
    def mean_gap(power):
        problem = problem_of("associative_recall", {"pairs": 2, "length": 64, "power": power})
        made = rows(problem)
        begin = (made.ids < problem.keys).long().argmax(1, keepdim=True) + 2 * problem.pairs
        at = (made.targets != IGNORE).nonzero()[:, 1].view(512, problem.pairs)
        return float(((at - begin) / 2).mean())

    assert abs(mean_gap(1.0) - 13.0) < 1.0  # uniform over 26 to 30 places, less the offset
    assert mean_gap(0.01) < 8.0


@pytest.mark.parametrize("name", ["associative_recall", "needle", "distractors", "flip_flop"])
def test_guessing_a_value_of_the_row_gets_chance(name):
    """What stands for chance is what a guess gets that knows the row's answers and not which one is asked."""
    problem, generator = problem_of(name), torch.Generator().manual_seed(1)
    made = rows(problem, 4096)
    right = asked = 0
    for ids, targets in zip(made.ids.tolist(), made.targets.tolist(), strict=True):
        if name == "flip_flop":
            values = [0, 1]
        else:  # what follows a key
            first, seen = (problem.keys, set())
            values = []
            for place, token in enumerate(ids[:-1]):
                if token < first and (token not in seen or name == "distractors") and ids[place + 1] < first + problem.values:
                    values.append(ids[place + 1])
                    seen.add(token)
        for target in targets:
            if target != IGNORE:
                guess = values[int(torch.randint(len(values), (), generator=generator))]
                right, asked = right + (guess == target), asked + 1
    noise = (problem.chance * (1 - problem.chance) / asked) ** 0.5
    assert abs(right / asked - problem.chance) < 4 * noise


def test_counts_stop_at_ten_and_proportions_hold():
    problem = problem_of("counting", {"raises": 50.0, "passes": 1.0, "variables": 1, "length": 200})
    answers = rows(problem).targets
    assert int(answers.max()) == 10
    plain = problem_of("counting", {"length": 400, "shortest": 400})
    ids = rows(plain, 256).ids
    sets, ups, passes = (int((ids == 11 + word).sum()) for word in (0, 1, 2))
    assert abs(sets / (sets + ups + passes) - 1 / 58) < 0.005
    assert 50 / 58 < passes / (sets + ups + passes) < 53 / 58  # raises of variables that are not there yet, or at ten, are passes
    with pytest.raises(InputError, match="none below 0"):
        problem_of("counting", {"sets": -1.0})


def test_brackets_reach_their_depth_and_both_directions_are_alike():
    problem = problem_of("brackets", {"depth": 4, "length": 400})
    ids = rows(problem).ids
    steps = torch.where(ids < problem.kinds, 1, -1)
    depth = steps.cumsum(1)
    assert (int(depth.min()), int(depth.max())) == (0, 4)
    inside = (depth[:, :-1] > 0) & (depth[:, :-1] < 4)
    assert abs(float((steps[:, 1:][inside] == 1).double().mean()) - 0.5) < 0.01
    kinds = ids[ids < problem.kinds].bincount().double()
    assert float((kinds / kinds.sum() - 1 / 8).abs().max()) < 0.005


def test_flip_flop_ignores_its_share():
    for share in (0.1, 0.8, 0.98):
        ids = rows(problem_of("flip_flop", {"ignore": share, "length": 512, "shortest": 512})).ids[:, 2:-2:2]
        assert abs(float((ids == 4).double().mean()) - share) < 0.01
        assert abs(int((ids == 2).sum()) / int((ids == 3).sum()) - 1) < 0.1


def test_one_block_holds_both_letters_and_stands_anywhere():
    problem = problem_of("two_letters", {"letters": 7})  # where others would often hold both
    where = []
    for ids in rows(problem, 300).ids.tolist():
        mark = ids.index(problem.letters + 1)
        blocks = [set(ids[at : at + 5]) for at in range(0, mark, 6)]
        assert all(len(block) == 5 for block in blocks)
        assert problem.least <= len(blocks) <= problem.blocks
        held = [number for number, block in enumerate(blocks) if set(ids[mark + 1 : mark + 3]) <= block]
        assert len(held) == 1
        where.append(held[0])
    assert set(where) == set(range(problem.blocks))


def test_byte_text_is_judged_on_a_part_that_is_never_trained_on(tmp_path):
    text = bytes(range(180)) * 1 + bytes(range(180, 200))  # every byte once, so that a window tells where it stands
    (tmp_path / "text").write_bytes(text)
    problem = problem_of("byte_text", {"length": 8, "text": str(tmp_path / "text")})
    trained, held = rows(problem), rows(problem, make="heldout")
    assert torch.equal(trained.targets, trained.ids + 1)
    assert torch.equal(held.targets, held.ids + 1)
    assert (int(trained.ids.min()), int(trained.targets.max())) == (0, 179)
    assert (int(held.ids.min()), int(held.targets.max())) == (180, 199)
    assert problem.chance == pytest.approx(math.log2(180 + 256))  # all held-out bytes are new: one of 436 counts
    found = problem.metrics(Tally(8 * math.log(2), 1, 4, 0, 1))
    assert found == {"bits_per_byte": pytest.approx(2.0), "accuracy": 0.25}
    whole = zoo.heldout_text().encode()
    assert bytes(rows(problem_of("byte_text"), 1).ids[0].tolist()) in whole
    with pytest.raises(InputError, match="give a longer text"):
        problem_of("byte_text", {"length": 64, "text": str(tmp_path / "text")})
    with pytest.raises(InputError, match="can't be read"):
        problem_of("byte_text", {"text": str(tmp_path / "none")})


def test_options_of_problems_are_checked():
    with pytest.raises(RegistryError, match="there is no problem 'nonsense'; there are: associative_recall, "):
        problem_of("nonsense")
    with pytest.raises(InputError, match="has no 'size'; it has pairs=4, "):
        problem_of("associative_recall", {"size": 3})
    for name, value in (("pairs", "many"), ("pairs", 2.5), ("pairs", True)):
        with pytest.raises(InputError, match="give a value such as 4"):
            problem_of("associative_recall", {name: value})
    with pytest.raises(InputError, match="length must be 20 at least"):
        problem_of("associative_recall", {"length": 19})
    assert problem_of("flip_flop", {"ignore": 0}).ignore == 0


def test_state_tracking_of_groups_that_commute_or_not():
    """Products of permutations depend on their order, of the cyclic group not; exchanges are of two items."""
    known = problem_of("state_tracking", {"items": 3, "commutes": False})
    other = problem_of("state_tracking", {"items": 3, "commutes": True})
    assert not torch.equal(known.products(), known.products().T)
    assert torch.equal(other.products(), other.products().T)
    for problem in (known, other):
        table = problem.products()
        assert torch.equal(table[0], torch.arange(6))
        assert all(sorted(row) == list(range(6)) for row in table.tolist())
    swaps = problem_of("state_tracking", {"items": 4, "swaps": True})
    ids = swaps.batch(64, torch.Generator().manual_seed(0), torch.device("cpu")).ids
    assert all(sum(i != to for i, to in enumerate(swaps.elements[n])) == 2 for n in ids.unique().tolist() if n < 24)
    with pytest.raises(InputError, match="give a value such as False"):
        problem_of("state_tracking", {"commutes": 1})
    with pytest.raises(InputError, match="commutes or swaps"):
        problem_of("state_tracking", {"commutes": True, "swaps": True})
