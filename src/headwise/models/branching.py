"""Texts whose paths run beside one another: their masks and places, and generation that forks and joins the cache.

    <Parallel> <Goal> <Outline> ... </Outline> ... </Goal> <Path> ... </Path> <Path> ... </Path> <Conclusion> ... </Conclusion>
    </Parallel>

Paths see what came before the block's first path, none of the others; all start at the same place, and the conclusion sees
all of them, from the place after the longest.

Source: Multiverse (arXiv:2506.09991), secs. 4 and 5, and the authors' code. The paper's text lets all paths converge to the
largest place; its figure and code to the one after it, as here. Tokens between </Goal> and the first path or between paths,
which leak from one path to the next, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..caches import LayerStore
from ..errors import InputError, UnsupportedModelError
from ..stages.branches import Branches
from .cache import HeadCacheLayer, cache_argument
from .program import Entry
from .subject import Subject, as_subject


@dataclass(frozen=True)
class Tags:
    """The token of each tag."""

    parallel: int
    parallel_end: int
    goal: int
    goal_end: int
    outline: int
    outline_end: int
    path: int
    path_end: int
    conclusion: int
    conclusion_end: int

    @staticmethod
    def of(tokenizer: Any) -> Tags:
        """Those of a tokenizer that has <Parallel>, </Parallel>, ... as single tokens.

        Raises: InputError naming the first that it lacks.
        """
        found = {}
        for field in fields(Tags):
            name, _, end = field.name.partition("_")
            text = f"<{'/' if end else ''}{name.capitalize()}>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise InputError(f"{text} is {len(ids)} tokens to this tokenizer; add the tags of branching texts to it")
            found[field.name] = int(ids[0])
        return Tags(**found)


@dataclass(frozen=True, eq=False)
class Branched:
    """Where each token of a text stands. position: (n,), for `position_ids`. mask: what hides paths from one another."""

    position: Tensor
    mask: Branches


@dataclass
class _Block:
    number: int
    start: int | None = None  # place of the first token of a path
    longest: int = 0
    path: int = -1  # of the path that is open
    done: bool = False


def branched(ids: Sequence[int], tags: Tags) -> Branched:
    """The places and the mask of a text, whose last blocks may still be open; blocks may stand within paths.

    Raises: InputError for tags that do not belong where they stand, with the token's number.
    """
    open_: list[_Block] = []
    places, rows = [], []
    place = paths = blocks = 0

    def wrong(at: int, what: str) -> InputError:
        return InputError(f"token {at}: {what}")

    for at, token in enumerate(ids):
        own = open_[-1] if open_ else None
        if (
            own is not None
            and own.start is not None
            and own.path < 0
            and not own.done
            and token not in (tags.path, tags.conclusion)
        ):
            raise wrong(at, "only <Path> or <Conclusion> can follow </Goal> or </Path>; other tokens would leak between paths")
        if token == tags.parallel:
            open_.append(_Block(blocks))
            blocks += 1
        elif token == tags.path:
            if own is None or own.start is None or own.path >= 0 or own.done:
                raise wrong(at, "<Path> stands neither behind </Goal> nor behind another path")
            place, own.path, paths = own.start, paths, paths + 1
        elif token == tags.conclusion:
            if own is None or not own.longest or own.path >= 0 or own.done:
                raise wrong(at, "<Conclusion> stands behind no path")
            place, own.done = own.longest, True
        elif token in (tags.goal_end, tags.path_end, tags.parallel_end) and own is None:
            raise wrong(at, "a tag ends what was not begun")
        places.append(place)
        rows.append([(block.path, block.number) if block.path >= 0 else (-1, -1) for block in open_])
        place += 1
        if token == tags.goal_end and own is not None:
            if own.start is not None:
                raise wrong(at, "</Goal> stands in a block that has its goal")
            own.start = place
        elif token == tags.path_end and own is not None:
            if own.path < 0:
                raise wrong(at, "</Path> ends no path")
            own.longest, own.path = max(own.longest, place), -1
        elif token == tags.parallel_end and own is not None:
            if own.path >= 0 or not own.done:
                raise wrong(at, "</Parallel> ends a block without a conclusion")
            open_.pop()
    levels = max((len(row) for row in rows), default=0)
    table = torch.full((2, levels, len(rows)), -1)
    for at, row in enumerate(rows):
        for level, pair in enumerate(row):
            table[:, level, at] = torch.tensor(pair)
    return Branched(torch.tensor(places), Branches(table[0], table[1]))


def branched_logits(model: Any, ids: Tensor, tags: Tags) -> Tensor:
    """(1, n, vocabulary): one pass over a whole text (1, n) under its mask, at its places.

    Raises: InputError for tags out of place; UnsupportedModelError for a model that takes no places.
    """
    subject = _placed(as_subject(model))
    text = branched(ids[0].tolist(), tags)
    remove = subject.session.install(entries=(Entry(subject.main.exists(), text.mask),))
    try:
        with torch.no_grad():
            # with a mask, or transformers takes places that begin again for several texts in one row
            given = {"position_ids": text.position[None].to(ids.device), "attention_mask": torch.ones_like(ids)}
            found: Tensor = subject.model(input_ids=ids, **given, use_cache=False).logits
    finally:
        remove()
    return found


@dataclass(frozen=True)
class Generated:
    """A text that was generated with forks. ids: all of it. tokens: how many are new; steps: calls of the model that made them,
    each for one token of every path that ran beside others."""

    ids: tuple[int, ...]
    tokens: int
    steps: int

    @property
    def parallelism(self) -> float:
        """New tokens a call."""
        return self.tokens / max(self.steps, 1)


def generate_branches(
    model: Any, ids: Tensor, tags: Tags, *, max_new_tokens: int = 256, max_path_tokens: int = 128, end: Sequence[int] = (),
    prime: Callable[[int], Sequence[int]] = lambda path: (),
) -> Generated:  # fmt: skip
    """Greedy generation that runs the paths of a block as rows of one batch, which share the pages of what came before.

    At </Goal> the cache forks, a row for each <Outline> of the goal; each row begins with <Path> and goes on to its </Path>;
    then the rows' pages are joined, prefix, path, path, ..., and <Conclusion> follows. Paths that are done wait for the others.
    A block within a path is not begun: <Parallel> is never chosen there.

    Args:
        ids: (1, n), the prompt. max_path_tokens: after so many a path is closed. end: tokens that end the text.
        prime: the tokens that follow <Path> of the first, second, ... path, for models that number them.

    Raises: InputError for a prompt of several rows, or with tags out of place; UnsupportedModelError as `branched_logits`.
    """
    subject = _placed(as_subject(model))
    if len(ids) != 1:
        raise InputError(f"the prompt has {len(ids)} rows; texts branch one at a time")
    remove = subject.session.install(entries=())
    try:
        return _Engine(subject, tags, prime, max_path_tokens, frozenset(end)).run(ids[0].tolist(), max_new_tokens)
    finally:
        remove()


class _Engine:
    """One text: its tokens so far, and the cache, one row of it or a row a path."""

    def __init__(
        self, subject: Subject, tags: Tags, prime: Callable[[int], Sequence[int]], limit: int, end: frozenset[int]
    ) -> None:
        self.subject, self.tags, self.prime, self.limit, self.end = subject, tags, prime, limit, end
        cache = subject.session.new_cache(always=True)
        if cache is None or not all(isinstance(layer, HeadCacheLayer) and layer.store.joinable for layer in cache.layers):
            raise UnsupportedModelError(
                f"{subject.name} has layers that do not keep all keys and values (windows, latents); its texts cannot branch"
            )
        self.stores: list[LayerStore] = [layer.store for layer in cache.layers]
        self.cache = {str(cache_argument(subject.model)): cache}
        self.steps = 0

    @torch.no_grad()
    def read(self, rows: list[list[int]], places: Tensor) -> Tensor:
        """(rows, vocabulary): logits after tokens at these places (rows, c)."""
        ids = torch.tensor(rows, device=self.subject.device)
        self.steps += 1
        out = self.subject.model(input_ids=ids, position_ids=places.to(ids.device), **self.cache)
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def run(self, text: list[int], count: int) -> Generated:
        start = len(text)
        laid = branched(text, self.tags)
        if bool((laid.mask.path[:, -1:] >= 0).any()):
            raise InputError("the prompt ends within a path; give it up to </Goal>, or up to the end of its last block")
        if bool((laid.mask.path >= 0).any()):
            raise InputError("the prompt has paths of its own, which one pass over it would let see each other; leave them out")
        logits, place = self.read([text], laid.position[None]), int(laid.position[-1]) + 1
        self.steps = 0
        goal = text[_last(text, self.tags.parallel) :] if _opened(text, self.tags) else []
        while len(text) - start < count:
            if text[-1] == self.tags.goal_end and goal:
                logits, place = self.fork(text, place, max(1, goal.count(self.tags.outline)))
                goal = []
                continue
            token = int(logits[0].argmax())
            text.append(token)
            goal = [token] if token == self.tags.parallel else [*goal, token] if goal else []
            if token in self.end or len(text) - start >= count:
                break
            logits, place = self.read([[token]], torch.tensor([[place]])), place + 1
        return Generated(tuple(text), len(text) - start, self.steps)

    def fork(self, text: list[int], place: int, paths: int) -> tuple[Tensor, int]:
        """Runs the paths of a block from its </Goal> on, and its <Conclusion>; logits after that, and the next place."""
        for store in self.stores:
            store.select(torch.zeros(paths, dtype=torch.long))
        primes = [[self.tags.path, *self.prime(i)] for i in range(paths)]
        if len({len(prime) for prime in primes}) > 1:
            raise InputError("the first tokens of paths are not as many in every path; pad them, or let `prime` give none")
        size = len(primes[0])
        before, rows = self.stores[0].seen, [list(prime) for prime in primes]
        logits = self.read(primes, (place + torch.arange(size)).expand(paths, -1))
        done = [False] * paths
        while not all(done):
            logits[:, self.tags.parallel] = -torch.inf
            chosen = logits.argmax(-1).tolist()
            for i, own in enumerate(rows):
                if done[i]:
                    continue
                own.append(chosen[i] if len(own) < self.limit else self.tags.path_end)
                done[i] = own[-1] == self.tags.path_end
            step = len(max(rows, key=len)) - 1
            fed = [[own[step] if len(own) > step else self.tags.path_end] for own in rows]  # a path that is done waits
            logits = self.read(fed, torch.full((paths, 1), place + step))
        lengths = [len(own) for own in rows]
        for store in self.stores:
            store.join(before, lengths)
        for own in rows:
            text += own
        text.append(self.tags.conclusion)
        end = place + max(lengths)
        return self.read([[self.tags.conclusion]], torch.tensor([[end]])), end + 1


def _last(text: Sequence[int], token: int) -> int:
    return len(text) - 1 - list(reversed(text)).index(token)


def _opened(text: Sequence[int], tags: Tags) -> bool:
    """Whether a block is open at the text's end."""
    return list(text).count(tags.parallel) > list(text).count(tags.parallel_end)


def _placed(subject: Subject) -> Subject:
    if "position_ids" not in subject.forward_names or cache_argument(subject.model) is None:
        raise UnsupportedModelError(f"{type(subject.model).__name__} takes no position_ids or no cache, so its texts cannot branch")
    return subject
