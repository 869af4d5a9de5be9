"""Memories that learn at test time: chunks against a loop over tokens, what they keep, what they refuse, and that they train."""

import pytest
import torch

from headwise.errors import ShapeError
from headwise.mechanisms.linear import miras, titans
from headwise.mechanisms.linear._memory import Layer, Network, spans
from headwise.mechanisms.linear.mega import Mega
from headwise.mechanisms.linear.miras import LOSSES, RETENTIONS, Miras
from headwise.mechanisms.linear.titans import Titans
from headwise.nn import Transformer
from headwise.stages.causal import Causal
from headwise.stages.documents import Documents
from headwise.stages.window import Window

SHAPES = {
    "memory": {"variant": "memory", "depth": 2},
    "deep": {"variant": "memory", "depth": 3, "expand": 2},
    "linear": {"variant": "memory", "depth": 1, "residual": False},
    "mag": {"variant": "mag", "window": 9, "persistent": 3},
    "mal": {"variant": "mal", "window": 9, "persistent": 3},
    "mac": {"variant": "mac", "segment": 24, "persistent": 3},
}


def tokens(n, width=16, b=1):
    return torch.randn(b, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def titan(seed=0, **options):
    torch.manual_seed(seed)
    made = Titans(16, 2, **options).double()
    with torch.no_grad():
        made.theta.bias.add_(2.0)
    return made


@pytest.mark.parametrize("chunk", [1, 4, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_a_loop_over_tokens_with_the_same_old_weights_and_so_are_their_gradients(shape, chunk):
    made, x = titan(chunk=chunk, **SHAPES[shape]), tokens(29).requires_grad_()
    weight = torch.randn(29, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out, wanted = made(x, Causal())[0], titans.oracle(made, x[0], None)
    assert (out - wanted).abs().max() < 1e-10
    leaves = [x, *made.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, wanted))
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine - right).abs().max() < 1e-9 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_all_choices_of_miras_are_a_loop_over_tokens(loss, retention, memory):
    torch.manual_seed(1)
    made = Miras(16, 2, memory=memory, loss=loss, retention=retention, chunk=3, rank=2, expand=2, clip=2.0).double()
    x = tokens(8).requires_grad_()
    out, wanted = made(x, Causal())[0], miras.oracle(made, x[0], None)
    assert (out - wanted).abs().max() < 1e-10
    leaves = [x, *made.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, wanted))
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine - right).abs().max() < 1e-8 * max(1.0, float(right.abs().max()))


@torch.no_grad()
def test_the_dot_loss_does_not_depend_on_chunks_and_others_do():
    x = tokens(24)
    for loss, same in (("dot", True), ("l2", False)):
        reads = []
        for chunk in (1, 8):
            torch.manual_seed(0)
            reads.append(Miras(16, 2, memory="linear", loss=loss, chunk=chunk, rate=30.0).double()(x, Causal()))
        assert ((reads[0] - reads[1]).abs().max() < 1e-12) == same


def test_old_weights_matter():
    x = tokens(24)
    one, many = (titan(chunk=chunk)(x, Causal()) for chunk in (1, 8))
    assert (one[:, 0] - many[:, 0]).abs().max() < 1e-12
    assert (one - many).abs().max() > 1e-3


def test_signals_are_gradients():
    for depth, residual in ((1, False), (1, True), (2, True), (3, False)):
        torch.manual_seed(depth)
        network = Network(5, depth, 2, residual)
        weights = [w.detach().double().requires_grad_() for w in network.start(3)]
        k, v = torch.randn(2, 3, 1, 5, dtype=torch.float64), torch.randn(2, 3, 1, 5, dtype=torch.float64)
        loss = (network.run(k, [lambda z, w=w: z @ w for w in weights]) - v).pow(2).sum()
        found = network.signals(weights, k, lambda out, v=v: 2 * (out - v))
        for (a, g), wanted in zip(found, torch.autograd.grad(loss, weights), strict=True):
            assert torch.allclose((a.mT @ g).sum(0), wanted)


@pytest.mark.parametrize("channels", [1, 4])
def test_what_a_layer_reads_is_what_its_weights_of_each_token_give(channels):
    torch.manual_seed(0)
    start, a, g, z = (torch.randn(2, 3, n, m, dtype=torch.float64) for n, m in ((5, 4), (6, 5), (6, 4), (6, 5)))
    logs = -torch.rand(2, 3, 6, channels, dtype=torch.float64)
    layer = Layer(start, a, g, logs.cumsum(2).exp(), spans(logs))
    each, weights = layer.each(), start
    for t in range(6):
        weights = logs[:, :, t, None].exp() * weights - a[:, :, t, :, None] * g[:, :, t, None]
        assert torch.allclose(each[:, :, t], weights)
        assert torch.allclose(layer.times(z)[:, :, t], (z[:, :, t, None] @ weights)[:, :, 0])
    assert torch.allclose(layer.last(), weights)


@torch.no_grad()
def test_blocks_are_counted_from_each_rows_first_token_however_a_text_is_cut_and_padded():
    made, x = titan(chunk=4, variant="mac", segment=8, persistent=2).eval(), tokens(30, b=3)
    real = torch.ones(3, 30, dtype=torch.bool)
    real[0, :5] = real[1, :17] = real[1, 20:22] = False
    alone = [made(x[row][real[row]][None], Causal())[0] for row in range(3)]
    for pieces in ([30], [1] * 30, [6, 13, 1, 1, 9]):
        cache, outs = made.new_cache(), []
        for piece, mask in zip(x.split(pieces, 1), real.split(pieces, 1), strict=True):
            outs.append(made(piece, Causal(), cache=cache, attention_mask=mask))
        for row, wanted in enumerate(alone):
            assert torch.allclose(torch.cat(outs, 1)[row][real[row]], wanted, atol=1e-12)


