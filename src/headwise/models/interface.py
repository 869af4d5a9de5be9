"""The two functions that transformers calls for headwise, and the model's own attention that they stand in for."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.read import repeat_heads
from ..errors import PlanError
from .call import Reading

IMPLEMENTATION = "headwise"


class Attends(Protocol):
    """What answers for a module's attention (a Session)."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> Tensor:
        """(b, n, h, dv)."""
        ...


MODULES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attends]] = weakref.WeakKeyDictionary()
BASES: dict[int, str] = {}  # id(config) -> the implementation that runs underneath, while headwise is installed


def register() -> None:
    """Adds the implementation "headwise", with its mask function, to transformers' tables; existing ones stay as they are."""
    if IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(IMPLEMENTATION, headwise_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, headwise_mask)


def headwise_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function under the name "headwise"."""
    found = MODULES.get(module)
    session = found() if found is not None else None
    if session is None:
        raise PlanError(
            f"{type(module).__name__} runs under attn_implementation 'headwise' but nothing is installed on it; "
            "was the model copied while a plan was applied? Remove the plan first, or call set_attn_implementation('sdpa')"
        )
    return session.attend(module, query, key, value, attention_mask, kwargs), None


def headwise_mask(**kwargs: Any) -> Any:
    """transformers' mask function under the name "headwise": the one of the implementation underneath."""
    base = BASES.get(id(kwargs.get("config")), "sdpa")
    return ALL_MASK_ATTENTION_FUNCTIONS[base](**kwargs)


def base_for(named: str | None, model: nn.Module) -> str:
    """What runs underneath: the model's own implementation if it is eager or sdpa, sdpa in place of other fused ones."""
    if named in ("eager", "sdpa"):
        return str(named)
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


def base_of(module: nn.Module) -> str:
    """The implementation underneath this attention module."""
    return BASES.get(id(getattr(module, "config", None)), "sdpa")


def is_causal(module: nn.Module, extras: dict[str, Any]) -> bool:
    """Whether the model relies on its kernel to be causal when it gives no mask."""
    given = extras.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    return causal and base_of(module) == "sdpa"  # eager applies the mask that it is given, and nothing else


def base_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> Tensor:
    """The model's own attention, exactly the call it would have made: (b, n, h, dv)."""
    if base_of(module) == "sdpa":
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    else:
        function = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    out: Tensor = function(module, q, k, v, mask, **{"dropout": 0.0, **extras})[0]
    return out


class _Like:
    """Stands for an attention module that has only some of its heads."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self.num_key_value_groups = groups
        self.is_causal = getattr(module, "is_causal", True)
        self.training = module.training


def base_attention_of(module: nn.Module, reading: Reading, mask: Tensor | None, extras: dict[str, Any]) -> Tensor:
    """The model's own SDPA call on some of its heads: (b, n, heads, dv)."""
    heads = list(reading.heads)
    extras = dict(extras)
    if extras.get("position_bias") is not None and extras["position_bias"].shape[1] > 1:
        extras["position_bias"] = extras["position_bias"][:, heads]
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, heads]
    k, v, groups = reading.k, reading.v, len(heads) // reading.k.shape[1]
    if not hasattr(module, "num_key_value_groups"):  # transformers repeats heads only for modules that have the attribute
        k, v, groups = repeat_heads(k, groups), repeat_heads(v, groups), 1
    out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](_Like(module, groups), reading.q, k, v, mask, **extras)[0]
    return out
