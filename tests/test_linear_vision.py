"""Linear mixers for images: what papers claim of weights and ranks, cost in tokens, grids, padding, what they refuse."""

import math
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.errors import ShapeError
from headwise.mechanisms.linear._grid import Depthwise, turned
from headwise.mechanisms.linear._windows import WindowLayer
from headwise.mechanisms.linear.flatten import Flatten, focused
from headwise.mechanisms.linear.in_line import InLine
from headwise.mechanisms.linear.l2_vit import L2Vit, LocalConcentration
from headwise.mechanisms.linear.mala import Mala
from headwise.mechanisms.linear.na_la_former import NaLaFormer
from headwise.mechanisms.linear.rala import Rala
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents
from headwise.stages.window import Window

WIDTH, HEADS = 32, 4
WHOLE = {"mala": Mala, "in_line": InLine, "flatten": Flatten, "rala": Rala, "na_la_former": NaLaFormer, "l2_vit": L2Vit}
ALONE = {  # without what reads both sides by nature
    "mala": lambda **more: Mala(WIDTH, HEADS, taps=0, **more),
    "in_line": lambda **more: InLine(WIDTH, HEADS, residual=False, **more),
    "flatten": lambda **more: Flatten(WIDTH, HEADS, taps=0, **more),
    "rala": lambda **more: Rala(WIDTH, HEADS, weighted=False, taps=0, **more),
    "na_la_former": lambda **more: NaLaFormer(WIDTH, HEADS, taps=0, **more),
    "l2_vit": lambda **more: L2Vit(WIDTH, HEADS, concentration=False, **more),
}
PLAIN = {"taps": 0, "rope": False, "eps": 0.0}


def made(build, **options):
    torch.manual_seed(0)
    return build(**options).double().eval()


def whole(name, **options):
    torch.manual_seed(0)
    return WHOLE[name](WIDTH, HEADS, **options).double().eval()


