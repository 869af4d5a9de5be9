"""Contexts handed from model to model, in all layers or in some."""

from __future__ import annotations

import families
import pytest
import torch

from headwise.attention import attention_weights
from headwise.errors import GeometryError, SelectionError, UnsupportedModelError
from headwise.models.handing import Context, context_weight, receive, send
from headwise.models.subject import Subject, open_model
from headwise.plans.recipes.kv_comm import kv_comm
from headwise.stages.causal import Causal


@pytest.fixture(scope="module")
def exact():
    return open_model("tiny-gqa", dtype=torch.float64)


def tokens(rows=1, length=120, seed=4):
    return torch.randint(3, 4000, (rows, length), generator=torch.Generator().manual_seed(seed))


def named(family):
    return Subject(next(f for f in families.ALL if f.name == family).model().double())


def logits(subject, ids, **cache):
    with torch.no_grad():
        return subject.model(input_ids=ids, **cache).logits


def test_all_layers_from_the_same_model_are_prefix_caching(exact):
    ids = tokens(2)
    context, question = ids[:, :100], ids[:, 100:]
    whole = logits(exact, ids, use_cache=False)[:, 100:]
    assert torch.allclose(logits(exact, question, **receive(exact, send(exact, context))), whole, atol=1e-10)
    sent = send(exact, context)
    with kv_comm(exact, range(exact.main.shape[0]))(exact):
        assert torch.allclose(logits(exact, question, **receive(exact, sent)), whole, atol=1e-10)
    made = exact.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)
    again = exact.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2, **receive(exact, sent))
    assert torch.equal(made, again)


def test_layers_that_are_not_sent_see_the_first_token_and_the_question(exact):
    """Against one pass in which those layers read under an explicit mask: the question keeps its places behind the context."""
    ids = tokens()
    sent, layers = send(exact, ids[:, :100]), (1, 3)
    with kv_comm(exact, layers, sink=1)(exact):
        found = logits(exact, ids[:, 100:], **receive(exact, sent))
    table = torch.ones(120, 120, dtype=torch.bool)
    table[100:, 1:100] = False

    def tap(call, out):
        if call.site.layer in layers:
            return None
        weights = attention_weights(call.q, call.k, Causal())
        weights = weights * table
        ratio = call.q.shape[1] // call.k.shape[1]
        return ((weights / weights.sum(-1, keepdim=True)) @ call.v.repeat_interleave(ratio, 1)).transpose(1, 2)

    # what the context's own tokens read is what the sender read, so only the question's rows are masked
    with exact.tap(tap):
        wanted = logits(exact, ids, use_cache=False)[:, 100:]
    assert torch.allclose(found, wanted, atol=1e-9)


def test_bytes_fall_with_the_layers(exact):
    context = send(exact, tokens(1, 640)[:, :640])
    layers = exact.main.shape[0]
    held = []
    for count in range(layers + 1):
        with kv_comm(exact, range(count))(exact):
            (cache,) = receive(exact, context).values()
            held.append(sum(layer.store.bytes() for layer in cache.layers) if count < layers else context.nbytes())
    assert held == sorted(held)
    site, token = exact.main.sites[0], 2 * 32 * 8 + 4  # keys, values and number; a layer that withholds notes what it keeps, too
    assert held[1] - held[0] == site.key_value_heads * (640 * token - 64 * (token + 4))
    assert context.nbytes(2) * layers == context.nbytes() * 2


def test_what_a_question_looks_at(exact):
    ids = tokens()
    context = send(exact, ids[:, :100])
    found = context_weight(exact, context, ids[:, 100:])
    assert ((found > 0) & (found < 1)).all()
    wanted = []

    def tap(call, out):
        wanted.append(float(call.weights(slice(100, 120))[..., 1:100].sum(-1).mean()))

    with exact.tap(tap):
        logits(exact, ids, use_cache=False)
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9)


def test_layers_are_chosen_by_weight_and_depth(exact):
    layers = exact.main.shape[0]
    by_weight = kv_comm(exact, share=0.5, samples=1, show_progress=False).about
    scores = torch.tensor(by_weight["scores"])
    assert len(by_weight["sent"]) == -(-layers // 2)
    assert by_weight["sent"] == sorted(scores.argsort(descending=True)[: len(by_weight["sent"])].tolist())
    by_depth = kv_comm(exact, share=0.01, samples=1, weight=0.0, centre=2.0, show_progress=False).about
    assert by_depth["sent"] == [2]


def test_errors(exact):
    context = send(exact, tokens()[:, :20])
    with pytest.raises(GeometryError, match="handed between models of one shape"):
        receive(open_model("tiny", dtype=torch.float64), context)
    with pytest.raises(UnsupportedModelError, match="layers of"):
        send(named("mistral"), torch.randint(3, 90, (1, 30)))
    with pytest.raises(SelectionError):
        kv_comm(exact, [99])
    assert isinstance(context, Context)
