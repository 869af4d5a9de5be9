"""A window, and beyond it tokens that a small network scores as worth keeping."""

import itertools

import pytest
import torch
from torch import nn

from headwise import Causal, Window
from headwise.errors import InputError, ShapeError
from headwise.mechanisms import Attention, Rotary
from headwise.mechanisms.cached import lte
from headwise.mechanisms.cached._retention import Bank, Router
from headwise.mechanisms.cached.lte import Lte, Sparsity
from headwise.nn import Transformer, build
from headwise.stages.sink import Sink


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module, seed=0, by=0.3):
    for number, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data.double() + by * noise(*parameter.shape, seed=seed + number)
    return module.double().eval()


def close(a, b, within=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=within)


def test_scores_depend_on_the_neighbours_within_the_margin_only():
    router = shaken(Router(2, 16))
    assert (router.margin, Router(1, 16, (1, 2)).margin) == (6, 3)
    u, real = noise(1, 2, 40, 16), torch.ones(1, 40, dtype=torch.bool)
    before, far = router(u, real), []
    for other in range(40):
        changed = u.clone()
        changed[:, :, other] += 1.0
        moved = (router(changed, real) != before).any(1)[0].nonzero().flatten() + 6
        far += (moved - other).tolist()
        within = [j for j in range(6, 34) if abs(j - other) <= 6 and (j - other) % 2 == 0]  # dilations of two: even distances
        assert moved.tolist() == within
    one = u.clone()
    one[:, 1] += 1.0
    assert torch.equal(router(one, real)[:, 0], before[:, 0])  # heads do not mix


def test_a_window_that_is_too_narrow_for_the_scores_is_refused():
    with pytest.raises(ShapeError, match="give 5 at least"):
        Lte(32, 4, window=4)
    mixer = shaken(Lte(32, 4, window=5, budget=3, sinks=1))
    x = noise(1, 40, 32)
    before = mixer(x, Causal())
    for at in (7, 20, 39):
        other = x.clone()
        other[:, at:] += 1.0
        assert torch.equal(mixer(other, Causal())[:, :at], before[:, :at])
    with pytest.raises(ShapeError, match="1 at least, and no more sinks"):
        Lte(32, 4, budget=3, sinks=4)
    with pytest.raises(ShapeError, match="can't be obeyed"):
        mixer(x, Causal(), Window(3))
    with pytest.raises(ShapeError, match="can't be obeyed"):
        mixer(x)
    with pytest.raises(ShapeError, match="attention_mask is"):
        mixer(x, Causal(), attention_mask=torch.ones(1, 3))


def test_the_bank_is_what_it_is_token_by_token():
    """Many scores are equal; batches, heads and pieces of any size."""
    size = 4
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(-3, 6, (2, 3, 60), generator=generator).double()
    score = score.masked_fill(score <= 0, -torch.inf)
    place = torch.arange(60).expand(2, 3, 60)
    for pieces in ([1] * 60, [7, 1, 30, 22], [60]):
        bank, start = Bank.empty(2, 3, size, score), 0
        until = torch.zeros(2, 3, 61, dtype=torch.long)
        for piece in pieces:
            now = slice(start, start + piece)
            where = torch.cat([bank.slot.where(bank.score > -torch.inf, 60), place[..., now]], -1)
            bank, went = bank.admit(score[..., now], place[..., now], place[..., now], place[..., now] + 100)
            until.scatter_(-1, where, went)
            start += piece
        for b, h in itertools.product(range(2), range(3)):
            inside, gone = {}, {}
            for j in range(60):
                gone[j] = j + 100
                if score[b, h, j] > -torch.inf:
                    inside[j] = float(score[b, h, j])
                    if len(inside) > size:
                        least = min(inside.values())
                        last = max(i for i in inside if inside[i] == least)
                        gone[last] = j + 100
                        del inside[last]
            for j in inside:
                gone[j] = lte.FAR
            assert until[b, h, :60].tolist() == list(gone.values())
            assert sorted(bank.slot[b, h].tolist()) == sorted(inside)
            assert bank.score[b, h].tolist() == sorted(inside.values(), reverse=True)
            assert bank.place[b, h].tolist() == sorted(inside, key=lambda i: (-inside[i], i))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [3, 256])
