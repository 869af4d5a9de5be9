"""Visual Mamba: both ways with documents and padding, its matrices beside softmax and linear attention, and scores of maps."""

from itertools import pairwise, permutations

import pytest
import torch

from headwise.attention import attention_weights
from headwise.errors import InputError, ShapeError
from headwise.mechanisms._states import KernelAttention, begin
from headwise.mechanisms.linear._matrices import block_ranks
from headwise.mechanisms.linear._parts import elu_plus_one
from headwise.mechanisms.linear.visual_mamba import CORES, VisualMamba, foreground_auc, off_diagonal_rank
from headwise.nn import Transformer
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents
from headwise.stages.window import Window


class EluAttention(KernelAttention):
    def features(self, q, k):
        return elu_plus_one(q), elu_plus_one(k)


def made(core, **options):
    """One with steps large enough that states fade."""
    torch.manual_seed(0)
    mixer = VisualMamba(16, 4, core=core, **{"state": 4, **options}).double()
    with torch.no_grad():
        for way in mixer.ways:
            way.bias.add_(2.0)
            way.convolutions.biases["u"].normal_(std=0.3)
    return mixer, torch.randn(3, 40, 16, dtype=torch.float64)


@pytest.mark.parametrize("core", CORES)
def test_both_ways_read_packed_documents_as_if_alone(core):
    mixer, x = made(core)
    ends = (0, 13, 14, 29, 40)
    ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(ends))])
    alone = torch.cat([mixer(x[:, a:b]) for a, b in pairwise(ends)], 1)
    torch.testing.assert_close(mixer(x, Documents(ids)), alone, rtol=0, atol=1e-12)
    shown = mixer.weights(x, Documents(ids))
    values = mixer.reading(x, begin(mixer.new_cache(), x, (Documents(ids),), None)).v
    torch.testing.assert_close(shown @ values, mixer.read(x, Documents(ids)))
    assert (shown[:, :, ids[:, None] != ids] == 0).all()


