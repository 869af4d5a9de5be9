"""The problems that models are trained on, one in each file."""

from ._problem import IGNORE, Batch, Problem, Tally

__all__ = ["IGNORE", "Batch", "Problem", "Tally"]
