"""Linear attention by features: distilled from softmax, expanded by order, matched in variance; trees of guesses."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import headwise
from headwise.attention import attention_weights
from headwise.errors import ShapeError
from headwise.mechanisms import Attention, Rotary
from headwise.mechanisms._states import KernelAttention, begin
from headwise.mechanisms.linear._parts import elu_plus_one
from headwise.mechanisms.linear._taylor import size_of, taylor
from headwise.mechanisms.linear.based import Based
from headwise.mechanisms.linear.fastmax import Fastmax
from headwise.mechanisms.linear.hedgehog import Hedgehog, distill, heard, softmax_weights
from headwise.mechanisms.linear.latte import Latte
from headwise.mechanisms.linear.linearized_llm import LinearizedLlm, accepted, lineage
from headwise.mechanisms.linear.lln_attention import LlnAttention, concentration
from headwise.mechanisms.softmax.cope import Cope
from headwise.nn import Transformer, from_transformers
from headwise.nn import mixer as sized
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents


class Plain(KernelAttention):
    """Linear attention with a map that learns nothing, on the projections of a softmax layer."""

    def __init__(self, attention, phi):
        p = attention.projections
        super().__init__(attention.width, p.heads, kv_heads=p.kv_heads, head_dim=p.head_dim)
        self.projections, self.rotary, self.phi = p, attention.rotary, phi

    def features(self, q, k):
        return self.phi(q), self.phi(k)


def sharp(seed=0):
    """Softmax attention whose logits deviate by about 2, and tokens for it."""
    torch.manual_seed(seed)
    teacher = Attention(32, 4)
    with torch.no_grad():
        for part in (teacher.projections.q, teacher.projections.k):
            torch.nn.init.normal_(part.weight, std=(2**0.5) / 32**0.5)
    return teacher, torch.randn(16, 48, 32)


def entropy(weights):
    return float(-(weights * weights.clamp(min=1e-30).log()).sum(-1).mean())


def rank_correlation(weights, scores):
    """Spearman's, of the last rows."""
    ranks = [t[:, :, -1].argsort(-1).argsort(-1).double() for t in (weights, scores)]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


@pytest.mark.parametrize("activation", ["softmax", "exp", "joint"])
def test_distillation_comes_closer_to_softmax_than_maps_that_learn_nothing(activation):
    """In cross entropy, in the order of weights, and in entropy than 1 + ELU, on tokens that it was not fitted to.

    Queries and keys that are noise of full rank are a hard case: about half of what is missing is gained.
    """
    teacher, x = sharp()
    student = Hedgehog.of(teacher, activation=activation)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    losses = distill([teacher], [student], [x[:14]], Causal(), steps=80)
    unseen = x[14:]
    wanted = softmax_weights(teacher, unseen, Causal())
    with torch.no_grad():
        mine = student.weights(unseen, Causal())
        others = [Plain(teacher, phi).weights(unseen, Causal()) for phi in (elu_plus_one, lambda t: F.relu(t) + 1e-6)]
        reached, *fixed = (float(-(wanted * w.clamp(min=1e-30).log()).sum(-1).mean()) for w in (mine, *others))
    floor = entropy(wanted)
    assert losses[-1] < losses[0]
    assert floor < reached < min(fixed)
    assert reached - floor < 0.75 * (min(fixed) - floor)
    assert floor < entropy(mine) < entropy(others[0]) - 0.2
    assert rank_correlation(mine, wanted) > 0.2 + max(rank_correlation(w, wanted) for w in others)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"maps.q", "maps.k", "shifts.q", "shifts.k"}
    assert all(p.grad is None for p in student.parameters())


def test_a_distilled_layer_of_the_embedded_model_recovers_most_of_the_loss():
    """The layer whose softmax matters most, on text that it was not fitted to; no other layer, and no other weight, is touched."""
    from headwise.models.inputs import text_rows

    subject = headwise.open_model(dtype="float32")
    stack = from_transformers(subject.model)
    fit, held = text_rows(subject, None, 12, 256).split([8, 4])

    @torch.no_grad()
    def loss(mixer):
        model = stack if mixer is None else stack.changed(lambda layer, old: mixer if layer == 2 else old)
        return float(F.cross_entropy(model(held)[:, :-1].flatten(0, 1), held[:, 1:].flatten()))

    teacher = stack.blocks[2].mixer
    x = heard(lambda: stack(fit), [teacher])
    torch.manual_seed(0)
    student = Hedgehog.of(teacher)
    assert student.rotary == teacher.rotary is not None
    base, undistilled, elu = loss(None), loss(student), loss(Plain(teacher, elu_plus_one))
    distill([teacher], [student], x, Causal(), steps=60, rows=2)
    distilled = loss(student)
    assert elu - base > 0.5
    assert distilled < undistilled
    assert distilled - base < 0.2 * (elu - base)


