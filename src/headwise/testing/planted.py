"""A model whose heads do what they are told: each probe must find the head that was planted for it.

Attention only, on fixed random codes of tokens and positions: a head's queries and keys are made so that it looks just
where its role says. The induction head's values are read out as logits, so the model really continues repeats and
answers needles, and without that head it does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.cache import CACHE_NAMES

CODE = 256  # size of a token's and of a position's code
IDLE = 2 * CODE  # channels of the residual stream that hold ones, more than half, so that its median magnitude is one
SHARPNESS = 80.0
ROLES = (("previous", "duplicate", "uniform", "local"), ("induction", "sink", "offset", "anchor"))
OFFSET, LOCAL, ANCHOR = 7, 8, 20
NO_CACHE = {name: None for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters}


class PlantedConfig(PreTrainedConfig):
    """roles: for each layer, the role of each head."""

    model_type = "headwise_planted"

    def __init__(self, roles: Sequence[Sequence[str]] = ROLES, massive: float = 0.0, **kwargs: Any) -> None:
        self.roles = [list(layer) for layer in roles]
        self.massive = massive  # added to one channel of the first token after the first layer
        self.vocab_size = 4096
        self.hidden_size = CODE + IDLE
        self.num_hidden_layers = len(self.roles)
        self.num_attention_heads = self.num_key_value_heads = len(self.roles[0])
        self.head_dim = 2 * CODE
        self.max_position_embeddings = 1024
        super().__init__(**kwargs)


def plant(role: str, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (b, n, 2 * CODE) of one head; tokens (b, n, CODE) and places (n, CODE) are codes of norm 1."""
    b, n, _ = tokens.shape
    places = places.expand(b, -1, -1)
    nothing = torch.zeros_like(tokens)
    first = nothing.clone()
    first[:, :, 0] = 1.0
    marked = nothing.clone()
    if role == "previous":
        return torch.cat([nothing, _back(places, 1)], -1), torch.cat([nothing, places], -1)
    if role == "offset":
        return torch.cat([nothing, _back(places, OFFSET)], -1), torch.cat([nothing, places], -1)
    if role == "local":
        near = torch.stack([_back(places, i) for i in range(LOCAL)]).sum(0)
        return torch.cat([nothing, near], -1), torch.cat([nothing, places], -1)
    if role == "duplicate":
        return torch.cat([tokens, -2 * places], -1), torch.cat([tokens, places], -1)
    if role == "induction":
        return torch.cat([tokens, nothing], -1), torch.cat([_back(tokens, 1), nothing], -1)
    if role == "sink":
        marked[:, 0, 0] = 1.0
        return torch.cat([first, nothing], -1), torch.cat([marked, nothing], -1)
    if role == "anchor":
        if n > ANCHOR:
            marked[:, ANCHOR, 0] = 1.0
        return torch.cat([first, nothing], -1), torch.cat([marked, nothing], -1)
    if role == "uniform":
        return torch.cat([nothing, nothing], -1), torch.cat([nothing, nothing], -1)
    raise ValueError(f"no role {role!r}")


def _back(codes: Tensor, by: int) -> Tensor:
    """Row i holds what row i - by held; the first rows hold zeros."""
    moved = torch.zeros_like(codes)
    moved[:, by:] = codes[:, : codes.shape[1] - by]
    return moved


class PlantedAttention(nn.Module):
    """Reads where its heads' roles say."""

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scaling, self.is_causal, self.num_key_value_groups = SHARPNESS, True, 1

    def forward(self, tokens: Tensor, places: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(b, n, h, 2 * CODE): what each head reads of the token codes."""
        planted = [plant(role, tokens, places) for role in self.config.roles[self.layer_idx]]
        query, key = (torch.stack(part, 1) for part in zip(*planted, strict=True))
        value = torch.cat([tokens, torch.zeros_like(tokens)], -1)[:, None].expand(-1, self.num_heads, -1, -1)
        interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _no_eager)
        return interface(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling)[0]


def _no_eager(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the planted model runs on sdpa")


class PlantedBlock(nn.Module):
    """A layer: its attention, written into a residual stream of logits and a few idle channels."""

    def __init__(self, config: PlantedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.attention = PlantedAttention(config, layer_idx)
        self.copies = nn.Parameter(torch.tensor([float(role == "induction") for role in config.roles[layer_idx]]))

    def forward(self, hidden: Tensor, tokens: Tensor, places: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(b, n, CODE + idle channels) -> the same."""
        read = torch.einsum("bnhc,h->bnc", self.attention(tokens, places, attention_mask)[..., :CODE], self.copies)
        hidden = hidden + torch.cat([read, torch.zeros_like(hidden[..., CODE:])], -1)
        if self.layer_idx == 0 and self.config.massive:
            spike = torch.zeros_like(hidden)
            spike[:, 0, CODE + 3] = self.config.massive
            hidden = hidden + spike
        return hidden


class PlantedModel(PreTrainedModel):
    """See the module's first line. Built with its config alone: `PlantedModel(PlantedConfig())`."""

    config_class = PlantedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(5)
        codes = torch.randn(config.vocab_size, CODE, generator=generator)
        self.codes = nn.Parameter(codes / codes.norm(dim=-1, keepdim=True))
        places = torch.randn(config.max_position_embeddings, CODE, generator=generator)
        self.places = nn.Parameter(places / places.norm(dim=-1, keepdim=True))
        self.layers = nn.ModuleList(PlantedBlock(config, i) for i in range(config.num_hidden_layers))

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is random here."""

    def get_output_embeddings(self) -> nn.Module:
        """Says that there are logits."""
        return self.layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Logits (b, n, vocabulary): sharp where the induction head has found something to copy."""
        tokens, places = self.codes[input_ids], self.places[: input_ids.shape[1]]
        mask = create_causal_mask(config=self.config, inputs_embeds=tokens, attention_mask=attention_mask, **NO_CACHE)
        idle = torch.ones(*input_ids.shape, IDLE, dtype=tokens.dtype, device=tokens.device)
        hidden = torch.cat([torch.zeros_like(tokens), idle], -1)
        for layer in self.layers:
            hidden = layer(hidden, tokens, places, mask)
        return CausalLMOutputWithPast(logits=20.0 * hidden[..., :CODE] @ self.codes.T)
