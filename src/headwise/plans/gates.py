"""Training DuoAttention's gates: which key/value heads need the whole context, learned by distillation on passkeys.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv:2410.10819, sec. 2.2 and
2.3) and its authors' code. Where they disagree, the code: full attention is of the teacher's stream (of the student's, as in
the paper, with full="student"); both losses are means, for which the penalty 0.05 is meant; labels are on questions, passkeys
and what separates them. Ours: the mask is exact, not rounded to blocks; passkeys are common words asked for by a name; lengths,
passkeys, steps, sinks and window are scaled to short contexts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attention.stage import Stage
from ..errors import InputError, ModelLoadError, PlanError, UnsupportedModelError
from ..models.call import Call
from ..models.inputs import text_ids
from ..models.layout import Stack
from ..models.subject import NO_LANGUAGE_MODEL, Subject, as_subject
from ..progress import bar
from ..prompts import ADJECTIVES, NOUNS, STATEMENT, WORDS, draw_keys
from ..stages.sink import Sink
from ..stages.window import Window
from ..types import Heads, HeadTable

FORMAT = "headwise.gates 1"
EVERY = 10  # steps from one checkpoint to the next
LENGTHS, DEPTHS = 50, 1000  # how many different ones rows are drawn from
TIES = 1e-6  # noise on gates before the quantile is taken, as a share of the largest


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained. The defaults are for contexts of about a thousand tokens; the paper's are in parentheses.

    steps: of one optimizer (2000). length: tokens of the longest rows, at most the model's context (32,000). shortest: of the
    shortest ones, None for half of `length` (1000). rows: of a step (1). passkeys, words: in each row (10 of 32 words).
    sink, recent: what a streaming head reads (128 and 256). rate: the highest learning rate (0.02). penalty: on the mean gate
    (0.05). full: whose stream full attention is of, "teacher" as in the authors' code or "student" as in the paper.
    """

    steps: int = 120
    length: int = 1024
    shortest: int | None = None
    rows: int = 1
    passkeys: int = 8
    words: int = 5
    sink: int = 24
    recent: int = 96
    rate: float = 0.02
    penalty: float = 0.05
    full: str = "teacher"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "length", "rows", "passkeys", "words", "recent"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 at least")
        if self.passkeys > len(ADJECTIVES) * len(NOUNS):
            raise InputError(f"{self.passkeys} passkeys; there are names for {len(ADJECTIVES) * len(NOUNS)}")
        if self.shortest is not None and not 1 <= self.shortest <= self.length:
            raise InputError(f"shortest is {self.shortest}; it must be from 1 to length, {self.length}")
        if self.sink < 0 or self.seed < 0 or not self.rate > 0 or not self.penalty >= 0:
            raise InputError(f"sink {self.sink}, seed {self.seed}, rate {self.rate}, penalty {self.penalty}; none may be negative")
        if self.full not in ("teacher", "student"):
            raise InputError(f"full is {self.full!r}; it is 'teacher' (the authors' code) or 'student' (their paper)")

    @property
    def view(self) -> Stage:
        """What a streaming head reads."""
        return Window(self.recent) | Sink(self.sink)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a trapezoid, up in a fifth of the steps and down in the last fifth, never below a tenth."""
        fifth = max(1, self.steps // 5)
        return self.rate * min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))


def train_gates(
    model: Any = None,
    *,
    text: str | None = None,
    file: str | Path | None = None,
    show_progress: bool = True,
    **options: Any,
) -> HeadTable:
    """Trains a gate for every key/value head and returns them as the table `duo_gates`, in [0, 1] for each query head.

    A gate a mixes what its heads read, a * F + (1 - a) * S: the whole context or sinks and a window. All start at 1; the loss is
    the mean squared difference of final hidden states to the model's own, over the tokens of questions and passkeys, plus
    `penalty` times the mean gate. The model's weights are left alone. Repeatable: rows depend on seed and step only.

    Args:
        text: the haystack; None is the embedded held-out text.
        file: where the training stands is kept, every few steps and when it is interrupted; if the file is there, training goes
            on from it and ends as one that was never interrupted. Without it an interruption loses the gates.
        options: fields of `GateTraining`, such as steps=200.

    Memory grows with layers x length, since the student's pass is kept for its gradient.

    Raises: InputError for options or a file of another training; UnsupportedModelError for a model that can't be asked for
        passkeys; PlanError while a plan is applied to the model; ModelLoadError for a file that can't be read.
    """
    try:
        training = GateTraining(**options)
    except TypeError as error:
        raise InputError(f"{error}; train_gates takes {', '.join(GateTraining.__dataclass_fields__)}") from error
    subject = as_subject(model)
    if not subject.is_language_model:
        raise UnsupportedModelError(f"gates cannot be trained on {subject.name}: {NO_LANGUAGE_MODEL}")
    if subject.session.installed:
        raise PlanError(f"something is applied to {subject.name}; take it off, gates are of the model itself")
    longest = min(training.length, subject.max_length)
    training = replace(training, length=longest, shortest=min(training.shortest or longest // 2, longest))
    run = _Run(subject, training, None if file is None else Path(file))
    haystack = text_ids(subject, text)
    with bar(training.steps, f"training gates of {subject.name}", show_progress) as advance, _frozen(subject.model):
        advance(len(run.losses))
        try:
            while len(run.losses) < training.steps:
                run.step(*passkey_rows(subject, training, len(run.losses), haystack))
                advance(1)
                if len(run.losses) % EVERY == 0 or len(run.losses) == training.steps:
                    run.save()
        except KeyboardInterrupt:
            run.save()
            raise
    return run.table()


class _Run:
    """Gates, their optimizer, and the losses so far, one a step. kept: what whole steps came to, which is what is written."""

    def __init__(self, subject: Subject, training: GateTraining, file: Path | None) -> None:
        self.subject, self.training, self.file = subject, training, file
        self.stack = subject.main
        self.sizes = [site.key_value_heads for site in self.stack.sites]
        dtype = torch.promote_types(subject.model.dtype, torch.float32)
        self.gates = nn.Parameter(torch.ones(sum(self.sizes), dtype=dtype, device=subject.device))
        self.optimizer = torch.optim.AdamW([self.gates], lr=training.rate, weight_decay=0.0)
        self.losses: list[float] = []
        self.distillation: list[float] = []
        self.kept = self._state()
        if file is not None and file.is_file():
            self._load(file)

    def step(self, ids: Tensor, labels: Tensor) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate_at(len(self.losses))
        training = self.training
        with torch.enable_grad():
            distance = distillation_loss(self.subject, ids, labels, self.gates.split(self.sizes), training.view, full=training.full)
            loss = distance + training.penalty * self.gates.abs().mean()
            (self.gates.grad,) = torch.autograd.grad(loss, [self.gates])
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)
        self.distillation.append(float(distance.detach()))
        self.losses.append(float(loss.detach()))
        self.kept = self._state()

    def table(self) -> HeadTable:
        """Each query head's gate."""
        training = asdict(self.training)
        about = {**training, "losses": self.losses, "distillation": self.distillation}
        return spread(self.stack, [part.detach() for part in self.gates.split(self.sizes)], "duo_gates", "share", about)

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"model": self.subject.name, "heads": self.sizes, **asdict(self.training)}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.optimizer.state.get(self.gates, {})
        held = {"gates": self.gates.data, **{name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}}
        told = {"identity": self._identity(), "losses": [*self.losses], "distillation": [*self.distillation]}
        return {name: tensor.detach().cpu().clone() for name, tensor in held.items()}, told

    def save(self) -> None:
        """Writes what whole steps came to, all of it or nothing."""
        if self.file is None:
            return
        tensors, told = self.kept
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, str(beside), metadata={"format": FORMAT, "told": json.dumps(told)})
            beside.replace(self.file)
        finally:
            beside.unlink(missing_ok=True)

    def _load(self, file: Path) -> None:
        try:
            with safe_open(str(file), "pt") as opened:
                metadata = opened.metadata() or {}
                held = {name: opened.get_tensor(name).to(self.gates) for name in opened.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise ModelLoadError(f"{file} is not of the format {FORMAT!r}; remove it to begin again")
            told = json.loads(metadata["told"])
            there = told["identity"]
            other = [f"{k} {there.get(k)} there, {mine} here" for k, mine in self._identity().items() if there.get(k) != mine]
            if other:
                raise InputError(f"{file} is of another training: {'; '.join(other[:3])}; remove it, or give another file")
            self.losses, self.distillation = list(told["losses"]), list(told["distillation"])
            self.gates.data.copy_(held["gates"])
            if self.losses:
                step = torch.tensor(float(len(self.losses)))
                self.optimizer.state[self.gates] = {"step": step, **{n: held[n] for n in ("exp_avg", "exp_avg_sq")}}
            self.kept = self._state()
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError, RuntimeError) as error:
            if isinstance(error, ModelLoadError):
                raise
            raise ModelLoadError(f"{file} can't be read ({error}); remove it to begin again") from error


