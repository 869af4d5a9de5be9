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
    from .plans.recipes.ada_kv import ada_kv
    from .plans.recipes.duo import duo
    from .plans.recipes.h2o import h2o
    from .plans.recipes.prune import prune
    from .plans.recipes.snap_kv import snap_kv
    from .plans.recipes.streaming import streaming
    from .probes import Measurement, Probe, measure, probe
    from .report.scan import Scan, scan
    from .stages.alibi import Alibi
    from .stages.block_table import BlockTable
    from .stages.blocks import Blocks
    from .stages.causal import Causal
    from .stages.dilated import Dilated
    from .stages.documents import Documents
    from .stages.entmax import Entmax
    from .stages.gate import Gate
    from .stages.identity_mix import IdentityMix
    from .stages.key_bias import KeyBias
    from .stages.low_rank_bias import LowRankBias
    from .stages.offset import Offset
    from .stages.per_head import PerHead
    from .stages.prefix import Prefix
    from .stages.relative_bias import RelativeBias
    from .stages.relu import Relu
    from .stages.signed_softmax import SignedSoftmax
    from .stages.sink import Sink
    from .stages.sink_logit import SinkLogit
    from .stages.softcap import Softcap
    from .stages.sparsemax import Sparsemax
    from .stages.strided import Strided
    from .stages.temperature import Temperature
    from .stages.uniform import Uniform
    from .stages.window import Window
    from .tasks import Evaluation, Task, evaluate
    from .types import Heads, HeadTable, Spans, Statistics

_PLACES = {
    "attend": "attention", "attention_weights": "attention", "explain": "attention", "statistics": "attention",
    "HeadwiseError": "errors", "capture": "models.capture", "Subject": "models.subject", "open_model": "models.subject",
    "Plan": "plans", "ada_kv": "plans.recipes.ada_kv", "duo": "plans.recipes.duo", "h2o": "plans.recipes.h2o",
    "prune": "plans.recipes.prune", "snap_kv": "plans.recipes.snap_kv", "streaming": "plans.recipes.streaming",
    "Measurement": "probes", "Probe": "probes", "measure": "probes", "probe": "probes",
    "Scan": "report.scan", "scan": "report.scan",
    "Alibi": "stages.alibi", "BlockTable": "stages.block_table", "Blocks": "stages.blocks", "Causal": "stages.causal",
    "Dilated": "stages.dilated", "Documents": "stages.documents", "Entmax": "stages.entmax", "Gate": "stages.gate",
    "IdentityMix": "stages.identity_mix", "KeyBias": "stages.key_bias", "LowRankBias": "stages.low_rank_bias",
    "Offset": "stages.offset", "PerHead": "stages.per_head", "Prefix": "stages.prefix",
    "RelativeBias": "stages.relative_bias", "Relu": "stages.relu", "SignedSoftmax": "stages.signed_softmax",
    "Sink": "stages.sink", "SinkLogit": "stages.sink_logit", "Softcap": "stages.softcap", "Sparsemax": "stages.sparsemax",
    "Strided": "stages.strided", "Temperature": "stages.temperature", "Uniform": "stages.uniform", "Window": "stages.window",
    "Evaluation": "tasks", "Task": "tasks", "evaluate": "tasks",
    "Heads": "types", "HeadTable": "types", "Spans": "types", "Statistics": "types",
}  # fmt: skip
__all__ = [
    "Alibi", "BlockTable", "Blocks", "Causal", "Dilated", "Documents", "Entmax", "Evaluation", "Gate", "HeadTable", "Heads",
    "HeadwiseError", "IdentityMix", "KeyBias", "LowRankBias", "Measurement", "Offset", "PerHead", "Plan", "Prefix", "Probe",
    "RelativeBias", "Relu", "Scan", "SignedSoftmax", "Sink", "SinkLogit", "Softcap", "Spans", "Sparsemax", "Statistics",
    "Strided", "Subject", "Task", "Temperature", "Uniform", "Window", "__version__", "ada_kv", "attend", "attention_weights",
    "capture", "duo", "evaluate", "explain", "h2o", "measure", "open_model", "probe", "prune", "scan", "snap_kv", "statistics",
    "streaming",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headwise.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
