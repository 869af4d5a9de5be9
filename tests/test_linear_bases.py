"""The base cases of state mixers: what a key that is bound twice returns, what a hybrid stack keeps, generation."""

import pytest
import torch

from headwise.errors import ShapeError
from headwise.mechanisms.linear._fading import Fading
from headwise.mechanisms.linear.gated_delta_net import GatedDeltaNet
from headwise.mechanisms.linear.gla import Gla
from headwise.mechanisms.linear.hgrn2 import Hgrn2, LowerBounds
from headwise.mechanisms.linear.kda import Kda
from headwise.mechanisms.linear.mamba2 import Mamba2
from headwise.mechanisms.linear.retention import Retention
from headwise.nn import Transformer, mixer
from headwise.stages.causal import Causal

NAMES = ("gated_delta_net", "kda", "gla", "retention", "mamba2", "hgrn2")
KEYS, VALUES = slice(0, 16), slice(16, 31)  # of a token: a code of its key, one of its value; the last channel is one


def bindings(*pairs):
    """Tokens that bind keys to values, by the numbers of their codes."""
    codes = torch.randn(9, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(1, dtype=torch.float64)
    return torch.stack([torch.cat([codes[key, KEYS], codes[value, VALUES], ones]) for key, value in pairs])[None]


def aimed(made):
    """Queries and keys see key codes only, values value codes only; queries are the keys."""
    made = made.double()
    with torch.no_grad():
        made.k.weight[:, VALUES.start :] = 0.0
        made.q.weight.copy_(made.k.weight)
        made.v.weight[:, KEYS] = 0.0
    return made


def delta(kind, **options):
    """One that forgets nothing, and writes in full."""
    torch.manual_seed(0)
    made = aimed(kind(32, 4, taps=0, **options))
    with torch.no_grad():
        made.fading.rate.fill_(-80.0)
        made.beta.weight.zero_()
        made.beta.weight[:, -1] = 100.0
    return made


@pytest.mark.parametrize("kind", [GatedDeltaNet, Kda])
@torch.no_grad()
def test_a_key_that_is_bound_twice_returns_its_last_value_by_the_delta_rule(kind):
    made = delta(kind)
    x = bindings((0, 1), (2, 3), (0, 4))
    read = made.read(x, Causal())[:, :, -1] * made.key_size**0.5
    wanted = torch.nn.functional.silu(made.v(x))[:, -1].unflatten(-1, (4, -1))
    assert torch.allclose(read, wanted, atol=1e-3)  # keys are a little shorter than one, for their epsilon


@torch.no_grad()
def test_a_key_that_is_bound_twice_returns_the_sum_without():
    torch.manual_seed(0)
    made = aimed(Gla(32, 4))
    made.alpha.up.bias.fill_(1e3)
    x = bindings((0, 1), (0, 4))
    k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (made.k, made.v))
    weight = k[:, :, -1].square().sum(-1, keepdim=True) * made.key_size**-0.5
    assert torch.allclose(made.read(x, Causal())[:, :, -1], weight * v.sum(2), atol=1e-12)


@torch.no_grad()
def test_three_states_to_one_softmax_layer_keep_a_quarter():
    """Of a long prompt; a state's own bytes are few, and do not grow."""
    ids = torch.randint(0, 50, (1, 4096), generator=torch.Generator().manual_seed(0))
    held = {}
    for name, mixers in (("hybrid", ["kda", "kda", "kda", "softmax"] * 2), ("softmax", ["softmax"] * 8)):
        model = Transformer(50, 32, 8, 4, mixer=mixers, hidden=0).eval()
        caches = model.new_caches()
        for piece in ids.split(512, 1):
            model(piece, caches=caches)
        held[name] = caches.nbytes
    state = 4 * (4 * 8 * 8 + 3 * 3 * 32)  # bytes of one: 4 heads of 8 x 8, and three tokens of three convolutions
    assert held["softmax"] == 8 * 4096 * 2 * 32 * 4
    assert held["hybrid"] == held["softmax"] // 4 + 6 * state
    assert 0.25 < held["hybrid"] / held["softmax"] < 0.255


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_gives_the_likeliest_tokens_of_full_passes(name):
    """Also behind left padding."""
    torch.manual_seed(0)
    model = Transformer(50, 32, 2, 4, mixer=name, tied=False, context=64).double().eval()
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(1))
    whole = ids
    for _ in range(12):
        whole = torch.cat([whole, model(whole)[:, -1:].argmax(-1)], 1)
    assert len(whole[:, 13:].unique()) > 5
    assert torch.equal(model.generate(ids, 12), whole[:, 13:])
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    real = torch.arange(18).expand(2, -1) >= 5
    assert torch.equal(model.generate(padded, 12, attention_mask=real), whole[:, 13:])


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_paper_train(name, size):
    """A step on random tokens changes every parameter."""
    torch.manual_seed(0)
    model = Transformer(20, 4 * size, 1, 4, mixer=name, context=64)
    ids = torch.randint(0, 20, (2, 40))
    torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for told, parameter in model.named_parameters():
        assert parameter.grad is not None, told
        assert bool(parameter.grad.isfinite().all()), told
        assert float(parameter.grad.abs().max()) > 0, told


