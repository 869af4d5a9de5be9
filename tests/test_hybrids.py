"""Linear, window and full attention in one stack: by layers, and by heads of one layer."""

import itertools

import pytest
import torch

from headwise import Causal, Window
from headwise.errors import ShapeError
from headwise.mechanisms import Attention
from headwise.mechanisms.linear.delta_net import DeltaNet
from headwise.mechanisms.side_by_side import SideBySide
from headwise.nn import Transformer, build, from_pretrained, mixer
from headwise.testing._check import Item, Skipped, checks_for

IDS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
MIXES = {
    "by layers": ["delta_net", "softmax", "gated_delta_net", "softmax"],
    "by heads": {"softmax": 2, "delta_net": 2},
    "by heads of three kinds": {"cope": 1, "softmax": 2, "delta_net": 1},
}


class Beside:
    """What the kit looks at: examples of a mixer that the inventory does not list."""

    @staticmethod
    def examples(heads, size):
        parts = Attention(2 * size, 2), Attention(size, 1), DeltaNet((heads - 3) * size, heads - 3)
        return [SideBySide(parts, [(), (Window(9),), ()])]


@pytest.mark.parametrize("check", checks_for("mixer"), ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance_of_heads_of_three_kinds(check):
    item = Item("mixer", "SideBySide", SideBySide, Beside)
    try:
        check(item)
    except Skipped as why:
        pytest.skip(str(why))
    assert check.__doc__


@pytest.mark.parametrize("mix", MIXES)
def test_a_hybrid_decodes_as_in_one_pass(mix, tmp_path):
    torch.manual_seed(0)
    model = Transformer(50, 32, 4, 4, mixer=MIXES[mix], context=64).double().eval()
    with torch.no_grad():
        whole = model(IDS)
        caches, outs = model.new_caches(), []
        for a, b in itertools.pairwise((0, 17, 18, 30, 40)):
            outs.append(model(IDS[:, a:b], caches=caches))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=0, atol=1e-10)
    model.float().save_pretrained(tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0)


def test_only_full_layers_keep_more_the_more_they_read():
    model = build("hybrid", vocabulary=50, width=32, layers=8, heads=4, ratio=3, context=4096)
    caches, grown = model.new_caches(), []
    for _ in range(2):
        before = [cache.nbytes for cache in caches.layers]
        with torch.no_grad():
            model(torch.zeros(1, 512, dtype=torch.long), caches=caches)
        grown.append([cache.nbytes - held for cache, held in zip(caches.layers, before, strict=True)])
    assert [n for n, more in enumerate(grown[1]) if more] == [3, 7]
    assert grown[1][3] == 2 * 32 * 512 * 4


def test_windows_and_states():
    """A window is for layers that read keys; a state holds all that came before, and says so."""
    stack = Transformer(50, 32, 2, 4, mixer=["delta_net", "softmax"], windows=[None, 8], context=64)
    caches = stack.new_caches()
    with torch.no_grad():
        stack(IDS, caches=caches)
    assert caches.layers[1].k.shape[2] == 8
    with pytest.raises(ShapeError, match="can't be obeyed"):
        Transformer(50, 32, 2, 4, mixer="delta_net", windows=8, context=64)(IDS)


def test_what_does_not_fit_is_said():
    with pytest.raises(ShapeError, match="stages for 1 parts"):
        SideBySide([Attention(8, 1), Attention(8, 1)], [()])
    with pytest.raises(ShapeError, match="names 3 heads"):
        mixer({"softmax": 2, "delta_net": 1}, 32, 4, 64)
    with pytest.raises(ShapeError, match="ratio"):
        build("hybrid", vocabulary=50, width=32, layers=2, heads=4, ratio=-1)
    one = SideBySide([Attention(16, 2), DeltaNet(16, 2)])
    assert not one.bounded
    assert one(torch.randn(1, 5, 32), Causal()).shape == (1, 5, 32)