# ---- the two streams -------------------------------------------------------------------------------------------------


def distillation_loss(
    subject: Subject, ids: Tensor, labels: Tensor, gates: Sequence[Tensor], view: Stage, *, full: str = "teacher"
) -> Tensor:
    """Mean over labelled tokens of the mean squared difference of final hidden states, the model's own and under the gates.

    ids: (b, n). labels: (b, n) booleans. gates: (key/value heads,) of each layer. view: what streaming heads read.
    """
    theirs: dict[int, Tensor] = {}

    def keep(call: Call, out: Tensor) -> None:
        if call.site.stack == subject.main.name:
            theirs[call.site.layer] = out

    with torch.no_grad(), subject.tap(keep):
        wanted = final_states(subject, ids)
    mixed = mixed_states(subject, ids, gates, view, theirs if full == "teacher" else None)
    wide = torch.promote_types(mixed.dtype, torch.float32)
    return (wanted[labels].to(wide) - mixed[labels].to(wide)).square().mean()


def mixed_states(
    subject: Subject, ids: Tensor, gates: Sequence[Tensor], view: Stage, theirs: dict[int, Tensor] | None = None
) -> Tensor:
    """(b, n, c): final hidden states if every head reads gate * F + (1 - gate) * S.

    theirs: F of each layer, (b, n, h, d); None for what the heads themselves read of the whole context.
    """

    def mix(call: Call, out: Tensor) -> Tensor | None:
        if call.site.stack != subject.main.name:
            return None
        gate = gates[call.site.layer].to(out.device).repeat_interleave(call.site.groups)[:, None]
        (reading,) = call.readings
        streaming = replace(reading, stages=(*reading.stages, view)).run().transpose(1, 2)
        whole = out if theirs is None else theirs[call.site.layer]
        return (gate * whole + (1 - gate) * streaming).to(out.dtype)

    with subject.tap(mix):
        return final_states(subject, ids)


