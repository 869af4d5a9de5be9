"""Makes any attention runnable in one way: `runner_for(instance)` looks at its signature; the checks know only `Runner`.

A module of yours that is called in a way of its own gives `adapter(module) -> Runner` beside it.
"""

from __future__ import annotations

import copy
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistryError
from ..mechanisms import Attention, Mechanism, Mixer
from ..stages.causal import Causal

HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE
ADVICE = "give examples(heads, size) -> ready instances, or adapter(module) -> Runner, in its module"
TENSORS = (("q", "k", "v"), ("query", "key", "value"), ("queries", "keys", "values"), ("xq", "xk", "xv"))
FLAGS = ("is_causal", "causal")


class Runner(ABC):
    """One attention, run as x (b, n, width) -> (b, n, width).

    module: what holds its parameters. cannot: what it can't do, each with the reason in words: "causal" and "full" (reading
    both sides), "padding", "decode".
    takes_nan: what empty slots hold may be NaN.
    kernel: the tensor-level attention inside (a Mechanism, or made to look like one), whose oracle takes q, k and v.
    """

    takes_nan = False
    kernel: Any = None

    def __init__(self, module: nn.Module, width: int = WIDTH, about: str = "") -> None:
        self.module = module.eval()
        self.width = width
        self.about = about or type(module).__name__
        self.cannot: dict[str, str] = {}

    @abstractmethod
    def run(self, x: Tensor, *, causal: bool = True, real: Tensor | None = None) -> Tensor:
        """All tokens at once. real (b, n): False at padding."""

    def decode(self, x: Tensor, sizes: Sequence[int], *, real: Tensor | None = None) -> Tensor:
        """Pieces of x, one after the other, with a cache that is empty at first."""
        raise NotImplementedError(self.cannot.get("decode", "has no cache"))

    def around(self, module: nn.Module) -> Runner:
        """The same way of running, for another module."""
        other = copy.copy(self)
        other.module = module.eval()
        return other

    def to(self, dtype: torch.dtype) -> Runner:
        """A copy in another dtype."""
        return self.around(copy.deepcopy(self.module).to(dtype))

    @property
    def modes(self) -> list[bool]:
        """The values of `causal` that it can run with."""
        return [causal for causal, name in ((True, "causal"), (False, "full")) if name not in self.cannot]


