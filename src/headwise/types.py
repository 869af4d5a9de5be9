"""The words of the library that hold data: HeadTable, Heads, Spans, Statistics.

A head is a query head, addressed (layer, head) and printed L5H3. Tables and selections are [layers, heads] of one stack
of a model (its decoder, its vision tower, ...), named in `stack`.
"""

from __future__ import annotations

import builtins
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError, SelectionError

if TYPE_CHECKING:
    import pandas

Address = tuple[int, int] | str
_ADDRESS = re.compile(r"L?(\d+)[H\-.:](\d+)", re.IGNORECASE)


def head_name(layer: int, head: int) -> str:
    """(5, 3) -> "L5H3"."""
    return f"L{layer}H{head}"


def parse_head(address: Address) -> tuple[int, int]:
    """(5, 3), "L5H3", "5-3" and "5.3" -> (5, 3).

    Raises: SelectionError if the text is no head's address.
    """
    if isinstance(address, str):
        match = _ADDRESS.fullmatch(address.strip())
        if match is None:
            raise SelectionError(f"{address!r} is no head; write it like L5H3 or 5-3")
        return int(match[1]), int(match[2])
    layer, head = address
    return int(layer), int(head)


@dataclass(frozen=True, eq=False)
class Heads:
    """A selection of heads of one stack: a boolean table [layers, heads] with & | ~ - and .count(), .list()."""

    mask: Tensor
    stack: str = "decoder"

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.dim() != 2:
            raise SelectionError(f"a selection is a boolean [layers, heads] table, not {self.mask.dtype} {tuple(self.mask.shape)}")

    @staticmethod
    def none(shape: tuple[int, int], stack: str = "decoder") -> Heads:
        """No head of a [layers, heads] table."""
        return Heads(torch.zeros(shape, dtype=torch.bool), stack)

    @staticmethod
    def all(shape: tuple[int, int], stack: str = "decoder") -> Heads:
        """Every head of a [layers, heads] table."""
        return Heads(torch.ones(shape, dtype=torch.bool), stack)

    @staticmethod
    def of(
        addresses: Iterable[Address] | str | Mapping[int, Iterable[int]], shape: tuple[int, int], stack: str = "decoder"
    ) -> Heads:
        """Heads from addresses: [(5, 3), "L6H0"], "L5H3,L6H0" or {layer: [heads]}.

        Raises: SelectionError if one of them is not in a table of that shape.
        """
        if isinstance(addresses, str):
            addresses = [part for part in re.split(r"[,\s]+", addresses) if part]
        elif isinstance(addresses, Mapping):
            addresses = [(layer, head) for layer, heads in addresses.items() for head in heads]
        mask = torch.zeros(shape, dtype=torch.bool)
        for address in addresses:
            layer, head = parse_head(address)
            if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
                raise SelectionError(
                    f"{head_name(layer, head)} is out of range: {stack} has layers 0-{shape[0] - 1} and heads 0-{shape[1] - 1}"
                )
            mask[layer, head] = True
        return Heads(mask, stack)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.mask.shape[0], self.mask.shape[1]

    def _with(self, other: Heads, join: Callable[[Tensor, Tensor], Tensor]) -> Heads:
        if not isinstance(other, Heads):
            return NotImplemented
        if self.shape != other.shape or self.stack != other.stack:
            raise SelectionError(
                f"selections of {self.stack} {self.shape} and {other.stack} {other.shape} cannot be joined; "
                "both must come from the same stack of the same model"
            )
        return Heads(join(self.mask, other.mask), self.stack)

    def __and__(self, other: Heads) -> Heads:
        return self._with(other, torch.logical_and)

    def __or__(self, other: Heads) -> Heads:
        return self._with(other, torch.logical_or)

    def __sub__(self, other: Heads) -> Heads:
        return self._with(other, lambda a, b: a & ~b)

    def __invert__(self) -> Heads:
        return Heads(~self.mask, self.stack)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Heads) and self.stack == other.stack and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.stack, tuple(self.list())))

    def __contains__(self, address: Address) -> bool:
        layer, head = parse_head(address)
        return 0 <= layer < self.shape[0] and 0 <= head < self.shape[1] and bool(self.mask[layer, head])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.list())

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return bool(self.mask.any())

    def count(self) -> int:
        """How many heads are selected."""
        return int(self.mask.sum())

    def list(self) -> builtins.list[tuple[int, int]]:
        """The selected heads as (layer, head), by layer."""
        return [(layer, head) for layer, head in self.mask.nonzero().tolist()]

    def names(self) -> builtins.list[str]:
        """The selected heads as L5H3, by layer."""
        return [head_name(layer, head) for layer, head in self.list()]

    def layer(self, layer: int) -> builtins.list[int]:
        """The selected heads of one layer."""
        return self.mask[layer].nonzero().flatten().tolist()

    def random(self, count: int, seed: int, *, like: Heads | None = None) -> Heads:
        """`count` of these heads drawn at random; with `like`, as many in each layer as it has (a fair control)."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros_like(self.mask)
        if like is None:
            pools = [(self.list(), count)]
        else:
            pools = [([h for h in self.list() if h[0] == layer], len(like.layer(layer))) for layer in range(self.shape[0])]
            if like.count() != count:
                raise SelectionError(f"like= selects {like.count()} heads, count is {count}; they must agree")
        for pool, size in pools:
            if size > len(pool):
                raise SelectionError(f"cannot draw {size} of {len(pool)} heads; draw fewer or from a larger selection")
            for index in torch.randperm(len(pool), generator=generator)[:size].tolist():
                mask[pool[index]] = True
        return Heads(mask, self.stack)

    def whole_groups(self, group_size: int) -> Heads:
        """The same heads and all that share a key/value head with one of them (`group_size` query heads share one)."""
        layers, heads = self.shape
        groups = self.mask.view(layers, heads // group_size, group_size).any(-1, keepdim=True)
        return Heads(groups.expand(-1, -1, group_size).reshape(layers, heads), self.stack)

    def expect(self, count: int) -> Heads:
        """Returns itself if it selects `count` heads.

        Raises: SelectionError otherwise, with both numbers.
        """
        if self.count() != count:
            raise SelectionError(f"selected {self.count()} heads, expected {count}: {', '.join(self.names()[:8])}")
        return self

    def __repr__(self) -> str:
        shown = ", ".join(self.names()[:12]) + (", ..." if self.count() > 12 else "")
        return f"Heads({self.count()} of {self.mask.numel()} in {self.stack}: {shown})"


@dataclass(frozen=True, eq=False)
class HeadTable:
    """A number for each head: values [layers, heads] in float64, with a name; NaN where a head does not exist.

    Compare with a number to select heads (`table > 0.5` is a `Heads`), or take `.top(k)`. `unit` says what the numbers
    are (probability, nats, tokens, ...); `about` holds what else the probe found, JSON-able.
    """

    values: Tensor
    name: str
    stack: str = "decoder"
    unit: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise SelectionError(f"a head table is [layers, heads], not {tuple(self.values.shape)}")
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float64))

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.values.shape[0], self.values.shape[1]

    def __getitem__(self, address: Address) -> float:
        layer, head = parse_head(address)
        Heads.of([(layer, head)], self.shape, self.stack)  # raises if out of range
        return float(self.values[layer, head])

    def __gt__(self, bound: float) -> Heads:
        return Heads(self.values > bound, self.stack)

    def __ge__(self, bound: float) -> Heads:
        return Heads(self.values >= bound, self.stack)

    def __lt__(self, bound: float) -> Heads:
        return Heads(self.values < bound, self.stack)

    def __le__(self, bound: float) -> Heads:
        return Heads(self.values <= bound, self.stack)

    def heads(self) -> Heads:
        """All heads that exist."""
        return Heads(~self.values.isnan(), self.stack)

    def ranking(self, *, descending: bool = True) -> list[tuple[tuple[int, int], float]]:
        """[((layer, head), value)] from the largest value (or the smallest) on; ties by address."""
        sign = -1.0 if descending else 1.0
        rows = [(head, float(self.values[head])) for head in self.heads().list()]
        return sorted(rows, key=lambda row: (sign * row[1], row[0]))

    def top(self, count: int) -> Heads:
        """The `count` heads of largest value."""
        return Heads.of([head for head, _ in self.ranking()[:count]], self.shape, self.stack)

    def bottom(self, count: int) -> Heads:
        """The `count` heads of smallest value."""
        return Heads.of([head for head, _ in self.ranking(descending=False)[:count]], self.shape, self.stack)

    def spearman(self, other: HeadTable) -> float:
        """Rank correlation with another table of the same heads, in [-1, 1]; ties share their mean rank."""
        if self.shape != other.shape or self.stack != other.stack:
            raise SelectionError(f"{self.name} is {self.stack} {self.shape}, {other.name} is {other.stack} {other.shape}")
        both = ~(self.values.isnan() | other.values.isnan())
        first, second = (_ranks(table.values[both]) for table in (self, other))
        first, second = first - first.mean(), second - second.mean()
        scale = first.norm() * second.norm()
        return float(first @ second / scale) if scale > 0 else math.nan

    def rows(self) -> list[list[float | None]]:
        """The values as lists, rounded to 9 significant digits; None where a head does not exist."""
        return [[None if math.isnan(v) else float(f"{v:.9g}") for v in row] for row in self.values.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: name, stack, unit, values, about."""
        return {"name": self.name, "stack": self.stack, "unit": self.unit, "values": self.rows(), "about": dict(self.about)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> HeadTable:
        """The table that `to_dict` wrote."""
        values = torch.tensor([[math.nan if v is None else v for v in row] for row in data["values"]], dtype=torch.float64)
        return HeadTable(values, data["name"], data.get("stack", "decoder"), data.get("unit", ""), data.get("about", {}))

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> HeadTable:
        """Reads what `save` wrote."""
        return HeadTable.from_dict(json.loads(Path(path).read_text()))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head: layer, head, name, value (needs pandas)."""
        import pandas

        rows = [{"layer": l, "head": h, "name": head_name(l, h), self.name: self[l, h]} for l, h in self.heads().list()]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        best = ", ".join(f"{head_name(*head)} {value:.3g}" for head, value in self.ranking()[:4])
        return f"HeadTable({self.name} [{self.unit}], {self.shape[0]} layers x {self.shape[1]} heads of {self.stack}; top: {best})"

    def __str__(self) -> str:
        width = max(7, *(len(f"{v:.3g}") for v in self.values.flatten().tolist()))
        lines = [
            f"{self.name} [{self.unit}] of {self.stack}",
            "    " + "".join(f"{f'H{h}':>{width + 1}}" for h in range(self.shape[1])),
        ]
        for layer, row in enumerate(self.values.tolist()):
            lines.append(f"L{layer:<3}" + "".join(f"{'' if math.isnan(v) else f'{v:.3g}':>{width + 1}}" for v in row))
        return "\n".join(lines)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean."""
    order = values.argsort()
    ranks = torch.empty_like(values)
    ranks[order] = torch.arange(len(values), dtype=values.dtype)
    for value in values.unique():
        same = values == value
        ranks[same] = ranks[same].mean()
    return ranks


@dataclass(frozen=True)
class Spans:
    """Named ranges of tokens of a prompt: {"document": [(3, 40), (52, 60)]}, stop exclusive."""

    ranges: Mapping[str, Sequence[tuple[int, int]]]

    @staticmethod
    def find(tokenizer: Any, text: str, parts: Mapping[str, str]) -> Spans:
        """The tokens of each part of `text`, from the offsets of a fast tokenizer.

        Raises: InputError if a part is not in the text, or the tokenizer gives no offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("spans need a fast tokenizer, which gives each token's place in the text")
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        ranges = {}
        for name, part in parts.items():
            start = text.find(part)
            if start < 0 or not part:
                raise InputError(f"span {name!r}: {part[:40]!r} is not in the text")
            inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(part) and b > start]
            ranges[name] = [(inside[0], inside[-1] + 1)]
        return Spans(ranges)

    def indicator(self, length: int) -> Tensor:
        """(spans, length) booleans: which tokens belong to which span, in the order of `ranges`.

        Raises: InputError if a range reaches past `length`.
        """
        table = torch.zeros(len(self.ranges), length, dtype=torch.bool)
        for row, (name, ranges) in enumerate(self.ranges.items()):
            for start, stop in ranges:
                if not 0 <= start <= stop <= length:
                    raise InputError(f"span {name!r} ({start}, {stop}) does not fit {length} tokens")
                table[row, start:stop] = True
        return table


class Statistics(dict[str, Tensor]):
    """Named statistics of a read, each (b, h, n), (b, h, m) or with one more dimension as its statistic says."""

    def __repr__(self) -> str:
        return f"Statistics({', '.join(f'{name} {tuple(value.shape)}' for name, value in self.items())})"