@torch.no_grad()
def test_what_memories_keep_does_not_grow():
    torch.manual_seed(0)
    mac = titan(chunk=4, variant="mac", segment=8, persistent=2)
    makes = (titan(chunk=4), mac, Miras(16, 2, chunk=4).double(), Mega(16, chunk=8).double())
    for made in makes:
        cache, sizes = made.new_cache(), set()
        for piece in tokens(60).split(6, 1):
            made(piece, Causal(), cache=cache)
            sizes.add(cache.nbytes)
        assert made.bounded
        assert len(cache) == 60
        assert len(sizes) == 1


@torch.no_grad()
def test_mega_reads_padding_as_no_token_and_the_same_however_it_is_cut():
    x = tokens(70, b=3)
    real = torch.ones(3, 70, dtype=torch.bool)
    real[0, :5] = real[1, :37] = real[1, 40:42] = real[2, 60:] = False
    for options in ({}, {"chunk": 8, "activation": "laplace"}, {"both": True}, {"both": True, "chunk": 8, "activation": "laplace"}):
        torch.manual_seed(0)
        made, stages = Mega(16, states=3, **options).double().eval(), () if options.get("both") else (Causal(),)
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        alone = [made(x[row][real[row]][None], *stages)[0] for row in range(3)]
        for pieces in ([70],) if made.both else ([70], [1] * 70, [33, 7, 30]):
            cache, outs = None if made.both else made.new_cache(), []
            for piece, mask in zip(x.split(pieces, 1), real.split(pieces, 1), strict=True):
                outs.append(made(piece, *stages, cache=cache, attention_mask=mask))
            for row, wanted in enumerate(alone):
                assert torch.allclose(torch.cat(outs, 1)[row][real[row]], wanted, atol=1e-11)


def test_mega_refuses_what_it_can_not_do():
    x = tokens(9)
    with pytest.raises(ShapeError, match="alone"):
        Mega(16)(x)
    with pytest.raises(ShapeError, match="both sides"):
        Mega(16, both=True)(x, Causal())
    made = Mega(16, both=True).double()
    with pytest.raises(ShapeError, match="cache"):
        made(x, cache=made.new_cache())
    with pytest.raises(ShapeError, match="larger `longest`"):
        Mega(16, longest=8).double()(x, Causal())
    for options in ({"activation": "tanh"}, {"bias": "none"}, {"chunk": 0}, {"keys": 3, "bias": "rotary"}):
        with pytest.raises(ShapeError):
            Mega(16, **options)


def test_memories_refuse_what_they_can_not_do():
    made, x = titan(), tokens(6)
    for stages in ((), (Window(3),), (Causal(), Documents(torch.zeros(6, dtype=torch.long)))):
        with pytest.raises(ShapeError, match="learns from what came before"):
            made(x, *stages)
    with pytest.raises(ShapeError, match="attention_mask"):
        titan(persistent=2)(x, Causal(), attention_mask=torch.ones(1, 5))
    for options in ({"variant": "mak"}, {"depth": 0}, {"chunk": 0}, {"variant": "mac", "chunk": 16, "segment": 24}):
        with pytest.raises(ShapeError):
            Titans(16, 2, **options)
    for options in ({"memory": "tree"}, {"loss": "l3"}, {"retention": "all"}, {"p": 0.5}, {"chunk": 0}):
        with pytest.raises(ShapeError):
            Miras(16, 2, **options)
    with pytest.raises(ShapeError, match="preset"):
        miras.sized(2, 8, 64, preset="mora")
    for kind in (Titans, Miras):
        with pytest.raises(ShapeError, match="multiple of 3 heads"):
            kind(16, 3)


@pytest.mark.parametrize(
    "spec", [("titans", {}), ("titans", {"variant": "mac"}), *(("miras", {"preset": p}) for p in miras.PRESETS)]
)
def test_gradients_do_not_explode_over_long_texts_as_layers_begin(spec):
    name, options = spec
    for seed in range(2):
        torch.manual_seed(seed)
        made = {"titans": titans, "miras": miras}[name].sized(2, 16, 512, **options)
        made(torch.randn(1, 512, 32), Causal()).square().mean().backward()
        assert max(float(p.grad.abs().max()) for p in made.parameters()) < 10


@pytest.mark.parametrize(
    "spec",
    [*(("titans", {"variant": v}) for v in titans.VARIANTS), *(("miras", {"preset": p}) for p in miras.PRESETS), ("mega", {})],
    ids=str,
)
def test_a_stack_learns_a_batch_by_heart(spec):
    torch.manual_seed(0)
    name, options = spec
    small = {"segment": 16, "window": 8, "persistent": 4} if name == "titans" else {}
    options = {**options, **small, "chunk": 16 if name == "mega" else 8}
    model = Transformer(12, 32, 1, 2, mixer=(name, options), context=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = torch.randint(0, 12, (8, 10))
    ids, losses = torch.cat([first, first], 1), []
    for _ in range(30):
        logits = model(ids)[:, 9:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 10:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
