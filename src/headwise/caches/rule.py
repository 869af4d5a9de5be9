"""What a plan may ask of how heads are cached: which tokens they keep, and as what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..attention import attention_weights
from ..attention import statistics as attend_statistics
from ..attention.stage import Stage
from ..errors import PlanError
from ..stages.causal import Causal

Parts = dict[str, Tensor]
Budget = float | Tensor


class Rotary(Protocol):
    """How a layer turns queries and keys by their positions."""

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (b, h, n, d) as it is at positions (b, n) or (b, h, n)."""
        ...

    def turned_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """What was turned to x at positions (b, n) or (b, h, n)."""
        ...


class Rule(Stage):
    """How some heads keep keys and values in generation. Heads that share a key/value head must have the same rule.

    turns: whether it needs the model's rotary positions. alone: whether its heads can have no other rule. masked: whether they
    can have a mask.
    """

    turns: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    masked: ClassVar[bool] = True

    @property
    def segments(self) -> tuple[Codec, ...]:
        """What tokens are kept as, one sequence of pages for each."""
        return (PLAIN,)


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a layer as a rule sees it, after the read: h query heads of some kv key/value heads.

    q: (b, h, n, d), the new queries. k, v: (b, kv, m, d), what they read, the new tokens last and all in the order of the text.
    number: (b, kv, m), when each came, pads counted; -1 where there is nothing. pads: (b,) left padding of each row.
    total: tokens so far, pads and evicted ones included. stages: the model's own (caps, sinks), masks left out.
    carried: what the rule keeps beside each token, (b, kv, m) each; zeros for new ones. layer: of how many `layers`.
    rotary: how q and k were turned, for rules that ask for it by `turns`; None if they were not.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    number: Tensor
    pads: Tensor
    total: int
    scale: float
    stages: tuple[Stage, ...] = ()
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    layer: int = 0
    layers: int = 1
    heads: tuple[int, ...] = ()
    rotary: Rotary | None = None

    @property
    def groups(self) -> int:
        """Query heads of each key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def there(self) -> Tensor:
        """(b, kv, m): which keys there are."""
        return self.number >= 0

    @property
    def age(self) -> Tensor:
        """(b, kv, m): 0 for the newest token."""
        return self.total - 1 - self.number

    @property
    def position(self) -> Tensor:
        """(b, kv, m): place in the row, 0 for its first real token; negative where there is nothing."""
        return torch.where(self.there, self.number - self.pads[:, None, None], -1)

    @property
    def real(self) -> Tensor:
        """(b,) real tokens so far, evicted ones included."""
        return self.total - self.pads

    def _head(self, kv: int, last: int | None) -> tuple[Tensor, tuple[Stage, ...], dict[str, Any]]:
        own = range(kv * self.groups, (kv + 1) * self.groups)
        n = self.q.shape[2] if last is None else min(last, self.q.shape[2])
        queries = torch.arange(self.total - n, self.total, device=self.q.device)[None] - self.pads[:, None]
        places: dict[str, Any] = {"query_positions": queries, "key_positions": self.position[:, kv]}
        return self.q[:, list(own), -n:], (*(stage.select(own) for stage in self.stages), Causal()), places

    def weights(self, last: int | None = None) -> Tensor:
        """(b, h, n, m) attention weights of the last queries (by default of all), causal, in float32 or wider."""
        rows = []
        for kv in range(self.k.shape[1]):
            q, stages, places = self._head(kv, last)
            wide = torch.promote_types(q.dtype, torch.float32)
            rows.append(attention_weights(q.to(wide), self.k[:, kv : kv + 1].to(wide), *stages, scale=self.scale, **places))
        return torch.cat(rows, 1)

    def received(self) -> Tensor:
        """(b, h, m): the weights that each key gets from all new queries together, without all weights at once."""
        columns = []
        for kv in range(self.k.shape[1]):
            q, stages, places = self._head(kv, None)
            found = attend_statistics(q, self.k[:, kv : kv + 1], *stages, want=["key_mass"], scale=self.scale, **places)
            columns.append(found["key_mass"])
        return torch.cat(columns, 1)

    def by_group(self, values: Tensor) -> Tensor:
        """(b, h, ...) -> (b, kv, groups, ...)."""
        return values.unflatten(1, (self.k.shape[1], self.groups))


class Evict(Rule, ABC):
    """Keeps only some tokens of each head: after a prompt, and if `every`, also after each new token.

    budget: tokens that each head keeps (an integer), or their share of the tokens so far (a float up to 1); or a tensor of one
    of the two for each head, of which that of the first query head of a key/value head counts. Subclasses are frozen
    dataclasses; they say what tokens are worth.
    """

    per_head: ClassVar[tuple[str, ...]] = ("budget",)
    masked: ClassVar[bool] = False
    every: ClassVar[bool] = False
    carries: ClassVar[tuple[str, ...]] = ()  # names of numbers kept beside each token, float32
    budget: Budget

    def carry(self, seen: Seen) -> Parts:
        """What is kept beside each token from now on, by the names in `carries`: (b, kv, m) each."""
        return dict(seen.carried)

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """(b, kv, m): what each token is worth; inf for one that is kept in any case."""

    def counts(self, seen: Seen, scores: Tensor) -> Tensor:
        """(b, kv): how many tokens each head keeps."""
        return self.tokens(seen)

    def tokens(self, seen: Seen) -> Tensor:
        """(b, kv): the budget in tokens."""
        exact = torch.float64 if isinstance(self.budget, float) else None  # 0.35 of 40 is 14
        each = torch.as_tensor(self.budget, dtype=exact, device=seen.k.device).reshape(-1).expand(seen.k.shape[1])
        if each.is_floating_point():
            return (each.double() * seen.real[:, None]).floor().long().clamp(min=1)
        return each.long().expand(len(seen.k), -1).clamp(min=1)

    def check_heads(self, heads: int) -> None:
        super().check_heads(heads)
        value = torch.as_tensor(self.budget).reshape(-1)
        bad = value[(value <= 0) | ((value > 1) if value.is_floating_point() else (value < 0))]
        if bad.numel():
            raise PlanError(
                f"{type(self).__name__} has a budget of {bad[0].item()}; give tokens (an integer from 1 on) or a share of "
                "the prompt (a float up to 1.0)"
            )


class Codec(Rule, ABC):
    """What a head's keys and values are kept as. Each token is encoded alone, so that it can be evicted alone.

    offloads: whether its parts lie in the host's memory; they are brought to the device before they are decoded.
    """

    offloads: ClassVar[bool] = False

    @property
    def segments(self) -> tuple[Codec, ...]:
        return (self,)

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> Parts:
        """(b, heads, c, d) each -> parts (b, heads, c, ...)."""

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Back again, as near as it gets, in the dtype of the keys that come."""