def test_the_teachers_stream_is_what_its_layers_are_given():
    torch.manual_seed(0)
    stack = Transformer(20, 32, 3, 4).eval()
    ids = torch.randint(0, 20, (2, 9))
    given = heard(lambda: stack(ids), [block.mixer for block in stack.blocks])
    with torch.no_grad():
        assert torch.equal(given[0], stack.blocks[0].norm(stack.embed(ids, None, 0)))
    assert [tuple(x.shape) for x in given] == [(2, 9, 32)] * 3
    assert not stack.blocks[0].mixer._forward_pre_hooks


def test_all_layers_are_distilled_at_once_each_from_its_own():
    torch.manual_seed(0)
    stack = Transformer(20, 32, 2, 4).eval()
    ids = torch.randint(0, 20, (4, 24))
    mixers = [block.mixer for block in stack.blocks]
    students = [Hedgehog.of(mixer, size=4, shift=False) for mixer in mixers]
    seen = []
    losses = distill(
        mixers, students, heard(lambda: stack(ids), mixers), Causal(), steps=5, rows=3, report=lambda *t: seen.append(t)
    )
    assert [loss for _, loss in seen] == losses
    assert losses[-1] < losses[0]
    linear = stack.changed(lambda layer, _: students[layer])
    assert linear.blocks[1].mixer.rotary == mixers[1].rotary
    whole = linear(ids)
    caches = linear.new_caches()
    pieces = torch.cat([linear(part, caches=caches) for part in ids.split([7, 1, 16], 1)], 1)
    assert torch.allclose(pieces, whole, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_the_mean_over_layers_of_cross_entropy_with_rotated_teachers():
    teacher, x = sharp()
    teacher.rotary = Rotary(100.0)
    weights, p = softmax_weights(teacher, x, Causal()), teacher.projections
    assert torch.allclose(p.merge(weights @ p.split(x)[2]), teacher(x, Causal()), atol=1e-5)
    student = Hedgehog.of(teacher)
    wanted = float(-(weights * student.weights(x, Causal()).log().clamp(min=-100)).sum(-1).mean())
    with torch.enable_grad():
        losses = distill([teacher] * 2, [student, Hedgehog.of(teacher)], [x, x], Causal(), steps=1)
    assert losses == pytest.approx([wanted], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        Hedgehog(32, 4),
        Hedgehog(32, 4, activation="exp"),
        Fastmax(32, 4, norm="none", temperature=0.3),
        LlnAttention(32, 4),
        LinearizedLlm(32, 4, group=3),
    ],
)
def test_a_rotary_embedding_turns_queries_and_keys(mixer):
    """As if the projections had given them turned."""
    mixer, x = mixer.double().eval(), torch.randn(2, 9, 32, dtype=torch.float64)
    if isinstance(mixer, LinearizedLlm):
        mixer.share.fill_(0.5)
    mixer.rotary = rotary = Rotary(100.0)
    found, split = mixer(x, Causal()), mixer.projections.split
    mixer.rotary, places = None, torch.arange(9)
    mixer.projections.split = lambda x: (rotary(split(x)[0], places), rotary(split(x)[1], places), split(x)[2])
    assert torch.allclose(found, mixer(x, Causal()), atol=1e-12)
    del mixer.projections.split


@torch.no_grad()
def test_normalised_fastmax_sees_distances_only():
    """Its rotary embedding turns after the means are taken off: the same two tokens weigh alike wherever they stand."""
    mixer = Fastmax(32, 4).double().eval()
    mixer.rotary = Rotary(100.0)
    x = torch.randn(1, 3, 32, dtype=torch.float64).repeat(1, 4, 1)
    weights = mixer.weights(x, Causal())
    ratios = [weights[:, :, at + 2, at] / weights[:, :, at + 2, at + 1] for at in (0, 3, 6, 9)]
    assert all(torch.allclose(r, ratios[0], atol=1e-10) for r in ratios)
    mixer.rotary = None
    assert not torch.allclose(mixer.weights(x, Causal()), weights, atol=1e-3)


def test_tokens_of_zero_are_read_alike():
    for mixer in (Fastmax(32, 4, norm="longest"), Fastmax(32, 4), Latte(32, 4), LinearizedLlm(32, 4), LlnAttention(32, 4)):
        x = torch.zeros(1, 5, 32, requires_grad=True)
        out = mixer(x, Causal())
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(out))
        assert bool(x.grad.isfinite().all())


