"""The stack: any mixer by name or as modules, caches that free what windows hide, generation, folders, checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import headwise
from headwise.errors import InputError, ModelLoadError, RegistryError, ShapeError, UnsupportedModelError
from headwise.mechanisms import Attention, KeyValues, Rotary
from headwise.mechanisms.by_head import ByHead
from headwise.mechanisms.following import KeyFollower, WeightFollower
from headwise.mechanisms.heads.gqa import pool
from headwise.mechanisms.heads.moh import Moh
from headwise.mechanisms.softmax.cope import Cope
from headwise.mechanisms.softmax.memory_efficient import MemoryEfficient
from headwise.mechanisms.softmax.mta import Mta
from headwise.nn import Transformer, build, from_pretrained, from_transformers, mixer
from headwise.nn.transformer import kept
from headwise.stages.alibi import Alibi
from headwise.stages.causal import Causal
from headwise.stages.sink import Sink
from headwise.stages.strided import Strided
from headwise.stages.window import Window

IDS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
PIECES = (7, 1, 1, 5, 9, 1, 6)


def stack(*args, seed=0, **options):
    torch.manual_seed(seed)
    return Transformer(50, 32, *(args or (3, 4)), context=64, **options).double().eval()


def decoded(model, ids, mask=None):
    caches, outs, start = model.new_caches(), [], 0
    for size in PIECES:
        piece = slice(start, start + size)
        outs.append(model(ids[:, piece], caches=caches, attention_mask=None if mask is None else mask[:, piece]))
        start += size
    return torch.cat(outs, 1), caches


CASES = {
    "plain": {},
    "windows": {"windows": [5, None, 7]},
    "learned places": {"positions": "learned", "mixer": ["softmax", "mqa", ("moh", {"shared": 1, "active": 2})]},
    "by head": {"mixer": {"softmax": 2, "cope": 1, "rela": 1}, "positions": "none"},
    "past queries": {"mixer": {"mta": 2, "softmax": 2}, "windows": 12},
    "a window shorter than those": {"mixer": "mta", "windows": 3},
    "followed past queries": {
        "mixer": lambda i: KeyFollower(32, 4) if i == 1 else Attention(32, 4, Mta(4, 8)), "follows": {1: 0},
    },
    "blocks twice": {"mixer": "gqa", "order": [0, 0, 2, 1, 1]},
    "followed keys": {"mixer": lambda i: KeyFollower(32, 4) if i == 1 else Attention(32, 4, kv_heads=2), "follows": {1: 0}},
    "followed window": {
        "mixer": lambda i: KeyFollower(32, 4) if i else Attention(32, 4), "follows": {1: 0, 2: 1}, "windows": 6,
    },
    "followed weights": {"mixer": lambda i: WeightFollower(32, 4) if i else Attention(32, 4), "follows": {1: 0, 2: 0}},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_decoding_and_padding_change_nothing(options):
    model = stack(**options)
    whole = model(IDS)
    assert torch.allclose(decoded(model, IDS)[0], whole, atol=1e-12)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :9] = False
    padded, _ = decoded(model, IDS, mask)
    assert torch.allclose(padded[1], whole[1], atol=1e-12)
    assert torch.allclose(padded[:1, 9:], model(IDS[:1, 9:]), atol=1e-12)
    assert torch.allclose(model(IDS, attention_mask=mask)[:1, 9:], padded[:1, 9:], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"windows": 4}, {"positions": "learned"}], ids=["plain", "windows", "learned"])
@torch.no_grad()
def test_padding_within_a_text_changes_nothing(options):
    """Pieces that are padding for one row of a batch alone, as when several texts are read side by side."""
    model = stack(**options)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 8:23] = False  # whole pieces, and parts of them
    out, _ = decoded(model, IDS, mask)
    there = mask[0]
    assert torch.allclose(out[0][there], model(IDS[:1, there])[0], atol=1e-12)
    assert torch.allclose(out[1], model(IDS[1:])[0], atol=1e-12)


@torch.no_grad()
def test_heads_of_several_mechanisms_read_their_own_keys():
    """Plain attention computed in two ways, and biases that differ by head, are given to each head as they are."""
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    split = ByHead([(None, 1), (MemoryEfficient(4, 4), 2), (None, 1)])
    for stages in ((Causal(),), (Causal(), Alibi.geometric(4))):
        assert torch.allclose(split(q, k, v, *stages), headwise.attend(q, k, v, *stages), atol=1e-12)
    grouped = ByHead([(None, 2), (MemoryEfficient(4, 4), 2)])
    assert torch.allclose(grouped(q, k[:, :2], v[:, :2]), headwise.attend(q, k[:, :2], v[:, :2]), atol=1e-12)
    with pytest.raises(ShapeError, match="do not have key/value heads of their own"):
        split(q, k[:, :2], v[:, :2])
    with pytest.raises(ShapeError, match="queries have 3 heads"):
        split(q[:, :3], k[:, :3], v[:, :3])


@torch.no_grad()
def test_bytes_are_those_of_what_can_be_read():
    """(2 rows) x (keys and values) x (8 heads' width) x (8 bytes) a token, of the tokens that each layer still reads."""
    token = 2 * 2 * 32 * 8
    assert decoded(stack(), IDS)[1].nbytes == 3 * 30 * token
    assert decoded(stack(windows=[5, None, 7]), IDS)[1].nbytes == (5 + 30 + 7) * token
    assert decoded(stack(mixer="mqa"), IDS)[1].nbytes == 3 * 30 * token // 4
    assert decoded(stack(order=[0, 1, 2, 0]), IDS)[1].nbytes == 4 * 30 * token
    assert decoded(stack(**CASES["followed window"]), IDS)[1].nbytes == 6 * token
    assert decoded(stack(**CASES["followed weights"]), IDS)[1].nbytes == (30 + 2 * 15) * token  # two layers keep values only
    assert len(decoded(stack(), IDS)[1]) == 30


def test_kept_follows_the_masks():
    assert kept(()) == (0, None)
    assert kept((Window(6),)) == (0, 6)
    assert kept((Window(6) | Sink(3),)) == (3, 6)
    assert kept((Strided(4),)) == (0, None)


@torch.no_grad()
def test_sinks_are_kept_beside_a_window():
    """The mask alone, without a cache that lets go, gives the same."""
    model = stack()
    for block in model.blocks:
        block.stages = (Window(6) | Sink(3),)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = False
    whole = model(IDS, attention_mask=mask)
    out, caches = decoded(model, IDS, mask)
    assert torch.allclose(out[:, 4:], whole[:, 4:], atol=1e-12)
    assert all(cache.k.shape[2] < 30 for cache in caches.layers)
    out, caches = decoded(model, IDS)
    assert torch.allclose(out, model(IDS), atol=1e-12)
    assert [cache.k.shape[2] for cache in caches.layers] == [9, 9, 9]


@torch.no_grad()
def test_rotation_is_that_of_transformers_and_sees_distances_only():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    turned = Rotary()(x, torch.arange(5))
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, head_dim=8)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    assert torch.allclose(turned, apply_rotary_pos_emb(x, x, cos, sin)[0], atol=1e-6)
    scores = turned @ turned.mT
    later = Rotary()(x, torch.arange(5) + 37)
    assert torch.allclose(later @ later.mT, scores, atol=1e-12)
    half = Rotary(share=0.5)(x, torch.arange(5))
    assert torch.equal(half[..., 4:], x[..., 4:])
    assert not torch.equal(half[..., :4], x[..., :4])
    with pytest.raises(ShapeError, match="3 of 6 dimensions"):
        Rotary(share=0.5)(x[..., :6], torch.arange(5))


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "grouped, untied": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": 7}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_checkpoints_give_the_same_logits(made):
    kind, config, options = made
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = kind(config(**sizes, max_position_embeddings=64, **options)).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours = from_transformers(model)
    theirs = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(ours(IDS), theirs, atol=1e-5 * float(theirs.abs().max()))  # they rotate in float32
    assert ours.parameter_count >= sum(p.numel() for p in model.parameters())
    wanted = model.generate(IDS, max_new_tokens=6, do_sample=False)[:, 30:]
    assert torch.equal(ours.generate(IDS, 6), wanted)


