"""Which heads a model has: its attention modules, found by how they call attention, grouped into stacks.

A stack is a run of like attention layers: a decoder's self-attention, an encoder's, the cross-attention between them, a
vision tower's. Its heads are addressed (layer, head), layers counted within the stack.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SelectionError, UnsupportedModelError
from ..types import Address, Heads

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "qk_head_dim")
WIDTHS = ("embed_dim", "hidden_size", "all_head_size", "dim", "d_model", "inner_dim")
# Where a module's path or class says what it is; the first that matches wins.
TOWERS = (("vision", r"vision|visual|image"), ("audio", r"audio|speech"), ("text", r"\btext_model|text_encoder|\btext\b"))
CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One attention module: its place in the model and its heads.

    path: of the module; block: of the layer that holds it (attention and feed-forward). cache_layer: which layer of a
    cache it fills, if any. latent: it caches one latent for all heads (MLA), so that no head's keys can be freed alone.
    """

    stack: str
    layer: int
    path: str
    block: str
    heads: int
    key_value_heads: int
    head_dim: int
    cache_layer: int | None
    latent: bool = False

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.key_value_heads


@dataclass(frozen=True)
class Stack:
    """A run of like attention layers. kind: self or cross; causal: queries read the past only."""

    name: str
    kind: str
    causal: bool
    sites: tuple[Site, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads): the largest number of heads of any layer."""
        return len(self.sites), max(site.heads for site in self.sites)

    def exists(self) -> Heads:
        """All heads that there are."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for site in self.sites:
            mask[site.layer, : site.heads] = True
        return Heads(mask, self.name)

    def heads(self, addresses: Any) -> Heads:
        """A selection of this stack from addresses such as "L5H3,L6H0" or [(5, 3)].

        Raises: SelectionError if one does not exist.
        """
        chosen = Heads.of(addresses, self.shape, self.name)
        missing = chosen - self.exists()
        if missing:
            raise SelectionError(f"{missing.names()[0]} is out of range: that layer of {self.name} has fewer heads")
        return chosen

    def key_value_groups(self, heads: Heads) -> Heads:
        """These heads and all that share a key/value head with one of them."""
        mask = heads.mask.clone()
        for site in self.sites:
            own = mask[site.layer, : site.heads].view(site.key_value_heads, site.groups)
            mask[site.layer, : site.heads] = own.any(-1, keepdim=True).expand(-1, site.groups).reshape(-1)
        return Heads(mask, self.name)

    def geometry(self) -> dict[str, Any]:
        """JSON-able: what a plan for this stack depends on."""
        return {
            "layers": len(self.sites),
            "heads": [site.heads for site in self.sites],
            "key_value_heads": [site.key_value_heads for site in self.sites],
            "head_dim": [site.head_dim for site in self.sites],
        }


@dataclass(frozen=True)
class Layout:
    """All stacks of a model, and the names of attention-like modules that could not be reached."""

    stacks: dict[str, Stack]
    unreached: tuple[str, ...]
    encoder_decoder: bool

    @property
    def main(self) -> Stack:
        """The stack that plans and probes mean unless told otherwise: the causal self-attention, or the first."""
        own = [stack for stack in self.stacks.values() if stack.kind == "self"]
        causal = [stack for stack in own if stack.causal and stack.name in ("decoder", "text")] or [s for s in own if s.causal]
        return (causal or own or list(self.stacks.values()))[0]

    def stack(self, name: str | None) -> Stack:
        """The stack of that name; the main one for None.

        Raises: SelectionError with the names there are.
        """
        if name is None:
            return self.main
        if name not in self.stacks:
            raise SelectionError(f"there is no stack {name!r}; this model has {', '.join(self.stacks)}")
        return self.stacks[name]

    def heads(self, addresses: Address | Any, stack: str | None = None) -> Heads:
        """A selection of heads of a stack; see `Stack.heads`."""
        return self.stack(stack).heads(addresses)


def _calls_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and INTERFACE in code.co_names


def _names_implementation(module: nn.Module) -> bool:
    """Whether the module's code asks for an implementation by name, so that another name would change what it does."""
    consts = inspect.unwrap(type(module).forward).__code__.co_consts
    flat = [c for const in consts for c in (const if isinstance(const, tuple) else (const,))]
    return "sdpa" in flat


