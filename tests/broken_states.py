"""Broken mixers that keep a state, one for each check that is about states."""

from __future__ import annotations

import torch
from broken_functions import Case

from headwise.mechanisms._states import KernelAttention, StateCache


class Positive(KernelAttention):
    """Correct: weights are products of exponentials."""

    def features(self, q, k):
        return q.double().sigmoid(), k.double().sigmoid()


class AnotherInChunks(Positive):
    """Its chunk form reads a little less."""

    def _read(self, x, stages, cache, attention_mask):
        out, given = super()._read(x, stages, cache, attention_mask)
        return (out * 0.999 if self.form == "chunk" else out), given


class WeightsOfAnother(Positive):
    """Shows weights before they are divided by their sum."""

    def weights(self, x, *stages, attention_mask=None):
        found = super().weights(x, *stages, attention_mask=attention_mask)
        return found * torch.arange(1, found.shape[-1] + 1, dtype=found.dtype)[:, None]


class ThroughDocuments(Positive):
    """Does not clear its state where a document begins."""

    def reading(self, x, now):
        now.starts = None
        return super().reading(x, now)


class KeepsAll(StateCache):
    """Also keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def tensors(self):
        return (*super().tensors(), *self.given)


class Grows(Positive):
    """Says that its cache is bounded, and it is not."""

    def _read(self, x, stages, cache, attention_mask):
        if cache is not None:
            cache.given.append(x.clone())
        return super()._read(x, stages, cache, attention_mask)

    def new_cache(self, owner=None):
        return KeepsAll()


def of(kind):
    return {"examples": lambda heads, size: [kind(heads * size, heads)]}


BROKEN_STATES = [
    Case("another formula in chunks", "forms", "chunk, 1 tokens: differs from recurrent by", AnotherInChunks, of(AnotherInChunks)),
    Case("weights of another", "implied_weights", "its weights times values differ", WeightsOfAnother, of(WeightsOfAnother)),
    Case("through documents", "documents", "packed documents meet", ThroughDocuments, of(ThroughDocuments)),
    Case("a cache that grows", "bounded", "its cache grows from", Grows, of(Grows)),
]
