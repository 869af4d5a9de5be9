"""Lightning attention, TransNormer, ReGLA and log-linear attention: their cost, their range, and what checks do not see."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headwise.errors import ShapeError
from headwise.mechanisms._states import begin
from headwise.mechanisms.linear._diagonal import DiagAttention
from headwise.mechanisms.linear.lightning_attention_2 import LightningAttention2
from headwise.mechanisms.linear.lightning_attention_tnl import LightningAttentionTnl
from headwise.mechanisms.linear.log_linear_attention import LogLinearAttention, sized
from headwise.mechanisms.linear.regla import Regla
from headwise.mechanisms.linear.trans_normer import NormAttention, TransNormer
from headwise.mechanisms.linear.trans_normer_llm import TransNormerLlm
from headwise.recurrence import recur
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents
from headwise.testing._mixer_forms import require_documents_apart, require_forms_agree, require_weights_implied
from headwise.testing.adapters import runner_for

LINEAR = {
    "lightning 2": lambda: LightningAttention2(32, 4),
    "tnl": lambda: LightningAttentionTnl(32, 4),
    "trans normer llm": lambda: TransNormerLlm(32, 4),
    "norm": lambda: TransNormer(32, 4),
    "diag": lambda: TransNormer(32, 4, "diag", block=16),
    "regla": lambda: Regla(32, 4),
}


class Tally(TorchDispatchMode):
    """Counts the numbers that operations make, and the sizes of running sums."""

    def __init__(self):
        super().__init__()
        self.numbers, self.sums = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers += out.numel()
            if "cumsum" in str(func):
                self.sums.append(out.numel())
        return out


def tokens(n, b=1, width=32, seed=0, dtype=torch.float32):
    return torch.randn(b, n, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def multiplied(mixer, n, cache=None):
    with FlopCounterMode(display=False) as counted:
        mixer(tokens(n), Causal(), cache=cache)
    return counted.get_total_flops()


@torch.no_grad()
def made(mixer, n):
    with Tally() as tally:
        mixer(tokens(n), Causal())
    return tally.numbers


@pytest.mark.parametrize("name", LINEAR)
def test_work_and_memory_of_a_token_do_not_grow_with_the_text(name):
    mixer = LINEAR[name]()
    few, many = multiplied(mixer, 512), multiplied(mixer, 2048)
    assert few > 0
    assert 3.9 * few < many <= 4 * few
    assert made(mixer, 2048) <= 4 * made(mixer, 512)


def test_the_quadratic_form_does_grow():
    mixer = LightningAttention2(32, 4)
    mixer.form = "parallel"
    assert multiplied(mixer, 2048) > 8 * multiplied(mixer, 512)
    assert made(mixer, 2048) > 8 * made(mixer, 512)


@pytest.mark.parametrize("name", LINEAR)
def test_decoding_costs_the_same_after_any_text(name):
    mixer = LINEAR[name]()
    costs, sizes = [], []
    for n in (16, 1024):
        cache = mixer.new_cache()
        with torch.no_grad():
            mixer(tokens(n), Causal(), cache=cache)
        sizes.append(cache.nbytes)
        costs.append(multiplied(mixer, 1, cache))
    assert costs[0] == costs[1] > 0
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("name", ["lightning 2", "tnl", "trans normer llm", "norm"])
def test_no_running_sum_of_states(name):
    """Only numbers of tokens and logarithms of decays are summed along the text, never products of keys and values."""
    mixer, n = LINEAR[name](), 256
    with torch.no_grad(), Tally() as tally:
        mixer(tokens(n), Causal())
    assert max(tally.sums, default=0) <= mixer.heads * n


def test_the_tally_sees_a_running_sum_of_states():
    k, v = (tokens(64, width=8, seed=seed) for seed in (1, 2))
    with Tally() as tally:
        (k[..., :, None] * v[..., None, :]).cumsum(1)
    assert tally.sums == [64 * 8 * 8]


@pytest.mark.parametrize("make", [lambda: LightningAttention2(32, 4), lambda: TransNormerLlm(32, 4, 1, 12)])
@torch.no_grad()
def test_robust_recurrence_does_not_overflow_where_the_naive_one_does(make):
    mixer, x = make(), tokens(3000)
    exact = make().double()
    exact.load_state_dict(mixer.state_dict())
    exact.form = "parallel"
    wanted = exact.read(x.double(), Causal())
    q, k, v, decay = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))[:4]
    place = decay.cumsum(2)[..., None]
    grown = (k * (-place).exp())[..., :, None] * v[..., None, :]
    naive = torch.einsum("bhnd,bhnde->bhne", q * place.exp(), grown.cumsum(2))
    assert not naive.isfinite().all()
    for form in ("chunk", "recurrent"):
        mixer.form = form
        out = mixer.read(x, Causal())
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("base", ["mamba2", "gated_delta"])
def test_log_linear_work_grows_with_the_logarithm_of_the_chunks(base):
    """A token's work with levels for its text: as many more as the text has doubled; a fixed number of levels costs the same."""
    each = [multiplied(sized(4, 8, n, base=base), n) // n for n in (128, 256, 512, 1024, 2048)]
    steps = {b - a for a, b in itertools.pairwise(each)}
    assert len(steps) == 1
    assert 0 < steps.pop() < each[0] / 4
    fixed = LogLinearAttention(32, 4, 12, base=base)
    assert multiplied(fixed, 2048) == 4 * multiplied(fixed, 512)


@pytest.mark.parametrize("base", ["mamba2", "gated_delta"])
def test_log_linear_memory_is_one_state_for_each_doubling(base):
    sizes = []
    for n in (64, 128, 256, 512):
        mixer = sized(4, 8, n, base=base, taps=0)
        cache = mixer.new_cache()
        with torch.no_grad():
            mixer(tokens(n), Causal(), cache=cache)
        sizes.append(cache.nbytes)
    one = 4 * 4 * mixer.state * mixer.size
    assert sizes == [one * levels for levels in (6, 7, 8, 9)]


@pytest.mark.parametrize("base", ["mamba2", "gated_delta"])
@torch.no_grad()
def test_log_linear_documents_decoded_one_by_one(base):
    mixer, x = LogLinearAttention(32, 4, 5, base=base).double(), tokens(30, dtype=torch.float64)
    mixer.log_rate.sub_(5.0)
    ids = torch.tensor([0] * 13 + [1] * 17)
    alone = torch.cat([mixer(x[:, :13], Causal()), mixer(x[:, 13:], Causal())], 1)
    cache = mixer.new_cache()
    sizes = [1] * 10 + [7, 1, 1, 5, 1, 5]
    pieces = [mixer(piece, Causal(), Documents(ids), cache=cache) for piece in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), alone, rtol=0, atol=1e-11)