class Plain(Codec):
    """Keys and values as they are."""

    def encode(self, k: Tensor, v: Tensor) -> Parts:
        return {"k": k, "v": v}

    def decode(self, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return parts["k"], parts["v"]


PLAIN = Plain()


def order_by(scores: Tensor, counts: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the `counts` (b, kv) best scores of (b, kv, m), in ascending order, and how many they are, (b, kv).

    (b, kv, most): slots; behind a head's own number, others that mean nothing. Of equal scores the earlier slot goes first.
    """
    counts = torch.minimum(counts, there.sum(-1))
    best = scores.masked_fill(~there, -torch.inf).sort(stable=True, dim=-1, descending=True).indices
    best = torch.where(there.gather(-1, best), best, scores.shape[-1])  # what is not there goes last
    best = _stable_partition(best, scores.shape[-1])
    most = int(counts.max()) if counts.numel() else 0
    ranks = torch.arange(most, device=scores.device)
    chosen = best[..., :most].masked_fill(ranks >= counts[..., None], scores.shape[-1])
    return chosen.sort(-1).values.clamp(max=max(scores.shape[-1] - 1, 0)), counts


def _stable_partition(slots: Tensor, nothing: int) -> Tensor:
    """Slots that are there first, in their order."""
    return slots.gather(-1, (slots == nothing).long().sort(stable=True, dim=-1).indices)
