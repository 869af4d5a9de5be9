"""What headwise does to one model at the moment.

While anything is installed, the model's configs name the implementation "headwise"; when the last thing is removed,
everything is as it was. Nothing is kept on classes or modules; two models, or two plans on one, do not meet.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache, StaticCache

from ..attention.mask import Mask
from ..caches import Keep, LayerStore, View
from ..caches.sharing import Sharing
from ..errors import GeometryError, PlanError, UnsupportedModelError
from ..stages.sink_logit import SinkLogit
from ..stages.softcap import Softcap
from .cache import CACHE_NAMES, HeadCache, HeadCacheLayer, cache_argument
from .call import SELECTING, Call, Reading, model_stages
from .interface import BASES, IMPLEMENTATION, MODULES, base_attention, base_attention_of, base_for, base_of, is_causal, register
from .layout import Layout, Site, find_layout
from .masks import Found
from .program import Entry, Program, compile_site
from .reading import make_readings
from .renumbering import renumbered, renumbers
from .rotary import RotaryPositions, rotary_of
from .sharing import SharedReads, check_keeps, check_sharing


class Tap(Protocol):
    """Sees every attention call of a model, and may return another output (b, n, h, d) for it."""

    def __call__(self, call: Call, out: Tensor) -> Tensor | None:
        """out: (b, n, h, d)."""
        ...


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module) -> Session:
    """The session of a model; made, with its layout, when first asked for.

    Raises: UnsupportedModelError if headwise cannot reach the model's attention.
    """
    session = _SESSIONS.get(model)
    if session is None:
        session = _SESSIONS[model] = Session(model)
    return session


class Session:
    """Entries of plans and taps in force on one model, and how its attention runs under them."""

    def __init__(self, model: nn.Module) -> None:
        self.layout: Layout = find_layout(model)
        self._model = weakref.ref(model)
        self._entries: list[tuple[object, tuple[Entry, ...]]] = []
        self._taps: list[tuple[object, Tap]] = []
        self._caches: list[object] = []  # one for each cache that is read by our attention although no plan asks for it
        self._programs: dict[tuple[str, int], Program] = {}
        self._sources: set[tuple[str, int]] | None = None  # (stack, layer) that others read; None until it is asked
        self._rotary: dict[tuple[str, int], RotaryPositions | None] = {}
        self._sites: weakref.WeakKeyDictionary[nn.Module, Site] = weakref.WeakKeyDictionary()
        for stack in self.layout.stacks.values():
            for site in stack.sites:
                self._sites[model.get_submodule(site.path)] = site
        self._configs: list[tuple[Any, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.applied: dict[object, Callable[[], None]] = {}  # plans applied until removed, and what removes each
        self._version = 0
        self._masked: bool | None = None  # whether plans change what the main stack caches; None until it is asked
        self._signature = inspect.signature(type(model).forward)
        self._cache_argument = cache_argument(model)
        # of the forward pass that is running:
        self._known: Found = {}
        self._token_mask: Tensor | None = None
        self._encoder_mask: Tensor | None = None
        self._pads: list[int] | None = None
        self._padded: bool | None = None
        self._plain_mask = False
        self._cache: HeadCache | None = None
        self._shared = SharedReads()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # a copied model has no session: its attention says so

    # ---- installing and removing ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model, while it lives."""
        model = self._model()
        if model is None:
            raise PlanError("the model of this session no longer exists")
        return model

    @property
    def installed(self) -> int:
        """How many things are in force."""
        return len(self._entries) + len(self._taps) + len(self._caches)

    def install(self, *, entries: Sequence[Entry] = (), tap: Tap | None = None, cache: bool = False) -> Callable[[], None]:
        """Puts entries, a tap or the reading of a cache in force; returns what removes them (calling it again does nothing)."""
        token = object()
        if not self.installed:
            self._take_over()
        if cache:
            self._caches.append(token)
        elif tap is not None:
            self._taps.append((token, tap))
        else:
            self._entries.append((token, tuple(entries)))
            self._changed()

        def remove() -> None:
            installed = self.installed
            entries = [item for item in self._entries if item[0] is not token]
            if len(entries) != len(self._entries):
                self._entries = entries
                self._changed()
            self._taps = [item for item in self._taps if item[0] is not token]
            self._caches = [item for item in self._caches if item is not token]
            if installed and not self.installed:
                self._give_back()

        return remove

    def _changed(self) -> None:
        self._programs.clear()
        self._sources = None
        self._masked = None
        self._version += 1

    def _take_over(self) -> None:
        register()
        model = self.model
        for config in _configs_of(model):
            named = config._attn_implementation_internal
            self._configs.append((config, named))
            BASES[id(config)] = base_for(named, model)
            config._attn_implementation_internal = IMPLEMENTATION
        for module in self._sites:
            MODULES[module] = weakref.ref(self)
        self._hooks.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after, always_call=True))

    def _give_back(self) -> None:
        for config, named in self._configs:
            config._attn_implementation_internal = named
            BASES.pop(id(config), None)
        self._configs.clear()
        for module in self._sites:
            MODULES.pop(module, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._forget_forward()

    # ---- around a forward pass --------------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Notes padding, and puts a per-head cache in the place of an empty default one where plans free memory."""
        self._forget_forward()
        try:
            bound = self._signature.bind_partial(model, *args, **kwargs)
        except TypeError:  # the model itself will say what is wrong with its arguments
            return args, kwargs
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        own = "decoder_attention_mask" if self.layout.encoder_decoder else "attention_mask"
        self._token_mask = _two_dimensional(given.get(own))
        self._encoder_mask = _two_dimensional(given.get("attention_mask"))
        self._plain_mask = given.get(own) is None
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if self._masks_main():
            if isinstance(cache, StaticCache):
                raise PlanError(
                    "a plan with masks cannot run on a StaticCache, whose slots have no order; use generate's default cache"
                )
            wanted = self.new_cache() if self._may_replace(cache, given) else None
            if wanted is not None and isinstance(cache, EncoderDecoderCache):
                cache.self_attention_cache = wanted
            elif wanted is not None:
                cache = wanted
                args, kwargs = self._with_cache(bound, cache)
        held = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self._cache = held if isinstance(held, HeadCache) else None
        if self._cache is not None:
            self._cache.begin()
        return args, kwargs

    def _with_cache(self, bound: inspect.BoundArguments, cache: HeadCache) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward's arguments with this cache in the place of the one given, under whichever name that came."""
        further = bound.arguments.get("kwargs", {})
        for name in CACHE_NAMES:
            bound.arguments.pop(name, None)
            further.pop(name, None)
        name = self._cache_argument or CACHE_NAMES[0]
        target = bound.arguments if name in self._signature.parameters else bound.arguments.setdefault("kwargs", {})
        target[name] = cache
        return bound.args[1:], bound.kwargs

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._cache is not None:
            if output is None:  # an error; one that is no Exception, as KeyboardInterrupt, does not come by here
                self._cache.rollback()
            else:
                self._cache.end()
        self._forget_forward()

    def _forget_forward(self) -> None:
        self._known = {}
        self._token_mask = self._encoder_mask = None
        self._pads = None
        self._padded = None
        self._plain_mask = False
        self._cache = None
        self._shared.forget()

    def _masks_main(self) -> bool:
        """Whether a plan masks heads of the main stack, or says how they are cached."""
        if self._masked is None:
            programs = [self.program(site) for site in self.layout.main.sites]
            self._masked = any(p.rules or any(group.mask is not None for group in p.groups) for p in programs)
        return self._masked

    @property
    def caches_otherwise(self) -> bool:
        """Whether a plan in force has rules of how heads are cached, which a forward pass without a cache knows nothing of."""
        rules = [rule for site in self.layout.main.sites for _, rule in self.program(site).rules]
        return any(not isinstance(rule, Sharing) for rule in rules)

    # ---- caches -----------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Another number whenever other plans are in force."""
        return self._version

    def _may_replace(self, cache: Any, given: dict[str, Any]) -> bool:
        """Whether a per-head cache may stand in: for an empty default cache, or for none where the model would make one."""
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            return type(cache) is DynamicCache and cache.get_seq_length() == 0
        use = given.get("use_cache")
        if use is None:
            config: Any = self.model.config
            use = getattr(config.get_text_config(decoder=True), "use_cache", False)
        return bool(use) and self._cache_argument is not None and not self.model.training and not self.layout.encoder_decoder

    def new_cache(self, always: bool = False) -> HeadCache | None:
        """A cache for the plans in force; None if every head keeps everything anyway, unless it is wanted `always`."""
        if any(site.latent for site in self.layout.main.sites):
            warnings.warn(
                f"{type(self.model).__name__} caches one latent for all heads of a layer: "
                "the plan's masks hold, but no head's memory can be freed",
                stacklevel=2,
            )
            return None
        template = DynamicCache(config=self.model.config)
        sites = {site.cache_layer: site for site in self.layout.main.sites}
        if template.layer_class_to_replicate is not None:
            template.layers = [DynamicLayer() for _ in sites]
        version, own, freed = self._version, weakref.ref(self), False

        def check() -> None:
            session = own()
            if session is None or session._version != version:
                raise PlanError("this cache was filled under another plan; continue it under the plan that it was filled under")

        layers: list[Any] = []
        all_keeps: dict[int, list[Keep | None]] = {}
        for index, layer in enumerate(template.layers):
            site = sites.get(index)
            if site is None or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                layers.append(layer)
                continue
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            program = self.program(site)
            keeps: list[Keep | None] = program.keeps(site, window)
            check_keeps(site, program, keeps, all_keeps, window)
            all_keeps[site.layer] = keeps
            # a layer with a window of its own is bounded already
            rules = tuple(pair for pair in program.rules if window is None or isinstance(pair[1], Sharing))
            freed |= bool(rules) or program.keeps(site, None) != [None] * site.key_value_heads
            layers.append(HeadCacheLayer(LayerStore(keeps, rules, (site.layer, len(sites))), window, check))
        return HeadCache(layers=layers) if freed or always else None

    def _store(self, site: Site, key: Tensor) -> tuple[LayerStore, Tensor, Tensor] | None:
        """The store that this call fills, and the new keys and values; None if the call has no per-head cache."""
        if self._cache is None or site.stack != self.layout.main.name or site.cache_layer is None:
            return None
        layer = self._cache.layers[site.cache_layer]
        new = layer.take(key, site.path) if isinstance(layer, HeadCacheLayer) else None
        return None if new is None else (layer.store, *new)

    # ---- one attention call -----------------------------------------------------------------------------------------

    def program(self, site: Site) -> Program:
        """What the plans in force ask of one module."""
        key = (site.stack, site.layer)
        if key not in self._programs:
            program = compile_site(site, [entry for _, entries in self._entries for entry in entries])
            check_sharing(site, program, self.layout.stacks[site.stack].sites, self.program)
            self._programs[key] = program
        return self._programs[key]

    def _is_source(self, site: Site) -> bool:
        """Whether heads of a later layer read what this one's do."""
        if self._sources is None:
            sites = [site for stack in self.layout.stacks.values() for site in stack.sites]
            self._sources = {(s.stack, r.layer) for s in sites for _, r in self.program(s).rules if isinstance(r, Sharing)}
        return (site.stack, site.layer) in self._sources

    def rotary(self, site: Site) -> RotaryPositions | None:
        """The rotary positions of one module, found when first asked for; see `rotary_of`."""
        key = (site.stack, site.layer)
        if key not in self._rotary:
            self._rotary[key] = rotary_of(self.model, site)
        return self._rotary[key]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extras: dict[str, Any]) -> Tensor:
        """(b, n, h, dv): one call of the model's attention under what is installed."""
        site = self._sites[module]
        if q.shape[1] != site.heads or k.shape[1] not in (site.key_value_heads, site.heads):
            raise GeometryError(
                f"{site.path} computes {q.shape[1]} query and {k.shape[1]} key heads; "
                f"its attributes said {site.heads} and {site.key_value_heads}"
            )
        program = self.program(site)
        stored = self._store(site, k)
        if stored is None:
            k, v = self._shared.given(site, program, k, v, self._is_source(site))
        readings: tuple[Reading, ...] = ()
        direct = stored is not None and self._reads_in_place(site, program, stored[0], q, extras)
        if not direct and (stored is not None or self._taps or not program.plain):
            store, k, v = stored if stored is not None else (None, k, v)
            readings = self._readings(module, site, program, q, k, v, mask, extras, store)
        if stored is None and program.plain:
            out = base_attention(module, q, k, v, mask, extras)
        elif extras.get("dropout"):
            raise PlanError(
                f"this plan changes how heads read, which knows no attention dropout ({extras['dropout']}); set it to 0"
            )
        elif direct:
            assert stored is not None
            stored[0].extend(*stored[1:], self._left_pads(q.shape[0]), read=False)
            out = _read_in_place(stored[0], q, extras, site.path)
        else:
            out = self._run(module, site, readings, mask, extras)
        if stored is not None and program.rules:
            own = model_stages(q, 0, None, False, extras, site.path)[0]
            rotary = self.rotary(site) if any(rule.turns for _, rule in program.rules) else None
            stored[0].settle(q, _scale(q, extras), own, rotary)
        for heads, stage in program.outputs:
            edited = stage.output(out[:, :, list(heads)].transpose(1, 2), None).transpose(1, 2)
            if len(heads) < site.heads:
                edited, part = out.clone(), edited
                edited[:, :, list(heads)] = part
            out = edited
        if self._taps:
            call = Call(site, q, k, v, readings, self._valid(site, q.shape[2]), self._known)
            for _, tap in self._taps:
                changed = tap(call, out)
                out = out if changed is None else changed
        return out.contiguous()

    def _readings(
        self, module: nn.Module, site: Site, program: Program, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        extras: dict[str, Any], store: LayerStore | None,
    ) -> tuple[Reading, ...]:  # fmt: skip
        causal, n = is_causal(module, extras), q.shape[2]
        pads = self._left_pads(q.shape[0]) if site.stack == self.layout.main.name else None
        if store is None:
            if causal and mask is None and 1 < n < k.shape[2]:  # an empty static cache: transformers reads its filled part
                k, v = k[:, :, :n], v[:, :, :n]
            total = k.shape[2]
            number = torch.arange(total, device=k.device)[None]
            views = self._shared.split(program, View(tuple(range(k.shape[1])), None, k, v, number, ordered=True, exact=False), site)
        else:
            if mask is None and causal and n > 1 and store.seen:
                raise UnsupportedModelError(f"{site.path} gives no mask for a prompt in parts; per-head caching needs one")
            views = store.extend(k, v, pads, sources=self._shared.views)
            if self._is_source(site):
                self._shared.note(site, program, views)
            total = store.seen
        own, visible = model_stages(q, total, mask, causal, extras, site.path)
        readings = make_readings(site, program, q, views, own, visible, _scale(q, extras), total, pads)
        return renumbered(readings, site, program, self.rotary(site)) if renumbers(program) else readings

    def _reads_in_place(self, site: Site, program: Program, store: LayerStore, q: Tensor, extras: dict[str, Any]) -> bool:
        """Whether a new token reads just what the store holds, as the model reads: nothing of masks and stages is left to do."""
        if q.shape[2] != 1 or self._taps or self._is_source(site) or not store.in_place or not self._only_padded(q.shape[0]):
            return False
        if renumbers(program):
            return False
        if torch.is_grad_enabled() and q.requires_grad:
            return False
        if any(extras.get(name) is not None for name in (*SELECTING, "position_bias")):
            return False
        if getattr(self.model.config.get_text_config(decoder=True), "attention_chunk_size", None) is not None:  # type: ignore[union-attr, operator]
            return False
        for group in program.groups:
            kv = {head // site.groups for head in group.heads}
            whole = len(kv) * site.groups == len(group.heads)
            if group.stages and not (whole and all(isinstance(s, Mask) for s in group.stages) and Keep.of(group.mask) is not None):
                return False
        return True

    def _only_padded(self, rows: int) -> bool:
        """Whether the model's masks hide nothing but what came before a row's first token."""
        if self._token_mask is None:
            return self._plain_mask
        if self._padded is None:
            mask = self._token_mask.long()
            self._padded = len(mask) == rows and bool((mask.cumsum(1).eq(0).sum(1) + mask.sum(1) == mask.shape[1]).all())
        return self._padded

    def _run(
        self, module: nn.Module, site: Site, readings: Sequence[Reading], mask: Tensor | None, extras: dict[str, Any]
    ) -> Tensor:
        """(b, n, h, dv): every reading, put together; heads without a plan go through the model's own kernel call."""
        untouched = {group.heads for group in self.program(site).groups if not group.stages}
        out: Tensor | None = None
        for reading in readings:
            if self._cache is None and type(reading) is Reading and reading.heads in untouched and base_of(module) == "sdpa":
                part = base_attention_of(module, reading, mask, extras)
            else:
                part = reading.run().transpose(1, 2)
            if len(readings) == 1:
                return part
            if out is None:
                out = part.new_empty(*part.shape[:2], site.heads, part.shape[-1])
            out[:, :, list(reading.heads)] = part
        assert out is not None
        return out

    def _left_pads(self, rows: int) -> list[int] | None:
        """Left padding of each row of the main stack's tokens; None if there is none."""
        if self._token_mask is None or self._token_mask.shape[0] != rows:
            return None
        if self._pads is None:
            self._pads = (self._token_mask.long().cumsum(1) == 0).sum(1).tolist()
        return self._pads if any(self._pads) else None

    def _valid(self, site: Site, n: int) -> Tensor | None:
        """(b, n): which queries are real tokens; None if all are."""
        mask = self._encoder_mask if site.stack == "encoder" else self._token_mask
        if mask is None or site.stack not in (self.layout.main.name, "encoder", "cross") or mask.shape[1] < n:
            return None
        return mask[:, -n:].bool()


def _configs_of(model: nn.Module) -> list[Any]:
    """Every config object that decides an attention implementation, once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        todo = [config] if config is not None else []
        while todo:
            item = todo.pop()
            if hasattr(item, "_attn_implementation_internal") and id(item) not in found:
                found[id(item)] = item
                todo += [sub for key in getattr(item, "sub_configs", ()) if (sub := getattr(item, key, None)) is not None]
    return list(found.values())


def _read_in_place(store: LayerStore, q: Tensor, extras: dict[str, Any], name: str) -> Tensor:
    """(b, 1, h, dv): a new token's read of all that a store holds."""
    own, _ = model_stages(q, 0, None, False, extras, name)
    cap = next((stage.cap for stage in own if isinstance(stage, Softcap)), None)
    sinks = next((stage.logit for stage in own if isinstance(stage, SinkLogit)), None)
    return store.attend(q, _scale(q, extras), cap, sinks).transpose(1, 2)


def _scale(q: Tensor, extras: dict[str, Any]) -> float:
    """What the model multiplies its scores by."""
    scale = extras.get("scaling")
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
