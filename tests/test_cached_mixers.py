"""Mixers and stacks that keep hidden states once, or latents of groups of layers."""

import itertools

import pytest
import torch
import transformers as t
from torch import nn

from headwise import Causal, Window
from headwise.errors import InputError, ShapeError
from headwise.mechanisms import Attention, KeyValues, Rotary
from headwise.mechanisms.cached import el_attention
from headwise.mechanisms.cached._latent import FourBits, LatentFollower, LatentProducer
from headwise.mechanisms.cached.el_attention import ElAttention, Memory, encoder_states_only
from headwise.nn import build
from headwise.nn.architectures.clla import kept
from headwise.stages.gate import Gate
from headwise.stages.identity_mix import IdentityMix, OwnValueMix
from headwise.stages.relu import Relu
from headwise.stages.softcap import Softcap


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module, seed=0, by=0.3):
    for number, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data.double() + by * noise(*parameter.shape, seed=seed + number)
    return module.double().eval()


def close(a, b, within=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=within)


# EL-attention


def bart(**options):
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = t.BartConfig(
        vocab_size=60, d_model=32, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, forced_eos_token_id=None,
        eos_token_id=None, pad_token_id=1, bos_token_id=0, decoder_start_token_id=2, **sizes, **options,
    )  # fmt: skip
    return shaken(t.BartForConditionalGeneration(config))


SOURCE = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))
THERE = torch.ones_like(SOURCE)
THERE[1, 7:] = 0


@torch.no_grad()
def test_cross_attentions_of_bart_from_the_encoder_states_alone():
    model, found = bart(), {}
    layers = {name: part for name, part in model.named_modules() if name.endswith("encoder_attn")}

    def note(name):
        def hook(_, args, kwargs, out):
            found[name] = args[0], kwargs["key_value_states"], out[0]

        return hook

    for name, part in layers.items():
        part.register_forward_hook(note(name), with_kwargs=True)
    model(input_ids=SOURCE, attention_mask=THERE, decoder_input_ids=SOURCE[:, :6])
    assert len(found) == 3
    memories = {states.data_ptr(): Memory(states, THERE) for _, states, _ in found.values()}
    assert len(memories) == 1  # one for all layers
    (memory,) = memories.values()
    for name, (x, _, out) in found.items():
        assert layers[name].k_proj.bias.abs().min() > 0
        close(ElAttention.of(layers[name]).cross(x, memory), out)
    both = sum(2 * memory.y.numel() * memory.y.element_size() for _ in layers)
    assert both == 6 * memory.nbytes == 6 * 2 * 11 * 32 * 8


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_bart_generates_alike_and_keeps_no_cross_attention(beams, how):
    model = bart()
    model.set_attn_implementation(how)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True}
    before = model.generate(SOURCE, attention_mask=THERE, **options)
    modules = dict(model.named_modules())
    with encoder_states_only(model) as names:
        assert len(names) == 3
        made = model.generate(SOURCE, attention_mask=THERE, **options)
        logits = model(input_ids=SOURCE, attention_mask=THERE, decoder_input_ids=SOURCE).logits
    assert dict(model.named_modules()) == modules
    assert torch.equal(made.sequences, before.sequences)
    close(logits, model(input_ids=SOURCE, attention_mask=THERE, decoder_input_ids=SOURCE).logits, 1e-11)

    def held(output):
        layers = output.past_key_values.cross_attention_cache.layers
        return sum(x.numel() for layer in layers for x in (layer.keys, layer.values) if x is not None)

    assert (held(before), held(made)) == (2 * 3 * 2 * beams * 11 * 32, 0)


def test_after_an_error_the_layers_are_as_before():
    model = bart()
    modules = dict(model.named_modules())

    def fail():
        assert dict(model.named_modules()) != modules
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), encoder_states_only(model):
        fail()
    assert dict(model.named_modules()) == modules
    with pytest.raises(ShapeError, match="no cross-attention named encoder_attn"), encoder_states_only(nn.Linear(2, 2)):
        pass
    with encoder_states_only(model), pytest.raises(ShapeError, match="none were given"):
        model.model.decoder.layers[0].encoder_attn(torch.zeros(1, 1, 32).double())


@torch.no_grad()
def test_beams_read_one_copy_of_the_states():
    module = shaken(ElAttention(24, 4, kv_heads=2, bias=True, memory_width=20))
    p = module.projections
    y, x = noise(2, 9, 20, seed=1), noise(6, 5, 24, seed=2)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 3:] = False
    keys, values = (f(y).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for f in (p.k, p.v))
    q = p.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
    scores = (q @ keys.repeat_interleave(3, 0).mT / 6**0.5).masked_fill(~real.repeat_interleave(3, 0)[:, None, None], -torch.inf)
    close(module.cross(x, Memory(y, real)), p.merge(scores.softmax(-1) @ values.repeat_interleave(3, 0)))
    once, each = Memory(y, real), Memory(y.repeat_interleave(3, 0), real.repeat_interleave(3, 0))
    close(module.cross(x, once), module.cross(x, each))
    assert (once.nbytes, each.nbytes) == (2 * 9 * 20 * 8, 3 * once.nbytes)
    with pytest.raises(ShapeError, match="multiple of the sentences"):
        module.cross(x[:5], once)
    with pytest.raises(ShapeError, match="20 wide"):
        module.cross(x, Memory(noise(2, 9, 24)))
    with pytest.raises(ShapeError, match="mask of hidden states"):
        Memory(y, real[:, :3])