def _first_number(owners: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _geometry(path: str, module: nn.Module) -> tuple[int, int, int]:
    config = getattr(module, "config", None)
    heads = _first_number((module, config), HEADS)
    size = _first_number((module,), SIZES)
    width = _first_number((module, config), WIDTHS)
    if heads is None and size and width:
        heads = width // size
    if size is None and heads and width:
        size = width // heads
    if heads is None or size is None:
        raise UnsupportedModelError(f"{path} ({type(module).__name__}): cannot tell its number of heads or their size")
    kv = _first_number((module,), ("num_key_value_heads",))
    groups = _first_number((module,), ("num_key_value_groups",))
    return heads, kv or heads // (groups or 1), size


def _is_cross(path: str, module: nn.Module) -> bool:
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return flag
    return bool(CROSS.search(".".join(path.split(".")[-2:])) or CROSS.search(type(module).__name__))


def _tower(path: str, causal: bool, encoder_decoder: bool, pixels: bool) -> str:
    for name, pattern in TOWERS:
        if re.search(pattern, path):
            return name
    if pixels:
        return "vision"
    if encoder_decoder:
        return "decoder" if "decoder" in path else "encoder"
    return "decoder" if causal else "encoder"


def _blocks(paths: list[str]) -> list[str]:
    """The shortest beginnings of the paths, each ending in a number, that tell the sites apart; the paths where none do."""
    for depth in range(1, 5):
        matches = [re.match(rf"(?:.*?\.\d+(?=\.|$)){{{depth}}}", path) for path in paths]
        starts = [match[0] for match in matches if match]
        if len(set(starts)) == len(paths):
            return starts
    return paths


def _attention_like(model: nn.Module, sites: set[str]) -> Iterator[str]:
    """Classes of modules that look like attention, hold weights of their own, and neither are nor hold a site."""
    for path, module in model.named_modules():
        inside = any(site == path or site.startswith(f"{path}.") for site in sites)
        if "attention" in type(module).__name__.lower() and not inside and next(module.parameters(), None) is not None:
            below_site = any(path.startswith(f"{site}.") for site in sites)
            if not below_site:
                yield type(module).__name__


def find_layout(model: nn.Module) -> Layout:
    """Finds every attention module that goes through transformers' AttentionInterface, and names its stack.

    Raises: UnsupportedModelError, naming the class, if there is none or one cannot be switched.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    found = [(path, module) for path, module in model.named_modules() if _calls_interface(module)]
    unreached = tuple(dict.fromkeys(_attention_like(model, {path for path, _ in found})))
    if not found:
        what = "it has no attention module"
        if unreached:
            what = (
                f"its attention ({', '.join(unreached)}) computes its own weights "
                "and does not go through transformers' AttentionInterface"
            )
        raise UnsupportedModelError(
            f"{name} cannot be used: {what}. Classes that work: Llama, Qwen, Mistral, Gemma, GPT-2, BERT, ViT, T5, ..."
        )
    runs: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in found:
        if _names_implementation(module):
            raise UnsupportedModelError(
                f"{name} cannot be used: {type(module).__name__} asks for the attention implementation by name, "
                "so running it under another name would change its results"
            )
        pattern = re.sub(r"\.\d+\.", ".*.", path)
        runs.setdefault(re.sub(r"\.\d+\.", ".*.", pattern), []).append((path, module))
    stacks: dict[str, Stack] = {}
    pixels = getattr(model, "main_input_name", "") == "pixel_values" and not encoder_decoder
    for run in runs.values():
        path, module = run[0]
        cross = _is_cross(path, module)
        causal = not cross and bool(getattr(module, "is_causal", False))
        tower = _tower(path, causal or (encoder_decoder and "decoder" in path), encoder_decoder, pixels)
        base = ("cross" if tower in ("decoder", "encoder") else f"{tower}_cross") if cross else tower
        label, count = base, 1
        while label in stacks:
            count += 1
            label = f"{base}{count}"
        sites, blocks = [], _blocks([site_path for site_path, _ in run])
        for layer, (site_path, site) in enumerate(run):
            cache_layer = getattr(site, "layer_idx", None)
            sites.append(
                Site(
                    label, layer, site_path, blocks[layer], *_geometry(site_path, site), cache_layer, hasattr(site, "kv_lora_rank")
                )
            )
        stacks[label] = Stack(label, "cross" if cross else "self", causal, tuple(sites))
    return Layout(stacks, unreached, encoder_decoder)
