"""headwise: every attention head, one table; see it, steer it, swap it, shrink it, scale it.

    import headwise

    model = headwise.open_model()                      # or a path, a hub id, a transformers model you have loaded
    tables = headwise.measure(model, ["induction", "retrieval"])
    plan = headwise.duo(model, tables["retrieval"], threshold=0.1)
    with plan(model):
        model.model.generate(...)

Names are loaded when first used; importing headwise imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .attention import attend, attention_weights, explain, statistics
    from .errors import HeadwiseError
    from .models.capture import capture
    from .models.subject import Subject, open_model
    from .plans import Plan
    from .plans.recipes.duo import duo
    from .plans.recipes.prune import prune
    from .plans.recipes.streaming import streaming
    from .probes import Measurement, Probe, measure, probe
    from .report.scan import Scan, scan
    from .stages.alibi import Alibi
    from .stages.causal import Causal
    from .stages.documents import Documents
    from .stages.gate import Gate
    from .stages.identity_mix import IdentityMix
    from .stages.key_bias import KeyBias
    from .stages.offset import Offset
    from .stages.sink import Sink
    from .stages.sink_logit import SinkLogit
    from .stages.softcap import Softcap
    from .stages.temperature import Temperature
    from .stages.uniform import Uniform
    from .stages.window import Window
    from .tasks import Evaluation, Task, evaluate
    from .types import Heads, HeadTable, Spans, Statistics

_PLACES = {
    "attend": "attention", "attention_weights": "attention", "explain": "attention", "statistics": "attention",
    "HeadwiseError": "errors", "capture": "models.capture", "Subject": "models.subject", "open_model": "models.subject",
    "Plan": "plans", "duo": "plans.recipes.duo", "prune": "plans.recipes.prune", "streaming": "plans.recipes.streaming",
    "Measurement": "probes", "Probe": "probes", "measure": "probes", "probe": "probes",
    "Scan": "report.scan", "scan": "report.scan",
    "Alibi": "stages.alibi", "Causal": "stages.causal", "Documents": "stages.documents", "Gate": "stages.gate",
    "IdentityMix": "stages.identity_mix", "KeyBias": "stages.key_bias", "Offset": "stages.offset", "Sink": "stages.sink",
    "SinkLogit": "stages.sink_logit", "Softcap": "stages.softcap", "Temperature": "stages.temperature", "Uniform": "stages.uniform",
    "Window": "stages.window", "Evaluation": "tasks", "Task": "tasks", "evaluate": "tasks",
    "Heads": "types", "HeadTable": "types", "Spans": "types", "Statistics": "types",
}  # fmt: skip
__all__ = [
    "Alibi", "Causal", "Documents", "Evaluation", "Gate", "HeadTable", "Heads", "HeadwiseError", "IdentityMix", "KeyBias",
    "Measurement", "Offset", "Plan", "Probe", "Scan", "Sink", "SinkLogit", "Softcap", "Spans", "Statistics", "Subject",
    "Task", "Temperature", "Uniform", "Window", "__version__", "attend", "attention_weights", "capture", "duo", "evaluate",
    "explain", "measure", "open_model", "probe", "prune", "scan", "statistics", "streaming",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headwise.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