@torch.no_grad()
@pytest.mark.parametrize(
    "stages", [(Gate(torch.tensor([0.5, 2.0, 0.0, -1.0])),), (Relu(),), (IdentityMix(0.4),), (OwnValueMix(0.4),)], ids=str
)
def test_stages_see_what_they_see_in_multi_head_attention(stages):
    plain = shaken(Attention(24, 4, kv_heads=2, bias=True))
    made, x = ElAttention.of(plain), noise(2, 12, 24)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :5] = False
    close(made(x, Causal(), *stages), plain(x, Causal(), *stages))
    close(made(x, Causal(), Window(4), attention_mask=real), plain(x, Causal(), Window(4), attention_mask=real))
    close(made(x), plain(x))


@torch.no_grad()
def test_a_bias_of_keys_alone_is_seen_where_scores_are_capped():
    plain = shaken(Attention(24, 4, bias=True))
    plain.projections.v = shaken(nn.Linear(24, 24, bias=False))
    made, x = ElAttention.of(plain), noise(2, 12, 24)
    close(made(x, Causal(), Softcap(1.0)), plain(x, Causal(), Softcap(1.0)))
    without = ElAttention.of(plain)
    without.projections.k = nn.Linear(24, 24, bias=False).double()
    without.projections.k.weight = plain.projections.k.weight
    close(without(x, Causal()), plain(x, Causal()))
    assert not torch.allclose(without(x, Causal(), Softcap(1.0)), plain(x, Causal(), Softcap(1.0)))


def test_only_keys_that_are_a_map_of_states_can_be_carried_over():
    config = t.LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=16, num_hidden_layers=1, vocab_size=9)
    with pytest.raises(ShapeError, match="rotates its keys"):
        ElAttention.of(t.LlamaModel(config).layers[0].self_attn)
    with pytest.raises(ShapeError, match="rotates its keys"):
        ElAttention.of(Attention(32, 4, rotary=Rotary()))
    normed = Attention(32, 4)
    normed.k_norm = nn.RMSNorm(8)
    with pytest.raises(ShapeError, match="norms queries or keys"):
        ElAttention.of(normed)
    with pytest.raises(ShapeError, match="mechanism of its own"):
        ElAttention.of(el_attention.Attention(32, 4, lambda q, k, v: v))
    with pytest.raises(ShapeError, match="no linear map named q_proj or q"):
        ElAttention.of(nn.Linear(4, 4))
    headless = nn.Module()
    headless.q, headless.k, headless.v, headless.o = (nn.Linear(8, 8) for _ in range(4))
    with pytest.raises(ShapeError, match="number of heads"):
        ElAttention.of(headless)


@torch.no_grad()
def test_scores_of_a_module_keep_their_scale():
    model = shaken(t.T5Model(t.T5Config(vocab_size=9, d_model=24, d_kv=6, num_heads=4, num_layers=1, d_ff=16)))
    cross = model.decoder.block[0].layer[1].EncDecAttention
    x, y = noise(2, 5, 24), noise(2, 7, 24, seed=1)
    close(ElAttention.of(cross, scale=1.0).cross(x, Memory(y)), cross(x, key_value_states=y)[0])
    plain = shaken(Attention(24, 4))
    plain.scaling = 0.5
    assert (ElAttention.of(plain).scale, ElAttention.of(plain, scale=2.0).scale, ElAttention(24, 4).scale) == (0.5, 2.0, 6**-0.5)


# CLLA


def test_four_bits_by_hand():
    packed, scales = FourBits(4).encode(torch.tensor([7.0, -7.0, 3.4, -2.6, 0.0, 14.0, -5.0]))
    assert scales.tolist() == [1.0, 2.0]
    assert packed.tolist() == [15 | 1 << 4, 11 | 5 << 4, 8 | 15 << 4, 8 - 2]  # codes + 8: 7, -7, 3, -3, 0, 7, -2 (ties to even)
    assert FourBits(4).decode(packed, scales, 7).tolist() == [7.0, -7.0, 3.0, -3.0, 0.0, 14.0, -4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_off_by_half_a_scale_at_most(dtype):
    x = (noise(60, 70) * torch.logspace(-9, 3, 60, dtype=torch.float64)[:, None]).to(dtype)
    x[3, :64] = 0.0
    packed, scales = FourBits(64).encode(x)
    left = FourBits(64).decode(packed, scales, 70)
    assert (packed.shape, packed.dtype) == ((60, 35), torch.uint8)
    assert left.dtype == scales.dtype == dtype
    steps = scales.double().repeat_interleave(64, -1)[:, :70]
    rounding = torch.finfo(dtype).eps * x.double().abs() + 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((left.double() - x.double()).abs() <= (0.5 + 1e-9) * steps + rounding).all())
    assert not bool(left[3, :64].any())


