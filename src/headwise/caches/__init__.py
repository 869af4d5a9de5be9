"""Keys and values for generation, held per group of heads; what a head will never read again is freed."""

from .arena import PAGE, Arena, Sequences
from .groups import Keep, View
from .rule import Budget, Codec, Evict, Rule, Seen
from .store import LayerStore

__all__ = ["PAGE", "Arena", "Budget", "Codec", "Evict", "Keep", "LayerStore", "Rule", "Seen", "Sequences", "View"]
