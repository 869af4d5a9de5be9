"""The one operator, `attend`, and what it is made of: stages, planner, backends, statistics."""

from .operator import attend, attention_weights, explain, statistics

__all__ = ["attend", "attention_weights", "explain", "statistics"]
