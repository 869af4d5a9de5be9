"""Rules that evict, against plain loops over small random queries and keys, and the cases in which they are something known."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from evictions import KV, RULES, SCALE, B, D, H, all_rules, prompted

from headwise.caches import LayerStore
from headwise.caches.rules.ada_kv import AdaKv
from headwise.caches.rules.h2o import H2o
from headwise.caches.rules.key_norm import KeyNorm
from headwise.caches.rules.pyramid_kv import PyramidKv
from headwise.caches.rules.snap_kv import SnapKv
from headwise.caches.rules.tova import Tova

PADS = (0, 3)
CALLS = (40, 1, 1, 3, 1, 36, 1)  # a prompt, tokens, a draft, a token, a further prompt, a token


# ---- the oracle: what is held after each call, by plain loops -----------------------------------------------------------


class Loops:
    """What rules choose, token by token; q, k (heads, tokens, d) of one row, numbers counted with its pads."""

    def __init__(self, q, k, pad):
        self.q, self.k, self.pad = q.tolist(), k.tolist(), pad
        self.mass = [{} for _ in range(KV)]

    def weights(self, h, i, keys):
        """{key: weight} of query i of head h."""
        dots = {j: SCALE * sum(x * y for x, y in zip(self.q[h][i], self.k[h // 2][j], strict=True)) for j in keys if j <= i}
        total = sum(math.exp(x) for x in dots.values())
        return {j: math.exp(x) / total for j, x in dots.items()}

    def votes(self, kv, keys, start, stop, *, window, kernel, pooling, together):
        """{key: score} for keys before the window."""
        by_head = []
        for h in (2 * kv, 2 * kv + 1):
            got = dict.fromkeys(keys, 0.0)
            for i in range(max(start, stop - window, self.pad), stop):
                for j, weight in self.weights(h, i, keys).items():
                    got[j] += weight if j < stop - window else 0.0
            by_head.append([got[j] for j in keys])
        if together:
            by_head = [[sum(pair) / 2 for pair in zip(*by_head, strict=True)]]
        pooled = [[0.0] * len(keys) for _ in by_head]
        for own, out in zip(by_head, pooled, strict=True):
            for place in range(len(keys)):
                near = [own[x] if 0 <= x < len(keys) else 0.0 for x in range(place - kernel // 2, place + kernel // 2 + 1)]
                out[place] = max(near) if pooling == "max" else sum(near) / kernel
        scores = [sum(column) / len(pooled) for column in zip(*pooled, strict=True)]
        return {j: score for j, score in zip(keys, scores, strict=True) if j < stop - window}

    def room(self, budget, kv, stop):
        own = budget[2 * kv] if isinstance(budget, list) else budget
        return max(1, math.floor(Fraction(str(own)) * (stop - self.pad))) if isinstance(own, float) else own

    def snap_kv(self, read, start, stop, *, budget, layer=None, beta=20, **how):
        kept = []
        for kv, keys in enumerate(read):
            room = self.room(budget, kv, stop)
            if layer is not None:
                room = pyramid(room, how["window"], beta, *layer, len(keys))
            score = self.votes(kv, keys, start, stop, together=False, **how)
            kept.append(best(score, room - min(room, how["window"])) + keys[len(keys) - min(room, how["window"], len(keys)) :])
        return kept

    def ada_kv(self, read, start, stop, *, budget, alpha, floor=False, normalize=False, **how):
        scores = [self.votes(kv, keys, start, stop, together=True, **how) for kv, keys in enumerate(read)]
        rooms = [self.room(budget, kv, stop) for kv in range(KV)]
        windows = [min(room, how["window"]) for room in rooms]
        own = shared(scores, [room - window for room, window in zip(rooms, windows, strict=True)], alpha, floor, normalize)
        return [best(scores[kv], own[kv]) + keys[len(keys) - min(windows[kv], len(keys)) :] for kv, keys in enumerate(read)]

    def h2o(self, read, start, stop, *, budget, recent):
        kept = []
        for kv, keys in enumerate(read):
            mass = self.mass[kv]
            for h, i in itertools.product((2 * kv, 2 * kv + 1), range(max(start, self.pad), stop)):
                for j, weight in self.weights(h, i, keys).items():
                    mass[j] = mass.get(j, 0.0) + weight / 2
            room = self.room(budget, kv, stop)
            last = min(recent, room) if isinstance(recent, int) else math.floor(Fraction(str(recent)) * room)
            old = [j for j in keys if j < stop - last]
            kept.append(best({j: mass[j] for j in old}, room - last) + [j for j in keys if j >= stop - last])
            self.mass[kv] = {j: mass[j] for j in kept[-1]}
        return kept

    def tova(self, read, start, stop, *, budget, newest=False):
        score = dict.fromkeys(read[0], 0.0)
        for h in range(H):
            for j, weight in self.weights(h, stop - 1, read[0]).items():
                score[j] += weight / H
        if newest:
            score[stop - 1] = math.inf
        return [best(score, self.room(budget, 0, stop))] * KV

    def key_norm(self, read, start, stop, *, budget):
        norms = [{j: -math.hypot(*self.k[kv][j]) for j in keys} for kv, keys in enumerate(read)]
        return [best(norm, self.room(budget, kv, stop)) for kv, norm in enumerate(norms)]


def best(score, count):
    """The keys of the largest scores, of equal ones the earlier, in the order of the text."""
    return sorted(sorted(score, key=lambda j: (-score[j], j))[:count])


def pyramid(room, window, beta, layer, layers, n):
    """A layer's budget, rounded to the nearest number, halves away from the layer's own end; n tokens are there."""
    mean = room - window
    if n < room or n < 2 * mean or mean <= 0 or layers == 1:
        return room
    first = min(2 * mean - mean // beta, n - window)
    fall = Fraction(2 * (first - mean), layers - 1)
    near = min(layer, layers - 1 - layer)
    down = math.floor(near * fall + Fraction(1, 2))
    return window + (first - down if layer == near else 2 * mean - first + down)


def shared(scores, rooms, alpha, floor, normalize):
    """Budgets of heads by the best scores of all."""
    rooms = [min(room, len(score)) for room, score in zip(rooms, scores, strict=True)]
    alpha = Fraction(str(alpha))
    ranked = []
    for kv, score in enumerate(scores):
        order = sorted(score.values(), reverse=True)
        part = sum(order[: rooms[kv]]) / sum(order) if normalize and order else 1.0
        safe = math.floor(alpha * rooms[kv]) if floor else 0
        ranked += [(-math.inf if i < safe else -x * part, kv, i) for i, x in enumerate(order)]
    own = [sum(kv == at for _, at, _ in sorted(ranked)[: sum(rooms)]) for kv in range(len(rooms))]
    if floor:
        return own
    wanted = [(1 - alpha) * m + alpha * room for m, room in zip(own, rooms, strict=True)]
    down = [math.floor(x) for x in wanted]
    for kv in sorted(range(len(rooms)), key=lambda kv: (down[kv] - wanted[kv], kv))[: sum(rooms) - sum(down)]:
        down[kv] += 1
    return down


def random(heads, n, generator):
    return torch.randn(B, heads, n, D, generator=generator, dtype=torch.float64)


def check_replayed(rule, name, *, layer=(0, 1), seed=0, calls=CALLS, **settings):
    """Runs a store and the loops side by side; returns what was held after each call."""
    generator, n = torch.Generator().manual_seed(seed), sum(calls)
    q, k, v = (random(heads, n, generator) for heads in (H, KV, KV))
    loops = [Loops(q[b], k[b], PADS[b]) for b in range(B)]
    store = LayerStore([None] * KV, [(tuple(range(KV)), rule.select([0, 2]))], layer)
    held, start, found = [[[] for _ in range(KV)] for _ in range(B)], 0, []
    if layer != (0, 1):
        settings["layer"] = layer
    for count in calls:
        stop = start + count
        store.extend(k[:, :, start:stop], v[:, :, start:stop], PADS)
        store.settle(q[:, :, start:stop], SCALE, ())
        for b, own in enumerate(loops):
            read = [had + [j for j in range(start, stop) if j >= PADS[b]] for had in held[b]]
            held[b] = getattr(own, name)(read, start, stop, **settings) if rule.every or start == 0 or count >= 32 else read
        assert store.held() == held, f"after {stop} tokens"
        found.append(store.held())
        start = stop
    return found


VOTING = {"window": 5, "kernel": 3, "pooling": "max"}
EACH = [9, 9, 14, 14]


@pytest.mark.parametrize("budget", [12, 0.3, 3, EACH, 1.0], ids=str)
@pytest.mark.parametrize("how", [VOTING, {**VOTING, "pooling": "mean", "kernel": 5}, {"window": 1, "kernel": 1, "pooling": "max"}])
def test_snap_kv_keeps_what_loops_keep(budget, how):
    check_replayed(SnapKv(given(budget), **how), "snap_kv", budget=budget, **how)


def given(budget):
    return torch.tensor(budget) if isinstance(budget, list) else budget


@pytest.mark.parametrize("layer", [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("budget", [12, 24, 3, 0.34, EACH], ids=str)
def test_pyramid_kv_keeps_what_loops_keep(layer, budget):
    check_replayed(PyramidKv(given(budget), **VOTING, beta=3), "snap_kv", layer=layer, budget=budget, beta=3, **VOTING)


@pytest.mark.parametrize("options", [{"alpha": a, "floor": f} for a in (0.0, 0.2, 0.5, 1.0) for f in (False, True)], ids=str)
@pytest.mark.parametrize("budget", [12, 0.3, 3, EACH, [60, 60, 9, 9]], ids=str)
def test_ada_kv_keeps_what_loops_keep(options, budget):
    for normalize in (False, True):
        settings = {**VOTING, **options, "normalize": normalize}
        check_replayed(AdaKv(given(budget), **settings), "ada_kv", seed=5, budget=budget, **settings)


@pytest.mark.parametrize("recent", [0.5, 0.0, 1.0, 0.3, 2, 100])
@pytest.mark.parametrize("budget", [10, 0.2, EACH, 1], ids=str)
def test_h2o_keeps_what_loops_keep(recent, budget):
    check_replayed(H2o(given(budget), recent), "h2o", budget=budget, recent=recent)


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("budget", [10, 0.2, 1], ids=str)
def test_tova_keeps_what_loops_keep(budget, newest):
    check_replayed(Tova(budget, newest), "tova", budget=budget, newest=newest)


@pytest.mark.parametrize("budget", [10, 0.3, EACH], ids=str)
def test_key_norm_keeps_what_loops_keep(budget):
    check_replayed(KeyNorm(given(budget)), "key_norm", budget=budget)


# ---- what all of them have in common --------------------------------------------------------------------------------------


@all_rules
def test_room_for_everything_evicts_nothing(make):
    for budget in (1.0, 60):
        store, *_ = prompted(make(budget), steps=5)
        assert store.held() == [[list(range(55))] * KV]


@all_rules
def test_the_output_changes_as_the_evicted_weights_say(make):
    """o' = (o - sum of evicted A_j v_j) / (1 - sum of evicted A_j), for the next token's read."""
    store, q, k, v = prompted(make(20), steps=2)
    q, k, v = q[:, :, :53], k[:, :, :53], v[:, :, :53]
    weights = (q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(2, 3) * SCALE).softmax(-1)[0, :, 0]
    held = store.held()[0]
    for view in itertools.chain.from_iterable(view.split() for view in store.extend(k[:, :, -1:], v[:, :, -1:])):
        (kv,) = view.heads
        own = (q[:, 2 * kv : 2 * kv + 2, -1:] @ view.k.transpose(2, 3) * SCALE).masked_fill(
            view.number[:, None, None] < 0, -torch.inf
        )
        read = (own.softmax(-1) @ view.v)[0, :, 0]
        gone = [j for j in range(52) if j not in held[kv]]
        assert 10 < len(gone) < 52
        a = weights[2 * kv : 2 * kv + 2]
        predicted = (a @ v[0, kv] - a[:, gone] @ v[0, kv, gone]) / (1 - a[:, gone].sum(-1, keepdim=True))
        torch.testing.assert_close(read, predicted, rtol=1e-12, atol=1e-14)


@all_rules
@pytest.mark.parametrize("budget", [7, 20])
def test_the_budget_is_met_at_every_step(make, budget):
    for n, steps in ((6, 3), (7, 3), (50, 0), (50, 1), (50, 6)):
        store, *_ = prompted(make(budget), n=n, steps=steps)
        sizes = [len(numbers) for numbers in store.held()[0]]
        room = budget if make(budget).every else budget + steps
        assert sum(sizes) == KV * (min(n, budget) + (min(steps, room - min(n, budget))))
        if make is not RULES["ada_kv"]:
            assert len(set(sizes)) == 1


@all_rules
def test_what_is_evicted_stays_away(make):
    before, *_ = prompted(make(15), steps=3)
    after, *_ = prompted(make(15), steps=9)  # the same text, six tokens on
    for old, new in zip(before.held()[0], after.held()[0], strict=True):
        assert {j for j in new if j < 53} <= set(old)