def test_long_texts_are_read_as_the_oracle_reads_them(chunk, monkeypatch):
    """Also with places, in pieces behind padding; the bank is full and changes again and again."""
    monkeypatch.setattr(lte, "CHUNK", chunk)
    mixer = shaken(Lte(16, 2, kv_heads=1, window=7, budget=6, sinks=2, dilations=(2, 2)))
    mixer.router.bias.fill_(0.1)
    x = noise(2, 60, 16)
    whole = mixer(x, Causal())
    for row in range(2):
        close(whole[row], lte.oracle(mixer, x[row], None), 1e-11)
    mixer.rotary = Rotary(100.0)
    whole = mixer(x, Causal())
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, :9] = False
    moved = x.clone()
    moved[1, 9:], moved[1, :9] = x[1, :51], 1e3
    for pieces in ((60,), (1,) * 60, (20, 1, 1, 30, 8)):
        cache, out, start = mixer.new_cache(), [], 0
        for piece in pieces:
            now = slice(start, start + piece)
            out.append(mixer(moved[:, now], Causal(), cache=cache, attention_mask=real[:, now]))
            start += piece
        out = torch.cat(out, 1)
        close(out[0], whole[0], 1e-11)
        close(out[1, 9:], whole[1, :51], 1e-11)
        assert (len(cache), cache.counted.tolist()) == (60, [60, 51])


@torch.no_grad()
def test_no_cache_is_larger_than_window_and_budget():
    mixer = shaken(Lte(32, 4, kv_heads=2, window=11, budget=7, sinks=2))
    cache = mixer.new_cache()
    for n in (1, 30, 1, 100):
        mixer(noise(1, n, 32, seed=n), Causal(), cache=cache)
        assert (cache.k.shape, cache.bank_k.shape) == ((1, 2, 12, 8), (1, 2, 7, 8))
        assert cache.nbytes == 2 * 8 * ((12 + 7) * 2 * 8 + 12 + 7 + 7)
    assert bool((cache.bank.score > 0).all())
    assert cache.bank.place.amax() <= 132 - 13
    assert (cache.bank.place < 2).sum(-1).tolist() == [[2, 2]]  # sinks stay


def test_in_training_all_that_score_are_kept_and_learn_what_their_values_are_worth():
    mixer = shaken(Lte(16, 2, window=5, budget=3, sinks=1, dropout=0.0)).train()
    nn.init.constant_(mixer.router.bias, 0.2)
    x = noise(2, 30, 16)
    out = mixer(x, Causal())
    wanted = torch.stack([lte.oracle(mixer, row, None) for row in x])
    close(out, wanted, 1e-11)
    weight, leaves = noise(2, 30, 16, seed=1), list(mixer.parameters())
    mine, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, wanted))
    for a, b in zip(mine, theirs, strict=True):
        assert bool(b.any())
        close(a, b, 1e-9)
    with torch.no_grad():
        cache = mixer.new_cache()
        with_cache = mixer(x, Causal(), cache=cache)  # without gradients there is a budget, too
        close(with_cache, mixer.eval()(x, Causal()))
        assert not torch.allclose(with_cache, out)
    mixer.train()
    fresh = mixer.new_cache()
    for filled in (cache, fresh):
        if not len(filled):
            mixer(x, Causal(), cache=filled)
        with pytest.raises(InputError, match="whole texts are read"):
            mixer(x[:, :1], Causal(), cache=filled)


def test_dropout_is_of_the_scores_in_training_only():
    torch.manual_seed(0)
    mixer = shaken(Lte(16, 2, window=5, budget=3, sinks=1, dropout=0.5))
    x = noise(1, 30, 16)
    assert torch.equal(mixer(x, Causal()), mixer(x, Causal()))
    mixer.train()
    mixer.router.bias.data.fill_(0.0)
    assert not torch.equal(mixer(x, Causal()), mixer(x, Causal()))


def test_the_loss_on_scores_holds_heads_to_their_budget():
    model = Transformer(20, 16, 2, 2, mixer=[("lte", {"window": 8, "budget": 10, "dropout": 0.0}), "softmax"], context=64)
    sparsity = Sparsity(model, every=4)
    ids = torch.randint(0, 20, (2, 40))
    (layer,) = sparsity.layers
    with pytest.raises(InputError, match="no pass in training"):
        sparsity.loss()
    with sparsity:
        model(ids)
        (found,) = sparsity._passes()
        margin = layer.router.margin
        assert found.known.tolist() == [[True] * (40 - margin) + [False] * margin] * 2
        assert sparsity.loss().item() == 0.0
        sparsity.multipliers = [torch.tensor([0.5, 2.0])]
        by_hand = (found.score[..., : 40 - margin].clamp(min=0) * torch.tensor([0.5, 2.0])[:, None]).mean()
        torch.testing.assert_close(sparsity.loss(), by_hand)
        sparsity.loss().backward()
        assert bool(layer.router.bias.grad.any())
    assert layer.watched is None
    with pytest.raises(InputError, match="no Lte layers"):
        Sparsity(nn.Linear(2, 2))


