"""Small trainings that show what a mechanism buys: problems, a trainer, comparisons at equal parameters, and their plot."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison, Entry, Spread, compare, problem_of
    from .problems import IGNORE, Batch, Problem, Tally
    from .trainer import Settings, Trained, judge, train

_PLACES = {
    "comparison": ("Comparison", "Entry", "Spread", "compare", "problem_of"),
    "problems": ("IGNORE", "Batch", "Problem", "Tally"),
    "trainer": ("Settings", "Trained", "judge", "train"),
}
__all__ = [
    "IGNORE", "Batch", "Comparison", "Entry", "Problem", "Settings", "Spread", "Tally", "Trained", "compare", "judge", "problem_of",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads a name when it is first used: the command line tells its options without PyTorch."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
