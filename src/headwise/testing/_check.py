"""Registry x checks: every check of a kind on every item of that kind, with exemptions that expire."""

from __future__ import annotations

import importlib
import inspect
import operator
import traceback
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import registry
from ..card import Card
from ..errors import RegistryError

# kind -> module of its checks. "mechanism" is the inventory's; "mixer" is any attention of the user's
MODULES = {
    "stage": "stages",
    "rule": "rules",
    "cache": "caches",
    "probe": "probes",
    "recipe": "recipes",
    "task": "tasks",
    "problem": "problems",
    "mechanism": "mixers",
    "architecture": "architectures",
    "mixer": "mixers",
}


class CheckFailed(AssertionError):
    """A check that did not hold; its message says in words what is wrong."""


def require(condition: bool, message: str) -> None:
    """Raises: CheckFailed with the message unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


class Skipped(unittest.SkipTest):  # which pytest, too, reports as skipped
    """A check that does not apply; its message says in words why."""


@dataclass(frozen=True)
class Item:
    """Something to check: its class or function, and the module that holds its oracle, examples and card."""

    kind: str
    name: str
    value: Any
    module: ModuleType

    @property
    def card(self) -> Card | None:
        """Its card, if it has one."""
        found = getattr(self.module, "CARD", None)
        return found if isinstance(found, Card) else None


@dataclass(frozen=True)
class Result:
    """outcome: passed, failed, skipped (does not apply, and why), exempt (fails, and its card says why it may), or expired
    (exempt, but does not fail)."""

    kind: str
    name: str
    check: str
    outcome: str
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether this is as it should be."""
        return self.outcome in ("passed", "skipped", "exempt")


def checks_for(kind: str) -> list[Callable[[Item], None]]:
    """The checks of a kind, in the order in which they are written."""
    if kind not in MODULES:
        raise RegistryError(f"there are no checks for {kind!r}; there are for: {', '.join(MODULES)}")
    module = importlib.import_module(f"headwise.testing.{MODULES[kind]}")
    return [value for name, value in vars(module).items() if name.startswith("check_") and callable(value)]


def registered(kind: str, name: str) -> Item:
    """An item of the inventory."""
    value = registry.load(kind, name)
    return Item(kind, name, value, importlib.import_module(value.__module__))


def everything() -> list[Item]:
    """All items of the inventory."""
    return [registered(kind, name) for kind in _listed() for name in registry.names(kind)]


def _listed() -> list[str]:
    return [kind for kind in MODULES if kind in registry.kinds()]


def find(name: str) -> Item:
    """An item by its registered name, or one of the user's own by `module:object`; see `find_all` for names of several kinds."""
    return find_all(name)[0]


def find_all(name: str) -> list[Item]:
    """The items of a registered name, one of each kind that has it; or one of the user's own by `module:object`.

    Raises: RegistryError if there is none, or it is nothing that can be checked.
    """
    if ":" not in name:
        found = [registered(kind, item) for kind in _listed() for item in registry.names(kind) if item == name.replace("-", "_")]
        if not found:
            raise RegistryError(f"nothing is registered as {name!r}; see `headwise list`, or give your own as module:object")
        return found
    path, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(path)
        value = operator.attrgetter(attribute)(module)
    except (ImportError, AttributeError) as error:
        raise RegistryError(f"cannot import {name!r}: {error}") from error
    return [Item(_kind_of(value, name), attribute, value, module)]


def _kind_of(value: Any, name: str) -> str:
    from ..attention.stage import Stage
    from ..caches import Rule
    from ..probes import Probe
    from ..tasks import Task
    from ._build import is_attention

    for kind, base in (("rule", Rule), ("stage", Stage), ("probe", Probe), ("task", Task)):
        if inspect.isclass(value) and issubclass(value, base):
            return kind
    if is_attention(value):
        return "mixer"
    if inspect.isfunction(value):
        return "recipe"
    raise RegistryError(
        f"{name} is a {type(value).__name__}; checked can be subclasses of Stage, Rule, Probe and Task, recipes (functions that "
        "make a Plan), and attentions (modules, and functions of q, k and v)"
    )


def check(item: Item) -> Iterator[Result]:
    """Runs every check of the item's kind.

    Raises: RegistryError if it is an attention of the user's that can't be built or called.
    """
    if item.kind == "mixer":
        from ._build import instances

        instances(item)
    exempt = item.card.exempt if item.card else {}
    for function in checks_for(item.kind):
        name = function.__name__.removeprefix("check_")
        reason = exempt.get(name)
        try:
            function(item)
        except Skipped as why:
            expired = f"does not apply ({why}), so its exemption must go ({reason})"
            yield Result(item.kind, item.name, name, "expired" if reason else "skipped", expired if reason else str(why))
        except Exception as error:  # a crash in the item is a finding about the item
            message = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error} ({_where(error)})"
            yield Result(
                item.kind, item.name, name, "exempt" if reason else "failed", f"{reason}: {message}" if reason else message
            )
        else:
            expired = f"passes now, so its exemption must go ({reason})" if reason else ""
            yield Result(item.kind, item.name, name, "expired" if reason else "passed", expired)


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
