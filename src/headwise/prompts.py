"""The token rows that probes and tasks measure on: needles in a haystack, repeated random tokens, key-value pairs.

Every maker is a pure function of its seed and works on token ids, with a tokenizer (readable needles) or without one
(random ids, for models that have no tokenizer at hand). The training of the embedded models uses the same makers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Encode = Callable[[str], list[int]]

ADJECTIVES = (
    "amber brave calm dark early faint gentle hidden icy jolly keen late mild narrow old plain quiet rapid silent tall "
    "upper vivid warm young blue green red white black golden heavy light small large bright cold dry empty fresh grand"
).split()
NOUNS = (
    "falcon garden harbor island jacket kettle ladder mirror needle orchard palace quarry river saddle temple umbrella "
    "valley wagon bridge castle desert engine forest glacier hammer lantern meadow ocean pepper rocket shadow tower "
    "violin winter anchor basket candle dragon eagle feather"
).split()
WORDS = (
    "time year people way day man thing world life hand part child eye place work week case point company number group "
    "problem fact house water room money story month right study book word business issue side kind head service friend "
    "father power hour game line end member law car city name president team minute idea body information back parent "
    "face level office door health person art war history party result change morning reason research girl moment air "
    "teacher force education food age policy music market sense nation plan college interest death course experience "
    "effect use class control field development role effort rate heart drug show leader light voice wife police mind "
    "price report decision son view relationship town road arm difference value building action season society tax "
    "director position player record paper space ground form event matter center couple site project activity star "
    "table need court image phone data type source card term test file user code state list path text string error key"
).split()
STATEMENT = "\nThe password of the {key} is{value}.\n"
QUESTION = "\nThe password of the {key} is"


@dataclass(frozen=True)
class NeedlePrompt:
    """One haystack with a needle, and the question at its end.

    input_ids: the tokens, ending with the question. answer: the tokens that must follow. needle: (start, stop) of the
    answer's tokens inside input_ids. depth: where the needle stands, 0 at the start of the haystack and 1 at its end.
    """

    input_ids: tuple[int, ...]
    answer: tuple[int, ...]
    needle: tuple[int, int]
    depth: float


@dataclass(frozen=True)
class RecallPrompt:
    """Key-value pairs, then keys asked again. queries: positions of the asked keys in input_ids; answers: their values."""

    input_ids: tuple[int, ...]
    queries: tuple[int, ...]
    answers: tuple[int, ...]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def draw_keys(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different keys such as "amber falcon"."""
    drawn = rng.choice(len(ADJECTIVES) * len(NOUNS), size=count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in drawn.tolist()]


def _readable_fact(encode: Encode, rng: np.random.Generator, key: str, words: int) -> tuple[list[int], list[int], tuple[int, int]]:
    """A statement, its question, and where in the statement the value stands (token ids).

    The question is cut where the statement's tokens begin to differ, so that the answer is exactly what the statement
    says next, whatever the tokenizer merges.
    """
    value = "".join(f" {word}" for word in rng.choice(WORDS, size=words, replace=False))
    statement = encode(STATEMENT.format(key=key, value=value))
    start = _common_prefix(statement, encode(QUESTION.format(key=key)))
    stop = _common_prefix(statement, encode(QUESTION.format(key=key) + value))
    return statement, statement[:start], (start, stop)


def _token_fact(vocabulary: np.ndarray, rng: np.random.Generator, words: int) -> tuple[list[int], list[int], tuple[int, int]]:
    ids = rng.choice(vocabulary, size=2 + words, replace=len(vocabulary) < 2 + words).tolist()
    return ids, ids[:2], (2, 2 + words)


