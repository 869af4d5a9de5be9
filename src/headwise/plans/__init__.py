"""Which heads of a model run which stage: plans, and the recipes that make them."""

from .plan import Plan

__all__ = ["Plan"]
