"""The conformance kit for attentions: every broken one is told apart by the check that is meant for it, good ones pass."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from broken_attentions import BROKEN, CORRECT
from broken_states import BROKEN_STATES
from correct_attentions import Correct
from torch import nn

from headwise import cli
from headwise.card import Card
from headwise.errors import RegistryError
from headwise.testing import Item, check, checks_for, find
from headwise.testing._build import construct, instances
from headwise.testing._check import CheckFailed, Skipped
from headwise.testing._conventions import ROWS, SQUARES
from headwise.testing.adapters import Runner, runner_for

CHECKS = {function.__name__.removeprefix("check_"): function for function in checks_for("mixer")}
SAID = {"oracle", "neutral", "identities"}  # run only if a module says more of itself
STATES = {"forms", "implied_weights", "documents", "bounded"}  # what only a mixer that keeps a state can be asked
OURS = {"rotary"} | STATES  # what only a Mixer can be asked, or what runs inside one
HUGGING_FACE = {  # class: checks that are skipped besides
    "llama:LlamaAttention": set(),
    "mistral:MistralAttention": set(),
    "qwen2:Qwen2Attention": set(),
    "qwen3:Qwen3Attention": set(),
    "gemma2:Gemma2Attention": set(),
    "gemma3:Gemma3Attention": set(),
    "gpt_neox:GPTNeoXAttention": {"groups"},
    "phi3:Phi3Attention": {"groups"},
    "olmo2:Olmo2Attention": set(),
    "starcoder2:Starcoder2Attention": set(),
    "cohere:CohereAttention": set(),
    "gpt2:GPT2Attention": {"groups"},
    "gpt_oss:GptOssAttention": set(),
    "deepseek_v3:DeepseekV3Attention": {"groups"},
    "opt:OPTAttention": {"groups"},
    "bert:BertSelfAttention": {"groups"},
    "vit:ViTAttention": {"groups", "decode"},
}


def outcomes(item):
    results = list(check(item))
    assert [(r.check, r.message) for r in results if not r.ok] == []
    assert all(len(r.message) > 10 for r in results if r.outcome == "skipped")
    return {r.check: r.outcome for r in results}


def item_of(value, **more):
    return Item("mixer", getattr(value, "__name__", type(value).__name__), value, SimpleNamespace(__name__="mine", **more))


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_STATES], ids=lambda case: case.name.replace(" ", "-"))
def test_each_fault_is_told(case):
    with pytest.raises(CheckFailed) as told:
        CHECKS[case.check](case.item)
    assert case.says in str(told.value)


@pytest.mark.parametrize("case", CORRECT, ids=lambda case: case.name)
def test_correct_ones_pass(case):
    found = outcomes(case.item)
    skipped = {name for name, outcome in found.items() if outcome == "skipped"}
    unsaid = {"correct": {"neutral"}, "windowed": {"identities"}, "careful": {"identities"}}.get(
        case.name, {"neutral", "identities", "left_padding"}
    )
    unsaid |= STATES
    if case.name == "function":
        unsaid |= {"right_padding", "masked_rows"}
    elif case.name != "careful":
        unsaid |= OURS
    assert skipped == unsaid


def test_every_check_has_a_fault_that_it_finds():
    assert {case.check for case in [*BROKEN, *BROKEN_STATES]} == set(CHECKS)


def test_torch_multihead_attention():
    found = outcomes(find("torch.nn:MultiheadAttention"))
    assert {name for name, outcome in found.items() if outcome == "skipped"} == SAID | OURS | {"decode", "groups"}
    assert {found[n] for n in ("causality", "left_padding", "right_padding", "masked_rows")} == {"passed"}
    first = nn.MultiheadAttention(32, 4, batch_first=False)
    assert outcomes(item_of(first))["left_padding"] == "passed"


def test_torch_scaled_dot_product_attention():
    """A built-in function of q, k, v: its parameters are read from its help."""
    found = outcomes(find("torch.nn.functional:scaled_dot_product_attention"))
    assert {name for name, outcome in found.items() if outcome == "skipped"} == SAID | STATES
    assert {found[n] for n in ("causality", "decode", "left_padding", "groups")} == {"passed"}


def test_headwise_attention():
    found = outcomes(find("headwise.mechanisms:Attention"))
    assert {name for name, outcome in found.items() if outcome == "skipped"} == SAID | STATES


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_classes(name):
    family, _, kind = name.partition(":")
    found = outcomes(find(f"transformers.models.{family}.modeling_{family}:{kind}"))
    assert {name for name, outcome in found.items() if outcome == "skipped"} == SAID | OURS | HUGGING_FACE[name]
    assert {found[n] for n in ("causality", "left_padding", "right_padding", "batch", "gradients")} == {"passed"}


def test_a_fault_in_a_hugging_face_class_is_told():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Deaf(LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
            return super().forward(hidden_states, position_embeddings, None, cache, **kwargs)

    class Forgets(LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
            if cache is not None and hidden_states.shape[1] == 1 and cache.get_seq_length(self.layer_idx) == 33:
                attention_mask = attention_mask.clone()
                attention_mask[..., :4] = False
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **kwargs)

    for kind in (Deaf, Forgets):
        kind.__module__ = LlamaAttention.__module__
    with pytest.raises(CheckFailed, match=r"left padding of 0\.7 changes the output"):
        CHECKS["left_padding"](item_of(Deaf))
    with pytest.raises(CheckFailed, match=r"cached decode \(token by token\) differs from the full pass from token 33,"):
        CHECKS["decode"](item_of(Forgets))


# ---- modules of many signatures -----------------------------------------------------------------------------------------


class Masked(Correct):
    """Takes one mask, of a form that is set."""

    def __init__(self, form):
        super().__init__(rotary=False)
        self.form = form

    def forward(self, x, mask=None):
        n = x.shape[1]
        seen = torch.ones(x.shape[0], n, n, dtype=torch.bool)
        if mask is not None:
            if mask.ndim != self.form.split("(")[1].split(")")[0].count(",") + 1 or mask.is_floating_point() != (
                "added" in self.form
            ):
                raise ValueError("another mask is due")
            if "float" in str(mask.dtype):
                mask = mask == 0
            elif "hidden" in self.form or "padding" in self.form:
                mask = ~mask
            shaped = {2: mask[None] if "(n, m)" in self.form else mask[:, None, :], 3: mask}
            seen = seen & (mask.bool().reshape(x.shape[0], -1, n) if mask.ndim == 4 else shaped[mask.ndim].bool())
        q, k, v = self.project(x)
        weights = self.weigh(self.score(q, self.repeat(k)), seen[:, None])
        return self.o_proj(self.mix(weights, self.repeat(v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", [*SQUARES, *(form for form in ROWS if "1, 1" not in form)])
def test_what_a_mask_means_is_found_out(form):
    runner = runner_for(Masked(form))
    assert runner.mask == "mask"
    x, real = torch.randn(2, 9, 32, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    real[0, :3] = False
    if "n, m" in form:
        assert "causal" not in runner.cannot
        other = x.clone()
        other[:, 6:] += 1.0
        assert torch.equal(runner.run(x)[:, :6], runner.run(other)[:, :6])
    else:
        assert "reads both sides" in runner.cannot["causal"]
    if "(n, m)" in form:
        assert "one mask for all rows" in runner.cannot["padding"]
    else:
        other = x.clone()
        other[0, :3] += 1.0
        same = [runner.run(t, causal=runner.modes[0], real=real)[real] for t in (x, other)]
        assert torch.equal(*same)
    assert not any(r.outcome == "failed" for r in check(item_of(Masked, examples=lambda heads, size: [Masked(form)])))


class Returned(Correct):
    """Gives its cache back as a tuple of keys and values, as older models do."""

    def forward(self, x, layer_past=None, use_cache=False):
        k, v = layer_past if layer_past is not None else (None, None)
        cache = {} if k is None else {"k": k, "v": v}
        y = Correct.forward(self, x, cache=cache)
        return (y, (cache["k"], cache["v"])) if use_cache else y


class CausalSelfAttention(nn.Module):
    """Made from one config object with the usual names; x alone is given."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class BothSides(CausalSelfAttention):
    """Reads all tokens."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_other_ways_of_calling():
    found = outcomes(item_of(Returned))
    assert found["decode"] == found["causality"] == found["groups"] == "passed"
    assert found["left_padding"] == "skipped"
    found = outcomes(item_of(CausalSelfAttention))
    assert found["causality"] == "passed"
    results = {r.check: r for r in check(item_of(BothSides))}
    assert results["causality"].outcome == "skipped"
    assert "reads both sides" in results["causality"].message
    BothSides.is_causal = True  # it says so, so it is held to it
    try:
        with pytest.raises(CheckFailed, match="leaks the future at position 0"):
            CHECKS["causality"](item_of(BothSides))
    finally:
        del BothSides.is_causal


class Weighed(nn.Module):
    """Linear attention, not causal, whose mask multiplies the keys' weights."""

    def __init__(self, dim):
        super().__init__()
        self.maps = nn.Linear(dim, 3 * dim)

    def forward(self, x, mask=None):
        q, k, v = self.maps(x).chunk(3, -1)
        k = k.sigmoid() if mask is None else k.sigmoid() * mask[..., None]
        return q.softmax(-1) @ (k.mT @ v) / k.sum(1, keepdim=True).sum(-1, keepdim=True).clamp(min=1e-9)


