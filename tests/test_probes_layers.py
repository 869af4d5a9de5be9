"""Heads that keep a state, seen by the probes that look at softmax heads."""

import pytest
import torch

from headwise import registry
from headwise.errors import SelectionError
from headwise.mechanisms import Attention
from headwise.mechanisms._states import KernelAttention
from headwise.nn import Transformer
from headwise.probes import head_weights, measure_layers

IDS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))


class Exponential(KernelAttention):
    """exp(q . k) written as features: of one-hot queries and keys only."""

    epsilon = 0.0

    def features(self, q, k):
        return q, k


def test_every_layer_is_seen():
    torch.manual_seed(0)
    mixers = ["delta_net", "softmax", {"softmax": 2, "delta_net": 2}, "cope", "hymba"]
    model = Transformer(50, 32, 5, 4, mixer=mixers, context=64)
    found = head_weights(model, IDS)
    assert [None if w is None else tuple(w.shape) for w in found] == [(2, 4, 30, 30)] * 4 + [None]
    for weights in found[:4]:
        assert float(weights.triu(1).abs().max()) == 0
    torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 4, 30))
    tables = measure_layers(model, ["induction", "previous_token", "entropy"], length=48)
    assert set(tables) == {"induction", "previous_token", "entropy"}
    for table in tables.values():
        assert table.shape == (5, 4)
        assert table.values[:4].isfinite().all()
        assert table.values[4].isnan().all()
    assert set(measure_layers(model, length=32)) <= set(registry.names("probe"))


def test_a_head_that_reads_the_token_before_is_found():
    """A state whose keys are the places before: two one-hot codes of places, shifted by one."""
    n = 24
    model = Transformer(50, 32, 1, 1, mixer=Exponential(32, 1, head_dim=32), context=n, positions="learned", hidden=0)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.places.weight.copy_(torch.eye(32)[:n])
        mixer.projections.k.weight.copy_(torch.eye(32))
        mixer.projections.q.weight.copy_(torch.eye(32).roll(-1, 0))  # place i asks for place i - 1
    table = measure_layers(model, ["previous_token", "induction"], length=n)
    assert float(table["previous_token"].values) > 0.99
    assert float(table["induction"].values) < 0.2


def test_softmax_layers_are_seen_as_by_the_probes_of_models():
    """The weights are those that attention gives values, and a mechanism's too."""
    model = Transformer(50, 32, 1, 4, context=64)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Attention)
    x = model.blocks[0].norm(model.embedding(IDS))
    weights = head_weights(model, IDS)[0]
    _, _, v = mixer.projections.split(x)
    from headwise import Causal

    torch.testing.assert_close(mixer.projections.merge(weights @ v), mixer(x, Causal()), rtol=0, atol=1e-5)


def test_what_can_not_be_asked_is_said():
    with pytest.raises(SelectionError, match="more than weights"):
        measure_layers(Transformer(50, 32, 1, 4, context=64), ["retrieval"])
    with pytest.raises(SelectionError, match="both sides"):
        measure_layers(Transformer(50, 32, 1, 4, context=64, causal=False))