def test_defaults_are_those_of_the_papers():
    """At a width of 128 and 4 heads, where Mamba-2's heads have just their size in the paper."""
    torch.manual_seed(0)
    made = {name: mixer(name, 128, 4, 64) for name in NAMES}
    maps = {name: {n: tuple(p.shape) for n, p in each.named_parameters() if p.dim() == 2} for name, each in made.items()}
    assert maps["gated_delta_net"]["k.weight"] == (96, 128)
    assert maps["gated_delta_net"]["v.weight"] == (192, 128)
    assert maps["kda"]["alpha.down.weight"] == maps["kda"]["gate.down.weight"] == (32, 128)
    assert maps["gla"]["alpha.down.weight"] == (16, 128)
    assert made["gla"].temperature == 16
    assert maps["mamba2"]["k.weight"] == (128, 128)
    assert maps["mamba2"]["v.weight"] == (4 * 64, 128)
    assert maps["retention"]["v.weight"] == (256, 128)
    for name in ("gated_delta_net", "kda", "mamba2"):
        assert made[name].convolutions.weights["q"].shape[1] == 4
    bound = 2**-2.5 * (6 / (128 + 128)) ** 0.5
    assert float(made["retention"].q.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("slowest", [0.0, 1.0])
def test_decays_start_as_in_the_papers(slowest):
    torch.manual_seed(0)
    fading = Fading(4000, slowest=slowest)
    rates = fading.rate.detach().exp()
    log_decay, steps = (t.detach()[0, :, 0] for t in fading(torch.zeros(1, 1, 4000)))
    assert torch.allclose(log_decay, -rates * steps)
    for values, low, high in ((rates, slowest, 16), (steps.log10(), -3, -1)):
        assert float(values.min()) == pytest.approx(low, abs=0.02)
        assert float(values.max()) == pytest.approx(high, abs=0.02)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.2)


def test_lower_bounds_are_shared_by_the_layers_of_a_stack():
    torch.manual_seed(0)
    bounds = LowerBounds(3, 32)
    model = Transformer(20, 32, 3, 4, mixer=lambda layer: Hgrn2(32, 4, lower=bounds, layer=layer))
    assert sum(p is bounds.table for p in model.parameters()) == 1
    model(torch.randint(0, 20, (2, 30))).square().sum().backward()
    assert float(bounds.table.grad.abs().max()) > 0
    assert [float(bounds(layer).detach().min()) for layer in range(3)] == pytest.approx([0, 1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GatedDeltaNet(30, 4), "whole numbers"),
        (lambda: GatedDeltaNet(32, 4, key_size=0), "1 or more"),
        (lambda: Kda(30, 4), "no multiple of 4 heads"),
        (lambda: Gla(28, 4), "even size"),
        (lambda: Retention(30, 4), "no multiple of 4 heads"),
        (lambda: Mamba2(32, 4, groups=3), "groups"),
        (lambda: Hgrn2(30, 4), "no multiple of 4 heads"),
        (lambda: Hgrn2(32, 4, lower=1.0), "not, 1"),
        (lambda: Hgrn2(32, 4, lower=LowerBounds(2, 32), layer=2), "this is layer 2"),
    ],
)
def test_settings_that_can_not_be_are_refused(make, words):
    with pytest.raises(ShapeError, match=words):
        make()