def test_masks_of_padding_alone_and_two_masks():
    found = outcomes(item_of(Weighed))
    assert found["left_padding"] == found["right_padding"] == "passed"
    assert found["causality"] == "skipped"
    runner = runner_for(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True))
    assert runner.mask == "src_mask"
    assert runner.form_name in ("bool (n, m), True where a key is hidden", "added (n, m), -inf where a key is hidden")
    assert runner.row_mask[0] == "src_key_padding_mask"
    found = outcomes(item_of(nn.TransformerEncoderLayer))
    assert {found[n] for n in ("causality", "left_padding", "right_padding", "gradients")} == {"passed"}


def test_one_head_of_keys_and_values_and_heads_that_meet():
    """All heads share one; and heads that are mixed read several, though their twin of repeated heads is the same."""

    class Talking(Correct):
        def weigh(self, scores, visible):
            mixed = torch.einsum("gh,bhnm->bgnm", torch.eye(4).roll(1, 0).to(scores) + 0.5, scores)
            return Correct.weigh(self, mixed, visible)

    assert outcomes(item_of(Correct, examples=lambda heads, size: [Correct(kv_heads=1)]))["groups"] == "passed"
    assert outcomes(item_of(Talking, examples=lambda heads, size: [Talking(kv_heads=2)]))["groups"] == "passed"