def test_multipliers_follow_how_many_are_kept():
    mixer = Lte(16, 2, window=5, budget=20, sinks=1)
    sparsity = Sparsity(mixer, every=4)
    nexts = sparsity._next(torch.tensor([1e-3] * 6), torch.tensor([2.0, 1.0, 0.99, 0.96, 0.95, 0.1]))
    torch.testing.assert_close(nexts, torch.tensor([1.5e-3, 1.5e-3, 1e-3, 1e-3, 5e-4, 5e-4]))
    nexts = sparsity._next(torch.tensor([0.0, 0.0, 1.5e-9, 0.9, 0.0]), torch.tensor([2.0, 0.95, 0.5, 3.0, 0.96]))
    torch.testing.assert_close(nexts, torch.tensor([1e-9, 0.0, 0.0, 1.0, 1e-9]), rtol=1e-6, atol=0)
    keep = torch.zeros(2, 2, 50, dtype=torch.bool)
    with sparsity:
        for many in (50, 20):
            keep[:, 0], keep[:, 1, :many] = True, True
            keep[:, 1, many:] = False
            mixer.watched.append(lte.Watched(torch.zeros(2, 2, 50), torch.ones(2, 50, dtype=torch.bool), keep.clone()))
            sparsity.step()
        assert sparsity.kept[0].tolist() == pytest.approx([50.0, 50 + 2 / 3 * -30])  # 2 / (1 + 4 // 2)
        assert sparsity.multipliers[0].tolist() == [0.0, 0.0]
        for _ in range(2):
            mixer.watched.append(lte.Watched(torch.zeros(2, 2, 50), torch.ones(2, 50, dtype=torch.bool), keep))
            sparsity.step()
        assert sparsity.multipliers[0].tolist() == pytest.approx([1e-9, 1e-9])


@torch.no_grad()
def test_what_is_read_is_a_window_sinks_and_columns():
    """Keep decided by hand, through the last bias and one channel of the keys."""
    mixer = shaken(Lte(16, 2, window=6, budget=30, sinks=3))
    plain = Attention(16, 2).double()
    plain.projections = mixer.projections
    mixer.router.last.zero_()
    x = noise(1, 40, 16)
    mixer.router.bias.fill_(-1.0)
    close(mixer(x, Causal()), plain(x, Causal(), Window(7) | Sink(3)))
    mixer.router.bias.copy_(torch.tensor([1.0, -1.0]))  # a head that keeps all, and one that keeps none
    p = mixer.projections
    wide, narrow = plain(x, Causal()), plain(x, Causal(), Window(7) | Sink(3))
    for head, wanted in ((0, wide), (1, narrow)):
        weight = p.out.weight.clone()
        p.out.weight[:, (1 - head) * 8 : (2 - head) * 8] = 0.0
        stages = (Causal(),) if head == 0 else (Causal(), Window(7) | Sink(3))
        assert wanted is not None
        if head == 0:
            close(mixer(x, Causal())[:, :36], plain(x, *stages)[:, :36])  # room for all of them until then
        else:
            close(mixer(x, Causal()), plain(x, *stages))
        p.out.weight.copy_(weight)


@torch.no_grad()
def test_gated_delta_net_and_lte_take_turns():
    model = build("hybrid", 30, 32, 4, 4, full="lte", ratio=1, context=64).double().eval()
    assert [type(block.mixer).__name__ for block in model.blocks] == ["GatedDeltaNet", "Lte"] * 2
    ids = torch.randint(0, 30, (2, 60), generator=torch.Generator().manual_seed(0))
    whole, caches, outs, sizes = model(ids), model.new_caches(), [], []
    for a, b in itertools.pairwise((0, 25, 26, 50, 60)):
        outs.append(model(ids[:, a:b], caches=caches))
        sizes.append(caches.nbytes)
    close(torch.cat(outs, 1), whole, 1e-10)
    assert len(set(sizes)) == 1
