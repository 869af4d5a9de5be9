"""Linear mixers that read all tokens: flows, ranks, cost in tokens, what lies outside a window, documents read both ways."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from headwise.errors import ShapeError
from headwise.mechanisms.linear import _through
from headwise.mechanisms.linear._axes import MdTpe
from headwise.mechanisms.linear._pooling import biased_pool
from headwise.mechanisms.linear._prefix import running_softmax
from headwise.mechanisms.linear.aft import Aft
from headwise.mechanisms.linear.agent_attention import AgentAttention, insert
from headwise.mechanisms.linear.efficient_attention import EfficientAttention
from headwise.mechanisms.linear.flare import Flare
from headwise.mechanisms.linear.flowformer import Flowformer
from headwise.mechanisms.linear.light_net import LightNet
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents
from headwise.stages.window import Window

WIDTH = 32
MADE = {
    "efficient": lambda: EfficientAttention(WIDTH, 4),
    "scaled": lambda: EfficientAttention(WIDTH, 4, normaliser="scaling"),
    "flow": lambda: Flowformer(WIDTH, 4),
    "light": lambda: LightNet(WIDTH, 4),
    "turned": lambda: LightNet(WIDTH, 4, lrpe=True, grid=(4, 3), first=1),
    "flare": lambda: Flare(WIDTH, 4, 6),
    "agents": lambda: AgentAttention(WIDTH, 4, 6),
    "simple": lambda: Aft(WIDTH, "simple"),
    "local": lambda: Aft(WIDTH, "local", tokens=512, rank=4, window=5),
    "conv": lambda: Aft(WIDTH, "conv", heads=4, taps=5),
}
ENDS = (0, 13, 14, 29, 40)


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    return MADE[name]().to(dtype).eval()


def tokens(n=40, b=2, dtype=torch.float64):
    return torch.randn(b, n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held that was made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = ("expand", "view", "unfold", "transpose", "permute", "detach", "slice", "select", "unsqueeze", "as_strided", "t.")
        if not any(name in str(func) for name in views):
            self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def costs(mixer, n, *stages):
    """Multiplications, and the largest tensor, of a forward and a backward pass."""
    x = tokens(n, 1, torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as counter, Largest() as held:
        mixer(x, *stages).sum().backward()
    return counter.get_total_flops(), held.most


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("name", MADE)
def test_cost_is_linear_in_tokens(name, causal):
    if causal and name == "agents":
        pytest.skip("reads both ways")
    mixer, stages = made(name, torch.float32), (Causal(),) if causal else ()
    (flops, held), (twice, held_twice) = (costs(mixer, n, *stages) for n in (128, 256))
    assert twice <= 2.05 * flops
    assert held_twice <= 2 * held


def test_the_counters_notice_a_quadratic_form():
    mixer = made("efficient", torch.float32)
    mixer.form = "parallel"
    (flops, held), (twice, held_twice) = (costs(mixer, n, Causal()) for n in (128, 256))
    assert twice > 2.2 * flops
    assert held_twice > 2.2 * held


def test_full_aft_holds_no_table_of_all_pairs_for_each_channel():
    mixer = Aft(WIDTH, "full", tokens=512, rank=4)
    (_, held), (_, twice) = (costs(mixer, n, Causal()) for n in (256, 512))
    assert twice <= 2 * held
    assert twice < 512 * 512


@pytest.mark.parametrize("name", ["efficient", "scaled", "flow", "light", "turned", "flare"])
@torch.no_grad()
def test_documents_read_both_ways_are_each_as_if_alone(name):
    mixer, x = made(name), tokens()
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(ENDS).diff())
    alone = torch.cat([mixer(x[:, a:b]) for a, b in pairwise(ENDS)], 1)
    assert torch.allclose(mixer(x, Documents(ids)), alone, atol=1e-10)
    real = torch.ones(2, 43, dtype=torch.bool)
    real[:, [0, 20, 42]] = False  # padding between tokens, too
    padded = torch.full((2, 43, WIDTH), 7.0, dtype=torch.float64)
    padded[:, real[0]] = x
    assert torch.allclose(mixer(padded, Documents(ids), attention_mask=real)[:, real[0]], alone, atol=1e-10)


@torch.no_grad()
def test_places_go_on_within_the_last_document():
    mixer, x = made("turned"), tokens(30)
    cache = mixer.new_cache()
    ids = torch.tensor([0] * 13 + [1] * 7)
    mixer(x[:, :20], Causal(), Documents(ids), cache=cache)
    last = mixer(x[:, 20:], Causal(), cache=cache)
    assert torch.allclose(last, mixer(x[:, 13:], Causal())[:, 7:], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@torch.no_grad()
def test_flows_are_conserved(causal):
    mixer = Flowformer(WIDTH, 4, eps=0.0).double()
    x, stages = tokens(), (Causal(),) if causal else ()
    flows = mixer.flows(x, *stages)
    q, k, _ = mixer._parts(x)
    pairs = q @ k.mT
    pairs = pairs.tril() if causal else pairs
    assert torch.allclose((pairs / flows.incoming[..., None]).sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    back = (k @ q.mT).tril() if causal else k @ q.mT
    assert torch.allclose((back / flows.outgoing[..., None]).sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    if not causal:
        assert torch.allclose(flows.conserved_incoming.sum(-1), torch.full((2, 4), 40.0, dtype=torch.float64))
        assert torch.allclose(flows.conserved_outgoing.mean(-1), torch.ones(2, 4, dtype=torch.float64))


def test_no_gradient_of_causal_flows_comes_from_later_tokens():
    mixer, x = made("flow"), tokens().requires_grad_()
    for at in (0, 7, 38):
        grad = torch.autograd.grad(mixer(x, Causal())[:, at].square().sum(), x)[0]
        assert not grad[:, at + 1 :].any()
        assert grad[:, at].any()


@torch.no_grad()
def test_flow_sums_are_counted_and_do_not_grow():
    mixer, x = made("flow"), tokens()
    cache = mixer.new_cache()
    held = []
    for piece in x.split(10, 1):
        mixer(piece, Causal(), cache=cache)
        held.append(cache.nbytes)
    d = WIDTH // 4
    numbers = 2 * (4 * d * d + 2 * 2 * 4 * d + 4 + 1)  # values; both sums of queries and of keys; competition; tokens
    assert held == [8 * numbers] * 4


@torch.no_grad()
def test_sources_compete():
    """A public port takes the softmax over an axis of one, and all sources win alike."""
    won = Flowformer(WIDTH, 4, clamp=False).double().flows(tokens()).competition
    assert float(won.std(-1).min()) > 1e-3
    cut = made("flow").flows(tokens())
    above = cut.conserved_outgoing > 1
    top = cut.competition.amax(-1, keepdim=True).expand_as(above)
    assert torch.allclose(cut.competition[above], top[above])


@torch.no_grad()
def test_ranks_are_bounded():
    x = tokens()
    for mixer, rank in (
        (Flare(WIDTH, 4, 5).double(), 5),
        (EfficientAttention(WIDTH, 4, key_size=3, value_size=8).double(), 3),
        (LightNet(WIDTH, 4, key_size=2).double(), 2),
        (made("flow"), 8),
    ):
        for name, parameter in mixer.named_parameters():
            if name == "latents":
                parameter.mul_(10)
        assert float(torch.linalg.svdvals(mixer.weights(x))[..., rank:].max()) < 1e-12
        later = mixer.weights(x, Causal())[..., 20:, :20]
        assert float(torch.linalg.svdvals(later)[..., rank:].max()) < 1e-12


@torch.no_grad()
def test_agents_bound_the_rank_of_what_is_mixed():
    """Of the mixer itself: tokens' outputs as the values change, less those of the convolution."""
    mixer, x = AgentAttention(WIDTH, 4, 3).double(), tokens(30, 1)
    torch.nn.init.zeros_(mixer.conv.weight)
    torch.nn.init.zeros_(mixer.conv.bias)
    mixer.projections.out.weight.copy_(torch.eye(WIDTH))
    q, k, v = mixer.projections.split(x)
    pooled, near = mixer._line(q, None)
    first, second = (mixer._bias(name, near) for name in ("agents", "tokens"))
    size = WIDTH // 4
    gathering = (pooled @ k.mT / size**0.5 + first).softmax(-1)
    spreading = (q @ pooled.mT / size**0.5 + second.mT).softmax(-1)
    dense = spreading @ gathering
    assert float(torch.linalg.svdvals(dense)[..., 3:].max()) < 1e-12
    out = (dense @ v).transpose(1, 2).flatten(2) + mixer.projections.out.bias
    assert torch.allclose(mixer(x), out, atol=1e-12)