def test_log_linear_starts_as_mamba2_does():
    torch.manual_seed(0)
    mixer = LogLinearAttention(2048, 2048, state=1, expand=1, levels=2)
    steps, rates = torch.nn.functional.softplus(mixer.step_bias), mixer.log_rate.exp()
    assert 0.00099 < float(steps.min()) < 0.0011
    assert 0.09 < float(steps.max()) < 0.101
    assert 1 <= float(rates.min()) < 1.1
    assert 15.9 < float(rates.max()) <= 16.001
    assert not (mixer.skip != 1).any()


@pytest.mark.parametrize("kind", ["T1", "T2"])
def test_norm_attention_is_a_state_like_others(kind):
    torch.manual_seed(0)
    runner = runner_for(NormAttention(32, 4, kind).double())
    require_forms_agree(runner)
    require_weights_implied(runner)
    require_documents_apart(runner)


def test_trans_normer_starts_with_smaller_maps_where_it_is_linear():
    torch.manual_seed(0)
    for layer, gain in (("norm", 2**-0.5), ("diag", 1.0)):
        maps = TransNormer(256, 4, layer).attention.maps
        for part, wanted in ((maps.q, gain), (maps.k, gain), (maps.v, gain), (maps.out, 1.0)):
            widest = wanted * (6 / 512) ** 0.5
            assert 0.99 * widest < float(part.weight.detach().abs().max()) <= widest * 1.000001


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padding_may_hold_nan(name, left):
    torch.manual_seed(0)
    mixer, x = LINEAR[name]().double(), tokens(40, b=2, dtype=torch.float64)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, slice(0, 9) if left else slice(31, 40)] = False
    out = mixer(x.masked_fill(~real[..., None], torch.nan), Causal(), attention_mask=real)
    torch.testing.assert_close(out[1, real[1]], mixer(x[1:, real[1]], Causal())[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_padding_is_no_largest_key():
    torch.manual_seed(0)
    mixer, x = Regla(32, 4).double(), tokens(20, dtype=torch.float64)
    x[..., 0] = 1.0
    mixer.k.weight[:, 0] = -60.0
    real = torch.arange(20)[None] >= 5
    out = mixer(x, Causal(), attention_mask=real)[:, 5:]
    torch.testing.assert_close(out, mixer(x[:, 5:], Causal()), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_gate_that_shuts_does_not_blur_those_after_it():
    torch.manual_seed(0)
    mixer, x = Regla(32, 4), tokens(16)
    mixer.gate.weight[:, 0] = 1e6
    x[..., 0] = 0.0
    x[:, 3, 0] = -1.0
    exact = Regla(32, 4).double()
    exact.load_state_dict(mixer.state_dict())
    wanted = exact(x.double(), Causal())
    torch.testing.assert_close(mixer(x, Causal()).double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_level_weights_of_any_length_and_any_chunk_agree():
    torch.manual_seed(0)
    mixer, x = LogLinearAttention(32, 4, 6, base="gated_delta").double(), tokens(203, dtype=torch.float64)
    mixer.form = "recurrent"
    wanted = mixer(x, Causal())
    mixer.form = "chunk"
    for chunk in (8, 64, 100):
        mixer.chunk = chunk
        torch.testing.assert_close(mixer(x, Causal()), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rate", [0.0, -0.5])
@torch.no_grad()
def test_lightning_is_retention_with_its_own_decay(rate):
    mixer, x = LightningAttention2(32, 4).double(), tokens(50, dtype=torch.float64)
    mixer.logs = [rate] * 4
    q, k, v = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(),), None))[:3]
    wanted = recur(q, k, v, decay=torch.full((1, 4, 50), rate, dtype=torch.float64), form="parallel").out
    torch.testing.assert_close(mixer.read(x, Causal()), wanted, rtol=0, atol=1e-11)


def test_what_can_not_be_is_refused_in_words():
    x = tokens(8)
    with pytest.raises(ShapeError, match="documents packed into a row"):
        DiagAttention(32, 4, "T2", 4)(x, Causal(), Documents(torch.zeros(8, dtype=torch.long)))
    for mixer in (Regla(32, 4), LogLinearAttention(32, 4)):
        with pytest.raises(ShapeError, match=r"give Causal\(\)"):
            mixer(x)
    for build, words in (
        (lambda: LightningAttention2(32, 5), "no multiple of 5 heads"),
        (lambda: LightningAttention2(32, 4, 3, 3), "layer 3 must be 0 or more"),
        (lambda: LightningAttentionTnl(32, 4, schedule="fast"), "schedule 'fast' must be one of slopes, paper"),
        (lambda: TransNormerLlm(32, 4, positions="none"), "positions 'none' must be one of mix"),
        (lambda: TransNormerLlm(32, 4, activation="relu"), "activation 'relu' must be one of swish"),
        (lambda: TransNormer(32, 4, "other"), "layer 'other' must be norm or diag"),
        (lambda: TransNormer(32, 4, kind="T3"), "kind 'T3' must be one of T1, T2"),
        (lambda: TransNormer(12, 4), "pairs of channels, and a head has 3"),
        (lambda: LogLinearAttention(32, 4, 1), "levels 1 must be 2 or more"),
        (lambda: LogLinearAttention(32, 4, base="gla"), "base 'gla' must be one of mamba2, gated_delta"),
        (lambda: Regla(32, 5), "no multiple of 5 heads"),
    ):
        with pytest.raises(ShapeError, match=words):
            build()
