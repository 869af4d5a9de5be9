"""Attentions that are broken in one way each, with the check that must notice and what it must say."""

# ruff: noqa: F811  (functions are named as the methods that they replace)
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import broken_functions
import torch
from correct_attentions import Careful, Case, Correct, function, function_oracle, oracle
from torch import nn

BROKEN: list[Case] = [*broken_functions.BROKEN]


def broken(check: str, says: str, base: type = Correct, **more: Any) -> Callable[[Any], Any]:
    """Makes of a function the method of that name, in a class derived from the correct one; classes are taken as they are."""

    def wrap(given):
        if isinstance(given, type):
            name, kind = given.__name__, given
        else:
            name = given.__doc__
            kind = type("Broken", (base,), {given.__name__: given})
        BROKEN.append(Case(name, check, says, kind, more))
        return given

    return wrap


# ---- scores and weights: only the oracle can tell ----------------------------------------------------------------------


@broken("oracle", "differs from its oracle by")
def score(self, q, k):
    "wrong sign of the scores"
    return -(q @ k.transpose(-1, -2)) / math.sqrt(self.size)


@broken("oracle", "differs from its oracle by")
def score(self, q, k):
    "no 1/sqrt(d)"
    return q @ k.transpose(-1, -2)


@broken("oracle", "differs from its oracle by")
def score(self, q, k):
    "scaled by d"
    return q @ k.transpose(-1, -2) / self.size


@broken("oracle", "differs from its oracle by")
def visible(self, there, n, m, causal):
    "does not see itself"
    seen = Correct.visible(self, there, n, m, causal)
    return seen & ~torch.eye(m, dtype=torch.bool)[m - n :] if causal else seen


@broken("oracle", "differs from its oracle by", examples=lambda heads, size: [WideWindow(window=4)])
class WideWindow(Correct):
    def visible(self, there, n, m, causal):
        self.window += 1
        seen = super().visible(there, n, m, causal)
        self.window -= 1
        return seen


def wrong_oracle(module, x, visible):
    return 1.01 * oracle(module, x, visible)


@broken("oracle", "differs from its oracle by", oracle=wrong_oracle)
class OracleOfAnotherFormula(Correct):
    pass


@broken("oracle", "its gradient of x differs from its oracle's")
def mix(self, weights, v):
    "values detached, told by the oracle"
    return weights @ v.detach()


# ---- the future --------------------------------------------------------------------------------------------------------


@broken("causality", "leaks the future at position")
def weigh(self, scores, visible):
    "softmax over queries"
    return torch.softmax(scores, -2) * visible


@broken("causality", "leaks the future at position 0")
def weigh(self, scores, visible):
    "masked after the softmax, not renormalised"
    return torch.softmax(scores, -1) * visible


@broken("causality", "leaks the future at position 0: changing token 1 changes it by")
def visible(self, there, n, m, causal):
    "sees the next token"
    ahead = torch.ones(n, m, dtype=torch.bool).tril(m - n + 1)
    return there[:, None, -m:] & ahead if causal else there[:, None, -m:].expand(-1, n, -1)


@broken("causality", "leaks the future at position 32: changing token 33")
def visible(self, there, n, m, causal):
    "forgets the mask in the second block of 32"
    seen = Correct.visible(self, there, n, m, causal).clone()
    seen[:, 32:, 32:] = True
    return seen


@broken("causality", "leaks the future at position 0")
def repeat(self, k):
    "keys pooled over time"
    return Correct.repeat(self, k + 0.1 * k.mean(2, keepdim=True))


@broken("causality", "leaks the future at position 0")
def prepare(self, x, places):
    "normalised over time"
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, correction=0) + 1e-6)


@broken("causality", "a gradient from before position 9 reaches token 9")
def repeat_values(self, v):
    "a straight-through gradient from the future"
    pooled = v.mean(2, keepdim=True)
    return Correct.repeat(self, v + (pooled - pooled.detach()))


# ---- the cache ---------------------------------------------------------------------------------------------------------


@broken("decode", "cached decode (token by token) differs from the full pass from token 1,")
def visible(self, there, n, m, causal):
    "causal mask aligned to the top left"
    ahead = torch.ones(n, m, dtype=torch.bool).tril()
    return there[:, None, -m:] & ahead if causal else there[:, None, -m:].expand(-1, n, -1)


