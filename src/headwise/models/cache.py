"""A transformers Cache whose layers hold, for each key/value head, only what a plan lets its heads read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..caches import LayerStore
from ..errors import PlanError, UnsupportedModelError

CACHE_NAMES = ("cache", "past_key_values")  # what releases of transformers call the same argument and output, newest first


def cache_argument(model: nn.Module) -> str | None:
    """What the installed transformers calls the cache that this model's forward takes; None if it takes none."""
    for module in model.modules():  # a forward of **kwargs alone hands them to a module below, which names it
        names = inspect.signature(type(module).forward).parameters
        for name in CACHE_NAMES:
            if name in names:
                return name
    return None


def cache_of(output: Any) -> Any:
    """The cache in what a model's forward or `generate` returned."""
    return next(getattr(output, name) for name in CACHE_NAMES if hasattr(output, name))


class HeadCacheLayer(CacheLayerMixin):
    """One layer. `update` hands the new keys through; headwise's attention function then reads and stores them."""

    def __init__(self, store: LayerStore, window: int | None, check: Callable[[], None]) -> None:
        super().__init__()
        self.store = store
        self.is_sliding = window is not None
        self.sliding_window = window
        self.is_initialized = True
        self.pending: tuple[Tensor, Tensor] | None = None
        self._check = check

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The store allocates when tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Notes the new keys and values and returns just them.

        Raises: PlanError if the plan that this cache was made for is no longer applied; UnsupportedModelError if the
        model did not read what it stored last time.
        """
        self._check()
        if self.store.broken:
            raise PlanError("an error interrupted the last call, after heads had evicted tokens; fill a new cache from the start")
        if self.pending is not None:
            self.pending = None
            raise UnsupportedModelError("the model stored keys that its attention did not read; per-head caching cannot serve it")
        self.pending = (key_states, value_states)
        return key_states, value_states

    def take(self, key: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
        """The keys and values of the update just made; None if there was none.

        Raises: UnsupportedModelError if the model changed the keys between cache and attention.
        """
        if self.pending is None:
            return None
        k, v = self.pending
        self.pending = None
        if key.data_ptr() != k.data_ptr() or key.shape != k.shape:
            raise UnsupportedModelError(
                f"{name} changes keys between its cache and its attention; per-head caching cannot serve it"
            )
        return k, v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made over all tokens that ever came; views pick their columns from them."""
        return self.store.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that came, freed ones included."""
        return self.store.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.pending = None
        self.store = LayerStore(self.store.keeps, self.store.rules, self.store.layer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search."""
        self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self.store.select(torch.arange(len(self.store.pads)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self.store.select(indices)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be taken back."""
        return self.store.croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, where nothing older was freed."""
        self.store.crop(abs(tokens_to_remove))  # releases of transformers differ in the sign


class HeadCache(Cache):
    """All layers of a model; made by applying a plan, and used by passing it on as the model's cache or by `generate`."""

    _before: list[int] | None = None  # tokens of each layer when the call began that has not ended yet

    def begin(self) -> None:
        """Notes where a call starts. One that was interrupted before, and so never ended, is taken back first."""
        self.rollback()
        self._before = [layer.store.seen if isinstance(layer, HeadCacheLayer) else 0 for layer in self.layers]

    def end(self) -> None:
        """The call is complete."""
        self._before = None

    def rollback(self) -> None:
        """After an error in a call: every layer is as before it, so that the call can be made again. Nothing after a complete one.

        Where tokens were evicted meanwhile that is not possible; the next call says so.
        """
        before, self._before = self._before, None
        for layer, seen in zip(self.layers, before or (), strict=before is not None):
            if isinstance(layer, HeadCacheLayer):
                layer.pending = None
                layer.store.rollback(seen)

    def reset(self) -> None:
        """Forgets everything."""
        self._before = None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, where nothing older was freed."""
        self.rollback()
        super().crop(tokens_to_remove)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came, freed ones included; those of a call that has not ended do not count yet."""
        if self._before is not None and isinstance(self.layers[layer_idx], HeadCacheLayer):
            return self._before[layer_idx]
        return int(super().get_seq_length(layer_idx))

    def host_bytes(self) -> int:
        """Bytes allocated in the host's memory, for heads that are offloaded."""
        return sum(layer.store.host_bytes() for layer in self.layers if isinstance(layer, HeadCacheLayer))

    def bytes(self) -> int:
        """Bytes really allocated for keys, values and their bookkeeping, but for those in the host's memory."""
        return sum(layer.store.bytes() for layer in self.layers if isinstance(layer, HeadCacheLayer)) + sum(
            cache_bytes_of_layer(layer) for layer in self.layers if not isinstance(layer, HeadCacheLayer)
        )


def cache_bytes_of_layer(layer: Any) -> int:
    """Bytes allocated by a layer of transformers' own caches."""
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def cache_bytes(cache: Cache) -> int:
    """Bytes allocated by a cache, ours or transformers'.

    Raises: PlanError for an object that is no such cache.
    """
    if isinstance(cache, HeadCache):
        return cache.bytes()
    if hasattr(cache, "self_attention_cache"):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    if not isinstance(cache, Cache):
        raise PlanError(f"cannot count the bytes of a {type(cache).__name__}")
    return sum(cache_bytes_of_layer(layer) for layer in cache.layers)