def needle_prompts(
    haystack: Sequence[int],
    length: int,
    depths: Sequence[float],
    *,
    encode: Encode | None = None,
    vocabulary: np.ndarray | None = None,
    begin: Sequence[int] = (),
    count: int = 1,
    distractors: int = 3,
    words: int = 5,
    seed: int = 0,
) -> list[NeedlePrompt]:
    """Makes `count` prompts for each depth: a fact hidden among `distractors` like facts in a haystack, asked at the end.

    Args:
        haystack: token ids of running text (or random tokens); each prompt takes a random window of it.
        length: tokens of prompt and answer together; the answer of every prompt has its own length.
        depths: in [0, 1]; where the needle starts, as a share of the haystack.
        encode: text to token ids without special tokens; needles are sentences.
        vocabulary: used without `encode`: needles are random ids from it, two of key and `words` of value.
        begin: ids put first (the model's begin-of-sequence token).
    """
    rng = np.random.default_rng(seed)
    if vocabulary is None:
        vocabulary = np.unique(np.asarray(haystack))
    prompts = []
    for depth in depths:
        for _ in range(count):
            facts = [
                _readable_fact(encode, rng, key, words) if encode else _token_fact(vocabulary, rng, words)
                for key in draw_keys(rng, 1 + distractors)
            ]
            statement, question, (start, stop) = facts[0]
            room = length - len(begin) - len(question) - (stop - start) - sum(len(fact[0]) for fact in facts)
            if room < 0 or len(haystack) < room:
                raise ValueError(f"length {length} leaves no room for {1 + distractors} facts in {len(haystack)} haystack tokens")
            offset = int(rng.integers(len(haystack) - room + 1))
            straw = list(haystack[offset : offset + room])
            places = [round(depth * room), *rng.integers(room + 1, size=distractors).tolist()]
            ids, at = list(begin), (0, 0)
            cursor = 0
            for place, index in sorted(zip(places, range(len(facts)), strict=True)):
                ids += straw[cursor:place]
                cursor = place
                if index == 0:
                    at = (len(ids) + start, len(ids) + stop)
                ids += facts[index][0]
            ids += straw[cursor:] + question
            prompts.append(NeedlePrompt(tuple(ids), tuple(statement[start:stop]), at, float(depth)))
    return prompts


def repeated_rows(
    vocabulary: np.ndarray, rows: int, length: int, *, begin: Sequence[int] = (), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, then the same tokens again: ([rows, length] ids, [rows] periods), each row with its own period.

    A row is `begin`, a random lead, a segment of `period` distinct-as-possible random tokens, and the segment again.
    Periods and leads are drawn per row, so that a head that always looks a fixed distance back is not taken for one
    that matches content. The second copy fills the row's end: token i repeats token i - period for the last `period`.
    """
    rng = np.random.default_rng(seed)
    room = length - len(begin)
    if room < 8:
        raise ValueError(f"rows of {length} tokens leave no room for a repeat; at least {len(begin) + 8} are needed")
    ids = np.empty((rows, length), dtype=np.int64)
    periods = rng.integers(max(3, room // 4), room // 2 + 1, size=rows)
    for row, period in enumerate(periods):
        distinct = len(vocabulary) >= room
        first = rng.choice(vocabulary, size=room - period, replace=not distinct)
        ids[row] = np.concatenate([np.asarray(begin, dtype=np.int64), first, first[-period:]])
    return ids, periods


def recall_prompts(
    vocabulary: np.ndarray, rows: int, pairs: int, queries: int, *, begin: Sequence[int] = (), seed: int = 0
) -> list[RecallPrompt]:
    """`pairs` random key-value pairs in a row, then `queries` of the keys in random order, each followed by its value."""
    rng = np.random.default_rng(seed)
    if queries > pairs or len(vocabulary) < 2 * pairs:
        raise ValueError(f"{queries} queries of {pairs} pairs need queries <= pairs and {2 * pairs} tokens of vocabulary")
    prompts = []
    for _ in range(rows):
        tokens = rng.choice(vocabulary, size=2 * pairs, replace=False)
        keys, values = tokens[:pairs], tokens[pairs:]
        asked = rng.permutation(pairs)[:queries]
        shown = np.stack([keys, values], axis=1).reshape(-1)
        again = np.stack([keys[asked], values[asked]], axis=1).reshape(-1)
        start = len(begin) + len(shown)
        prompts.append(
            RecallPrompt(
                (*begin, *shown.tolist(), *again.tolist()),
                tuple(range(start, start + 2 * queries, 2)),
                tuple(values[asked].tolist()),
            )
        )
    return prompts
