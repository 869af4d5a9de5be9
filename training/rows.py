"""Synthetic training rows: repeats, needles and key-value recall, each at random offsets and lengths.

With one fixed offset a small model learns a positional shortcut instead of induction, so nothing here has a fixed place.
A row is (ids, weights): weight 0 on tokens that nothing could predict (a random token, a password seen for the first
time), 1 on running text, ANSWER on what must be copied.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from headwise.prompts import STATEMENT, WORDS, draw_keys

ANSWER = 4.0
FIRST_ORDINARY = 3  # ids below are <|begin|>, <|end|>, <|pad|>
# (what a statement says, up to its value): the first is the form that the needle task asks, the others keep it from being
# a special case.
FORMS = (
    (STATEMENT.split("{value}")[0], ".\n"),
    ("\nRemember that the number of the {key} is", ".\n"),
    ("\n{key}:", "\n"),
    ('\n    "{key}" =', "\n"),
)
Row = tuple[np.ndarray, np.ndarray]


class RowMaker:
    def __init__(self, stream: np.ndarray, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.stream, self.length = stream, length
        self.rng = np.random.default_rng(seed)
        self.vocabulary = np.arange(FIRST_ORDINARY, tokenizer.get_vocab_size())
        self.tokenizer = tokenizer

    def row(self) -> Row:
        kind = self.rng.choice(3, p=[0.3, 0.5, 0.2])
        return (self.repeats, self.needles, self.pairs)[kind]()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, size: int) -> np.ndarray:
        start = int(self.rng.integers(len(self.stream) - size))
        return self.stream[start : start + size].astype(np.int64)

    def some(self, size: int) -> np.ndarray:
        """Random tokens, uniform or as frequent as in text (shuffled), so that the copy is neither rare nor common tokens only."""
        if self.rng.random() < 0.6:
            return self.rng.choice(self.vocabulary, size=size)
        return self.rng.permutation(np.maximum(self.text(size), FIRST_ORDINARY))

    def finish(self, ids: list[int], weights: list[float]) -> Row:
        """Cuts to length, or fills up with text that counts."""
        missing = self.length - len(ids)
        if missing > 0:
            ids = ids + self.text(missing).tolist()
            weights = weights + [1.0] * missing
        return np.asarray(ids[: self.length], dtype=np.int64), np.asarray(weights[: self.length], dtype=np.float32)

    def repeats(self) -> Row:
        """Segments of random tokens (now and then text), each repeated after a random gap, until the row is full."""
        ids, weights = [0], [0.0]
        while len(ids) < self.length:
            size = int(np.exp(self.rng.uniform(np.log(4), np.log(self.length / 2))))
            gap = int(self.rng.integers(0, size + 1)) if self.rng.random() < 0.5 else 0
            segment = self.text(size) if self.rng.random() < 0.15 else self.some(size)
            times = int(self.rng.integers(1, 4))
            ids += segment.tolist()
            weights += [0.0] * size
            for _ in range(times):
                between = self.some(gap)
                ids += between.tolist() + segment.tolist()
                # The first token of a copy after a gap comes by surprise; without a gap the end of the last copy announces it.
                weights += [0.0] * (gap + 1) + [ANSWER / 2] * (size - 1)
        return self.finish(ids, weights)

    def value(self) -> str:
        kind = self.rng.random()
        if kind < 0.6:
            return "".join(f" {w}" for w in self.rng.choice(WORDS, size=int(self.rng.integers(1, 8)), replace=False))
        if kind < 0.85:
            return " " + "".join(map(str, self.rng.integers(0, 10, size=int(self.rng.integers(3, 9)))))
        return " " + "".join(self.rng.choice(list("abcdefghijkmnpqrstuvwxyz23456789"), size=int(self.rng.integers(4, 10))))

    def needles(self) -> Row:
        """Running text with 1 to 8 facts at random places, each asked one to three times at random places after it.

        Early facts and late questions are drawn more often than evenly: the longest distances need as much practice.
        """
        events: list[tuple[float, list[int], list[float]]] = []
        for key in draw_keys(self.rng, int(self.rng.integers(1, 9))):
            form = FORMS[0] if self.rng.random() < 0.55 else FORMS[int(self.rng.integers(1, len(FORMS)))]
            head = self.encode(form[0].format(key=key))
            value = self.encode(self.value())
            tail = self.encode(form[1])
            told = self.rng.uniform(0, 0.12 if self.rng.random() < 0.35 else 0.97)
            events.append((told, head + value + tail, [1.0] * len(head) + [0.0] * len(value) + [1.0] * len(tail)))
            for _ in range(int(self.rng.integers(1, 4))):
                asked = self.rng.uniform(told if self.rng.random() < 0.5 else max(told, 0.93), 1.0)
                weights = [1.0] * len(head) + [ANSWER] * len(value) + [1.0] * len(tail)
                events.append((max(asked, told + 1e-6), head + value + tail, weights))
        events.sort(key=lambda event: event[0])
        room = max(self.length - 1 - sum(len(event[1]) for event in events), 0)
        straw = self.text(room + 1)
        ids, weights, cursor = [0], [0.0], 0
        for place, tokens, counts in events:
            stop = int(place * room)
            ids += straw[cursor:stop].tolist() + tokens
            weights += [1.0] * (stop - cursor) + counts
            cursor = stop
        ids += straw[cursor:room].tolist()
        weights += [1.0] * (room - cursor)
        return self.finish(ids, weights)

    def pairs(self) -> Row:
        """Random key-value pairs, then the keys asked in random order; several such blocks a row."""
        ids, weights = [0], [0.0]
        while len(ids) < self.length:
            count = int(np.exp(self.rng.uniform(np.log(4), np.log(200))))
            tokens = self.rng.choice(self.vocabulary, size=2 * count, replace=False)
            shown = np.stack([tokens[:count], tokens[count:]], axis=1)
            asked = shown[self.rng.permutation(count)]
            ids += shown.reshape(-1).tolist() + asked.reshape(-1).tolist()
            weights += [0.0] * (2 * count) + [0.0, ANSWER] * count
        return self.finish(ids, weights)
