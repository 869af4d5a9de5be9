"""A model under study: the transformers model with its tokenizer, opened from a path, a hub id, or an object in hand."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .. import zoo
from ..errors import DeviceError, InputError, ModelLoadError, UnsupportedModelError
from ..types import Heads
from .layout import Layout, Stack
from .session import Session, Tap, session_of

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_LANGUAGE_MODEL = "the model is no decoder that predicts each next token of one row"
CHUNK_LOGITS = 2**28  # elements of logits held at once when losses are computed
CHUNK_LOGITS_CPU = 2**22  # on a CPU: larger blocks are mapped, and their pages cleared, anew each time, a third of the run


@dataclass(eq=False)
class Subject:
    """What probes, tasks and plans work on. `model` is a transformers model, unmodified."""

    model: Any
    tokenizer: Any | None = None
    name: str = ""
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = session_of(self.model)
        self.name = self.name or getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__

    def __repr__(self) -> str:
        stacks = ", ".join(f"{s.name} {s.shape[0]} x {s.shape[1]}" for s in self.layout.stacks.values())
        return f"Subject({self.name}: {type(self.model).__name__}, {stacks})"

    # ---- heads ------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Its stacks of attention layers."""
        return self.session.layout

    @property
    def main(self) -> Stack:
        """The stack that is meant unless another is named."""
        return self.layout.main

    def heads(self, addresses: Any, stack: str | None = None) -> Heads:
        """A selection of its heads, from "L5H3,L6H0", [(5, 3)] or {5: [3]}."""
        return self.layout.heads(addresses, stack)

    @contextmanager
    def tap(self, tap: Tap) -> Iterator[None]:
        """Lets `tap` see, and if it returns something change, every attention call within the block."""
        remove = self.session.install(tap=tap)
        try:
            yield
        finally:
            remove()

    def run(self, inputs: Mapping[str, Any]) -> None:
        """One forward pass, for what taps see in it: no cache, and logits of no more tokens than the model must give."""
        extras: dict[str, Any] = {"use_cache": False} if "use_cache" in self.forward_names else {}
        if "logits_to_keep" in self.forward_names:
            extras["logits_to_keep"] = 1
        self.model(**{**extras, **inputs})

    # ---- tokens -----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def forward_names(self) -> frozenset[str]:
        """The arguments that the model's forward names."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @property
    def text_config(self) -> Any:
        """The config of the part that reads tokens."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def is_language_model(self) -> bool:
        """Whether it predicts the next token from the ones before: the main stack is causal and there are output logits."""
        own = getattr(self.model, "get_output_embeddings", lambda: None)()
        return self.main.causal and self.main.name == "decoder" and not self.layout.encoder_decoder and own is not None

    @property
    def max_length(self) -> int:
        """Tokens of context; a large number where the config names none."""
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            value = getattr(self.text_config, name, None)
            if isinstance(value, int) and value > 0:
                return value - self._reserved_positions()
        return 1 << 30

    def _reserved_positions(self) -> int:
        """Positions that no token can have: RoBERTa counts from behind its padding index."""
        for path, module in self.model.named_modules():
            if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return module.padding_idx + 1
        return 0

    @property
    def begin(self) -> tuple[int, ...]:
        """The tokens that a text starts with: what the tokenizer puts first, or the config's begin-of-sequence token."""
        if self.tokenizer is not None:
            with_special, without = self.tokenizer("a")["input_ids"], self.tokenizer("a", add_special_tokens=False)["input_ids"]
            return tuple(with_special[: len(with_special) - len(without)]) if with_special[-1:] == without[-1:] else ()
        bos = getattr(self.text_config, "bos_token_id", None)
        return (bos,) if isinstance(bos, int) and 0 <= bos < self.vocabulary_size else ()

    @property
    def vocabulary_size(self) -> int:
        """Rows of the token embedding."""
        return int(self.text_config.vocab_size)

    @property
    def vocabulary(self) -> np.ndarray:
        """Ids of ordinary tokens: neither special nor reserved."""
        ids = np.arange(self.vocabulary_size)
        special: set[int] = set()
        config = self.model.config
        for owner in (self.text_config, config):
            special |= {v for k, v in vars(owner).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        if self.tokenizer is not None:
            special |= set(self.tokenizer.all_special_ids)
            ids = ids[: len(self.tokenizer)]
        return ids[~np.isin(ids, list(special))]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises: InputError without a tokenizer, or for a text with nothing in it.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer here; give one, or token ids")
        if not text.strip():
            raise InputError("the text is empty; give some words")
        return self.encode_raw(text)

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of any text, special or blank, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if self.tokenizer else []

    def check_length(self, length: int) -> int:
        """Returns the length if the model has room for it.

        Raises: InputError with both numbers otherwise.
        """
        if length > self.max_length:
            raise InputError(
                f"{length} tokens do not fit the context of {self.name}, {self.max_length} tokens; shorten the text or --length"
            )
        return length

    def token_losses(self, input_ids: Tensor) -> Tensor:
        """(b, n) ids -> (b, n - 1) negative log-likelihoods in nats, in at least float32.

        Raises: UnsupportedModelError if the model predicts no next token.
        """
        if not self.is_language_model:
            raise UnsupportedModelError(f"{type(self.model).__name__} predicts no next token, so it has no language-model loss")
        losses = []
        for rows in input_ids.split(self.rows_at_once(input_ids.shape[1])):
            logits = self.model(input_ids=rows, use_cache=False).logits
            wide = torch.promote_types(logits.dtype, torch.float32)
            # row by row: one row's logits are contiguous, so that nothing of the size of all of them is copied
            losses += [F.cross_entropy(own[:-1].to(wide), ids[1:], reduction="none") for own, ids in zip(logits, rows, strict=True)]
        return torch.stack(losses)

    def rows_at_once(self, length: int) -> int:
        """How many rows of that length `token_losses` runs in one forward pass."""
        logits = CHUNK_LOGITS_CPU if self.device.type == "cpu" else CHUNK_LOGITS
        return max(1, logits // (length * self.vocabulary_size))


def as_subject(model: Any, tokenizer: Any | None = None) -> Subject:
    """A Subject of a Subject, a transformers model, a path, a hub id, or None (the embedded model)."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, nn.Module):
        if not isinstance(model, transformers.PreTrainedModel):
            raise UnsupportedModelError(f"{type(model).__name__} is no transformers model; headwise opens PreTrainedModel classes")
        return Subject(model, tokenizer)
    return open_model(model, tokenizer=tokenizer)


def check_device(device: str | torch.device | None) -> torch.device:
    """The device, if it is there.

    Raises: DeviceError if it is not, with what to use instead.
    """
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is no device; use cpu, cuda or cuda:0") from error
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"--device {device}: no such NVIDIA GPU here ({torch.cuda.device_count()} found); use --device cpu")
    return chosen


def open_model(
    source: str | Path | None = None,
    *,
    tokenizer: Any | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Opens a model: a zoo name ("tiny", "tiny-gqa"; None is "tiny"), a folder, or a hub id.

    Args:
        dtype: default: float32 on the CPU, the checkpoint's own on a GPU.
        trust_remote_code: run code that the checkpoint brings along; never unless asked.

    Raises: ModelLoadError, DeviceError, UnsupportedModelError: each says what to do.
    """
    place = check_device(device)
    path = zoo.path(source) if source is None or str(source) in zoo.names() else Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelLoadError(f"{path} is no model folder: it holds no config.json. Give a folder written by save_pretrained")
    if path.is_file():
        raise ModelLoadError(f"{path} is a file; give the folder of a model, a hub id, or one of {', '.join(zoo.names())}")
    if not path.exists() and str(source).startswith((".", "/", "~")):
        raise ModelLoadError(f"{source} does not exist; give a model folder, a hub id, or one of {', '.join(zoo.names())}")
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and chosen is None:
        raise InputError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if chosen is None and place.type == "cpu":
        chosen = torch.float32
    where = str(path) if path.exists() else str(source)
    with _quiet_loading():
        try:
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
            names = [name for name in config.architectures or [] if hasattr(transformers, name)]
            kind = getattr(transformers, names[0]) if names else transformers.AutoModel
            extra = {"trust_remote_code": True} if trust_remote_code and not names else {}
            model = kind.from_pretrained(where, dtype=chosen or "auto", use_safetensors=True, **extra)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelLoadError(
                f"cannot open {source!r}: {reason} "
                f"(give a model folder, a hub id reachable from here, or one of {', '.join(zoo.names())})"
            ) from error
        found = tokenizer if tokenizer is not None else _tokenizer(where, trust_remote_code)
    name = str(source) if source is not None else zoo.DEFAULT
    return Subject(model.to(place).eval(), found, name)


def _tokenizer(where: str, trust_remote_code: bool) -> Any | None:
    try:
        return transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception:  # a vision model has none, and transformers raises many kinds of error to say so
        return None


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers draws a bar for each file it reads; a model of a few megabytes needs none."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pad_rows(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-aligned rows: (b, n) ids with `pad` on the left, and the (b, n) attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
