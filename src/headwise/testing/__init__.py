"""The conformance checks, for everything in the inventory and for what you write yourself: `headwise check`."""

from ._check import Item, Result, check, checks_for, everything, find

__all__ = ["Item", "Result", "check", "checks_for", "everything", "find"]
