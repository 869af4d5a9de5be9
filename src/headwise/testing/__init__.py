"""The conformance checks, for everything in the inventory and for what you write yourself: `headwise check`."""

from ._check import Result, check, checks_for

__all__ = ["Result", "check", "checks_for"]
