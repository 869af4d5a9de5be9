"""Runs attention classes of transformers: a tiny config, rotary embeddings, masks and caches as their models give them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistryError
from .adapters import ADVICE, HEADS, SIZE, WIDTH, Runner, parameters_of

TINY: dict[str, Any] = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "head_dim": SIZE, "num_hidden_layers": 2, "intermediate_size": 64,
    "vocab_size": 99, "max_position_embeddings": 256, "sliding_window": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": SIZE, "qk_nope_head_dim": SIZE, "v_head_dim": SIZE,
    "num_local_experts": 2, "query_pre_attn_scalar": SIZE,
}  # fmt: skip
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
MASKS = ("attention_mask", "mask")
KNOWN = (
    "hidden_states",
    "position_embeddings",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    *CACHES,
    *MASKS,
)


def config_class(kind: Any) -> Any | None:
    """The config class of an attention class, by the annotation of `config` or by the name beside it."""
    if "config" not in parameters_of(kind.__init__):
        return None
    try:
        from transformers import PreTrainedConfig
    except ImportError:
        return None
    space = vars(sys.modules[kind.__module__])
    for base in kind.__mro__:
        told = vars(base).get("__init__")
        annotated = getattr(told, "__annotations__", {}).get("config")
        parts = getattr(annotated, "__args__", None) or (annotated,)  # a union: any of its parts
        for part in parts:
            found = space.get(part) if isinstance(part, str) else part
            if inspect.isclass(found) and issubclass(found, PreTrainedConfig):
                return found
    configs = [v for n, v in space.items() if inspect.isclass(v) and issubclass(v, PreTrainedConfig) and n.endswith("Config")]
    named = [c for c in configs if kind.__name__.startswith(c.__name__.removesuffix("Config"))]
    return max(named, key=lambda c: len(c.__name__), default=None)


def tiny_config(kind: Any, kv_heads: int) -> Any:
    """A small config: of the usual names, those that this family has."""
    has = kind()
    options = {name: value for name, value in TINY.items() if getattr(has, name, None) is not None or name == "head_dim"}
    if "head_dim" not in inspect.signature(kind.__init__).parameters:
        options.pop("head_dim", None)
    if hasattr(has, "num_key_value_heads"):
        options["num_key_value_heads"] = kv_heads
    config = kind(**options)
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    eager = getattr(module, "eager_attention_forward", None)
    softcap = eager is not None and "softcap" in parameters_of(eager) and getattr(config, "attn_logit_softcapping", None)
    sinks = eager is not None and "sinks" in inspect.getsource(eager)
    config._attn_implementation = "eager" if softcap or sinks else "sdpa"
    return config


def build(kind: Any, config: Any) -> nn.Module:
    """An instance for the first layer, with weights of a usual size."""
    names = parameters_of(kind.__init__)
    module: nn.Module = kind(config, **({"layer_idx": 0} if "layer_idx" in names else {}))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:  # biases and norms are not always initialised by their modules
                centre = parameter.clone() if bool(parameter.isfinite().all()) and float(parameter.abs().max()) < 10 else 0.0
                parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module


class TransformersRunner(Runner):
    """See the module's first line. The mask is bool for sdpa and added for eager, with the window of the layer's type."""

    def __init__(self, module: nn.Module, about: str = "") -> None:
        config: Any = module.config
        super().__init__(module, int(config.hidden_size), about)
        self.config = config
        self.names = parameters_of(module.forward)
        self.layer = int(getattr(module, "layer_idx", None) or 0)
        self.cache = next((n for n in CACHES if n in self.names), None)
        self.mask = next((n for n in MASKS if n in self.names), None)
        self.eager = self.config._attn_implementation == "eager"
        self.rotary = self._rotary() if "position_embeddings" in self.names else None
        self.window = self._window()
        if self.mask is None:
            self.cannot["padding"] = f"forward({', '.join(self.names)}) takes no attention_mask"
        if self.cache is None:
            self.cannot["decode"] = f"forward({', '.join(self.names)}) takes no cache"
        self._check_callable()

    def _rotary(self) -> nn.Module | None:
        space = vars(sys.modules[type(self.module).__module__])
        found: list[Any] = [v for n, v in space.items() if n.endswith("RotaryEmbedding") and inspect.isclass(v)]
        own = [v for v in found if v.__module__ == type(self.module).__module__] or found
        for kind in own:
            if "config" in inspect.signature(kind.__init__).parameters:
                made: nn.Module = kind(config=self.config)
                return made
        return None

    def _window(self) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds:
            return window if "sliding" in kinds[self.layer] else None
        return window

    def _check_callable(self) -> None:
        empty = inspect.Parameter.empty
        unknown = [n for n, p in self.names.items() if p.default is empty and p.kind in (1, 3) and n not in KNOWN]
        signature = f"{type(self.module).__name__}.forward({', '.join(self.names)})"
        if unknown:
            raise RegistryError(f"cannot call {signature}: nothing says what {', '.join(unknown)} is; {ADVICE}")
        if self.rotary is None and "position_embeddings" in self.names and self.names["position_embeddings"].default is empty:
            raise RegistryError(f"cannot call {signature}: its module has no class ...RotaryEmbedding(config); {ADVICE}")
        try:
            with torch.no_grad():
                self.run(torch.zeros(1, 3, self.width, dtype=torch.float64))
        except Exception as error:
            told = str(error).splitlines()[0] if str(error) else ""
            raise RegistryError(
                f"cannot call {signature} with x (1, 3, {self.width}): {type(error).__name__}: {told}; {ADVICE}"
            ) from error

    def _call(self, x: Tensor, causal: bool, real: Tensor | None, before: int = 0, cache: Any = None) -> Tensor:
        b, n = x.shape[:2]
        there = torch.ones(b, before + n, dtype=torch.bool, device=x.device) if real is None else real
        places = (there.cumsum(1) - 1).clamp(min=0)[:, before:]
        options: dict[str, Any] = {}
        length, offset = (n, 0) if cache is None else cache.get_mask_sizes(n, self.layer)
        if self.mask is not None:
            options[self.mask] = self._visible(there, n, before, length, offset, causal, x.dtype)
        if self.rotary is not None:
            kinds = getattr(self.config, "layer_types", None)
            more = {"layer_type": kinds[self.layer]} if "layer_type" in parameters_of(self.rotary.forward) and kinds else {}
            options["position_embeddings"] = self.rotary(x, position_ids=places, **more)
        if "position_ids" in self.names:
            options["position_ids"] = places
        if "cache_position" in self.names:
            options["cache_position"] = torch.arange(before, before + n, device=x.device)
        if self.cache is not None and cache is not None:
            options[self.cache] = cache
        found = self.module(x, **options)
        return found[0] if isinstance(found, tuple) else found

    def _visible(
        self, there: Tensor, n: int, before: int, length: int, offset: int, causal: bool, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        queries = torch.arange(before, before + n)[:, None]
        keys = torch.arange(offset, offset + length)[None]
        seen = (keys <= queries) if causal else torch.ones(n, length, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        visible = (seen & there[:, None, offset : offset + length])[:, None]
        if not self.eager:
            return visible
        low = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # their softmax runs in float32
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)

    def run(self, x: Tensor, *, causal: bool = True, real: Tensor | None = None) -> Tensor:
        """See `Runner.run`."""
        return self._call(x, causal, real)

    def decode(self, x: Tensor, sizes: Sequence[int], *, real: Tensor | None = None) -> Tensor:
        """See `Runner.decode`."""
        from transformers import DynamicCache

        cache, outs, start = DynamicCache(config=self.config), [], 0
        for size in sizes:
            stop = start + size
            covered = None if real is None else real[:, :stop]
            outs.append(self._call(x[:, start:stop].contiguous(), True, covered, start, cache))
            start = stop
        return torch.cat(outs, 1)
