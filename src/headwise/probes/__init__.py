"""What each head does: one file a probe, each returning a HeadTable, none keeping n x n weights."""

from ._measure import Measurement, measure, probe
from ._probe import Probe

__all__ = ["Measurement", "Probe", "measure", "probe"]
