"""How queries read keys (mechanisms), and whole token-mixing modules built around them (mixers)."""

from ._mixer import Attention, KeyValues, Mechanism, Mixer, Positions, Projections, Seen

__all__ = ["Attention", "KeyValues", "Mechanism", "Mixer", "Positions", "Projections", "Seen"]