def test_latents_learn_as_if_they_were_not_rounded():
    mixer = shaken(LatentProducer(24, 4, 8, codec=FourBits(4)))
    x = noise(2, 9, 24)
    for cache in (None, mixer.new_cache()):
        found = []
        for codec in (FourBits(4), None):
            mixer.codec = codec
            c = mixer.down(x)[..., :8]
            packed, scales = FourBits(4).encode(c.detach())
            left = c + (FourBits(4).decode(packed, scales, 8) - c.detach())
            if codec is None:  # written out
                q = mixer.queries(x, torch.arange(9)[None])
                out = mixer.read(q, left[:, None], x.new_empty(2, 1, 9, 0), (Causal(),), {})
            else:
                out = mixer(x, Causal(), cache=cache)
            found.append([out, *torch.autograd.grad(out.square().sum(), [mixer.down.weight, mixer.to_keys.weight])])
        for mine, theirs in zip(*found, strict=True):
            close(mine, theirs, 1e-11)


def test_rounded_latents_of_earlier_calls_stay_where_they_are():
    mixer, x = shaken(LatentProducer(24, 4, 8, codec=FourBits(4))), noise(2, 9, 24)
    cache, wanted = mixer.new_cache(), mixer(x, Causal())
    for a, b in itertools.pairwise((0, 6, 9)):  # gradients are recorded
        close(mixer(x[:, a:b], Causal(), cache=cache), wanted[:, a:b])


@torch.no_grad()
def test_a_follower_reads_with_maps_of_its_own():
    first, second = shaken(LatentProducer(24, 4, 10, rotary_dim=4)), shaken(LatentFollower(24, 4, 10, rotary_dim=4), 50)
    first.rotary = second.rotary = Rotary(100.0)
    cache = first.new_cache()
    view = second.new_cache(cache)
    x, y = noise(2, 9, 24), noise(2, 9, 24, seed=1)
    whole = first.new_cache()
    also = second.new_cache(whole)
    first(x, Causal(), cache=whole)
    wanted = second(y, Causal(), cache=also)
    for a, b in itertools.pairwise((0, 4, 5, 9)):
        first(x[:, a:b], Causal(), cache=cache)
        close(second(y[:, a:b], Causal(), cache=view), wanted[:, a:b])
    assert (view.nbytes, cache.nbytes) == (0, 2 * 9 * (10 + 4) * 8)
    twin = LatentProducer(24, 4, 10, rotary_dim=4).double()  # of which the maps to queries, keys and values are the second's
    twin.load_state_dict({**first.state_dict(), **second.state_dict()})
    twin.rotary = first.rotary
    close(second(x, Causal(), cache=_read(second, first, x)), twin(x, Causal()))
    with pytest.raises(InputError, match="keeps KeyValues"):
        second.new_cache(KeyValues())
    with pytest.raises(InputError, match="follows another layer's cache"):
        second(x, Causal())


def _read(second, first, x):
    cache = first.new_cache()
    view = second.new_cache(cache)
    first(x, Causal(), cache=cache)
    return view


@torch.no_grad()
def test_bytes_of_a_real_cache_are_below_two_percent():
    """Sizes in the paper's proportions: a rank of an eighth of the width, pairs of layers; bfloat16."""
    ids = torch.randint(0, 30, (1, 40))
    held = {}
    for name, options in (("clla", {"rank": 128, "rotary_dim": 16}), ("transformer", {})):
        model = build(name, 30, 1024, 4, 8, hidden=0, **options).bfloat16()
        caches = model.new_caches()
        model(ids, caches=caches)
        held[name] = caches.nbytes
        if name == "clla":
            assert kept(model, 40) * 2 == caches.nbytes
            assert [cache.nbytes for cache in caches.layers] == [40 * (64 + 2 * 2 + 16 * 2), 0] * 2
    assert held["transformer"] == 40 * 4 * 2 * 1024 * 2
    assert held["clla"] / held["transformer"] == pytest.approx(100 / 8192)
    assert held["clla"] / held["transformer"] < 0.02


def test_what_is_read_absorbed_or_not_is_chosen_by_what_it_costs():
    mixer = LatentProducer(64, 4, 32, rotary_dim=8)  # heads of 16
    assert [mixer._absorb(n, 1000, ()) for n in (1, 1000)] == [True, False]
    # 32 * 16 * (64 - n) saved, n * 64 * (32 - 16) paid
    assert [mixer._absorb(n, 64, ()) for n in (20, 21, 22)] == [True, True, False]
    assert not mixer._absorb(1, 1000, (Gate(torch.ones(4)),))
    mixer.absorbed = False
    assert not mixer._absorb(1, 1000, ())
    with pytest.raises(ShapeError, match="pairs"):
        LatentProducer(64, 4, 32, rotary_dim=3)
    with pytest.raises(ShapeError, match="factor of 0"):
        build("clla", 9, 32, 2, 4, factor=0)
    with pytest.raises(ShapeError, match="8 bits"):
        build("clla", 9, 32, 2, 4, bits=8)
