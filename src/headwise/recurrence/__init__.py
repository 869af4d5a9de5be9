"""States instead of keys and values: one operator for what decays, erases, writes and reads, in three exact forms."""

from .backends import Plan, explain
from .operator import Read, recur, starts_of, weights

__all__ = ["Plan", "Read", "explain", "recur", "starts_of", "weights"]