def test_other_models_are_refused_with_what_they_have():
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel is no causal model of llama"):
        from_transformers(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, hidden_act="gelu"
    )
    with pytest.raises(UnsupportedModelError, match="has another activation"):
        from_transformers(LlamaForCausalLM(config))


@torch.no_grad()
def test_conversions_of_the_embedded_model():
    """Pooling and mixtures are exact where they change nothing, and cost what they should elsewhere."""
    subject = headwise.open_model(dtype="float32")
    stack = from_transformers(subject.model)
    from headwise.models.inputs import text_rows

    ids = text_rows(subject, None, 4, 256)

    def loss(model):
        return float(torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    base = loss(stack)
    assert abs(loss(stack.changed(lambda _, m: pool(m, 8))) - base) < 1e-5
    assert abs(loss(stack.changed(lambda _, m: Moh.of(m, 4, 4))) - base) < 1e-5
    mixture = loss(stack.changed(lambda _, m: Moh.of(m, 4, 2)))
    pooled = loss(stack.changed(lambda _, m: pool(m, 4)))
    assert base < mixture < base + 0.3  # three quarters of the heads, untrained
    assert pooled > base + 0.5  # whose heads are no copies of each other, and which was not trained on
    assert loss(stack) == base  # the model itself is as it was


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = stack(
        mixer=["softmax", ("moh", {"shared": 2, "active": 1}), {"softmax": 3, "cope": 1}], windows=[4, None, None], tied=False
    )
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert again.config == model.config
    assert not again.training
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["mixer"][1] == ["moh", {"shared": 2, "active": 1}]
    other = stack(mixer="mta")
    with pytest.raises(ModelLoadError, match="does not fit this model"):
        other.load_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**told, "format": "something else"}))
    with pytest.raises(ModelLoadError, match="not of the format"):
        from_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="can't be read"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="is not there"):
        other.load_weights(tmp_path / "nowhere")