def test_an_instance_and_an_adapter():
    found = outcomes(item_of(Correct()))
    assert found["saved"] == "skipped"

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Correct(rotary=False)

        def forward(self, batch, mode, /, *, extra):
            return {"y": self.inner(batch)}

    class OddRunner(Runner):
        def run(self, x, *, causal=True, real=None):
            return self.module(x, "read", extra=1)["y"]

    def adapter(module):
        runner = OddRunner(module, 32, "Odd")
        runner.cannot = dict.fromkeys(("full", "padding", "decode"), "its adapter does not say how")
        return runner

    found = outcomes(item_of(Odd, adapter=adapter))
    assert found["causality"] == found["groups"] == found["state"] == "passed"
    assert found["decode"] == found["masked_rows"] == "skipped"


def test_a_skipped_check_cannot_be_exempt():
    card = Card("A paper", 2024, "softmax", "nowhere", exempt={"identities": "there are none at all"})
    results = {r.check: r for r in check(item_of(Correct, CARD=card))}
    assert results["identities"].outcome == "expired"
    assert results["neutral"].ok
    assert issubclass(Skipped, pytest.importorskip("unittest").SkipTest)


def test_a_registered_one_must_have_an_oracle():
    item = Item("mechanism", "attention", Correct, SimpleNamespace(__name__="mine", examples=lambda heads, size: [Correct()]))
    with pytest.raises(CheckFailed, match="no other check can catch a wrong formula"):
        CHECKS["oracle"](item)


def test_single_precision_inside_is_allowed_for():
    class Single(Correct):
        def weigh(self, scores, visible):
            return Correct.weigh(self, scores.float(), visible).to(scores)

    assert outcomes(item_of(Single))["gradients"] == "passed"