@broken("decode", "cached decode (token by token) differs from the full pass from token 2,")
class CacheNotExtended(Correct):
    def keep(self, cache, k, v):
        k, v = torch.cat([cache.get("k", k[:, :, :0]), k], 2), torch.cat([cache.get("v", v[:, :, :0]), v], 2)
        cache.setdefault("k", k)
        cache.setdefault("v", v)
        return k, v


@broken("decode", "cached decode (token by token) differs from the full pass from token 1,")
class PositionOffByOne(Correct):
    def rotate(self, t, places):
        return super().rotate(t, places + (places[:, :1] > 0))


@broken("decode", "cached decode (token by token) differs from the full pass from token 2,")
class RotatedAgain(Correct):
    def keep(self, cache, k, v):
        if cache:
            old = self.rotate(cache["k"], torch.arange(cache["k"].shape[2])[None])
            k, v = torch.cat([old, k], 2), torch.cat([cache["v"], v], 2)
        cache["k"], cache["v"] = k, v
        return k, v


@broken("decode", "cached decode (in uneven pieces) differs from the full pass from token 4,")
class ChunkSeesOnlyItself(Correct):
    def visible(self, there, n, m, causal):
        seen = super().visible(there, n, m, causal).clone()
        if 1 < n < m:
            seen[:, :, : m - n] = False
        return seen


@broken("decode", "cached decode (token by token) differs from the full pass from token 33,")
class CacheOf32(Correct):
    def keep(self, cache, k, v):
        k, v = super().keep(cache, k, v)
        return (k, v) if k.shape[2] <= 33 else (torch.cat([k[:, :, :1] * 0, k[:, :, 1:]], 2), v)


# ---- padding -----------------------------------------------------------------------------------------------------------


@broken("left_padding", "left padding of 0.7 changes the output (causal) by")
def visible(self, there, n, m, causal):
    "padding attended"
    return Correct.visible(self, torch.ones_like(there), n, m, causal)


@broken("right_padding", "right padding of 0.7 changes the output (reading both sides) by")
def visible(self, there, n, m, causal):
    "padding attended where nothing is causal"
    return Correct.visible(self, there if causal else torch.ones_like(there), n, m, causal)


@broken("left_padding", "left padding of")
def weigh(self, scores, visible):
    "hidden by -10"
    return torch.softmax(scores.masked_fill(~visible, -10.0), -1)


@broken("left_padding", "left padding of 0.7 changes the output (causal) by", oracle=None)
class PlacesThroughPadding(Correct):
    """Adds positions to tokens, and counts padding."""

    def places(self, there):
        return torch.arange(there.shape[1]).expand(there.shape)

    def prepare(self, x, places):
        return x + torch.sin(places[..., None] * torch.arange(1, self.width + 1).to(x) / self.width)


@broken("left_padding", "left padding changes the output of cached decode by")
class DecodesAtTheSlot(Correct):
    def places(self, there):
        self.padded = not bool(there.all())
        return super().places(there)

    def rotate(self, t, places):
        one = t.shape[2] == 1 and self.padded
        return super().rotate(t, places + 3 if one else places)


# ---- rows and heads ----------------------------------------------------------------------------------------------------


@broken("batch", "rows of a batch meet")
def prepare(self, x, places):
    "normalised over the batch"
    return x - 0.5 * x.mean(0, keepdim=True)


@broken("batch", "a row alone differs from the same row in a batch")
def prepare(self, x, places):
    "scaled by the size of the batch"
    return x / x.shape[0]


@broken("groups", "grouped heads are averaged, not repeated")
def repeat(self, k):
    "grouped heads averaged"
    return k.mean(1, keepdim=True).expand(-1, self.heads, -1, -1)


