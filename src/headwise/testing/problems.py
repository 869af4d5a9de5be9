"""Checks for problems: what a row asks can be told from the row, and from nothing less."""

from __future__ import annotations

import json

import torch

from ..training.problems import IGNORE, Batch, Problem, Tally
from ._check import Item, Skipped, require

ROWS = 512


def check_repeatable(item: Item) -> None:
    """The same seed makes the same rows, another seed others."""
    problem = _problem(item)
    for make in ("batch", "heldout"):
        one, again, other = (_rows(problem, seed, make) for seed in (1, 1, 2))
        same = all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        require(same, f"{make}: the same seed makes other rows")
        require(not torch.equal(one.ids, other.ids), f"{make}: another seed makes the same rows")


def check_tokens(item: Item) -> None:
    """Rows have the context's length, tokens and targets lie in the vocabulary, and every row asks something."""
    problem = _problem(item)
    for make in ("batch", "heldout"):
        rows = _rows(problem, 3, make)
        for name, given in (("ids", rows.ids), ("targets", rows.targets)):
            require(given.dtype == torch.long, f"{make}: {name} are {given.dtype}, not int64")
            shape = (ROWS, problem.context)
            require(given.shape == shape, f"{make}: {name} are {tuple(given.shape)}; rows and context are {shape}")
        asked = rows.targets != IGNORE
        low, high = int(rows.ids.min()), int(rows.ids.max())
        require(low >= 0 and high < problem.vocabulary, f"{make}: tokens {low} to {high} of {problem.vocabulary}")
        answers = rows.targets[asked]
        low, high = int(answers.min()), int(answers.max())
        require(low >= 0 and high < problem.vocabulary, f"{make}: targets {low} to {high} of {problem.vocabulary}")
        require(bool(asked.any(1).float().mean() > 0.99), f"{make}: {int((~asked.any(1)).sum())} of {ROWS} rows ask nothing")


def check_places(item: Item) -> None:
    """What is asked does not always stand at the same place, unless every place is asked."""
    problem = _problem(item)
    asked = _rows(problem, 4).targets != IGNORE
    if bool(asked.all()):
        return
    share = asked.float().mean(0)
    require(bool(share.max() < 1), f"place {int(share.argmax())} is asked in every row")
    require(int((share > 0).sum()) > 1, "only one place is ever asked")


def check_oracle(item: Item) -> None:
    """Reading a row slowly gives exactly its targets."""
    problem = _problem(item)
    if problem.ceiling is None:
        raise Skipped("what comes next can't be told for sure, so there is no oracle")
    rows = _rows(problem, 5)
    for row, (ids, targets) in enumerate(zip(rows.ids.tolist(), rows.targets.tolist(), strict=True)):
        told = item.module.oracle(problem, ids)
        wrong = [place for place in range(len(ids)) if told[place] != targets[place]]
        require(not wrong, f"row {row}: the oracle differs from the targets at places {wrong[:5]}")


def check_chance(item: Item) -> None:
    """One answer given everywhere gets no more than chance, which lies below what counts as solved, and that below the ceiling."""
    problem = _problem(item)
    require(problem.better(problem.solved, problem.chance), f"solved at {problem.solved:.3f}, chance is {problem.chance:.3f}")
    if problem.ceiling is not None:
        require(problem.better(problem.ceiling, problem.solved), f"solved at {problem.solved:.3f} of {problem.ceiling:.3f}")
        rows = _rows(problem, 6)
        asked = rows.targets != IGNORE
        best = rows.targets[asked].bincount().argmax()
        right = (rows.targets == best) & asked
        tally = Tally(1.0, int(right.sum()), int(asked.sum()), int((right | ~asked).all(1).sum()), ROWS)
        got = problem.metrics(tally)[problem.metric]
        noise = 4 * (problem.chance * (1 - problem.chance) / ROWS) ** 0.5
        require(got <= problem.chance + noise, f"always saying {int(best)} gets {got:.3f}, chance is {problem.chance:.3f}")


def check_metric(item: Item) -> None:
    """The metric that models are compared by is among the metrics, which are plain numbers; options are plain data."""
    problem = _problem(item)
    found = problem.metrics(Tally(2.0, 3, 4, 1, 2))
    require(problem.metric in found, f"metric {problem.metric!r} is not among {', '.join(found)}")
    require(all(isinstance(value, float) for value in found.values()), f"not all numbers: {found}")
    again = type(problem)(**{name: value for name, value in problem.to_dict().items() if name != "problem"})
    require(again == problem, "built from its own options it is another problem")
    json.dumps(problem.to_dict())


def check_caller(item: Item) -> None:
    """Only the given generator is drawn from."""
    problem = _problem(item)
    before = torch.get_rng_state()
    _rows(problem, 7)
    require(torch.equal(before, torch.get_rng_state()), "making rows draws from torch's own random numbers")


def _problem(item: Item) -> Problem:
    return item.value()


def _rows(problem: Problem, seed: int, make: str = "batch") -> Batch:
    return getattr(problem, make)(ROWS, torch.Generator().manual_seed(seed), torch.device("cpu"))
