"""What each head does: one file a probe, each returning a HeadTable, none keeping n x n weights."""

from ._layers import head_weights, measure_layers
from ._material import Batch, Material, Request
from ._measure import Measurement, measure, probe
from ._probe import CallProbe, Observation, Planted, Probe, queries

__all__ = [
    "Batch",
    "CallProbe",
    "Material",
    "Measurement",
    "Observation",
    "Planted",
    "Probe",
    "Request",
    "head_weights",
    "measure",
    "measure_layers",
    "probe",
    "queries",
]
