"""Sequences in pages against the simplest model of them: lists of tokens."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch

from headwise.caches import Arena, Sequences
from headwise.caches.arena import LOOSE, SPARE
from headwise.caches.joining import concatenate, drop_range, join, stack
from headwise.errors import DeviceError, ShapeError

D = 2
TOKEN = D * 8 + 4  # bytes: a key in float64 and a number in int32


class Watched(Arena):
    """Notes how many pages were held at once since it was last made smaller."""

    peak = 0

    def take(self, count):
        found = super().take(count)
        self.peak = max(self.peak, self.held)
        return found

    def arrange(self, order):
        found = super().arrange(order)
        self.peak = len(self.refs)
        return found

    def empty(self):
        super().empty()
        if not len(self.refs):
            self.peak = 0


def parts_of(numbers):
    """Keys that name themselves."""
    number = torch.as_tensor(numbers, dtype=torch.int32)
    return {"k": number[..., None].double() * torch.tensor([1.0, -1.0], dtype=torch.float64), "number": number}


class Pair:
    """Sequences, and the lists that they should hold: lists[row][head]."""

    def __init__(self, sequences, lists):
        self.sequences, self.lists = sequences, lists

    def check(self):
        own, every = self.sequences, range(self.sequences.heads)
        assert own.lengths.tolist() == [[len(head) for head in row] for row in self.lists]
        if not own.arena.pools or not own.rows:
            return
        number, k = own.read("number", every), own.read("k", every)
        there = own.there(every, torch.device("cpu"))
        there = torch.ones(number.shape, dtype=torch.bool) if there is None else there
        assert number[there].tolist() == [token for row in self.lists for head in row for token in head]
        assert torch.equal(k[there], parts_of(number[there])["k"])


class World:
    """Several sequences in one arena, and what can be done to them."""

    def __init__(self, seed, page, packed, heads):
        self.rng = np.random.default_rng(seed)
        self.arena, self.heads = Watched(page, packed=packed), heads
        self.groups = [range(heads)] if seed % 2 else [[head] for head in reversed(range(heads))]
        self.last = 0
        self.pairs = [self.fresh(2), self.fresh(2)]

    def fresh(self, rows):
        own = Sequences(self.arena, self.heads)
        own.begin(rows)
        return Pair(own, [[[] for _ in range(self.heads)] for _ in range(rows)])

    def some_heads(self):
        return sorted(self.rng.choice(self.heads, self.rng.integers(1, self.heads + 1), replace=False).tolist())

    def new(self, shape):
        self.last += int(np.prod(shape))
        return np.arange(self.last - int(np.prod(shape)), self.last).reshape(shape)

    def append(self, pair):
        heads, c = self.some_heads(), int(self.rng.integers(1, 6))
        numbers = self.new((len(pair.lists), len(heads), c))
        counts = self.rng.integers(0, c + 1, numbers.shape[:2]) if self.rng.random() < 0.5 else None
        pair.sequences.append(heads, parts_of(numbers), self.groups, counts)
        for row, own in enumerate(pair.lists):
            for i, head in enumerate(heads):
                own[head] += numbers[row, i, : c if counts is None else counts[row, i]].tolist()

    def keep(self, pair):
        heads = self.some_heads()
        lengths = pair.sequences.lengths[:, heads]
        most = int(lengths.max(initial=0))
        slots = np.zeros((*lengths.shape, most), dtype=np.int64)
        counts = self.rng.integers(0, lengths + 1)
        for (row, i), length in np.ndenumerate(lengths):
            chosen = self.rng.permutation(length)[: counts[row, i]]
            slots[row, i, : len(chosen)] = np.sort(chosen) if self.rng.random() < 0.7 else chosen
            own = pair.lists[row][heads[i]]
            pair.lists[row][heads[i]] = [own[slot] for slot in slots[row, i, : len(chosen)]]
        pair.sequences.keep(heads, torch.from_numpy(slots), counts, self.groups)

    def drop(self, pair):
        heads = self.some_heads()
        lengths = pair.sequences.lengths[:, heads]
        slots = self.rng.integers(0, np.maximum(lengths, 1))
        pair.sequences.drop(heads, slots)
        for (row, i), slot in np.ndenumerate(slots):
            own = pair.lists[row][heads[i]]
            if own:
                own[slot] = own[-1]
                own.pop()

    def crop(self, pair):
        heads, tokens = self.some_heads(), int(self.rng.integers(0, 6))
        pair.sequences.crop(heads, tokens)
        for row in pair.lists:
            for head in heads:
                del row[head][max(len(row[head]) - tokens, 0) :]

    def overwrite(self, pair):
        """Some tokens, where there are any."""
        every, lengths = range(self.heads), pair.sequences.lengths
        slots = self.rng.integers(0, np.maximum(lengths, 1))[..., None]
        there = (lengths > 0)[..., None] & (self.rng.random((*lengths.shape, 1)) < 0.7)
        numbers = self.new(slots.shape)
        pair.sequences.write(every, slots, parts_of(numbers), there)
        for row, head, _ in np.argwhere(there):
            pair.lists[row][head][slots[row, head, 0]] = int(numbers[row, head, 0])

    def fork(self, pair):
        rows = self.rng.integers(0, len(pair.lists), self.rng.integers(1, 4)).tolist()
        self.pairs.append(Pair(pair.sequences.fork(rows), copied(pair.lists, rows)))

    def select(self, pair):
        rows = self.rng.integers(0, len(pair.lists), self.rng.integers(1, 4)).tolist()
        pair.sequences.select(rows)
        pair.lists = copied(pair.lists, rows)

    def clear(self, pair):
        rows = int(self.rng.integers(1, 4))
        pair.sequences.begin(rows)
        pair.lists = [[[] for _ in range(self.heads)] for _ in range(rows)]

    def join(self, pair):
        other = self.pairs[self.rng.integers(len(self.pairs))]
        rows = self.rng.integers(0, len(other.lists), len(pair.lists)).tolist()
        lengths = other.sequences.lengths[rows]
        start = 0 if self.rng.random() < 0.5 else self.rng.integers(0, lengths + 1)
        stop = None if self.rng.random() < 0.5 else self.rng.integers(0, lengths + 1)
        lists = copied(other.lists, rows)
        join(pair.sequences, other.sequences, rows, start, stop)
        for (row, head), length in np.ndenumerate(lengths):
            a = start if isinstance(start, int) else start[row, head]
            b = length if stop is None else stop[row, head]
            pair.lists[row][head] += lists[row][head][a:b]
            if len(pair.lists[row][head]) > 40:
                del pair.lists[row][head][5:]
        pair.sequences.lengths = np.array([[len(head) for head in row] for row in pair.lists])

    def concatenate(self, pair):
        parts = [p for p in self.pairs if len(p.lists) == len(pair.lists)][:3]
        if sum(int(p.sequences.lengths.max(initial=0)) for p in parts) < 60:
            made = concatenate([p.sequences for p in parts])
            lists = [[[t for p in parts for t in p.lists[r][h]] for h in range(self.heads)] for r in range(len(pair.lists))]
            self.pairs.append(Pair(made, lists))

    def stack(self, pair):
        other = self.pairs[self.rng.integers(len(self.pairs))]
        if len(pair.lists) + len(other.lists) <= 4:
            stack(pair.sequences, other.sequences)
            pair.lists = pair.lists + copied(other.lists, range(len(other.lists)))

    def drop_range(self, pair):
        heads = self.some_heads()
        lengths = pair.sequences.lengths[:, heads]
        start = self.rng.integers(0, lengths + 2)
        stop = start + self.rng.integers(-1, 12, lengths.shape)
        drop_range(pair.sequences, heads, start, stop)
        for (row, i), a in np.ndenumerate(start):
            del pair.lists[row][heads[i]][a : max(a, stop[row, i])]

    def trim(self, pair):
        pair.sequences.trim(self.groups)
        assert (len(self.arena.refs) - self.arena.held) * LOOSE < max(len(self.arena.refs), 1)

    def poison(self):
        """What is in pages and slots that nobody holds may be anything."""
        if not self.arena.pools:
            return
        used = np.zeros((len(self.arena.refs), self.arena.page), dtype=bool)
        for pair in self.pairs:
            own = pair.sequences
            for (row, head), length in np.ndenumerate(own.lengths):
                for slot in range(length):
                    used[own.table[row, head, slot // self.arena.page], slot % self.arena.page] = True
        self.arena.pools["k"][~torch.from_numpy(used)] = torch.nan
        self.arena.pools["number"][~torch.from_numpy(used)] = -7

    def check(self):
        counted = np.zeros(len(self.arena.refs), dtype=np.int64)
        for pair in self.pairs:
            pair.check()
            own = pair.sequences
            need = np.arange(own.table.shape[2]) < -(-own.lengths // self.arena.page)[..., None]
            assert (own.table[need] >= 0).all()
            np.add.at(counted, own.table[own.table >= 0], 1)
        assert (counted == self.arena.refs).all()
        peak = max(self.arena.peak, self.arena.held)
        assert len(self.arena.refs) <= peak + peak // SPARE
        if self.arena.pools:
            assert self.arena.nbytes == len(self.arena.refs) * self.arena.page * TOKEN


def copied(lists, rows):
    return [[list(head) for head in lists[row]] for row in rows]


STEPS = {
    "append": 6, "keep": 2, "drop": 2, "crop": 1, "overwrite": 2, "fork": 1, "select": 2, "clear": 1, "join": 2,
    "concatenate": 1, "stack": 1, "drop_range": 2, "trim": 1,
}  # fmt: skip
NAMES = [name for name, often in STEPS.items() for _ in range(often)]


@pytest.mark.parametrize("seed", range(14))
def test_ten_thousand_steps_against_lists(seed):
    """715 steps each: contents after every one, every page counted, none lost or leaked, no more memory than is allowed."""
    world = World(seed, page=2 + seed % 7, packed=seed % 3 > 0, heads=1 + seed % 3)
    for step in range(715):
        name = NAMES[world.rng.integers(len(NAMES))]
        getattr(world, name)(world.pairs[world.rng.integers(len(world.pairs))])
        world.check()
        if step % 5 == 0:
            world.poison()
        while len(world.pairs) > 4:
            world.pairs.pop(int(world.rng.integers(len(world.pairs))))  # its pages go with it
    for pair in world.pairs:
        pair.sequences.clear()
    assert world.arena.held == 0
    assert world.arena.nbytes == 0


def filled(page=4, rows=2, heads=2, tokens=10, packed=True, arena=None):
    arena = arena or Arena(page, packed=packed)
    own = Sequences(arena, heads)
    own.begin(rows)
    numbers = np.arange(rows * heads * tokens).reshape(rows, heads, tokens)
    own.append(range(heads), parts_of(numbers), [range(heads)])
    return own, numbers


def test_several_that_write_one_page_at_once_get_one_each():
    own, numbers = filled(rows=1, heads=1, tokens=6)
    own.select([0, 0, 0])
    assert own.arena.held == 2
    other = own.fork([1])
    own.write([0], np.full((3, 1, 1), 5), parts_of(np.array([[[70]], [[71]], [[72]]])))
    assert own.read("number", [0])[:, 0].tolist() == [[0, 1, 2, 3, 4, last] for last in (70, 71, 72)]
    assert other.read("number", [0])[0, 0].tolist() == numbers[0, 0].tolist()
    assert sorted(own.arena.refs[own.arena.refs > 0].tolist()) == [1, 1, 1, 1, 4]  # four last pages, and the first of all
    before = own.table.copy()
    other.clear()
    own.select([0])  # the last who holds a page keeps it
    own.write([0], np.full((1, 1, 1), 2), parts_of(np.array([[[9]]])))
    assert own.table.tolist() == before[:1].tolist()


def test_the_last_of_those_who_write_keeps_the_page():
    own, _ = filled(rows=1, heads=1, tokens=6)
    own.select([0, 0, 0])
    shared = own.table[0, 0, 1]
    own.write([0], np.full((3, 1, 1), 5), parts_of(np.array([[[70]], [[71]], [[72]]])))
    assert (own.table[:, 0, 1] == shared).tolist() == [False, False, True]


def test_pages_that_need_not_be_written_stay_shared():
    own, _ = filled(rows=2, heads=1, tokens=10)
    other, shared = own.fork(), own.arena.held
    own.write([0], np.full((2, 1, 1), 9), parts_of(np.array([[[70]], [[71]]])), np.array([[[True]], [[False]]]))
    assert own.arena.held == shared + 1
    other.drop([0], np.full((2, 1), 9))  # the last tokens
    other.keep([0], torch.arange(6).expand(2, 1, -1), np.full((2, 1), 6), [[0]])  # the first ones
    assert own.arena.held == shared  # the page of the first row's last tokens is gone
    assert own.arena.refs[other.table[:, 0, :2]].tolist() == [[2, 2], [2, 2]]


def test_growing_beside_others_moves_none_of_their_pages():
    own, _ = filled()
    other, theirs = filled(arena=own.arena)
    before, forked = other.version, own.fork()
    own.clear()
    for sequences in (forked, forked.fork()):
        sequences.append([0, 1], parts_of(np.full((2, 2, 9), 5)), [range(2)])
    assert other.version == before
    assert other.read("number", [0, 1]).tolist() == theirs.tolist()


def test_what_is_packed_is_read_where_it_is():
    own, numbers = filled(tokens=10)
    pool = own.arena.pools["k"]
    read = own.read("k", range(2))
    assert read.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    assert own.read("number", [1]).tolist() == numbers[:, 1:].tolist()
    assert own.read("k", [1]).untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    own.select([1, 1, 1])  # the same pages
    read = own.read("number", range(2))
    assert read.stride(0) == 0
    assert read.tolist() == [numbers[1].tolist()] * 3
    own.select([0])
    own.append([0], parts_of(np.array([[[90] * 5]])), [range(2)])
    assert own.read("number", [0]).tolist() == [[[*numbers[1, 0].tolist(), *[90] * 5]]]


def test_pages_of_others_stay_when_pages_move():
    own, numbers = filled(packed=False)
    other, theirs = filled(arena=own.arena)
    forked = own.fork([1])
    third, _ = filled(arena=own.arena, tokens=40)
    third.clear()
    size, before = own.arena.nbytes, other.version
    own.trim()
    assert own.arena.nbytes < size
    assert own.arena.nbytes == own.arena.held * 4 * TOKEN
    assert other.version != before
    for sequences, wanted in ((own, numbers), (other, theirs), (forked, numbers[1:])):
        assert sequences.read("number", range(2)).tolist() == wanted.tolist()


def test_pages_whose_holder_is_not_known_do_not_move():
    own, _ = filled()
    kept = own.arena.take(1)
    own.arena.pools["number"][kept[0]] = 77
    own.crop([0, 1], 9)
    own.trim()
    assert own.arena.refs[kept[0]] == 1
    assert own.arena.pools["number"][kept[0]].tolist() == [77] * 4
    own.arena.release(kept)
    own.trim()
    assert len(own.arena.refs) == own.arena.held == 4


def test_a_fork_that_is_gone_holds_nothing():
    own, _ = filled()
    forked = own.fork()
    assert own.arena.refs.tolist() == [2] * 12
    forked.itself = forked  # only the collector finds it
    del forked
    gc.collect()
    assert own.arena.refs.tolist() == [1] * 12
    again = copy.copy(own)
    assert own.arena.refs.tolist() == [2] * 12
    del again
    own.clear()
    assert own.arena.nbytes == 0


def test_a_deep_copy_has_an_arena_of_its_own():
    own, numbers = filled()
    own.select([0, 0])
    made = copy.deepcopy({"a": own, "b": own.fork([0])})
    assert made["a"].arena is made["b"].arena
    assert made["a"].arena is not own.arena
    assert made["a"].arena.refs.tolist() == [3] * 6 + [0] * 6
    own.write([0], np.zeros((2, 1, 1), dtype=int), parts_of(np.full((2, 1, 1), 99)))
    assert made["a"].read("number", [0])[:, 0, 0].tolist() == [numbers[0, 0, 0]] * 2


def test_forks_do_not_share_pages_that_hold_nothing():
    own, _ = filled(tokens=10)
    own.reserve(own.lengths + 20, [range(2)])
    own.select([0, 0])
    assert own.pages == 2 * (8 + 3)
    assert own.fork().pages == 4 * 3
    own.append([0, 1], parts_of(np.full((2, 2, 6), 5)), [range(2)])
    assert own.arena.held == 2 * (2 + 6 + 2)  # two full pages shared; the row that has the spare pages uses them


def test_parts_of_other_kinds():
    own, _ = filled()
    half = {"k": torch.full((2, 2, 1, D), 0.1, dtype=torch.float32), "number": torch.zeros(2, 2, 1, dtype=torch.int32)}
    own.append([0, 1], half, [range(2)])
    assert own.read("k", [0])[0, 0, -1].tolist() == [float(torch.tensor(0.1))] * 2  # wide enough for both
    with pytest.raises(ShapeError, match=r"is \(3,\), what is held is \(2,\)"):
        own.append([0, 1], {**half, "k": torch.zeros(2, 2, 1, 3)}, [range(2)])
    with pytest.raises(DeviceError, match="came on meta, what is held is on cpu"):
        own.append([0, 1], {**half, "k": half["k"].to("meta")}, [range(2)])
    assert own.lengths.tolist() == [[11, 11]] * 2
    own.begin(2)
    own.append([0, 1], {**half, "k": torch.zeros(2, 2, 1, 3)}, [range(2)])  # nothing is held: all may change
    assert own.read("k", [0]).dtype == torch.float32
    assert own.read("k", [0]).shape == (2, 1, 1, 3)
    own.append([0, 1], {**half, "k": torch.ones(2, 2, 1, 3, dtype=torch.float64)}, [range(2)])
    assert own.read("k", [0]).dtype == torch.float64
    assert own.read("k", [0])[0, 0].tolist() == [[0.0] * 3, [1.0] * 3]


def test_what_was_written_in_inference_mode_grows_outside_of_it():
    with torch.inference_mode():
        own, numbers = filled(tokens=4)
        own.append([0], parts_of(np.full((2, 1, 3), 5)), [range(2)])
        own.trim()
    own.select([0, 0])
    with torch.no_grad():
        own.append([0], parts_of(np.full((2, 1, 3), 6)), [range(2)])
    assert own.read("number", [0]).tolist() == [[[*numbers[0, 0].tolist(), 5, 5, 5, 6, 6, 6]]] * 2


@pytest.mark.parametrize("packed", [True, False])
def test_without_room_all_stays_as_it_was(monkeypatch, packed):
    own, numbers = filled(tokens=4, packed=packed)
    pools, made = dict(own.arena.pools), torch.zeros

    def full(*size, dtype, **options):
        if dtype == torch.int32:
            raise MemoryError("no room")
        return made(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(MemoryError):
        own.append([0, 1], parts_of(np.full((2, 2, 4), 5)), [range(2)])
    monkeypatch.undo()
    assert all(own.arena.pools[name] is pool for name, pool in pools.items())
    assert own.read("number", [0, 1]).tolist() == numbers.tolist()
    own.append([0, 1], parts_of(np.full((2, 2, 4), 5)), [range(2)])
    assert own.read("number", [0, 1])[..., :4].tolist() == numbers.tolist()
    assert own.arena.refs.tolist() == [1] * 8


def test_pools_that_are_not_packed_grow_by_a_sixteenth():
    own, _ = filled(page=4, rows=1, heads=1, tokens=4 * 160, packed=False)
    sizes = set()
    for i in range(4 * 40):
        own.append([0], parts_of(np.array([[[i]]])), [[0]])
        sizes.add(len(own.arena.refs))
        assert own.pages * 4 - own.lengths.sum() < 4  # less than a page ahead
    assert sorted(sizes) == [170, 180, 191, 202]


def test_whole_pages_are_shared_when_sequences_are_joined():
    own, _ = filled(page=4, rows=1, heads=1, tokens=8)
    long, _ = filled(page=4, rows=1, heads=1, tokens=11, arena=own.arena)
    held = own.arena.held
    join(own, long)
    assert own.arena.held == held  # tokens 8..18 are the other's pages 0..2
    assert own.table[0, 0, 2:].tolist() == long.table[0, 0].tolist()
    join(own, long, start=3, stop=10)  # 19 and 3 are at the same place in a page: one is copied, the other six shared
    assert own.arena.held == held + 1
    assert own.table[0, 0, 5:].tolist() == long.table[0, 0, 1:].tolist()
    join(own, own, start=1, stop=3)  # 26 and 1 are not
    assert own.arena.held == held + 2
    assert own.read("number", [0])[0, 0].tolist() == [*range(8), *range(11), *range(3, 10), 1, 2]
    assert long.read("number", [0])[0, 0].tolist() == [*range(11)]
    drop_range(own, [0], 4, 12)  # whole pages: nothing is copied, and one is not held any more
    assert own.arena.held == held + 1
    last = own.pages
    drop_range(own, [0], 8, 99)
    assert own.pages == 2 < last
    with pytest.raises(ShapeError, match="two arenas"):
        join(own, filled()[0])
    with pytest.raises(ShapeError, match="sequences of 2 heads"):
        stack(own, filled(arena=own.arena)[0])
    with pytest.raises(ShapeError, match="2 rows cannot be joined to 1"):
        join(own, long, [0, 0])


def test_page_numbers_times_tokens_may_pass_int32():
    own, _ = filled(page=64, rows=1, heads=1, tokens=64)
    own.table[:] = 2**31 - 1
    assert own._flat([0], np.array([[[63]]])).tolist() == [[[(2**31 - 1) * 64 + 63]]]
    own.table[:] = -1


def test_sequences_of_no_tokens():
    own = Sequences(Arena(4), 2)
    own.begin(2)
    own.crop([0, 1], 3)
    own.select([1, 0, 0])
    own.drop([0], np.full((3, 1), 3))
    own.keep([0, 1], torch.zeros(3, 2, 0, dtype=torch.long), np.zeros((3, 2), dtype=int), [range(2)])
    join(own, own.fork())
    drop_range(own, [0], 0, 5)
    own.append([0, 1], parts_of(np.zeros((3, 2, 0), dtype=int)), [range(2)])
    own.append([0], parts_of(np.arange(6).reshape(3, 1, 2)), [range(2)], np.array([[0], [2], [1]]))
    assert own.lengths.tolist() == [[0, 0], [2, 0], [1, 0]]
    assert own.read("k", [1]).shape == (3, 1, 0, D)
    assert own.there([0, 1], torch.device("cpu"))[..., 0].tolist() == [[False, False], [True, False], [True, False]]
    own.drop([0, 1], np.array([[3, 3], [0, 3], [0, 3]]))
    assert own.read("number", [0])[1, 0].tolist() == [3]
    table, lengths = own.on_device()
    assert table.shape == (6, own.table.shape[2])
    assert lengths.tolist() == [0, 0, 1, 0, 0, 0]