@torch.no_grad()
def test_defaults_are_those_of_the_papers():
    """At a width of 128 and 4 heads."""
    made = {name: sized(name, 128, 4, 64) for name in ("hedgehog", "based", "fastmax", "lln_attention", "latte", "linearized_llm")}
    hedgehog = made["hedgehog"]
    assert hedgehog.activation == "softmax"
    assert torch.equal(hedgehog.maps["q"], torch.eye(32).expand(4, 32, 32))
    sharpest = hedgehog.features(*(torch.full((1, 4, 1, 32), 1e4).cumsum(-1) for _ in range(2)))[1]
    assert float(sharpest.min()) == pytest.approx(1e-12)
    assert made["based"].features == 153
    assert (made["fastmax"].order, made["fastmax"].norm, made["fastmax"].temperature) == (2, "token", 8.0)
    assert (made["lln_attention"].block, made["lln_attention"].mix) == (32, "average")
    assert all(float(p.min()) == float(p.max()) == 0.5 for p in LlnAttention(32, 4, mix="scale").parts.values())
    assert made["latte"].of_latent.weight.shape == (128, 128)
    assert Latte(64, 4).latents == 16
    assert (made["linearized_llm"].group, made["linearized_llm"].kernel.shape) == (64, (4, 32))


@torch.no_grad()
def test_terms_of_exp_converge_to_softmax_attention():
    """Softmax as a state for each order: every one comes closer, and the first is linear attention with 1 + s."""
    torch.manual_seed(0)
    q, k = 0.6 * torch.randn(2, 2, 3, 40, 4, dtype=torch.float64)
    s = q @ k.mT
    exact = attention_weights(q, k, Causal(), scale=1.0)
    errors = []
    for order in range(13):
        weights = (taylor(q, order) @ taylor(k, order).mT).tril()
        errors.append(float((weights / weights.sum(-1, keepdim=True) - exact).abs().mean()))
        bound = s.abs().max() ** (order + 1) / math.factorial(order + 1) * s.abs().max().exp()
        assert float((weights - s.exp().tril()).abs().max()) < float(bound)
    assert all(late < early for early, late in pairwise(errors))
    assert errors[-1] < 1e-5 * errors[0]
    assert torch.allclose(taylor(q, 1) @ taylor(k, 1).mT, 1 + s)


@torch.no_grad()
def test_higher_orders_of_based_and_fastmax_come_closer_to_softmax():
    torch.manual_seed(0)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    based = [Based(16, 4, feature_dim=4, order=order).double() for order in (2, 4, 8)]
    fast = [Fastmax(16, 4, norm="longest", order=order).double() for order in (1, 2, 4, 8)]
    for made in (based, fast):
        for other in made[1:]:
            other.load_state_dict(made[0].state_dict())
    q, k = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (based[0].q, based[0].k))
    off = [float((mixer.weights(x, Causal()) - attention_weights(q, k, Causal())).abs().max()) for mixer in based]
    assert off[0] > 3 * off[1] > 100 * off[2]
    q, k = (t - t.mean(-1, keepdim=True) for t in fast[0].projections.split(x)[:2])
    q, k = (t / t.norm(dim=-1).amax(-1)[..., None, None] for t in (q, k))
    off = [float((mixer.weights(x) - attention_weights(q, k, scale=1.0)).abs().max()) for mixer in fast]
    assert all(late < early / 2 for early, late in pairwise(off))


def test_a_state_of_based_has_as_many_rows_as_told():
    assert size_of(16, 2) == 153
    assert size_of(16, 2, packed=False) == 273
    for packed in (True, False):
        mixer = Based(64, 4, packed=packed)
        cache = mixer.new_cache()
        mixer(torch.randn(1, 5, 64), Causal(), cache=cache)
        assert cache.state.shape == (1, 4, mixer.features, 17)  # values, and the sum of weights


def gaussian(spread, size):
    """LLN alone, one head, with queries and keys of that deviation; and tokens."""
    torch.manual_seed(0)
    mixer = LlnAttention(size, 1, mix="none").double().eval()
    for part in (mixer.projections.q, mixer.projections.k):
        torch.nn.init.orthogonal_(part.weight, gain=spread)
    return mixer, torch.randn(2, 512, size, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 128])
