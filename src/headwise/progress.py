"""Progress bars for long work, which obey transformers' verbosity: no bar where its progress bars are switched off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


def bars_wanted() -> bool:
    """Whether the user has left progress bars on in transformers (if it is loaded at all)."""
    logging = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())


@contextmanager
def bar(total: int, what: str, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields what advances it."""
    with tqdm(total=total, desc=what, disable=not (show and bars_wanted()), leave=False, dynamic_ncols=True) as shown:

        def advance(steps: int) -> None:
            shown.update(steps)

        yield advance
