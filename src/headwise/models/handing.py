"""Handing what one model has read to another: keys and values of a context, put into the other's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..errors import GeometryError, InputError, UnsupportedModelError
from .cache import HeadCacheLayer, cache_argument, cache_of
from .call import Call
from .session import session_of
from .subject import Subject, as_subject


@dataclass(frozen=True, eq=False)
class Context:
    """What a model holds after reading a context: ids (b, n), and keys and values (b, kv, n, d) of every layer."""

    ids: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def nbytes(self, layers: int | None = None) -> int:
        """Bytes of so many layers, by default of all."""
        each = sum(t.nbytes for t in (*self.keys, *self.values)) // len(self.keys)
        return each * (len(self.keys) if layers is None else layers)


@torch.no_grad()
def send(model: Any, ids: Tensor) -> Context:
    """Reads a context (b, n) of token ids, the same number in every row, and returns what the model holds of it.

    Raises: UnsupportedModelError for a model whose layers do not all hold the whole context.
    """
    subject = as_subject(model)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in subject.forward_names else {}
    cache = cache_of(subject.model(input_ids=ids.to(subject.device), use_cache=True, **keep))
    layers = getattr(cache, "layers", [])
    tensors: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    whole = [k for k, v in tensors if k is not None and v is not None and k.dim() == 4 and k.shape[2] == ids.shape[1]]
    if not layers or len(whole) < len(layers):
        raise UnsupportedModelError(
            f"{len(whole)} of {len(layers)} layers of {subject.name} hold keys of all {ids.shape[1]} tokens; a context can only be "
            "handed on by models all of whose layers do, and under no plan"
        )
    return Context(ids, tuple(k for k, _ in tensors), tuple(v for _, v in tensors))


def receive(model: Any, context: Context) -> dict[str, Cache]:
    """A cache that holds a context, as the keyword argument that the model takes it by.

    Under a plan it holds what the plan keeps of it. Go on with the tokens that follow: `model(input_ids=question, **received)`, or
    `model.generate(torch.cat([context.ids, question], 1), **received)`.

    Raises: GeometryError if the model's layers, heads or sizes are others; UnsupportedModelError if it takes no cache.
    """
    subject = as_subject(model)
    name = cache_argument(subject.model)
    if name is None:
        raise UnsupportedModelError(f"{type(subject.model).__name__} takes no cache, so no context can be handed to it")
    sites = {site.cache_layer: site for site in subject.main.sites}
    mine = [(site.key_value_heads, site.head_dim) for site in subject.main.sites]
    theirs = [(k.shape[1], k.shape[3]) for k in context.keys]
    if mine != theirs:
        raise GeometryError(
            f"the context is of {len(theirs)} layers of {theirs[0][0]} key/value heads of size {theirs[0][1]}, {subject.name} has "
            f"{len(mine)} of {mine[0][0]} of size {mine[0][1]}; contexts are handed between models of one shape"
        )
    cache: Cache = session_of(subject.model).new_cache() or DynamicCache(config=subject.model.config)
    for index, layer in enumerate(cache.layers):
        k, v = (t[index].to(subject.device, subject.model.dtype) for t in (context.keys, context.values))
        if isinstance(layer, HeadCacheLayer):
            nobody = k.new_zeros(1).expand(k.shape[0], sites[index].heads, *k.shape[2:])  # rules that ask queries see none
            layer.store.extend(k, v)
            layer.store.settle(nobody, 1.0, ())
        else:
            cache.update(k, v, index)
    return {name: cache}


@torch.no_grad()
def context_weight(model: Any, context: Context, question: Tensor) -> Tensor:
    """(layers,): the weight that a question's tokens (b, n) give to a context, without its first token, as a mean over heads,
    rows and tokens, if every layer has the context.

    Raises: InputError for an empty question.
    """
    subject: Subject = as_subject(model)
    if not question.shape[1]:
        raise InputError("the question has no tokens, so nothing can be said of what it looks at")
    found: dict[int, float] = {}
    size = context.ids.shape[1]

    def tap(call: Call, out: Tensor) -> None:
        if call.site.stack == subject.main.name:
            found[call.site.layer] = float(call.weights()[..., 1:size].sum(-1).double().mean())

    with subject.tap(tap):
        subject.model(input_ids=question.to(subject.device), **receive(subject, context))
    return torch.tensor([found[layer] for layer in sorted(found)], dtype=torch.float64)
