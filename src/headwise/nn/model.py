"""What every model of this room is: token numbers to logits, with caches, generation, and folders to save in."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ..errors import InputError, ModelLoadError
from ..mechanisms import Cache, KeyValues
from ..progress import bar

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "headwise.nn 1"


class Caches:
    """What a model keeps of the tokens it has read: one cache for each layer, and how many tokens those were.

    layers: None for those that keep nothing, because they read both sides.
    """

    def __init__(self, layers: Sequence[Cache | None]) -> None:
        self.layers = list(layers)
        self.counted: Tensor | None = None  # (b, 1) tokens without padding; None while there was none
        self.total = 0

    def __len__(self) -> int:
        return self.total

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers together."""
        return sum(cache.nbytes for cache in self.layers if cache is not None)

    def advance(self, ids: Tensor, attention_mask: Tensor | None) -> Int[Tensor, "b n"] | None:
        """Counts new tokens and returns their places, 0 at padding; None while nothing was padding."""
        before, self.total = self.total, self.total + ids.shape[1]
        if attention_mask is None and self.counted is None:
            return None
        there = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        start = torch.full_like(ids[:, :1], before) if self.counted is None else self.counted
        places = start + there.cumsum(1) - 1
        self.counted = places[:, -1:] + 1
        return places.clamp(min=0)

    def release(self) -> None:
        """Lets go of what layers showed to those that follow them, at the end of a pass."""
        for cache in self.layers:
            if isinstance(cache, KeyValues):
                cache.seen = None


class LanguageModel(nn.Module, ABC):
    """Token numbers (b, n) -> logits (b, n, vocabulary).

    config: what it was built from, as JSON: its architecture's name and arguments. Set by what builds it.
    """

    vocabulary: int
    context: int
    config: dict[str, Any]

    @abstractmethod
    def forward(
        self, ids: Int[Tensor, "b n"], *, caches: Caches | None = None, attention_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n vocabulary"]:
        """Logits of the token after each. caches: from `new_caches`, extended. attention_mask: 0 at padding."""

    @abstractmethod
    def new_caches(self) -> Caches:
        """Empty caches for decoding."""

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained; shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        tokens: int,
        *,
        attention_mask: Bool[Tensor, "b n"] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        end: int | None = None,
        caches: Caches | None = None,
        show_progress: bool = False,
    ) -> Int[Tensor, "b tokens"]:
        """Continues texts, with a cache.

        Args:
            attention_mask: 0 at padding, which must be on the left. temperature: 0 for the likeliest token, else what logits are
                divided by before one is drawn. end: the token that ends a text; what follows it is `end` again. caches: to
                go on from.

        Raises: InputError for an empty prompt, or one whose padding is not on the left.
        """
        if ids.dim() != 2 or not ids.shape[1]:
            raise InputError(f"prompts are {tuple(ids.shape)}; they must be (batch, tokens) with a token at least")
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise InputError("padding must be on the left of prompts that are continued; attention_mask ends with 0")
        caches = self.new_caches() if caches is None else caches
        generator = torch.Generator(ids.device).manual_seed(seed)
        done, made, piece, mask = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device), [], ids, attention_mask
        with bar(tokens, "tokens", show_progress) as advance:
            for _ in range(tokens):
                logits = self(piece, caches=caches, attention_mask=mask)[:, -1].float()
                if temperature > 0:
                    chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                else:
                    chosen = logits.argmax(-1, keepdim=True)
                if end is not None:
                    chosen = chosen.masked_fill(done, end)
                    done = chosen == end
                made.append(chosen)
                advance(1)
                if bool(done.all()):
                    break
                piece, mask = chosen, None
        out = torch.cat(made, 1)
        return out if end is None else torch.nn.functional.pad(out, (0, tokens - out.shape[1]), value=end)

    def save_weights(self, folder: str | Path) -> None:
        """Writes all parameters and buffers into model.safetensors of a folder, which is made if it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(folder) / WEIGHTS))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, for `headwise.nn.from_pretrained`."""
        self.save_weights(folder)
        told = {"format": FORMAT, "dtype": str(next(self.parameters()).dtype).removeprefix("torch."), **self.config}
        (Path(folder) / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def load_weights(self, folder: str | Path) -> None:
        """Reads what `save_weights` has written, into a model built alike.

        Raises: ModelLoadError if there is no such file, or it is of another model.
        """
        file = Path(folder) / WEIGHTS
        if not file.is_file():
            raise ModelLoadError(f"{file} is not there; give a folder that save_weights or save_pretrained has written")
        try:
            load_model(self, str(file))
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelLoadError(f"{file} does not fit this model: {error}") from error
