"""The small trained models that ship with headwise, and held-out text to measure on. Each folder has a model card."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelLoadError

DEFAULT = "tiny"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """The embedded models."""
    return sorted(folder.name.replace("_", "-") for folder in _HERE.iterdir() if (folder / "config.json").exists())


def path(name: str | Path | None = None) -> Path:
    """The folder of an embedded model.

    Raises: ModelLoadError if there is none of that name.
    """
    folder = _HERE / str(name or DEFAULT).replace("-", "_")
    if not (folder / "config.json").exists():
        raise ModelLoadError(f"there is no embedded model {name!r}; there are: {', '.join(names())}")
    return folder


def heldout_text() -> str:
    """About 110 kB of documentation and code that the embedded models have not seen (see text/NOTICE)."""
    return (_HERE / "text" / "heldout.txt").read_text(encoding="utf-8")
