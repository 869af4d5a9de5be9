"""Rewrites a declared read into a cheaper exact one and chooses what runs it; `explain` says how and why."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from ..errors import BackendError
from .backends import chunked, flex, kernel, reference, sdpa
from .folds import Folded, fold
from .read import Operands, Read, reachable_pairs

# In the order in which they are asked: the first that neither refuses nor shuns a read runs it.
BACKENDS: dict[str, ModuleType] = {"sdpa": sdpa, "kernel": kernel, "flex": flex, "chunked": chunked, "reference": reference}


@dataclass(frozen=True)
class Explanation:
    """How a read is executed: the backend, the folds applied, why each faster backend was refused, expected cost.

    flops: floating-point operations of the two matrix products over the keys that the mask can reach. bytes: the
    tensors read and written once, plus what the backend holds beside them. not_folded: folds that would not be exact in
    this dtype. kernel: the backend, and on a GPU which of PyTorch's kernels it asks for. statistics: which sweep gives each.
    """

    backend: str
    folds: tuple[str, ...]
    refused: dict[str, str]
    flops: int
    bytes: int
    not_folded: tuple[str, ...] = ()
    kernel: str = ""
    statistics: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "backend": self.backend,
            "folds": list(self.folds),
            "refused": dict(self.refused),
            "flops": self.flops,
            "bytes": self.bytes,
            "not_folded": list(self.not_folded),
            "kernel": self.kernel,
            "statistics": self.statistics,
        }

    def __str__(self) -> str:
        lines = [f"backend   {self.kernel or self.backend}"]
        lines += [f"fold      {fold}" for fold in self.folds]
        lines += [f"no fold   {fold}" for fold in self.not_folded]
        lines += [f"not {name:<9} {reason}" for name, reason in self.refused.items()]
        lines += [f"sweep     {name}: {sweep}" for name, sweep in (self.statistics or {}).items()]
        lines.append(f"expected  {self.flops / 1e9:.3g} GFLOP, {self.bytes / 2**20:.3g} MiB")
        return "\n".join(lines)


@dataclass(frozen=True)
class Execution:
    """A read ready to run, with its tensors."""

    folded: Folded
    backend: str
    refused: dict[str, str]

    @property
    def explanation(self) -> Explanation:
        """How it will run, and why so. Counted when asked for: every call would pay for it."""
        return _explained(self.folded, self.backend, self.refused)

    def run(self) -> Tensor:
        """(b, h, n, dv)."""
        out: Tensor = BACKENDS[self.backend].run(self.folded.read, self.folded.x)
        return out


def plan(read: Read, x: Operands, backend: str | None = None) -> Execution:
    """Folds what can be folded and picks the first backend of BACKENDS that accepts, or the one named.

    Raises: BackendError if the named backend does not exist or refuses, with its reason.
    """
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    # the specification runs what was declared
    folded = Folded(read, x) if backend == "reference" else fold(read, x)
    refused: dict[str, str] = {}
    for name, module in BACKENDS.items():
        if backend is not None and name != backend:
            continue
        reason = module.refuses(folded.read, folded.x)
        if reason is None and backend is None:
            reason = module.shuns(folded.read, folded.x)
        if reason is None:
            return Execution(folded, name, refused)
        refused[name] = reason
    reason = refused[backend or ""]
    raise BackendError(f"backend {backend!r} cannot run this read: {reason}; leave backend= out to let the planner choose")


def _explained(folded: Folded, name: str, refused: dict[str, str]) -> Explanation:
    read, x = folded.read, folded.x
    how = f"{name} ({sdpa.kernel(x)})" if name == "sdpa" and x.q.is_cuda else name
    return Explanation(name, folded.folds, refused, _flops(read, x), _bytes(read, x, name), folded.kept, how)


def _flops(read: Read, x: Operands) -> int:
    b, h, _, d = x.q.shape
    dv = d if x.v is None else x.v.shape[-1]
    return 2 * b * h * reachable_pairs(read, x) * (d + dv)


def _bytes(read: Read, x: Operands, backend: str) -> int:
    tensors = [t for t in (x.q, x.k, x.v) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    moved += x.q.shape[0] * x.q.shape[1] * x.q.shape[2] * (x.v.shape[-1] if x.v is not None else 0) * x.q.element_size()
    if backend == "reference":
        moved += 2 * 4 * x.q.shape[0] * x.q.shape[1] * x.q.shape[2] * x.k.shape[2]
    return moved