@broken("groups", "grouped heads are tiled (head i reads i mod kv_heads), not repeated")
def repeat(self, k):
    "grouped heads tiled"
    return k.repeat(1, self.heads // self.kv_heads, 1, 1)


@broken("groups", "grouped heads are mixed (keys repeated, values tiled")
def repeat_values(self, v):
    "value heads not repeated as the keys"
    return v.repeat(1, self.heads // self.kv_heads, 1, 1)


@broken("groups", "grouped heads are all read from the first one")
def repeat(self, k):
    "all heads read the first"
    return k[:, :1].expand(-1, self.heads, -1, -1)


# ---- gradients, state, numbers -----------------------------------------------------------------------------------------


@broken("gradients", "unused parameters: q_proj.weight, k_proj.weight")
def mix(self, weights, v):
    "weights detached"
    return weights.detach() @ v


@broken("gradients", "wrong gradient of the input: along a random direction")
def mix(self, weights, v):
    "half of the values detached"
    return weights @ (0.5 * v + 0.5 * v.detach())


@broken("gradients", "unused parameters: gate")
class UnusedParameter(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.ones(3))


@broken("gradients", "no gradient reaches its output")
def finish(self, y):
    "output detached"
    return y.detach()


@broken("state", "a sequence leaves state")
class Remembers(Correct):
    last = 0.0

    def finish(self, y):
        y = y + 0.1 * self.last
        self.last = y.detach().mean()
        return y


@broken("state", "decoding a sequence leaves state")
class SharedCache(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = [0.0]

    def keep(self, cache, k, v):
        self.bias[0] += 1.0
        return super().keep(cache, k, v + self.bias[0])


@broken("state", "train() and eval() change its output")
class MergesTwice(Correct):
    def train(self, mode=True):
        if not mode and self.training:
            self.o_proj.weight.data *= 1.5
        return super().train(mode)


@broken("repeatable", "a pass in eval mode changes its buffer seen")
class CountsInEval(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(1))

    def finish(self, y):
        self.seen += 1
        return y


@broken("repeatable", "changes its input in place")
def prepare(self, x, places):
    "input scaled in place"
    return x.mul_(1.1) if not torch.is_grad_enabled() else 1.1 * x


@broken("repeatable", "running again in eval mode differs by")
def finish(self, y):
    "dropout left on in eval"
    return nn.functional.dropout(y, 0.1, training=True)


@broken("shape", "returns torch.float32 for torch.float64")
def finish(self, y):
    "always float32"
    return y.float()


@broken("shape", "x (3, 7, 32) becomes (3, 8, 32)")
def finish(self, y):
    "odd lengths padded"
    return torch.cat([y, y[:, :1]], 1) if y.shape[1] == 7 else y


@broken("masked_rows", "NaN in a row that sees nothing (causal)")
def weigh(self, scores, visible):
    "rows that see nothing are NaN"
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)


@broken("masked_rows", "NaN gradient from a row that sees nothing")
def weigh(self, scores, visible):
    "NaN hidden from the output, not from the gradient"
    hidden = torch.zeros_like(scores).masked_fill(~visible, -torch.inf)
    return torch.softmax(scores + hidden, -1).nan_to_num()


@broken("extremes", "not finite for inputs of size 1000")
def weigh(self, scores, visible):
    "softmax without its maximum"
    parts = scores.exp() * visible
    return parts / parts.sum(-1, keepdim=True).clamp(min=1e-30)


@broken("half_precision", "computes in less than float32 inside")
def mix(self, weights, v):
    "bfloat16 inside"
    return (weights.bfloat16() @ v.bfloat16()).to(v)


@broken("half_precision", "in bfloat16 it is off by")
def score(self, q, k):
    "scores as the difference of large numbers"
    return ((q + 50) @ k.transpose(-1, -2) - 50 * k.sum(-1)[:, :, None]) / math.sqrt(self.size)


@broken("saved", "its state_dict does not hold all that matters")
class HiddenTensor(Correct):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.features = torch.randn(self.width)

    def prepare(self, x, places):
        return x * self.features.to(x)


# ---- what the module says of itself -------------------------------------------------------------------------------------


def plain(heads, size):
    return [Correct(heads * size, heads, rotary=False)]


def windowed(heads, size):
    return [Correct(heads * size, heads, rotary=False, window=4)]


BROKEN += [
    Case("not neutral", "neutral", "neutral setting 1: differs from plain softmax attention by", Correct,
         {"examples": windowed, "neutral": windowed}),
    Case("no-op", "neutral", "changes nothing: it is plain softmax attention", Correct, 
         {"examples": plain, "neutral": plain, "oracle": None}),
    Case("a wrong identity", "identities", "rows sum to one: off by 0.25", Correct,
         {"identities": lambda: [("zero is zero", 0.0), ("rows sum to one", 0.25)]}),
]  # fmt: skip
CORRECT = [
    Case("correct", "", "", Correct, {"identities": lambda: [("one is one", 0.0)]}),
    Case("windowed", "", "", Correct, {"examples": windowed, "neutral": plain}),
    Case(
        "careful",
        "",
        "",
        Careful,
        {"examples": lambda heads, size: [Careful()], "oracle": function_oracle, "neutral": lambda heads, size: [Careful()]},
    ),
    Case("function", "", "", function, {"examples": None, "oracle": function_oracle, "neutral": None}),
]