def test_log_weights_of_lln_vary_as_softmaxs(size):
    """Within 40 % from a deviation of 1 to 1.5; not so much below, where the model of the variance has its floor."""
    found = {}
    for spread in (0.5, 1.0, 1.25, 1.5):
        mixer, x = gaussian(spread, size)
        mixer.calibrate(x)
        assert mixer.deviations.tolist() == pytest.approx([spread, spread], rel=0.05)
        q, k, _ = mixer.projections.split(x)
        softmax, lln = (float(concentration(w).log_variance.mean()) for w in (attention_weights(q, k), mixer.weights(x)))
        assert softmax == pytest.approx(spread**4, rel=0.1)
        found[spread] = lln
        if spread >= 1:
            assert 0.6 < lln / softmax < 1.4
    assert sorted(found.values()) == list(found.values())
    assert found[0.5] < 0.15


@torch.no_grad()
def test_lln_weights_sharpen_as_queries_and_keys_grow():
    sharpness = []
    for spread in (0.5, 1.0, 1.5, 2.0):
        mixer, x = gaussian(spread, 64)
        mixer.calibrate(x)
        sharpness.append(float(concentration(mixer.weights(x)).entropy.mean()))
    assert sharpness == sorted(sharpness, reverse=True)
    assert math.log(512) - 0.2 < sharpness[0] < math.log(512)


@torch.no_grad()
def test_deviations_of_lln_move_in_train_mode_only_and_leave_padding_out():
    mixer, x = gaussian(1.0, 64)
    real = torch.arange(512).expand(2, -1) >= 100
    noise = torch.where(real[..., None], x, 1e3)
    mixer.train()
    mixer.deviations.fill_(3.0)
    mixer(noise, Causal(), attention_mask=real)
    assert mixer.deviations.tolist() == pytest.approx([0.9 * 3 + 0.1] * 2, rel=0.02)
    mixer.eval()
    kept = mixer.deviations.clone()
    mixer(x, Causal())
    assert torch.equal(mixer.deviations, kept)
    mixer.calibrate(noise, real)
    assert mixer.deviations.tolist() == pytest.approx([1.0, 1.0], rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [Fastmax(32, 4, norm="longest"), Latte(32, 4), Hedgehog(32, 4, activation="exp"), LlnAttention(32, 4)]
)
def test_documents_read_both_ways_are_each_as_if_alone(mixer):
    """Their running sums and maxima, and their blocks, begin anew."""
    mixer = mixer.double().eval()
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    x[:, :9] *= 30
    ids = torch.tensor([0] * 9 + [1] * 10 + [2])
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, [0, 4]] = False
    for stages in ((), (Causal(),)):
        alone = torch.cat([mixer(part, *stages) for part in x.split([9, 10, 1], 1)], 1)
        assert torch.allclose(mixer(x, *stages, Documents(ids)), alone, atol=1e-10)
        counted = torch.cat([ids[:9][2:], ids[9:], ids[-1:], ids[-1:]])  # ids go by the place among real tokens
        out = mixer(x[:1], *stages, Documents(counted), attention_mask=real[:1])[real[:1]]
        first = mixer(x[:1, :9][:, real[0, :9]], *stages)
        assert torch.allclose(out[:7], first[0], atol=1e-10)
        assert torch.allclose(out[7:], alone[0, 9:], atol=1e-10)
    decay = mixer.reading(x, begin(mixer.new_cache(), x, (Causal(), Documents(ids)), None)).decay
    assert decay is None or float(decay.max()) < 1e-12  # up to rounding


@torch.no_grad()
@pytest.mark.parametrize("activation", ["exp", "softmax"])
def test_large_logits_are_as_exact_as_small_ones(activation):
    """exp of 300 overflows float32; a running log of sums does not, and each query reads the keys that its channel likes best."""
    mixer = Hedgehog(32, 4, activation=activation).eval()
    for each in mixer.maps.values():
        each.mul_(300.0)
    x = torch.randn(1, 20, 32)
    out = mixer(x, Causal())
    exact = mixer.double()(x.double(), Causal())
    assert bool(out.isfinite().all())
    assert torch.allclose(out.double(), exact, atol=1e-3)


def tree_logits(model, ids, parents, caches):
    """Logits after each token of a tree, (m, vocabulary), by a stack whose mixers read trees."""
    x = model.embedding(ids)
    for (_, block), cache in zip(model.layers(), caches.layers, strict=True):
        x = x + block.mixer.tree(block.norm(x), parents, cache)
        x = x + block.feed_forward(block.feed_norm(x))
    return model.head(model.norm(x))[0]


def linearized(group=5):
    torch.manual_seed(0)
    mixer = ("linearized_llm", {"group": group, "taps": 4})
    model = Transformer(12, 32, 2, 4, mixer=mixer, hidden=48, tied=False).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.share.fill_(0.5)
            torch.nn.init.normal_(block.mixer.kernel, std=0.5)
    return model


