"""Grouped heads: which query heads read which key and value heads, told in words."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._build import KV_NAMES
from ._check import Skipped, require
from ._mixer_measures import Maps, apart, heads_tensors, run, tokens
from .adapters import HEADS, Runner

GROUP_NAMES = ("num_key_value_groups", "n_rep", "groups", "num_groups", "group_size", "kv_groups", "repeats", "n_groups")
Change = Callable[[Tensor], Tensor]  # of the heads (kv_heads, ...) of keys or of values


def arranged(t: Tensor, how: str, heads: int) -> Tensor:
    """Key or value heads (kv_heads, ...), as many as query heads, in one of the ways that one may confuse."""
    held, places = t.shape[0], torch.arange(heads)
    if how == "averaged":
        return t.mean(0, keepdim=True).expand(heads, *t.shape[1:])
    return t[{"repeated": places // (heads // held), "tiled": places % held, "only the first": places * 0}[how]]


WORDS = {
    "repeated": "repeated",
    "averaged": "averaged",
    "tiled": "tiled (head i reads i mod kv_heads)",
    "only the first": "all read from the first one",
}


class Grouped(ABC):
    """An attention of fewer key/value heads than heads, whose keys and values can be changed."""

    heads: int
    kv_heads: int

    @abstractmethod
    def out(self, change: dict[str, Change]) -> Tensor:
        """(b, n, ...) its output after changes to its "keys" and "values"."""

    @abstractmethod
    def twin(self) -> Tensor | None:
        """The output with repeated heads; None if it can't be made."""

    @abstractmethod
    def heads_changed(self, change: dict[str, Change], above: float) -> Tensor:
        """(heads,) bool: the heads whose output a change reaches.

        Raises: Skipped if its heads can't be told apart.
        """


def require_repeated(about: str, grouped: Grouped, allowed: float) -> None:
    """Grouped heads must be as repeated ones.

    That the twin of as many key/value heads gives the same is not enough: where all are averaged, the twin's are, too.

    Raises: CheckFailed that says in words what the heads read instead.
    """
    out, twin = grouped.out({}), grouped.twin()
    by = 0.0 if twin is None else apart(out, twin)
    found = {}
    for which in ("keys", "values"):
        each = [apart(grouped.out({which: _other(held)}), out) > allowed for held in range(grouped.kv_heads)]
        if not any(each):
            found[which] = ""  # it does not use them
        elif grouped.kv_heads == 1:
            continue  # which all share; the twin tells
        elif apart(grouped.out({which: lambda t: t.flip(0)}), out) <= allowed:
            found[which] = WORDS["averaged"]
        elif each == [True] + [False] * (grouped.kv_heads - 1):
            found[which] = WORDS["only the first"]
    if not any(found.values()) and twin is not None and by <= allowed:
        return
    for which in {"keys", "values"} - set(found):
        found[which] = _told(grouped, which, allowed)
    keys, values = found["keys"] or found["values"], found["values"] or found["keys"]
    how = keys if keys == values else f"mixed (keys {keys}, values {values})"
    differs = f"; it differs by {by:.2g}" if by > allowed else ""
    mixed = how.startswith("read") and by <= allowed  # heads that meet, as talking heads do; only the twin could tell more
    require(mixed or (how == "repeated" and by <= allowed), f"{about}: grouped heads are {how}, not repeated{differs}")


def _other(held: int) -> Change:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[held] = t[held].flip(-1 if t.ndim > 2 else 0)
        return t

    return change


