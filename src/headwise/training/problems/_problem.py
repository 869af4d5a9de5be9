"""What a problem is: rows made from a seed, what is asked in them, and how answers are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ...errors import InputError

IGNORE = -100  # the target where nothing is asked


class Batch(NamedTuple):
    """Rows of token numbers, and what is to be said at each place; IGNORE where nothing is asked."""

    ids: Int[Tensor, "b n"]
    targets: Int[Tensor, "b n"]


@dataclass(frozen=True)
class Tally:
    """What was counted over held-out rows. nats: summed loss; whole: rows of which every answer was right."""

    nats: float
    right: int
    asked: int
    whole: int
    rows: int


class Problem(ABC):
    """Makes rows to train on and to be judged by. Subclasses are frozen dataclasses of sizes and options, all plain data.

    metric: the name, among those of `metrics`, that models are compared by. higher: whether more of it is better.
    ceiling: its best value, None if nobody knows.
    """

    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    ceiling: ClassVar[float | None] = 1.0

    @property
    def name(self) -> str:
        """The registered name: its file's stem."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are; they are numbered from 0."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens of every row; what a row does not need is filled up at its end."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The metric of guessing without finding the place where the answer stands; each problem says how."""

    @property
    def solved(self) -> float:
        """The metric from which on the problem counts as learned: nine tenths of the way from chance to the ceiling."""
        return self.chance + 0.9 * ((1.0 if self.ceiling is None else self.ceiling) - self.chance)

    @abstractmethod
    def batch(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """Rows to train on, made on the device; the generator is of that device."""

    def heldout(self, rows: int, generator: torch.Generator, device: torch.device) -> Batch:
        """Rows to be judged by: like those of training, unless there is a part that training never sees."""
        return self.batch(rows, generator, device)

    def metrics(self, tally: Tally) -> dict[str, float]:
        """Named numbers: loss in nats and accuracy, both for each answer, and the share of rows with all answers right."""
        return {
            "accuracy": tally.right / tally.asked,
            "rows_right": tally.whole / tally.rows,
            "loss": tally.nats / tally.asked,
        }

    def better(self, one: float, other: float) -> bool:
        """Whether one value of the metric is at least as good as the other."""
        return one >= other if self.higher else one <= other

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: its name and options."""
        return {"problem": self.name, **asdict(self)}  # type: ignore[call-overload]


def need(condition: bool, told: str) -> None:
    """Raises: InputError with what was told, unless sizes fit together."""
    if not condition:
        raise InputError(told)


def uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Numbers between 0 and 1."""
    return torch.rand(shape, generator=generator, device=device)


def integers(generator: torch.Generator, device: torch.device, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator, device=device)


def below(most: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from 0 to `most`, both included, for each entry of a tensor."""
    drawn = torch.rand(most.shape, generator=generator, device=most.device)
    return torch.minimum((drawn * (most + 1)).long(), most)


def distinct(generator: torch.Generator, device: torch.device, rows: int, among: int, count: int) -> Tensor:
    """(rows, count) different whole numbers below `among`, in random order."""
    return uniform(generator, device, rows, among).argsort(1)[:, :count]


def nothing_asked(ids: Tensor) -> Tensor:
    """Targets of rows in which nothing is asked yet."""
    return torch.full_like(ids, IGNORE)