@torch.no_grad()
def test_modules_are_saved_as_weights_only(tmp_path):
    def make(seed):
        torch.manual_seed(seed)  # the mixers are made first
        return stack(2, 4, seed=seed, mixer=[Attention(32, 4, Cope(8, 5)), Attention(32, 4)])

    make(0).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="Attention', 'Attention'"):
        from_pretrained(tmp_path)
    other = make(1)
    other.load_weights(tmp_path)
    assert torch.equal(other(IDS), make(0)(IDS))


@torch.no_grad()
def test_generation():
    model = stack()
    greedy = model.generate(IDS, 8)
    assert torch.equal(model.generate(IDS, 8), greedy)
    drawn = [model.generate(IDS, 8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    end = int(greedy[0, 2])
    stopped = model.generate(IDS[:1], 8, end=end)
    first = (greedy[0] == end).nonzero()[0]
    assert torch.equal(stopped[0, : first + 1], greedy[0, : first + 1])
    assert (stopped[0, first:] == end).all()
    caches = model.new_caches()
    parts = [model.generate(IDS, 3, caches=caches)]
    parts.append(model.generate(parts[0][:, -1:], 5, caches=caches))  # the cache has read all but the last token
    assert torch.equal(torch.cat(parts, 1), greedy)
    with pytest.raises(InputError, match="on the left"):
        model.generate(IDS, 2, attention_mask=torch.arange(30).expand(2, 30) < 20)
    with pytest.raises(InputError, match="with a token at least"):
        model.generate(IDS[:, :0], 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RegistryError, match="no mechanism 'nothing'"):
        stack(mixer="nothing")
    with pytest.raises(RegistryError, match=r"moh does not take the options \['sharing'\]"):
        stack(mixer=("moh", {"sharing": 1}))
    with pytest.raises(RegistryError, match="transformer can't be built"):
        build("transformer", 50, 32, 2, 4, widht=3)
    with pytest.raises(ShapeError, match="names 3 heads"):
        stack(mixer={"moh": 2, "softmax": 1})
    for options, told in (
        ({"mixer": ["softmax"] * 2}, "2 mixers for 3 layers"),
        ({"mixer": Attention(32, 4)}, "one module can't be the mixer of 3 layers"),
        ({"mixer": lambda _: Attention(16, 4)}, "width 16 does not fit"),
        ({"mixer": {"softmax": 3}}, "names 3 heads, the layer has 4"),
        ({"mixer": lambda _: KeyFollower(32, 4)}, "must be told in `follows`"),
        ({"follows": {1: 0}}, "keeps what it reads itself"),
        ({"mixer": lambda i: KeyFollower(32, 4) if i < 1 else Attention(32, 4), "follows": {0: 1}}, "does not come before it"),
        ({**CASES["followed window"], "windows": [6, 6, 7]}, "layer 2 reads 7 tokens back, and layer 1, which it follows, keeps 6"),
        ({**CASES["followed window"], "windows": [6, None, 6]}, "layer 1 reads all tokens back"),
        ({"order": [0, 3]}, "names blocks that are not there"),
        ({"windows": [3]}, "1 entries for 3 layers"),
        ({"positions": "alibi"}, "must be 'rotary', 'learned' or 'none'"),
    ):
        with pytest.raises(ShapeError, match=told):
            stack(**options)
    with pytest.raises(InputError, match="learned up to 64"):
        stack(positions="learned")(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="run it in a stack"):
        KeyFollower(32, 4)(torch.zeros(1, 2, 32))
    with pytest.raises(InputError, match="run it in a stack"):
        KeyFollower(32, 4).new_cache()
    with pytest.raises(InputError, match="in the same pass"):
        KeyFollower(32, 4)(torch.zeros(1, 2, 32), cache=KeyFollower(32, 4).new_cache(KeyValues()))
    with pytest.raises(ShapeError, match="of 2 heads do not fit the other layer's queries"):
        stack(2, 4, mixer=[Attention(32, 4), WeightFollower(32, 2)], follows={1: 0})(IDS)


def test_mixers_by_name_are_at_the_papers_settings():
    assert mixer("softmax", 32, 4, 64).mechanism is None
    assert mixer("mqa", 32, 4, 64).projections.kv_heads == 1
    assert mixer(("cope", {"positions": 9}), 32, 4, 64).mechanism.embedding.shape == (9, 8)
    assert (mixer("moh", 32, 4, 64).shared, mixer("moh", 32, 4, 64).active) == (2, 1)
    model = stack(mixer=["softmax", "cope", "rela"])
    assert [block.mixer.rotary is not None for block in model.blocks] == [True, False, True]  # cope tells places apart itself


@torch.no_grad()
def test_an_encoder_reads_both_sides():
    model = stack(causal=False)
    other = IDS.clone()
    other[:, 20] = (other[:, 20] + 1) % 50
    assert not torch.equal(model(IDS)[:, 3], model(other)[:, 3])
    causal = stack()
    assert torch.equal(causal(IDS)[:, :20], causal(other)[:, :20])


def test_every_mechanism_can_be_built_by_its_name():
    """At the paper's settings, in a stack, it trains: a step along the gradient makes the loss less."""
    from headwise import registry

    for name in registry.names("mechanism"):
        torch.manual_seed(0)
        made = mixer(name, 32, 4, 32)
        causal = "causal" not in made.cannot
        model = Transformer(50, 32, 1, 4, mixer=name, context=32, causal=causal)
        loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad
        after = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert after < loss, f"{name}: {float(loss)} -> {float(after)}"