@pytest.mark.parametrize("name", ["agents", "flare"])
@torch.no_grad()
def test_all_tokens_are_read_by_exactly_two_reads(name, monkeypatch):
    calls = []

    def counted(q, k, v, *stages, **options):
        calls.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, *stages, **options)

    attend = _through.attend
    monkeypatch.setattr(_through, "attend", counted)
    for n in (40, 80):  # so their cost is linear in tokens, which the counter of operations does not see on every device
        calls.clear()
        made(name)(tokens(n))
        assert calls == [(6, n), (n, 6)]


@torch.no_grad()
def test_inserted_agents_of_all_queries_are_plain_attention():
    q, k, v = torch.randn(3, 1, 2, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(insert(q, k, v, q), plain, atol=1e-12)
    assert not torch.allclose(insert(q, k, v, q[:, :, :5]), plain, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@torch.no_grad()
def test_outside_the_window_biases_are_zero_and_not_minus_infinity(causal):
    mixer, x, stages = made("local"), tokens(30, 1), (Causal(),) if causal else ()
    mixer.places_q.fill_(0.0)
    mixer.places_k.fill_(0.0)
    mixer.places_q[:, 0], mixer.places_k[:, 0] = 1.0, 1e6  # within the window: all the weight
    inside = mixer(x, *stages)
    far = x.clone()
    far[:, 0] += 1.0
    assert torch.equal(mixer(far, *stages)[:, 20], inside[:, 20])
    mixer.places_k[:, 0] = 0.0
    outside = mixer(x, *stages)
    assert torch.allclose(outside, _plain(mixer)(x, *stages), atol=1e-12)  # all tokens count, however far
    assert not torch.allclose(mixer(far, *stages)[:, 20], outside[:, 20], atol=1e-6)
    mixer.places_k[:, 0] = -1e6  # within the window: nothing is left, and only what is outside counts
    k, v = mixer.keys(x)[0], mixer.values(x)[0]
    at = torch.arange(30)
    shown = ((at[:, None] - at).abs() >= 5) & ((at <= at[:, None]) if causal else torch.ones(30, 30, dtype=torch.bool))
    share = k.expand(30, 30, -1).masked_fill(~shown[..., None], -torch.inf).softmax(1)
    wanted = mixer.out(mixer.gate(x)[0].sigmoid() * (share * v).sum(1))
    assert torch.allclose(mixer(x, *stages)[0, 6:], wanted[6:], atol=1e-12)


def _plain(mixer):
    plain = Aft(WIDTH, "simple").double()
    plain.load_state_dict({name: value for name, value in mixer.state_dict().items() if "." in name})
    return plain


@pytest.mark.parametrize("variant", ["full", "simple", "local", "conv"])
@torch.no_grad()
def test_keys_far_below_a_later_one_are_not_lost(variant):
    """Whatever comes later: with the largest key of all taken out, what is 200 below would be nothing in float32."""
    torch.manual_seed(0)
    options = {"full": {"tokens": 40}, "local": {"tokens": 40, "window": 4}, "conv": {"heads": 4, "taps": 3}}.get(variant, {})
    mixer, x = Aft(WIDTH, variant, **options), tokens(40, 1, torch.float32)
    mixer.keys.weight.mul_(0.0)
    mixer.keys.weight[:, 0] = 1.0
    x[:, :, 0] = torch.where(torch.arange(40) < 39, -200.0 + x[:, :, 0], 200.0)
    out = mixer(x, Causal())[:, :39]
    assert torch.allclose(out, mixer(x[:, :39], Causal()), atol=1e-6)
    assert float(out.abs().min()) > 0
    double = Aft(WIDTH, variant, **options).double()
    double.load_state_dict(mixer.state_dict())
    assert torch.allclose(out.double(), double(x.double(), Causal())[:, :39], atol=1e-4)


@torch.no_grad()
def test_simple_aft_is_cleared_where_documents_begin():
    mixer, x = made("simple"), tokens()
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(ENDS).diff())
    alone = torch.cat([mixer(x[:, a:b], Causal()) for a, b in pairwise(ENDS)], 1)
    assert torch.allclose(mixer(x, Causal(), Documents(ids)), alone, atol=1e-12)
    for name in ("simple", "local", "conv"):
        with pytest.raises(ShapeError, match="documents"):
            made(name)(x, Documents(ids))
    for name in ("local", "conv"):
        with pytest.raises(ShapeError, match="documents"):
            made(name)(x, Causal(), Documents(ids))
    with pytest.raises(ShapeError, match="Causal"):
        Aft(WIDTH, "full", tokens=40).double()(x, Causal(), Documents(ids))


@torch.no_grad()
def test_padding_anywhere_takes_no_place_in_windows():
    for name in ("local", "conv", "agents"):
        mixer, x = made(name), tokens(30)
        real = torch.ones(2, 36, dtype=torch.bool)
        real[0, [0, 1, 9, 10, 20, 35]] = False
        real[1, [4, 5, 6, 30, 31, 32]] = False
        padded = torch.full((2, 36, WIDTH), 9.0, dtype=torch.float64)
        padded[real] = x.flatten(0, 1)
        for stages in ((),) if name == "agents" else ((), (Causal(),)):
            out = mixer(padded, *stages, attention_mask=real)[real].unflatten(0, (2, 30))
            assert torch.allclose(out, mixer(x, *stages), atol=1e-12)


@torch.no_grad()
def test_biases_of_places_end():
    for variant in ("full", "local"):
        mixer = Aft(WIDTH, variant, tokens=20, rank=2)
        assert mixer(tokens(20, dtype=torch.float32), Causal()).shape == (2, 20, WIDTH)
        with pytest.raises(ShapeError, match="20"):
            mixer(tokens(21, dtype=torch.float32), Causal())


def test_what_sees_nothing_has_no_weight():
    k, v = torch.zeros(1, 3, 2), torch.ones(1, 3, 2, 1)
    u = torch.zeros(1, 3, 1)
    pool = biased_pool(k, v, torch.zeros(1, 3, dtype=torch.bool), u, u, False)
    assert bool((pool.z < -1e29).all())
    assert not pool.mean.any()


@torch.no_grad()
def test_global_maps_leave_padding_out():
    mixer, x = made("efficient"), tokens(20)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    maps = mixer.maps(x, real)
    assert not maps[0, :, :, :7].any()
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 8, dtype=torch.float64))
    assert torch.allclose(maps[:1, :, :, 7:], mixer.maps(x[:1, 7:]), atol=1e-12)
    real[1] = False
    assert not mixer.maps(x, real)[1].any()


