"""The scan of a model, from probes to a plan, and its report as one HTML file."""

from .scan import Scan, scan

__all__ = ["Scan", "scan"]