def final_states(subject: Subject, ids: Tensor) -> Tensor:
    """(b, n, c): hidden states after the last layer and its norm, from which logits are read.

    Raises: UnsupportedModelError if the model's base gives none.
    """
    found: list[Any] = []
    handle = subject.model.base_model.register_forward_hook(lambda _, __, out: found.append(out))
    try:
        subject.run({"input_ids": ids})
    finally:
        handle.remove()
    last = found[-1] if found else None
    states = last[0] if isinstance(last, tuple) else getattr(last, "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
        raise UnsupportedModelError(f"{type(subject.model.base_model).__name__} gives no last_hidden_state to distil from")
    return states


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradient of weights within the block."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
        for module, mode in modes:
            module.training = mode


# ---- passkeys --------------------------------------------------------------------------------------------------------


def passkey_rows(subject: Subject, training: GateTraining, step: int, haystack: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(rows, n) ids and labels: passkeys hidden in running text, all stated again at the end; labels are true there.

    Without a tokenizer a passkey is random ids, two of key and `words` of value.

    Raises: InputError if the rows have no room for their passkeys.
    """
    rng = np.random.default_rng((training.seed, step))
    shortest = training.length // 2 if training.shortest is None else training.shortest
    drawn = int(rng.choice(np.linspace(shortest, training.length, LENGTHS).astype(int)))
    facts_of = [_facts(subject, rng, training) for _ in range(training.rows)]
    needed = max(len(subject.begin) + len(facts) + 2 * sum(map(len, facts)) for facts in facts_of)
    length = max(drawn, needed)
    if length > training.length:
        raise InputError(
            f"rows of {training.length} tokens leave no room for {training.passkeys} passkeys of {training.words} words, which "
            f"need {needed}; give fewer or shorter ones, or longer rows"
        )
    ids, labels = np.empty((training.rows, length), dtype=np.int64), np.zeros((training.rows, length), dtype=bool)
    for row, facts in enumerate(facts_of):
        asked = [token for fact in facts for token in fact]
        room = length - len(subject.begin) - 2 * len(asked)
        straw = np.resize(np.asarray(haystack), room + len(haystack))[rng.integers(len(haystack)) :][:room].tolist()
        depths = np.linspace(0.05, 0.95, DEPTHS)[np.sort(rng.choice(DEPTHS, len(facts), replace=len(facts) > DEPTHS))]
        made, cursor = list(subject.begin), 0
        for fact, place in zip(facts, (depths * room).astype(int).tolist(), strict=True):
            made += straw[cursor:place] + fact
            cursor = place
        ids[row] = made + straw[cursor:] + asked
        labels[row, length - len(asked) :] = True
    return torch.from_numpy(ids).to(subject.device), torch.from_numpy(labels).to(subject.device)


def _facts(subject: Subject, rng: np.random.Generator, training: GateTraining) -> list[list[int]]:
    if subject.tokenizer is None:
        size = 2 + training.words
        return [rng.choice(subject.vocabulary, size=size).tolist() for _ in range(training.passkeys)]
    facts = []
    for key in draw_keys(rng, training.passkeys):
        value = "".join(f" {word}" for word in rng.choice(WORDS, size=training.words))
        facts.append(subject.encode_raw(STATEMENT.format(key=key, value=value)))
    return facts


# ---- from gates to heads ---------------------------------------------------------------------------------------------


def spread(stack: Stack, gates: Sequence[Tensor], name: str, unit: str, about: dict[str, Any]) -> HeadTable:
    """A table of query heads from (key/value heads,) numbers of each layer; NaN where a layer has fewer heads."""
    values = torch.full(stack.shape, torch.nan, dtype=torch.float64)
    for site, own in zip(stack.sites, gates, strict=True):
        values[site.layer, : site.heads] = own.double().cpu().repeat_interleave(site.groups)
    return HeadTable(values, name, stack.name, unit, about)


def above_quantile(table: HeadTable, stack: Stack, sparsity: float, seed: int = 0) -> Heads:
    """The heads that keep everything when a share `sparsity` of all key/value heads, the lowest over all layers, does not.

    A key/value head counts by the largest value of its query heads. Ties are broken by seeded noise of a millionth.

    Raises: InputError for a share outside 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is {sparsity}; it is the share of heads that stream, from 0 to 1")
    own = [table.values[site.layer, : site.heads].view(site.key_value_heads, site.groups) for site in stack.sites]
    values = torch.cat([part.nan_to_num(nan=-math.inf).amax(-1) for part in own])
    finite = values[values.isfinite()]
    size = float(finite.abs().max()) if len(finite) and finite.abs().max() > 0 else 1.0
    values = values.clamp(-4 * size, 4 * size)  # so that a quantile of heads without a value is a number
    noise = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = values + TIES * size * noise
    full = values >= (math.inf if sparsity == 1 else values.quantile(sparsity))
    sizes = [site.key_value_heads for site in stack.sites]
    return spread(stack, [part.double() for part in full.split(sizes)], table.name, "", {}) > 0.5
