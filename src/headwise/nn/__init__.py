"""Small models to put mechanisms into: stacks that take any mixer, generate, and are saved."""

from .build import build, from_pretrained
from .imports import from_transformers
from .mixers import mixer
from .model import Caches, LanguageModel
from .residual import Residual, Stream
from .transformer import Block, Transformer

__all__ = [
    "Block",
    "Caches",
    "LanguageModel",
    "Residual",
    "Stream",
    "Transformer",
    "build",
    "from_pretrained",
    "from_transformers",
    "mixer",
]