@pytest.mark.parametrize("core", CORES)
def test_both_ways_with_documents_and_padding_anywhere(core):
    mixer, x = made(core)
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    ids = torch.arange(40) // 9  # of real tokens
    out = mixer(torch.where(real[..., None], x, 1e4), Documents(ids), attention_mask=real)
    for row in range(3):
        there = x[row][real[row]][None]
        wanted = mixer(there, Documents(ids[: there.shape[1]]))[0]
        torch.testing.assert_close(out[row][real[row]], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("core", CORES)
def test_padding_anywhere_is_as_if_it_were_not_there(core):
    mixer, x = made(core, both=False)
    real = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    filled, cache = torch.where(real[..., None], x, 1e4), mixer.new_cache()
    pieces = [mixer(filled[:, at], Causal(), cache=cache, attention_mask=real[:, at]) for at in (slice(0, 17), slice(17, 40))]
    two = made(core)[0]
    for out, wanted in ((torch.cat(pieces, 1), lambda t: mixer(t, Causal())), (two(filled, attention_mask=real), two)):
        for row in range(3):
            torch.testing.assert_close(out[row][real[row]], wanted(x[row][real[row]][None])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_the_scan_of_a_long_text_is_the_recurrence_with_its_gradients(both):
    mixer, _ = made("mamba1", both=both)
    x, results = torch.randn(2, 150, 16, dtype=torch.float64), []
    for form in ("chunk", "recurrent"):
        mixer.form = form
        leaf = x.clone().requires_grad_()
        out = mixer(leaf, *(() if both else (Causal(),)))
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *mixer.parameters()])])
    for scanned, stepped in zip(*results, strict=True):
        torch.testing.assert_close(scanned, stepped, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("core", CORES)
def test_each_token_reads_both_sides_and_one_way_reads_one(core):
    mixer, x = made(core)
    x = x[:1].requires_grad_()
    grad = torch.autograd.grad(mixer(x)[0, 20].sum(), x)[0][0].abs().amax(-1)
    assert bool((grad > 0).all())
    mixer, x = made(core, both=False)
    x = x[:1].requires_grad_()
    grad = torch.autograd.grad(mixer(x, Causal())[0, 20].sum(), x)[0][0].abs().amax(-1)
    assert bool((grad[:21] > 0).all())
    assert not grad[21:].any()


def test_blocks_beside_the_diagonal_have_the_rank_of_the_state():
    """The paper's order: linear attention and Mamba by their sizes, softmax attention not bounded by its heads' size."""
    torch.manual_seed(0)
    x, chunk, size = torch.randn(1, 64, 32, dtype=torch.float64), 16, 8
    linear = EluAttention(32, 4).double().weights(x, Causal())
    q, k = torch.randn(2, 1, 4, 64, size, dtype=torch.float64)
    softmax = attention_weights(3 * q, k, Causal())
    assert off_diagonal_rank(softmax, chunk).min() == chunk
    assert off_diagonal_rank(linear, chunk).max() == size
    for core in CORES:
        for state in (2, 5):
            mixer = made(core, both=False, state=state)[0]
            shown = mixer.weights(torch.randn(1, 64, 16, dtype=torch.float64), Causal())
            assert off_diagonal_rank(shown, chunk).unique().tolist() == [state]
            ranks = block_ranks(shown, chunk)
            assert bool((ranks.diagonal(dim1=-2, dim2=-1) == chunk).all())
            assert not ranks.triu(1).any()
    for matrix in (softmax, linear, shown):  # triangular with no zero on the diagonal: the rank of the whole tells none apart
        assert not matrix.triu(1).any()
        assert bool((matrix.diagonal(dim1=-2, dim2=-1) != 0).all())


def test_a_map_is_scored_by_how_often_foreground_has_more():
    torch.manual_seed(0)
    mask = torch.zeros(2, 40, 50, dtype=torch.bool)
    mask[0, 5:20, 10:30], mask[1, :, 3] = True, True
    noise = torch.randn(2, 40, 50)
    assert foreground_auc(mask.float(), mask).tolist() == [1.0, 1.0]
    assert foreground_auc(1 - mask.float(), mask).tolist() == [0.0, 0.0]
    assert foreground_auc(torch.full((2, 40, 50), 3.0), mask).tolist() == [0.5, 0.5]
    assert (foreground_auc(noise, mask) - 0.5).abs().max() < 0.06  # three standard deviations of a column of 40
    for rising in (torch.exp, lambda m: m**3, lambda m: 1e3 * m - 7, torch.atan):
        assert torch.equal(foreground_auc(rising(noise.double()), mask), foreground_auc(noise, mask))
    assert torch.equal(foreground_auc(noise, ~mask), 1 - foreground_auc(noise, mask))
    better = foreground_auc(noise + mask, mask)
    assert bool((better > foreground_auc(noise, mask) + 0.15).all())
    values = torch.tensor(list(permutations((0.0, 0.1, 0.3, 2.0, 2.0, 5.0)))).view(-1, 2, 3)
    front = torch.tensor([[True, False, False], [True, False, False]]).expand_as(values)
    assert float(foreground_auc(values, front).mean()) == pytest.approx(0.5, abs=1e-12)


def test_what_can_not_be_measured_is_refused():
    with pytest.raises(ShapeError, match="rows, columns"):
        foreground_auc(torch.rand(4, 5), torch.ones(5, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="no foreground"):
        foreground_auc(torch.rand(4, 5), torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="no background"):
        foreground_auc(torch.rand(4, 5), torch.ones(4, 5, dtype=torch.bool))
    for wrong in (torch.rand(2, 10, 10), torch.rand(2, 9, 12)):
        with pytest.raises(ShapeError, match="blocks of 3 x 3"):
            off_diagonal_rank(wrong, 3)


def test_ways_that_can_not_be_taken_are_refused():
    mixer, x = made("mamba2")
    with pytest.raises(ShapeError, match="called with Causal"):
        mixer(x, Causal())
    with pytest.raises(ShapeError, match="nothing to keep"):
        mixer(x, cache=mixer.new_cache())
    with pytest.raises(ShapeError, match="Causal and Documents"):
        mixer(x, Window(4))
    with pytest.raises(ShapeError, match="called without Causal"):
        made("mamba1", both=False)[0](x)
    with pytest.raises(ShapeError, match="mamba2, mamba1"):
        VisualMamba(16, 4, core="mamba3")
    with pytest.raises(ShapeError, match="can't read causally"):
        Transformer(23, 32, 2, 4, mixer="visual_mamba")


@pytest.mark.parametrize("core", CORES)
def test_a_stack_encodes_both_ways_and_decodes_one(core):
    torch.manual_seed(0)
    ids = torch.randint(0, 23, (2, 12))
    encoder = Transformer(23, 32, 2, 4, mixer=("visual_mamba", {"core": core}), causal=False, positions="learned")
    assert encoder(ids).shape == (2, 12, 23)
    decoder = Transformer(23, 32, 2, 4, mixer=("visual_mamba", {"core": core, "both": False})).double()
    made_of, text = decoder.generate(ids, 6), ids
    for _ in range(6):
        text = torch.cat([text, decoder(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made_of, text[:, 12:])
    caches = decoder.new_caches()
    decoder(ids, caches=caches)
    early = caches.nbytes
    decoder(ids, caches=caches)
    assert caches.nbytes == early