def test_a_state_of_nothing_does_not_decay():
    """Or running sums of decays would lose digits to its first, which is without end."""
    real = torch.tensor([[False, True, True, False, True]])
    _, decay, z = running_softmax(torch.zeros(1, 1, 5, 1), real, None, None)
    assert decay is not None
    assert torch.allclose(decay, -torch.tensor([[[1.0, 1.0, 2.0, 1.0, 1.5]]]).log(), atol=1e-6)
    assert torch.allclose(z[0, 0, 1:, 0], torch.tensor([1.0, 2.0, 2.0, 3.0]).log(), atol=1e-6)


def test_a_solution_that_needs_all_tokens_is_fitted():
    """-u'' = f on a line, u = 0 at its ends: every value of u needs all of f."""
    torch.manual_seed(0)
    n = 32
    at = torch.linspace(0, 1, n + 2)[1:-1]
    green = torch.minimum(at[:, None], at) * (1 - torch.maximum(at[:, None], at)) / (n + 1)
    f = torch.randn(32, n) @ torch.exp(-((at[:, None] - at) ** 2) / 0.02)
    u = f @ green
    u = u / u.std()

    class Solver(torch.nn.Module):
        def __init__(self, mixes):
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, WIDTH), torch.nn.Linear(WIDTH, 1)
            self.mixer = Flare(WIDTH, 4, 8, layers=-1) if mixes else torch.nn.Identity()

        def forward(self, f):
            x = self.first(torch.stack([f, at.expand_as(f), at.expand_as(f).square()], -1))
            return self.last(F.gelu(x + self.mixer(x)))[..., 0]

    left = []
    for mixes in (True, False):
        solver = Solver(mixes)
        optimizer = torch.optim.Adam(solver.parameters(), 2e-2)
        for _ in range(150):
            loss = (solver(f) - u).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left.append(loss.item())
    assert left[0] < 0.2 * left[1]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: EfficientAttention(32, 4, normaliser="none"), "softmax, scaling"),
        (lambda: EfficientAttention(33, 4), "33"),
        (lambda: Aft(32, "other"), "full, simple, local, conv"),
        (lambda: Aft(32, "full"), "tokens"),
        (lambda: Aft(32, "simple", heads=4), "simple"),
        (lambda: Aft(32, "conv", heads=5), "5"),
        (lambda: Aft(32, "conv", taps=4), "4"),
        (lambda: Aft(32, "local", tokens=8, window=0), "0"),
        (lambda: Aft(32, "local", tokens=8, grid=(2, 4)), "local"),
        (lambda: Flowformer(32, 4, eps=-1.0), "-1.0"),
        (lambda: AgentAttention(32, 4, 5, grid=(4, 4)), "5"),
        (lambda: AgentAttention(32, 4, 4, class_token=True), "grid"),
        (lambda: LightNet(33, 4), "33"),
        (lambda: LightNet(32, 4, gate="relu"), "silu, sigmoid"),
        (lambda: LightNet(32, 4, grid=(2, 2)), "lrpe"),
        (lambda: Flare(33, 4), "33"),
        (lambda: Flare(32, 4, 0), "0"),
        (lambda: MdTpe(33, 4, 1), "33"),
        (lambda: MdTpe(32, 4, 2)(tokens(12).float(), (3, 5)), "12"),
        (lambda: Aft(32, "conv", heads=4, taps=3, grid=(3, 3))(tokens(8).float()), "8"),
        (lambda: Aft(32, "conv", heads=4, taps=3, grid=(2, 4))(tokens(8).float(), Causal()), "both ways"),
        (lambda: AgentAttention(32, 4, 4, grid=(3, 3))(tokens(8).float()), "8"),
        (lambda: AgentAttention(32, 4, 4)(tokens(8).float(), Causal()), "no stage"),
        (lambda: AgentAttention(32, 4, 4)(tokens(8).float(), attention_mask=torch.ones(2, 9)), "9"),
        (lambda: AgentAttention(32, 4, 4, grid=(2, 4))(tokens(8).float(), attention_mask=torch.ones(2, 8)), "none"),
        (lambda: Flare(32, 4)(tokens(8).float(), Causal(), Window(3)), "obeyed"),
    ],
)
def test_what_does_not_fit_is_said(build, said):
    with pytest.raises(ShapeError, match=said):
        build()