def tokens(n=40, b=2, seed=1):
    return torch.randn(b, n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def entropy(weights):
    return torch.special.entr(weights).sum(-1)


def ranks(t):
    return torch.linalg.matrix_rank(t).unique().tolist()


def flops(mixer, n, *stages):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(tokens(n, 1), *stages)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", WHOLE)
def test_cost_is_linear_in_tokens(name):
    line = [flops(whole(name), n) for n in (256, 512, 1024)]
    assert line[2] - line[1] == 2 * (line[1] - line[0]) > 0
    grid = [flops(whole(name, grid=(n // 16, 16)), n) for n in (256, 512, 1024)]
    assert grid[2] - grid[1] == 2 * (grid[1] - grid[0]) > line[1] - line[0] - 1
    causal = [flops(made(ALONE[name]), n, Causal()) for n in (256, 512, 1024)]
    assert causal[2] - causal[1] == 2 * (causal[1] - causal[0])


@pytest.mark.parametrize("name", WHOLE)
def test_padding_anywhere_in_a_line_is_left_out(name):
    x, real = tokens(30), torch.rand(2, 30, generator=torch.Generator().manual_seed(3)) > 0.4
    mixer = made(ALONE[name]) if name == "l2_vit" else whole(name)
    with torch.no_grad():
        out = mixer(x.where(real[..., None], 1e4), attention_mask=real)
        for row in range(2):
            torch.testing.assert_close(out[row][real[row]], mixer(x[row][real[row]][None])[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_documents_are_each_as_if_alone(name, causal):
    x, stages = tokens(), (Causal(),) if causal else ()
    options = {"tokens": 16} if name == "flatten" else {}
    mixer = made(ALONE[name], **options)
    if name == "flatten":
        torch.nn.init.normal_(mixer.positions)
    ids = torch.tensor([0] * 13 + [1] * 16 + [2] * 11)
    with torch.no_grad():
        alone = torch.cat([mixer(x[:, a:b], *stages) for a, b in ((0, 13), (13, 29), (29, 40))], 1)
        torch.testing.assert_close(mixer(x, *stages, Documents(ids)), alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", WHOLE)
def test_rows_of_a_grid_are_not_columns(name):
    x = tokens(24)
    grid, line = whole(name, grid=(4, 6)), whole(name)
    assert grid(x).shape == x.shape
    assert grid.cannot["padding"]
    assert not torch.allclose(grid(x), whole(name, grid=(6, 4))(x))
    assert sum(p.numel() for p in grid.parameters()) > sum(p.numel() for p in line.parameters())


def test_what_is_usual_is_the_papers():
    sized = {name: import_module(f"headwise.mechanisms.linear.{name}").sized(4, 16, 24) for name in WHOLE}
    for name in ("mala", "rala", "na_la_former"):
        assert (sized[name].eps, sized[name].rope, sized[name].conv.conv.weight.shape) == (1e-6, True, (64, 1, 1, 5))
    assert sized["rala"].weighted
    assert sized["in_line"].kernel == "identity"
    assert sized["in_line"].kernels is not None
    assert sized["flatten"].power == 3
    assert sized["flatten"].positions.shape == (24, 64)
    assert not sized["flatten"].positions.any()
    assert sized["l2_vit"].concentration.first.conv.weight.shape == (64, 1, 1, 7)
    assert WindowLayer(WIDTH, HEADS).window == 7
    for mixer in sized.values():
        assert mixer(torch.randn(2, 24, 64)).shape == (2, 24, 64)


def test_convolutions_are_those_of_images():
    x, conv = tokens(24), Depthwise(WIDTH, 5, (4, 6)).double()
    image = x.transpose(1, 2).reshape(2, WIDTH, 4, 6)
    wanted = torch.nn.functional.conv2d(image, conv.conv.weight, conv.conv.bias, padding=2, groups=WIDTH)
    torch.testing.assert_close(conv(x), wanted.flatten(2).transpose(1, 2))
    along = Depthwise(WIDTH, 5, None).double()
    wanted = torch.nn.functional.conv1d(x.mT, along.conv.weight[:, :, 0], along.conv.bias, padding=2, groups=WIDTH).mT
    torch.testing.assert_close(along(x), wanted)


def test_rotations_keep_lengths_and_see_both_axes():
    x = torch.randn(1, 2, 24, 8, dtype=torch.float64)
    out = turned(x, torch.arange(24)[None], (4, 6))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(out[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(out[:, :, 3, :4], x[:, :, 3, :4])  # the first row
    torch.testing.assert_close(out[:, :, 12, 4:], x[:, :, 12, 4:])  # the first column
    angle = torch.tensor(2.0).double()
    torch.testing.assert_close(out[0, 0, 12, 0], x[0, 0, 12, 0] * angle.cos() - x[0, 0, 12, 1] * angle.sin())


def of_one_query(mixer, times):
    """The weights of queries whose features are so many times as large, all else the same."""
    with torch.no_grad():
        mixer.projections.q.weight.zero_()
        mixer.projections.q.bias.copy_(times * torch.linspace(1.5, 4, WIDTH) - 1)
        return mixer.weights(tokens())


def test_magnitude_sharpens_mala_and_not_linear_attention():
    plain, aware = made(lambda: Rala(WIDTH, HEADS, weighted=False, **PLAIN)), made(lambda: Mala(WIDTH, HEADS, **PLAIN))
    aware.load_state_dict(plain.state_dict())
    usual = of_one_query(plain, 1.0)
    torch.testing.assert_close(of_one_query(plain, 3.0), usual)
    far = [of_one_query(aware, times) - usual for times in (1.0, 3.0)]
    torch.testing.assert_close(far[1], 3 * far[0])  # A = L + S (L - 1/n)
    spread = [of_one_query(aware, times).std(-1) for times in (1.0, 2.0, 4.0)]
    assert bool((spread[0] < spread[1]).all())
    assert bool((spread[1] < spread[2]).all())


def test_rotations_change_the_sum_of_weights():
    for build in (Mala, Rala, NaLaFormer):
        sums = made(lambda build=build: build(WIDTH, HEADS, taps=0)).weights(tokens()).sum(-1)
        assert (sums - 1).abs().max() > 0.01


def test_collinear_queries_collide_in_linear_attention_and_not_in_inline():
    def two(mixer):
        with torch.no_grad():
            mixer.projections.q.weight.zero_()
            found = []
            for times in (1.0, 2.0):
                mixer.projections.q.bias.copy_(times * torch.linspace(0.5, 2, WIDTH))
                found.append(mixer.weights(tokens())[:, :, 0])
        return found

    one, other = two(made(lambda: L2Vit(WIDTH, HEADS, concentration=False, floor=1e-9)))
    torch.testing.assert_close(one, other)
    for kernel in ("identity", "relu", "leakyrelu"):
        one, other = two(made(lambda kernel=kernel: InLine(WIDTH, HEADS, residual=False, kernel=kernel)))
        assert bool(((one - other).abs().amax(-1) > 1e-3).all())


@pytest.mark.parametrize("n", [8, 9, 20])
def test_inline_is_injective_with_more_tokens_than_channels(n):
    """A query can be told from its weights if centred keys have full rank, which takes more tokens than channels."""
    mixer = made(lambda: InLine(WIDTH, HEADS, residual=False))
    q, k, _ = mixer.projections.split(tokens(n))
    centred = (k - k.mean(2, keepdim=True)) / (n * 8**0.5)
    assert ranks(centred) == [8 if n > 8 else 7]
    found = torch.linalg.lstsq(centred, (mixer.weights(tokens(n)) - 1 / n).mT).solution.mT
    assert torch.allclose(found, q) == (n > 8)


def test_inline_weights_may_be_negative():
    assert made(ALONE["in_line"]).weights(10 * tokens()).min() < 0


def test_a_kernel_is_made_for_each_sequence():
    mixer, x = whole("in_line"), tokens()
    local = [mixer.local(torch.ones(2, HEADS, 40, 8).double(), t, None) for t in (x, x.flip(0))]
    torch.testing.assert_close(local[0], local[1].flip(0))
    assert not torch.allclose(local[0][0], local[0][1])
    torch.testing.assert_close(local[0], mixer.local(torch.ones(2, HEADS, 40, 8).double(), x.flip(1), None))


def test_higher_powers_sharpen():
    mixers = {power: made(ALONE["flatten"], power=power) for power in (1.0, 2.0, 3.0, 6.0)}
    mean = [entropy(mixer.weights(tokens())).mean() for mixer in mixers.values()]
    assert mean == sorted(mean, reverse=True)
    assert mean[0] - mean[-1] > 0.1
    with torch.no_grad():
        u = torch.tensor([[1.0, 0.6, 0.1], [0.9, 0.3, 0.2], [0.3, 1.0, 0.2]]).double()
        near, far = ([torch.cosine_similarity(f[0], f[i], dim=0) for f in (u, focused(u, 4.0))] for i in (1, 2))
    assert near[1] > near[0]  # the same largest channel
    assert far[1] < far[0]


@pytest.mark.parametrize("power", [3.0, 30.0])
def test_high_powers_stay_finite(power):
    mixer = made(ALONE["flatten"], power=power).float()
    for scale in (1e-4, 1e3):
        x = (scale * tokens()).float().requires_grad_()
        mixer(x).sum().backward()
        assert bool(x.grad.isfinite().all())


def test_a_convolution_raises_the_rank_above_the_channels_of_a_head():
    mixer = made(lambda: Flatten(WIDTH, HEADS, grid=(8, 8)))
    maps = mixer.weights(tokens(64))
    assert ranks(maps) == [8]
    basis = torch.eye(64, dtype=torch.float64)[None, None].expand(8, HEADS, -1, -1)  # one value after the other
    with torch.no_grad():
        mixer.conv.conv.bias.zero_()
        each = torch.stack([mixer.local(basis[..., t : t + 1].expand(-1, -1, -1, 8), None, None)[0, 0] for t in range(64)], 1)
    both = maps[:, :, None] + each.permute(2, 0, 1)
    assert min(ranks(both)) > 8 * 6


def test_positive_coefficients_keep_the_rank_of_keys_times_values_in_general():
    mixer = whole("rala")
    v = torch.randn(1, HEADS, 40, 8, dtype=torch.float64)
    q, k = torch.rand(2, 1, HEADS, 40, 8, dtype=torch.float64)

    class Now:
        real = None

    a = mixer.coefficients(q, k, Now())
    assert a.std() > 0.01
    assert ranks(k.mT @ v) == ranks((a * k).mT @ v) == [8]
    few = torch.cat([v[..., :3], v[..., :5] @ torch.ones(5, 5).double()], -1)
    assert ranks(few) == ranks(k.mT @ few) == ranks((a * k).mT @ few)
    basis = torch.linalg.qr(k, mode="complete").Q[..., 8:16]  # values that unweighted keys cancel
    assert float((k.mT @ basis).abs().max()) < 1e-12
    assert ranks((a * k).mT @ basis) == [8]


def test_the_map_of_x_raises_the_rank_of_outputs():
    mixer, x = made(lambda: Rala(WIDTH, HEADS, taps=0)), tokens()
    heads = mixer.read(x)
    assert ranks(heads) == [8]
    gate = mixer.gate(x).unflatten(-1, (HEADS, 8)).transpose(1, 2)
    low = heads[..., :2] @ torch.randn(2, 8, dtype=torch.float64)
    assert ranks(low) == [2]
    assert min(ranks(low * gate)) == 8
    whole_low = low.transpose(1, 2).flatten(2)
    assert max(ranks(whole_low)) <= 8
    assert min(ranks(whole_low * mixer.gate(x))) == 32


@pytest.mark.parametrize("kernel", ["cosine", "polarity"])
def test_entropy_falls_as_queries_grow(kernel):
    torch.manual_seed(1)
    mixer = NaLaFormer(WIDTH, HEADS, kernel=kernel, **PLAIN)
    q, k = torch.randn(2, 1, HEADS, 50, 8, dtype=torch.float64)
    q, found = q / q.norm(dim=-1, keepdim=True), []
    for norm in (0.1, 0.5, 1.0, 1.5, 2.0):
        a, b = mixer.features(norm * q, k)
        weights = a @ b.mT
        assert weights.min() >= 0
        found.append(entropy(weights / weights.sum(-1, keepdim=True)))
    means = [each.mean() for each in found]
    assert means == sorted(means, reverse=True)
    assert (found[0] - found[-1] > 0).double().mean() > 0.95
    powers = [3 * (0.5 + math.tanh(norm)) for norm in (0.0, 1e3)]
    assert powers == [1.5, 4.5]


def test_the_formula_as_told_may_give_negative_weights():
    mixer = NaLaFormer(2, 1, taps=0, rope=False, angle=1.0)
    a, b = mixer.features(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[-1.0, 0.0]]]]))
    assert float((a @ b.mT).squeeze()) == pytest.approx(math.cos(2.0))


@pytest.mark.parametrize("kernel", ["cosine", "polarity"])
def test_queries_and_keys_of_zero_are_finite(kernel):
    mixer = made(lambda: NaLaFormer(WIDTH, HEADS, kernel=kernel))
    with torch.no_grad():
        for part in (mixer.projections.q, mixer.projections.k):
            part.bias.zero_()
    x = torch.zeros(1, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    out = mixer(x)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in (x, *mixer.parameters()))


def test_few_small_tokens_are_not_normalised():
    mixer, x = made(ALONE["l2_vit"]), tokens(9, 1)
    sums = mixer.weights(x).sum(-1)
    assert sums.max() < 8**-0.5 / 2
    torch.testing.assert_close(mixer.weights(10 * x[:, :1].expand(-1, 900, -1)).sum(-1).amax(), mixer.tau[0].detach())


def test_the_module_concentrates_what_is_mixed_near_by():
    """The part of a token's influence that stays within the convolution's reach grows; without it, it is as even as the heads."""
    grid, x = (8, 8), tokens(64, 1)
    mixer = made(lambda: L2Vit(WIDTH, HEADS, grid=grid, taps=3, floor=1.0))
    with torch.no_grad():
        for part in (mixer.concentration.first, mixer.concentration.second):
            part.conv.weight.mul_(4.0)
    slopes = torch.autograd.functional.jacobian(lambda t: mixer(t).sum((0, 2)), x)[:, 0].norm(dim=-1)
    mixer.concentration = None
    plain = torch.autograd.functional.jacobian(lambda t: mixer(t).sum((0, 2)), x)[:, 0].norm(dim=-1)
    at = torch.stack([torch.arange(64) // 8, torch.arange(64) % 8])
    near = (at[:, :, None] - at[:, None, :]).abs().amax(0) <= 2
    shares = [(t * near).sum() / t.sum() for t in (plain, slopes)]
    assert shares[1] > shares[0] + 0.1


def test_batch_norm_measures_in_training_only():
    module, x = LocalConcentration(WIDTH).double(), tokens()
    before = module.batch_norm.running_mean.clone()
    out = module.train()(x)
    assert not torch.equal(module.batch_norm.running_mean, before)
    assert not torch.allclose(module.eval()(x), out)


def test_windows_read_tokens_of_zero_at_the_end():
    """As their code does: the last window is filled up, and what fills it is read."""
    mixer, x = WindowLayer(WIDTH, HEADS, window=7).double(), tokens(9)
    filled = torch.cat([x, torch.zeros(2, 5, WIDTH).double()], 1)
    torch.testing.assert_close(mixer(x), mixer(filled)[:, :9])
    first = x.clone()
    first[:, 7:] += 1.0
    torch.testing.assert_close(mixer(first)[:, :7], mixer(x)[:, :7])
    with pytest.raises(ShapeError, match="no grid"):
        WindowLayer(WIDTH, HEADS, grid=(3, 3))(tokens(8).float())
    with pytest.raises(NotImplementedError, match="both ways"):
        mixer.new_cache()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: Mala(WIDTH, HEADS, grid=(4, 6))(tokens(23).float()), "23 tokens are no grid"),
        (lambda: Mala(WIDTH, HEADS, grid=(4, 6))(tokens(24).float(), attention_mask=torch.ones(2, 24)), "with padding"),
        (lambda: Mala(WIDTH, HEADS)(tokens().float(), Causal()), "both sides"),
        (lambda: Mala(WIDTH, HEADS)(tokens().float(), Documents(torch.zeros(40).long())), "both sides"),
        (lambda: Mala(WIDTH, HEADS, grid=(5, 8), taps=0)(tokens().float(), Causal()), "as a whole"),
        (lambda: Mala(WIDTH, HEADS)(tokens().float(), cache=Mala(WIDTH, HEADS).new_cache()), "nothing to keep"),
        (lambda: Mala(WIDTH, HEADS, taps=0)(tokens().float(), Window(3)), "Window"),
        (lambda: Mala(WIDTH, HEADS, taps=4), "odd"),
        (lambda: Mala(12, 2), "pairs"),
        (lambda: Rala(12, 2), "pairs"),
        (lambda: NaLaFormer(12, 2), "pairs"),
        (lambda: Rala(WIDTH, HEADS, taps=0)(tokens().float(), Causal()), "mean of all queries"),
        (lambda: InLine(WIDTH, HEADS, kernel="gelu"), "identity, relu"),
        (lambda: InLine(WIDTH, HEADS)(tokens().float(), Causal()), "all tokens"),
        (lambda: NaLaFormer(WIDTH, HEADS, kernel="sine"), "cosine, polarity"),
        (lambda: Flatten(WIDTH, HEADS, power=0.5), "blur"),
        (lambda: Flatten(WIDTH, HEADS, tokens=8)(tokens().float()), "no position"),
        (lambda: L2Vit(WIDTH, HEADS, floor=0.0), "above 0"),
        (lambda: L2Vit(WIDTH, HEADS)(tokens().float(), attention_mask=torch.ones(2, 40)), "batch norm"),
    ],
)
def test_what_does_not_fit_is_said(run, said):
    with pytest.raises(ShapeError, match=said):
        run()