@torch.no_grad()
def test_speculative_decoding_gives_greedy_decodings_tokens():
    """Trees of guesses, some of them right, across the ends of groups: fewer passes, token for token the same."""
    model = linearized()
    ids = torch.randint(0, 12, (1, 3), generator=torch.Generator().manual_seed(1))
    wanted = model.generate(ids, 40)[0].tolist()
    assert len(set(wanted)) > 3
    draws = torch.Generator().manual_seed(2)
    parents = [-1, -1, 0, 0, 1, 2, 5]
    caches, text, passes = model.new_caches(), [], 0
    following = int(model(ids, caches=caches)[0, -1].argmax())
    while len(text) < 40:
        truth = wanted[len(text) :] + [0] * 8
        depth = lineage(parents).sum(-1) - 1
        guesses = [truth[int(d)] if torch.rand((), generator=draws) < 0.7 else 11 - truth[int(d)] for d in depth]
        logits = tree_logits(model, torch.tensor([guesses]), parents, caches)
        path, after = accepted(parents, guesses, following, logits.argmax(-1).tolist())
        new = [guesses[at] for at in path] + [after]
        if path:
            model(torch.tensor([new[:-1]]), caches=caches)
        else:  # none was right: go on by the token that is known
            after = int(model(torch.tensor([[following]]), caches=caches)[0, -1].argmax())
            new = [following, after]
        text += new[:-1]
        following = new[-1]
        passes += 1
    assert text[:40] == wanted
    assert passes < 30


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 4, 64])
@pytest.mark.parametrize("before", [0, 1, 3, 4, 7, 8])
def test_a_tree_is_as_each_of_its_paths_alone(group, before):
    """In a stack with rotary embedding and left padding, wherever groups end; what is cached stays as it was."""
    model = linearized(group)
    draws = torch.Generator().manual_seed(3)
    prompt, nodes = (torch.randint(0, 12, (1, n), generator=draws) for n in (before, 7))
    parents = [-1, 0, 0, 1, 3, 4, -1]
    caches = model.new_caches()
    if before:
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), prompt], 1)
        model(padded, caches=caches, attention_mask=torch.arange(before + 2)[None] >= 2)
    kept = [t.clone() for cache in caches.layers for t in cache.tensors() if t is not None]
    found = tree_logits(model, nodes, parents, caches)
    for at, line in enumerate(lineage(parents)):
        alone = model(torch.cat([prompt, nodes[:, line]], 1))[0, -1]
        assert torch.allclose(found[at], alone, atol=1e-9), at
    now = [t for cache in caches.layers for t in cache.tensors() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@torch.no_grad()
def test_a_tree_after_packed_documents_goes_on_with_the_last_one():
    torch.manual_seed(0)
    mixer = linearized(3).blocks[0].mixer
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    cache = mixer.new_cache()
    mixer(x[:, :8], Causal(), Documents(torch.tensor([0] * 6 + [1] * 2)), cache=cache)
    mixer.rotary = None
    cache = mixer.new_cache()
    mixer(x[:, :8], Causal(), Documents(torch.tensor([0] * 6 + [1] * 2)), cache=cache)
    found = mixer.tree(x[:, 8:], [-1, 0, 0, 2], cache)
    assert torch.allclose(found[:, 3], mixer(x[:, [6, 7, 8, 10, 11]], Causal())[:, -1], atol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Hedgehog(32, 4, activation="relu"), "must be one of softmax, exp, joint"),
        (lambda: Hedgehog.of(Attention(32, 4, Cope(8, 5))), "mechanism of its own"),
        (lambda: distill([Attention(32, 4)], [], []), "1 teachers, 0 students"),
        (lambda: Based(30, 4), "no multiple of 4 heads"),
        (lambda: Based(32, 4, feature_dim=0), "1 or more"),
        (lambda: Fastmax(32, 4, norm="l2"), "must be one of token"),
        (lambda: Fastmax(32, 4, order=0), "1 or more"),
        (lambda: Latte(30, 4), "no multiple of 4 heads"),
        (lambda: Latte(32, 4, latents=0), "1 or more"),
        (lambda: LlnAttention(32, 4, mix="sum"), "must be one of average"),
        (lambda: LlnAttention(32, 4, block=0), "1 or more"),
        (lambda: LinearizedLlm(32, 4, group=0), "1 or more"),
        (lambda: lineage([-1, 1]), "parents stand earlier"),
        (lambda: Latte(32, 4)(torch.randn(1, 3, 32), Causal(), cache=Based(32, 4).new_cache()), "is a CarryCache"),
    ],
)
def test_settings_that_can_not_be_are_refused(make, words):
    with pytest.raises(ShapeError, match=words):
        make()
