"""How queries read keys (mechanisms), and whole token-mixing modules built around them (mixers)."""

from ._caches import Cache, KeyValues, Seen
from ._mixer import Attention, Mechanism, Mixer, Positions, Projections
from ._rotary import Rotary

__all__ = ["Attention", "Cache", "KeyValues", "Mechanism", "Mixer", "Positions", "Projections", "Rotary", "Seen"]
