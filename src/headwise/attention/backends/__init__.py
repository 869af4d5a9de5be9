"""Ways to execute a read. Each module has three functions of a read and its operands:

`refuses` (why it cannot run it, or None), `shuns` (why the planner passes it over although it could, or None: then it runs
only where it is named), and `run`.
"""

from __future__ import annotations

from ..read import Read

FEW = 16  # queries, below which the tiles of a kernel are mostly empty


def edits_weights(read: Read) -> str | None:
    """Why a kernel that never holds weights cannot run the read; None if it leaves them alone."""
    names = ", ".join(type(stage).__name__ for stage in read.weights)
    return f"{names} edits weights and has no fold" if names else None


def not_softmax(read: Read) -> str | None:
    """Why a softmax kernel cannot run the read; None if it is a softmax, perhaps with one more logit."""
    if read.normalizer is None or read.normalizer.extra_logit() is not None:
        return None
    return f"{type(read.normalizer).__name__} is no softmax"
