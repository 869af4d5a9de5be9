"""Ready instances of what is to be checked: from `examples(heads, size)`, by well-known names of arguments, or as given."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..errors import HeadwiseError, RegistryError
from ..mechanisms import Mechanism, Mixer
from ._check import Item
from .adapters import ADVICE, HEADS, SIZE, WIDTH, Runner, parameters_of, reads_tensors, runner_for

HEAD_NAMES = ("num_heads", "n_heads", "heads", "n_head", "nhead", "num_attention_heads", "nheads")
KV_NAMES = ("num_kv_heads", "kv_heads", "num_key_value_heads", "n_kv_heads", "n_kv_head", "nkv_heads")
WIDTH_NAMES = (
    "embed_dim", "d_model", "dim", "width", "hidden_size", "n_embd", "model_dim", "embed_size", "d_embed", "channels",
    "input_dim",
)  # fmt: skip
VALUES: dict[str, Any] = {
    **dict.fromkeys(WIDTH_NAMES, WIDTH),
    **dict.fromkeys(HEAD_NAMES, HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "head_size", "d_head"), SIZE),
    **dict.fromkeys(
        ("dropout", "attn_dropout", "dropout_p", "attention_dropout", "resid_dropout", "attn_pdrop", "resid_pdrop"), 0.0
    ),
    **dict.fromkeys(("causal", "is_causal", "batch_first"), True),
    **dict.fromkeys(("block_size", "max_len", "max_seq_len", "context_length", "max_position_embeddings", "n_positions"), 128),
}
OPTIONAL = {
    *HEAD_NAMES,
    *KV_NAMES,
    *WIDTH_NAMES,
    "head_dim",
    "dim_head",
    "head_size",
    "d_head",
    "causal",
    "is_causal",
    "batch_first",
}


def instances(item: Item, seed: int = 0) -> list[Runner]:
    """Runners of all that is to be checked, built anew with the seed, in float64.

    Raises: RegistryError if nothing can be built or called: what was tried, and what to provide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = _values(item)
        adapter = getattr(item.module, "adapter", None)
        if adapter is not None:
            made = [adapter(v.double().eval() if isinstance(v, nn.Module) else v) for _, v in values]
            if not all(isinstance(runner, Runner) for runner in made):
                raise RegistryError(f"adapter(module) of {item.module.__name__} must return a headwise.testing.adapters.Runner")
            return made
        return [runner_for(value, told or _name(item, value, i, len(values))) for i, (told, value) in enumerate(values)]


def built_anew(item: Item) -> bool:
    """Whether `instances` makes new ones, rather than taking the one that was given."""
    return not isinstance(item.value, nn.Module)


def _name(item: Item, value: Any, i: int, count: int) -> str:
    name = type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", item.name)
    if count == 1:
        return name
    told = next((f"{n}={getattr(value, n)}" for n in KV_NAMES if isinstance(getattr(value, n, None), int)), f"example {i + 1}")
    return f"{name}({(value.extra_repr() if isinstance(value, nn.Module) else '') or told})"


def _told(kind: type, setting: dict[str, Any]) -> str:
    return f"{kind.__name__}({', '.join(f'{n}={v}' for n, v in setting.items())})" if setting else kind.__name__


def _values(item: Item) -> list[tuple[str, Any]]:
    """What is to be checked, with a name where one is known."""
    make = getattr(item.module, "examples", None)
    if make is not None and not isinstance(item.value, nn.Module):
        try:
            made = list(make(HEADS, SIZE))
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise RegistryError(f"examples({HEADS}, {SIZE}) of {item.module.__name__} raised {told}") from error
        fitting = [v for v in made if (isinstance(v, item.value) if inspect.isclass(item.value) else True)]
        if item.kind == "mechanism" and not made:
            raise RegistryError(f"examples(heads, size) of {item.module.__name__} returns none")
        if fitting or item.kind == "mechanism":
            return [("", value) for value in fitting or made]
    if not inspect.isclass(item.value):
        return [("", item.value)]
    return construct(item.value)  # type: ignore[arg-type]


def construct(kind: type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Named instances of a class, one with as many key/value heads as heads and one with fewer if it takes that."""
    from ._transformers import config_class

    named = f"{kind.__module__}.{kind.__name__}"
    found = config_class(kind)
    if found is not None:
        return _from_config(kind, found, named)
    if inspect.isabstract(kind):
        raise RegistryError(f"cannot build {named}: it is abstract; {ADVICE}")
    if issubclass(kind, Mechanism) and not issubclass(kind, Mixer) and not _needed(kind):
        return [("", kind())]
    signature = parameters_of(kind.__init__)
    unknown = [n for n in _needed(kind) if n not in VALUES and n not in KV_NAMES and n not in ("config", "cfg", "args")]
    if unknown:
        raise RegistryError(
            f"cannot build {named}({', '.join(signature)}): {', '.join(unknown)} {'is no' if len(unknown) == 1 else 'are no'} "
            f"well-known name, as embed_dim, num_heads, head_dim, num_kv_heads, dropout and is_causal are; {ADVICE}"
        )
    options = {n: VALUES[n] for n, p in signature.items() if n in VALUES and (n in OPTIONAL or p.default is p.empty or "drop" in n)}
    shared = next((n for n in KV_NAMES if n in signature), None)
    settings = [{}] if shared is None else [{shared: HEADS}, {shared: HEADS // 2}]
    for n in ("config", "cfg", "args"):
        if n in _needed(kind):
            options[n] = SimpleNamespace(**VALUES, **dict.fromkeys(KV_NAMES, HEADS), bias=True, layer_idx=0, vocab_size=99)
    try:
        return [(_told(kind, setting), kind(**options, **setting)) for setting in settings]
    except HeadwiseError:
        raise
    except Exception as error:
        given = ", ".join(f"{n}={v}" for n, v in {**options, **settings[0]}.items() if not isinstance(v, SimpleNamespace))
        raise RegistryError(f"cannot build {named}({given}): {type(error).__name__}: {error}; {ADVICE}") from error


def _needed(kind: type[nn.Module]) -> list[str]:
    parameters = parameters_of(kind.__init__)
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind in (1, 3)]


def _from_config(kind: type[nn.Module], config: Any, named: str) -> list[tuple[str, nn.Module]]:
    from ._transformers import build, tiny_config

    try:
        grouped = hasattr(config(), "num_key_value_heads") and not hasattr(config(), "kv_lora_rank")  # which has one latent
        counts = (HEADS, HEADS // 2) if grouped else ()
        made = [(_told(kind, {"num_key_value_heads": n}), build(kind, tiny_config(config, n))) for n in counts]
        return made or [(kind.__name__, build(kind, tiny_config(config, HEADS)))]
    except Exception as error:
        raise RegistryError(
            f"cannot build {named} from a tiny {config.__name__}: {type(error).__name__}: {error}; {ADVICE}"
        ) from error


def is_attention(value: Any) -> bool:
    """Whether it is something for these checks: a module, a class of modules, or a function of q, k and v."""
    if inspect.isclass(value):
        return issubclass(value, nn.Module)
    return isinstance(value, nn.Module) or (callable(value) and reads_tensors(value))
