"""Every error that headwise raises on purpose. Each says what was expected, what came, and what to do."""

from __future__ import annotations


class HeadwiseError(Exception):
    """The base of all errors of headwise; the command line turns it into one line and exit code 2."""


class ShapeError(HeadwiseError, ValueError):
    """Tensors whose shapes do not fit together."""


class SelectionError(HeadwiseError, ValueError):
    """A head that does not exist, or a selection of another size or geometry than expected."""


class GeometryError(HeadwiseError, ValueError):
    """A plan or table made for a model of other layers, heads or head size."""


class BackendError(HeadwiseError, RuntimeError):
    """A backend asked for by name that cannot run this read exactly."""


class UnsupportedModelError(HeadwiseError, TypeError):
    """A model class whose attention headwise cannot reach, and why."""


class ModelLoadError(HeadwiseError, OSError):
    """A model path or id that could not be opened."""


class DeviceError(HeadwiseError, RuntimeError):
    """A device that is not there."""


class InputError(HeadwiseError, ValueError):
    """A text or batch that cannot be used: empty, too long, or a span that is not in it."""


class PlanError(HeadwiseError, ValueError):
    """A plan that cannot be made, read, applied or removed."""


class RegistryError(HeadwiseError, LookupError):
    """A name that is not in the inventory."""
