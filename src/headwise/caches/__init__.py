"""Keys and values for generation, held per group of heads; what a head will never read again is freed."""

from .store import Keep, LayerStore, View

__all__ = ["Keep", "LayerStore", "View"]