def _told(grouped: Grouped, which: str, allowed: float) -> str:
    """What each head reads, in words."""
    reads = torch.stack([grouped.heads_changed({which: _other(held)}, allowed) for held in range(grouped.kv_heads)], 1)
    ways = ("repeated", "tiled", "only the first")
    same = torch.eye(grouped.kv_heads)
    known = next((how for how in ways if torch.equal(reads, arranged(same, how, grouped.heads).bool())), None)
    if known is not None:
        return WORDS[known]
    group = grouped.heads // grouped.kv_heads
    odd = next((h for h in range(grouped.heads) if reads[h].nonzero().flatten().tolist() != [h // group]), 0)
    return f"read otherwise (head {odd} reads key/value heads {reads[odd].nonzero().flatten().tolist()})"


class GroupedKernel(Grouped):
    """Of queries, keys and values themselves."""

    def __init__(self, runner: Runner, n: int) -> None:
        self.runner, self.heads, self.kv_heads = runner, HEADS, HEADS // 2
        self.tensors = heads_tensors(6, n, n, self.kv_heads)

    def _read(self, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.runner.read(self.tensors[0], k, v, self.runner.modes[0])  # type: ignore[attr-defined]
        return out.transpose(1, 2)

    def out(self, change: dict[str, Change]) -> Tensor:
        """See `Grouped.out`."""
        _, k, v = self.tensors
        if "keys" in change:
            k = change["keys"](k.transpose(0, 1)).transpose(0, 1)
        if "values" in change:
            v = change["values"](v.transpose(0, 1)).transpose(0, 1)
        return self._read(k, v)

    def twin(self) -> Tensor:
        """See `Grouped.twin`."""
        return self._read(*(t.repeat_interleave(self.heads // self.kv_heads, 1) for t in self.tensors[1:]))

    def heads_changed(self, change: dict[str, Change], above: float) -> Tensor:
        """See `Grouped.heads_changed`."""
        return (self.out(change) - self.out({})).abs().amax((0, 1, 3)) > above


class GroupedModule(Grouped):
    """Of a module whose linear maps were recognised: their rows are changed."""

    def __init__(self, runner: Runner, maps: Maps) -> None:
        self.runner, self.maps, self.heads, self.kv_heads = runner, maps, maps.heads, maps.kv_heads
        self.x = tokens(runner, 2, 9)

    def _rows(self, module: nn.Module, change: dict[str, Change]) -> None:
        for which, name in (("keys", self.maps.k), ("values", self.maps.v)):
            if which in change:
                weight = _linear(module, name).weight.data
                weight.copy_(change[which](weight.clone().unflatten(0, (self.kv_heads, -1)).flatten(2)).flatten(0, 1))

    def out(self, change: dict[str, Change]) -> Tensor:
        """See `Grouped.out`."""
        module = copy.deepcopy(self.runner.module)
        self._rows(module, change)
        return run(self.runner.around(module), self.x)

    def heads_changed(self, change: dict[str, Change], above: float) -> Tensor:
        """See `Grouped.heads_changed`."""
        maps = self.maps
        if maps.out is None or _linear(self.runner.module, maps.out).in_features != maps.heads * maps.size:
            raise Skipped("its output projection is not recognised, so its heads can't be told apart")
        found = torch.zeros(maps.heads, dtype=torch.bool)
        for head in range(maps.heads):
            module = copy.deepcopy(self.runner.module)
            columns = torch.zeros(maps.heads * maps.size, dtype=torch.bool)
            columns[head * maps.size : (head + 1) * maps.size] = True
            _linear(module, maps.out).weight.data[:, ~columns] = 0.0
            one = self.runner.around(module)
            before = run(one, self.x)
            self._rows(module, change)
            found[head] = apart(run(one, self.x), before) > above
        return found

    def twin(self) -> Tensor | None:
        """See `Grouped.twin`."""
        module, maps = copy.deepcopy(self.runner.module), self.maps
        for name in (maps.k, maps.v):
            old = _linear(module, name)
            weight = self._repeated(old.weight)
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, dtype=weight.dtype)
            new.weight.data.copy_(weight)
            if old.bias is not None:
                new.bias.data.copy_(self._repeated(old.bias))
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, new)
        for part in module.modules():
            for name in KV_NAMES:
                if type(getattr(part, name, None)) is int:
                    setattr(part, name, maps.heads)
            for name in GROUP_NAMES:
                if getattr(part, name, None) == maps.heads // maps.kv_heads:
                    setattr(part, name, 1)
        for name, parameter in module.named_parameters():
            if "k_norm" in name and parameter.shape == (maps.kv_heads * maps.size,):  # over all heads at once
                parameter.data = self._repeated(parameter)
        try:
            return run(self.runner.around(module), self.x)
        except Exception:  # sizes that were taken from its arguments and are kept elsewhere
            return None

    def _repeated(self, t: Tensor) -> Tensor:
        return arranged(t.detach().unflatten(0, (self.kv_heads, -1)), "repeated", self.heads).flatten(0, 1).contiguous()


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found
