"""Checkpoints of transformers as stacks of ours, whose mixers can then be changed."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError
from ..mechanisms import Attention
from .transformer import Transformer

SHAPES = ("llama", "mistral", "qwen2")


def from_transformers(model: Any) -> Transformer:
    """A Llama-shaped causal model of transformers (llama, mistral, qwen2) with its weights copied: the same logits.

    Raises: UnsupportedModelError for any other shape, and what it has that a stack has not.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in SHAPES or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(f"{type(model).__name__} is no causal model of {', '.join(SHAPES)}; load one with its head")
    assert config is not None
    rope = getattr(config, "rope_parameters", None) or {}
    body = model.model
    first = body.layers[0].self_attn
    odd = {
        "rotary embedding": rope.get("rope_type", "default") not in ("default", None),
        "activation": config.hidden_act != "silu",
        "bias in its feed-forward layers": body.layers[0].mlp.gate_proj.bias is not None,
        "bias after attention": first.o_proj.bias is not None and not bool((first.o_proj.bias == 0).all()),
    }
    if any(odd.values()):
        raise UnsupportedModelError(f"{type(model).__name__} has another {', '.join(name for name, is_so in odd.items() if is_so)}")
    heads, layers, size = config.num_attention_heads, config.num_hidden_layers, first.head_dim
    windows = [_window(config, layer) for layer in range(layers)]
    options = {"kv_heads": config.num_key_value_heads, "head_dim": size, "bias": first.q_proj.bias is not None}
    stack = Transformer(
        config.vocab_size,
        config.hidden_size,
        layers,
        heads,
        mixer=("softmax", options),
        context=config.max_position_embeddings,
        hidden=config.intermediate_size,
        base=float(rope.get("rope_theta", 10000.0)),
        windows=windows,
        tied=bool(config.tie_word_embeddings),
        epsilon=config.rms_norm_eps,
    ).to(dtype=model.dtype, device=model.device)
    with torch.no_grad():
        stack.embedding.weight.copy_(body.embed_tokens.weight)
        stack.norm.weight.copy_(body.norm.weight)
        if stack.head is not None:
            stack.head.weight.copy_(model.lm_head.weight)
        for (_, block), theirs in zip(stack.layers(), body.layers, strict=True):
            _copy(block, theirs)
    return stack.eval()


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    sliding = kinds[layer] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    size = getattr(config, "sliding_window", None)
    return int(size) if size and sliding else None


def _copy(block: Any, theirs: Any) -> None:
    assert isinstance(block.mixer, Attention)
    mine, attention, mlp = block.mixer.projections, theirs.self_attn, theirs.mlp
    pairs = {
        block.norm: theirs.input_layernorm,
        block.feed_norm: theirs.post_attention_layernorm,
        mine.q: attention.q_proj,
        mine.k: attention.k_proj,
        mine.v: attention.v_proj,
        mine.out: attention.o_proj,
        block.feed_forward.gate: mlp.gate_proj,
        block.feed_forward.up: mlp.up_proj,
        block.feed_forward.down: mlp.down_proj,
    }
    for own, other in pairs.items():
        own.weight.copy_(other.weight)
        bias = getattr(own, "bias", None)
        if bias is not None:
            given = getattr(other, "bias", None)
            bias.copy_(torch.zeros_like(bias) if given is None else given)
