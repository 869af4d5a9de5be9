"""Running probes: what makes sense is measured, what does not is skipped with a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import registry
from ..errors import SelectionError, UnsupportedModelError
from ..models.layout import Stack
from ..models.subject import as_subject
from ..progress import bar
from ..types import HeadTable
from ._material import Material
from ._probe import CallProbe, Probe, observe_calls


@dataclass(frozen=True)
class Measurement(Mapping[str, HeadTable]):
    """Tables by probe. `measurement["entropy"]` is the main stack's; `.tables[probe, stack]` holds all, `.skipped` says why not."""

    main: str
    tables: Mapping[tuple[str, str], HeadTable]
    skipped: Mapping[tuple[str, str], str]

    def __getitem__(self, name: str) -> HeadTable:
        return self.tables[name, self.main]

    def __iter__(self) -> Iterator[str]:
        return (name for name, stack in self.tables if stack == self.main)

    def __len__(self) -> int:
        return sum(stack == self.main for _, stack in self.tables)

    def of(self, stack: str) -> dict[str, HeadTable]:
        """The tables of one stack, by probe."""
        return {name: table for (name, of), table in self.tables.items() if of == stack}


def measure(
    model: Any = None,
    probes: Iterable[str | Probe] | str | Probe | None = None,
    *,
    stacks: Iterable[str] | str | None = None,
    text: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    seed: int = 0,
    batch_size: int = 4,
    length: int | None = None,
    material: Material | None = None,
    show_progress: bool = True,
) -> Measurement:
    """Measures heads with probes, and returns their tables.

    Args:
        model: a transformers model, a Subject, a path or id; None is the embedded model.
        probes: names or Probe objects; None for all.
        stacks: names of stacks; None for all.
        text: what to read; None is the embedded held-out text. inputs: instead, a dict for the model's forward.
        batch_size: rows of a forward pass.
        length: tokens of a row of running text, for the probes that read it (512 unless said); as long as the context allows.
        material: rows to share with other measurements of the same model.

    Raises: RegistryError or SelectionError for an unknown probe or stack; InputError for a text that cannot be read.
    """
    subject = as_subject(model, tokenizer)
    material = material or Material(subject, text, inputs, seed, batch_size, length)
    names: list[str | Probe] = (
        [*registry.names("probe")] if probes is None else [probes] if isinstance(probes, str | Probe) else [*probes]
    )
    chosen = [probe if isinstance(probe, Probe) else registry.load("probe", probe)() for probe in names]
    which = list(subject.layout.stacks) if stacks is None else [stacks] if isinstance(stacks, str) else list(stacks)
    for name in which:
        subject.layout.stack(name)  # raises for a stack that does not exist
    if not which or not chosen:
        raise SelectionError("nothing to measure: no probe or no stack was given")
    run: list[tuple[Probe, list[Stack]]] = []
    skipped: dict[tuple[str, str], str] = {}
    for probe in chosen:
        fit = []
        for stack in (subject.layout.stacks[name] for name in which):
            reason = probe.why_not(subject, stack)
            if reason is None:
                fit.append(stack)
            else:
                skipped[probe.name, stack.name] = reason
        if fit:
            run.append((probe, fit))
    total = sum(probe.steps(subject, stack, material) for probe, fit in run for stack in fit)
    tables: dict[tuple[str, str], HeadTable] = {}
    with bar(total, f"measuring {subject.name}", show_progress) as advance:
        watching: dict[tuple[str, ...], list[CallProbe]] = {}
        for probe, fit in run:
            if isinstance(probe, CallProbe):
                watching.setdefault(tuple(stack.name for stack in fit), []).append(probe)
            else:
                for stack in fit:
                    tables[probe.name, stack.name] = probe.measure(subject, stack, material, advance)
        for names_of, group in watching.items():
            fit = [subject.layout.stacks[name] for name in names_of]
            found = observe_calls(group, subject, fit, material, advance)
            tables.update({(probe.name, name): table for (probe, name), table in found.items()})
    order = {probe.name: i for i, probe in enumerate(chosen)}
    tables = dict(sorted(tables.items(), key=lambda item: (order[item[0][0]], which.index(item[0][1]))))
    return Measurement(subject.main.name, tables, skipped)


def probe(name: str | Probe, model: Any = None, *, stack: str | None = None, needed_for: str = "", **options: Any) -> HeadTable:
    """The table of one probe for one stack (the main one unless named). `options` go to `measure`.

    Raises: UnsupportedModelError, with the reason, if the probe makes no sense for that stack.
    """
    subject = as_subject(model, options.pop("tokenizer", None))
    of = subject.layout.stack(stack).name
    measured = measure(subject, name, stacks=of, **options)
    for (skipped, _), reason in measured.skipped.items():
        what = f"{needed_for} needs the probe {skipped}, but" if needed_for else f"the probe {skipped} cannot be run on {of}:"
        raise UnsupportedModelError(f"{what} {reason}")
    return next(iter(measured.tables.values()))