# ---- what can't be built or called -----------------------------------------------------------------------------------------


class NeedsMuch(nn.Module):
    """Its arguments have no usual names."""

    def __init__(self, shape, tricks):
        super().__init__()


class NeedsMore(nn.Module):
    """Called with things that nothing explains."""

    def forward(self, x, memory, ranks):
        return x


class Raises(nn.Module):
    """Fails on any input."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        if num_heads > 100:
            raise ValueError("too many")

    def forward(self, x):
        raise IndexError("no such expert")


class Sums(nn.Module):
    """Returns one number for each token."""

    def forward(self, x):
        return x.sum((1, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            NeedsMuch,
            r"cannot build .*NeedsMuch\(shape, tricks\): shape, tricks are no well-known name.*give examples\(heads, size\)",
        ),
        (NeedsMore, r"cannot call NeedsMore.forward\(x, memory, ranks\): it needs memory, ranks, and nothing says what that is"),
        (Raises, r"cannot call Raises.forward\(x\) with x \(2, 6, 32\) in float64: IndexError: no such expert"),
        (Sums, r"Sums.forward\(x\) returned a tensor \(2,\) for x \(2, 6, 32\); \(b, n, width\) is due"),
        (nn.Linear, r"cannot build torch.nn.modules.linear.Linear\(in_features, out_features"),
    ],
)
def test_what_cannot_be_built_or_called_says_what_to_provide(value, message):
    with pytest.raises(RegistryError, match=message) as told:
        list(check(item_of(value)))
    assert "adapter(module) -> Runner" in str(told.value)


def test_what_a_users_functions_do_wrong_is_said():
    with pytest.raises(RegistryError, match=r"examples\(4, 8\) of mine raised ZeroDivisionError"):
        instances(item_of(Correct, examples=lambda heads, size: 1 / 0))
    with pytest.raises(RegistryError, match=r"adapter\(module\) of mine must return a headwise.testing.adapters.Runner"):
        instances(item_of(Correct, adapter=lambda module: module))
    with pytest.raises(RegistryError, match=r"cannot build .*BloomAttention|cannot call BloomAttention.forward"):
        instances(find("transformers.models.bloom.modeling_bloom:BloomAttention"))
    assert [(name, m.kv_heads) for name, m in construct(Correct)] == [("Correct(kv_heads=4)", 4), ("Correct(kv_heads=2)", 2)]


# ---- the command ------------------------------------------------------------------------------------------------------------


def run_cli(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headwise", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


FILE = '''
import torch
from torch import nn


class Mean(nn.Module):
    """Causal, they say."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.v_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        return {}self.v_proj(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None].to(x)
'''


def test_the_command(tmp_path, monkeypatch, capsys):
    code, out, _ = run_cli(["check", "torch.nn:MultiheadAttention"], monkeypatch, capsys)
    assert code == 0
    assert "mixer MultiheadAttention: passes 12 of 22, 10 skipped" in out
    assert "oracle skipped: gives no oracle, so a wrong formula would pass unseen" in out
    monkeypatch.chdir(tmp_path)
    for name, before, wanted in (("fine", "", 0), ("leaky", "x.mean(1, keepdim=True) + ", 1)):
        (tmp_path / f"kit_{name}.py").write_text(FILE.replace("{}", before), encoding="utf-8")
        code, out, _ = run_cli(["check", f"kit_{name}:Mean"], monkeypatch, capsys)
        assert code == wanted
        told = "fails 1 of 22, 13 skipped" in out and "causality: Mean: leaks the future at position 0" in out
        assert told == bool(wanted), out
    (tmp_path / "kit_odd.py").write_text("from torch import nn\nclass Odd(nn.Module):\n    def forward(self, x, y): pass\n")
    code, _, err = run_cli(["check", "kit_odd:Odd"], monkeypatch, capsys)
    assert code == 2
    assert "it needs y, and nothing says what that is" in err
    code, out, _ = run_cli(["check", "kit_leaky:Mean", "--json"], monkeypatch, capsys)
    assert code == 1
    assert '"outcome": "skipped"' in out
