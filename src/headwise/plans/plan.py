"""The plan: frozen data that says which heads of a model get which stages; applied to a model and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.mask import Mask
from ..attention.stage import Stage
from ..errors import GeometryError, PlanError, SelectionError
from ..models.program import Entry
from ..models.session import session_of
from ..models.subject import Subject, as_subject
from ..stages.offset import Offset
from ..stages.sink import Sink
from ..types import Heads
from . import _files


def _model_of(model: Any) -> nn.Module:
    if isinstance(model, Subject):
        return model.model  # type: ignore[no-any-return]
    if isinstance(model, nn.Module):
        return model
    raise PlanError(
        f"a plan is applied to a loaded model, not to {type(model).__name__} {model!r}; open it first with headwise.open_model"
    )


@dataclass(frozen=True, eq=False)
class Plan:
    """What some heads of a model do differently. Immutable: `use` and `|` return new plans.

    Under a plan the model runs as ever (forward, generate, batches, padding); heads that a plan masks keep only the keys
    they can still read, so that generation really allocates less.

        plan = Plan.empty(model).use(heads, Window(256) | Sink(16))
        with plan(model):
            model.generate(...)

    geometry: for each stack, its layers, heads, key/value heads and head size. about: JSON-able notes (recipe, figures).
    """

    geometry: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...] = ()
    model: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    # ---- making -----------------------------------------------------------------------------------------------------

    @staticmethod
    def empty(model: Any) -> Plan:
        """The plan that changes nothing, for this model's geometry (a Subject, a transformers model, a path or id)."""
        subject = as_subject(model)
        geometry = {name: stack.geometry() for name, stack in subject.layout.stacks.items()}
        return Plan(geometry, (), subject.name)

    def use(self, heads: Heads, *stages: Stage, expect: int | None = None) -> Plan:
        """This plan, and the given stages on the selected heads, after what is there already.

        A stage's per-head fields have one entry for each selected head, in the order of `heads.list()`, or one for all.

        Args:
            expect: how many heads must be selected, for safety.

        Raises: SelectionError, GeometryError, ShapeError or PlanError if heads and stages do not fit this geometry.
        """
        if expect is not None:
            heads.expect(expect)
        if heads.stack not in self.geometry:
            raise SelectionError(f"there is no stack {heads.stack!r} in this plan; it has {', '.join(self.geometry)}")
        own = self.geometry[heads.stack]
        shape = (own["layers"], max(own["heads"]))
        if heads.shape != shape:
            raise GeometryError(
                f"the selection is for {heads.shape[0]} layers x {heads.shape[1]} heads, "
                f"the {heads.stack} has {shape[0]} x {shape[1]}"
            )
        missing = [name for name, (layer, head) in zip(heads.names(), heads.list(), strict=True) if head >= own["heads"][layer]]
        if missing:
            raise SelectionError(
                f"{missing[0]} does not exist: layer {missing[0].split('H')[0][1:]} of {heads.stack} has fewer heads"
            )
        for stage in stages:
            if not isinstance(stage, Stage):
                raise PlanError(f"{stage!r} is no stage; see `headwise list --kind stage`")
            stage.check_heads(heads.count())
            if isinstance(stage, Mask) and heads.stack.endswith("cross") and not isinstance(stage, Sink):
                raise PlanError(f"{type(stage).__name__} compares places of queries and keys, which cross-attention counts apart")
            if isinstance(stage, Offset) and stage.vector.shape[-1] not in {own["head_dim"][layer] for layer, _ in heads.list()}:
                raise GeometryError(f"an offset of size {stage.vector.shape[-1]} for heads of size {own['head_dim'][0]}")
        if not heads:
            return self
        return replace(self, entries=(*self.entries, *(Entry(heads, stage) for stage in stages)))

    def __or__(self, other: Plan) -> Plan:
        """Both plans, this one's stages first. They must be for the same geometry."""
        if not isinstance(other, Plan):
            return NotImplemented
        for name in self.geometry.keys() & other.geometry.keys():
            _same_geometry(name, self.geometry[name], other.geometry[name], "one plan", "the other")
        about = {**self.about, **other.about}
        return Plan({**self.geometry, **other.geometry}, (*self.entries, *other.entries), self.model or other.model, about)

    def noting(self, **about: Any) -> Plan:
        """This plan with notes added to `about`."""
        return replace(self, about={**self.about, **about})

    def heads(self, kind: type[Stage] | None = None, stack: str | None = None) -> Heads:
        """The heads that have any stage (or one of that kind), of a stack: by default the first that the plan touches."""
        touched = [entry for entry in self.entries if kind is None or isinstance(entry.stage, kind)]
        name = stack or next((entry.heads.stack for entry in touched), next(iter(self.geometry)))
        own = self.geometry[name]
        chosen = Heads.none((own["layers"], max(own["heads"])), name)
        for entry in touched:
            if entry.heads.stack == name:
                chosen = chosen | entry.heads
        return chosen

    # ---- applying ---------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        """Raises: GeometryError, with both geometries, if this plan is for another model."""
        layout = session_of(_model_of(model)).layout
        for name in dict.fromkeys(entry.heads.stack for entry in self.entries):
            if name not in layout.stacks:
                raise GeometryError(f"the plan is for the stack {name!r}; this model has {', '.join(layout.stacks)}")
            _same_geometry(name, self.geometry[name], layout.stacks[name].geometry(), "the plan", "this model")

    def _install(self, model: Any) -> Callable[[], None]:
        self.check(model)
        return session_of(_model_of(model)).install(entries=self.entries)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Any]:
        """Within the block, the model runs under this plan; afterwards it is as before, also after an error."""
        remove = self._install(model)
        try:
            yield model
        finally:
            remove()

    def apply(self, model: Any) -> Any:
        """Puts this plan in force until `remove`. Returns the model.

        Raises: PlanError if it is already applied; GeometryError if it is for another model.
        """
        applied = session_of(_model_of(model)).applied
        if self in applied:
            raise PlanError("this plan is already applied to the model; applying it twice would do everything twice")
        applied[self] = self._install(model)
        return model

    def remove(self, model: Any) -> Any:
        """Takes this plan off again. Returns the model.

        Raises: PlanError if it is not applied.
        """
        remove = session_of(_model_of(model)).applied.pop(self, None)
        if remove is None:
            raise PlanError("this plan is not applied to the model")
        remove()
        return model

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes plan.json and, if any stage holds tensors, plan.safetensors. Returns the folder.

        Raises: PlanError for a stage that is not in the inventory, which could not be read back.
        """
        return _files.save(self, Path(folder))

    @staticmethod
    def from_pretrained(source: str | Path, *, revision: str | None = None) -> Plan:
        """Reads a plan from a folder, or from a repository of the Hugging Face hub.

        Raises: PlanError if it is no plan, or one that this version cannot read.
        """
        geometry, entries, model, about = _files.read(source, revision)
        plan = Plan(geometry, (), model, about)
        for heads, stage in entries:
            plan = plan.use(heads, stage)
        return plan

    def __repr__(self) -> str:
        parts = [f"{entry.stage} on {entry.heads.count()} heads of {entry.heads.stack}" for entry in self.entries]
        return f"Plan({'; '.join(parts) or 'empty'})"


def _same_geometry(name: str, first: Mapping[str, Any], second: Mapping[str, Any], one: str, other: str) -> None:
    if dict(first) != dict(second):
        raise GeometryError(f"{name}: {one} is for {describe_geometry(first)}, {other} has {describe_geometry(second)}")


def describe_geometry(geometry: Mapping[str, Any]) -> str:
    """In words: 8 layers x 8 heads (2 key/value) of size 32."""

    def one(values: list[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"

    heads, kv, size = one(geometry["heads"]), one(geometry["key_value_heads"]), one(geometry["head_dim"])
    return f"{geometry['layers']} layers x {heads} heads ({kv} key/value) of size {size}"