class MixerRunner(Runner):
    """A headwise Mixer; a Mechanism or a function of q, k, v runs inside an `Attention` with fixed random projections."""

    def __init__(self, module: Mixer, about: str = "", kernel: Any = None) -> None:
        super().__init__(module, module.width, about)
        self.cannot |= module.cannot
        self.kernel = kernel
        if isinstance(kernel, Function):
            self.cannot |= kernel.cannot
        elif kernel is not None:
            self.takes_nan = True

    def run(self, x: Tensor, *, causal: bool = True, real: Tensor | None = None) -> Tensor:
        """See `Runner.run`."""
        return self.module(x, *((Causal(),) if causal else ()), attention_mask=real)

    def decode(self, x: Tensor, sizes: Sequence[int], *, real: Tensor | None = None) -> Tensor:
        """See `Runner.decode`."""
        cache, outs, start = self.module.new_cache(), [], 0  # type: ignore[operator]
        for size in sizes:
            piece = slice(start, start + size)
            mask = None if real is None else real[:, piece]
            outs.append(self.module(x[:, piece], Causal(), cache=cache, attention_mask=mask))
            start += size
        return torch.cat(outs, 1)

    def around(self, module: nn.Module) -> Runner:
        """The same way of running, for another module."""
        other = super().around(module)
        if self.kernel is not None:
            other.kernel = module.mechanism
        return other

    def read(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """The tensor-level attention on its own tensors."""
        return self.kernel(q, k, v, *((Causal(),) if causal else ()))


class Function(Mechanism):
    """A user's function or module of (q, k, v, ...) in the form of a Mechanism; finds out what its mask means by trying."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function  # becomes a submodule if it is a module
        names = list(parameters_of(function))
        self.flag = next((n for n in names if n in FLAGS), None)
        self.grouped = "enable_gqa" in names
        self.mask = next((n for n in names[3:] if "mask" in n or n in ("visible", "bias", "attn_bias")), None)
        self.form: Callable[[Tensor], Tensor] | None = None
        self.cannot: dict[str, str] = {}
        if self.mask is not None:
            self._learn()
        if self.form is None:
            self.cannot["padding"] = "takes no mask" if self.mask is None else f"no mask that was tried fits its `{self.mask}`"
        if self.form is None and self.flag is None:
            self.cannot["full" if self._hides_the_future() else "causal"] = (
                "has no mask and no flag `causal`, so it reads one way only"
            )

    def _learn(self) -> None:
        from ._conventions import SQUARES, influence, likeness

        q, k, v = (torch.randn(2, HEADS, 6, SIZE, dtype=torch.float64, generator=_seed(i)) for i in range(3))
        visible = torch.ones(6, 6).tril().bool().expand(2, 6, 6).clone()
        visible[0, 2:, 1] = False

        def read(form: Callable[[Tensor], Tensor]) -> Callable[[int | None], Tensor]:
            def changed(j: int | None) -> Tensor:
                k2, v2 = k.clone(), v.clone()
                if j is not None:
                    k2[:, :, j] += 1.0
                    v2[:, :, j] -= 2.0
                return self._call(q, k2, v2, {self.mask: form(visible)}).transpose(1, 2)

            return changed

        tried = [(influence(read(form), 6), name, form) for name, form in SQUARES.items()]
        both = visible[1:].expand_as(visible)  # what one mask for all rows can say
        scored = [(likeness(f, both) - 0.3 if "(n, m)" in n else likeness(f, visible), n, form) for f, n, form in tried]
        score, name, form = max(scored, key=lambda triple: triple[0])
        self.form = None if score < 0 else form
        if "(n, m)" in name:
            self.cannot["padding"] = "takes one mask for all rows of a batch"

    def _hides_the_future(self) -> bool:
        q, k, v = (torch.randn(1, HEADS, 6, SIZE, dtype=torch.float64, generator=_seed(i)) for i in range(3))
        v2 = v.clone()
        v2[:, :, 5:] += 1.0
        return torch.equal(self._call(q, k, v, {})[:, :, 0], self._call(q, k, v2, {})[:, :, 0])

    def _call(self, q: Tensor, k: Tensor, v: Tensor, options: dict[Any, Any]) -> Tensor:
        if self.grouped and k.shape[1] != q.shape[1]:
            options = {**options, "enable_gqa": True}
        found = self.function(q, k, v, **options)
        out = found[0] if isinstance(found, tuple) else found
        return out

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *stages: Any,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """Reads as a Mechanism does. A mask is given where the flag can't say it."""
        causal = any(isinstance(stage, Causal) for stage in stages)
        n, m = q.shape[2], k.shape[2]
        plain = key_positions is None and (n == m or self.form is None)
        if plain and (self.flag is not None or not causal):
            return self._call(q, k, v, {} if self.flag is None else {self.flag: causal})
        if self.form is None:
            return self._call(q, k, v, {})
        slots = torch.arange(m, device=k.device)
        places = slots[None] if key_positions is None else key_positions
        own = slots[None, m - n :] if query_positions is None else query_positions
        visible = (places >= 0)[:, None, :].expand(-1, n, -1)
        if causal:
            visible = visible & (places[:, None, :] <= own[:, :, None])
        mask = self.form(visible.expand(q.shape[0], -1, -1))
        return self._call(q, k, v, {self.mask: mask.to(q.dtype) if mask.is_floating_point() else mask})


class MultiheadRunner(Runner):
    """torch.nn.MultiheadAttention and its like: (query, key, value, key_padding_mask, attn_mask) -> (out, weights)."""

    def __init__(self, module: nn.Module, about: str = "") -> None:
        super().__init__(module, int(getattr(module, "embed_dim", WIDTH)), about)
        self.names = parameters_of(module.forward)
        self.first = bool(getattr(module, "batch_first", False))
        self.cannot["decode"] = "has no cache"
        if "key_padding_mask" not in self.names:
            self.cannot["padding"] = "takes no key_padding_mask"
        if "attn_mask" not in self.names:
            self.cannot["causal"] = "takes no attn_mask"

    def run(self, x: Tensor, *, causal: bool = True, real: Tensor | None = None) -> Tensor:
        """See `Runner.run`."""
        n = x.shape[1]
        options: dict[str, Any] = {}
        if real is not None:
            options["key_padding_mask"] = ~real  # True where a key is to be left out, in this convention
        if causal and "attn_mask" in self.names:
            options["attn_mask"] = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        if "need_weights" in self.names:
            options["need_weights"] = False  # with weights, a row that sees nothing is NaN by contract
        x = x if self.first else x.transpose(0, 1)
        found = self.module(x, x, x, **options)
        out = found[0] if isinstance(found, tuple) else found
        return out if self.first else out.transpose(0, 1)


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    """Its parameters by name, without self; of built-in functions as their help's first line says. Empty if unknown."""
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        found = dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        told = re.match(r"\s*\w+\(([^)]*)\)", function.__doc__ or "")
        names = [part.split("=")[0].split(":")[0].strip() for part in told[1].split(",")] if told else []
        found = {n: inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names if n.isidentifier()}
    found.pop("self", None)
    return found


def reads_tensors(function: Any) -> bool:
    """Whether it is called with queries, keys and values."""
    names = tuple(parameters_of(function))[:3]
    return any(names == triple for triple in TENSORS)


def is_multihead(names: dict[str, inspect.Parameter]) -> bool:
    """Whether parameters are those of torch.nn.MultiheadAttention."""
    return tuple(names)[:3] == ("query", "key", "value") and bool({"key_padding_mask", "need_weights"} & set(names))


def runner_for(value: Any, about: str = "", kv_heads: int | None = None, dtype: torch.dtype = torch.float64) -> Runner:
    """The runner of an instance or function, in float64 and eval mode.

    Raises: RegistryError if it can't be called in any known way: what was found, and what to provide.
    """
    if isinstance(value, Runner):
        return value
    if isinstance(value, nn.Module):
        value = value.to(dtype).eval()
        about = about or type(value).__name__
    if isinstance(value, Mixer):
        return MixerRunner(value, about)
    names = parameters_of(value)
    module_level = isinstance(value, nn.Module) and not isinstance(value, Mechanism)
    if module_level and is_multihead(names):
        return MultiheadRunner(value, about)
    if isinstance(value, Mechanism) or reads_tensors(value):
        kernel = value if isinstance(value, Mechanism) else Function(value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            mixer = Attention(WIDTH, HEADS, kernel, kv_heads=kv_heads).to(dtype)
        return MixerRunner(mixer, about or getattr(value, "__name__", type(value).__name__), kernel)
    if not isinstance(value, nn.Module):
        raise RegistryError(f"{about or value!r} is no module, and is not called with q, k, v; {ADVICE}")
    if hasattr(value, "config") and "hidden_states" in names:
        from ._transformers import TransformersRunner

        return TransformersRunner(value, about)
    from ._modules import ModuleRunner

    return ModuleRunner(value, about)
