"""Training one model on one problem: batches from seeds, a curve, checkpoints that a later call goes on from."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import HeadwiseError, InputError
from ..models.subject import check_device
from ..nn import LanguageModel
from ..progress import bar
from . import checkpoint
from .captured import Step, step_for, told
from .optimizer import adamw, rate_at, set_rate
from .problems import IGNORE, Batch, Problem, Tally
from .sizing import cannot

ROUND = 1 << 20  # batches that one seed may have
SEEDS = (1 << 12) - 1  # for generators on the CPU look at 32 bits only: further seeds would make the batches of others
HELD_OUT_SEED = SEEDS * ROUND  # of the rows that all models are judged by: the only ones above all of training's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How a model is trained and judged.

    steps: how many. batch: rows of each. lr: the highest rate. seed: of the batches. rows: held-out rows that it is judged by.
    points: how often, at equal distances; a checkpoint is written each time. device, dtype: dtype is what products are
    computed in, float32 or bfloat16; None for bfloat16 on a GPU, float32 elsewhere. capture: whether steps are recorded as a
    CUDA graph where that can be.
    """

    steps: int = 600
    batch: int = 32
    lr: float = 3e-3
    seed: int = 0
    rows: int = 256
    points: int = 20
    device: str = "cpu"
    dtype: str | None = None
    capture: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rows", "points"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 at least")
        if not 0 <= self.seed < SEEDS or max(self.steps, self.rows) > ROUND:
            raise InputError(
                f"seed {self.seed}, {self.steps} steps and {self.rows} held-out rows; seeds must be below {SEEDS:,}, the others "
                f"{ROUND:,} at most"
            )
        if not self.lr > 0:
            raise InputError(f"lr is {self.lr}; it must be above 0")
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")

    @property
    def every(self) -> int:
        """Steps from one point of the curve to the next."""
        return max(1, self.steps // self.points)

    def autocast(self, device: torch.device) -> torch.dtype | None:
        """What products are computed in; None for float32."""
        name = self.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        return None if name == "float32" else DTYPES[name]


@dataclass(frozen=True)
class Trained:
    """What came out. curve: at each point the step, the mean loss since the last one, and the metrics on held-out rows.

    metrics: those at the end. seconds: of training alone. tokens_per_second: without the first point's steps, where there are
    more. peak_bytes: the most that was allocated on a GPU, None elsewhere. captured, why: whether steps were recorded as a
    CUDA graph, and if not, why.
    """

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    captured: bool
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass
class _Run:
    """Where a run stands: what a checkpoint tells besides tensors."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    timed_tokens: int = 0
    timed_seconds: float = 0.0


def train(
    model: LanguageModel,
    problem: Problem,
    settings: Settings | None = None,
    *,
    file: str | Path | None = None,
    minutes: float | None = None,
    show_progress: bool = True,
    advance: Advance | None = None,
) -> Trained:
    """Trains a model in place.

    The same settings and the same model give the same batches and, on one device, the same numbers: with a checkpoint a run
    that was interrupted and goes on ends bit for bit as one that was not.

    Args:
        file: where checkpoints go; if one is there, training goes on from it. minutes: sets the steps to what fits into so much
            time, measured by a few steps of a copy; a run that goes on keeps its steps. advance: is told of each step done,
            instead of a bar.

    Raises: InputError where sizes do not fit. DeviceError for a device that is not there. ModelLoadError for a checkpoint of
        another model; InputError for one of other settings.
    """
    settings = settings or Settings()
    device = check_device(settings.device)
    if problem.vocabulary > model.vocabulary:
        raise InputError(f"the problem {problem.name} has {problem.vocabulary} tokens, the model {model.vocabulary}")
    with _left_alone(device):
        torch.manual_seed(settings.seed)
        model.to(device)
        if minutes is not None:
            begun = file is not None and Path(file).is_file()
            steps = checkpoint.peek(Path(str(file)))["identity"]["steps"] if begun else steps_in(minutes, model, problem, settings)
            settings = replace(settings, steps=steps)
        with nullcontext(advance) if advance else bar(settings.steps, f"{problem.name}", show_progress) as shown:
            return _train(model, problem, settings, device, None if file is None else Path(file), shown)


def _train(
    model: LanguageModel, problem: Problem, settings: Settings, device: torch.device, file: Path | None, advance: Advance
) -> Trained:
    run, optimizer = _Run(), adamw(model, settings.lr)
    identity = {**problem.to_dict(), **{k: v for k, v in asdict(settings).items() if k != "capture"}}
    if file is not None and file.is_file():
        run = _resumed(file, model, optimizer, identity)
        advance(run.step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = step_for(model, optimizer, settings.autocast(device), settings.capture)
    generator = torch.Generator(device)
    while run.step < settings.steps:
        count = min(settings.every - run.step % settings.every, settings.steps - run.step)
        loss, seconds = _steps(step, optimizer, problem, settings, run.step, count, generator, advance)
        run.step += count
        run.seconds += seconds
        if run.curve or run.step == settings.steps:
            run.timed_seconds += seconds
            run.timed_tokens += count * settings.batch * problem.context
        run.curve.append({"step": run.step, "train_loss": loss, **judge(model, problem, settings)})
        if file is not None:
            checkpoint.save(file, model, optimizer, {"identity": identity, "run": asdict(run)})
    model.eval()
    final = {name: value for name, value in run.curve[-1].items() if name not in ("step", "train_loss")}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Trained(final, run.curve, run.seconds, run.timed_tokens / max(run.timed_seconds, 1e-9), peak, *told(step))


def _steps(
    step: Step, optimizer: torch.optim.Optimizer, problem: Problem, settings: Settings, first: int, count: int,
    generator: torch.Generator, advance: Advance,
) -> tuple[float, float]:  # fmt: skip
    """Some steps: their mean loss, and the seconds they took."""
    device = generator.device
    total = torch.zeros((), device=device, dtype=torch.float64)
    began = _now(device)
    for number in range(first, first + count):
        set_rate(optimizer, rate_at(number, settings.steps, settings.lr))
        total += step(batch_of(problem, settings.batch, settings.seed, number, generator))
        advance(1)
    return float(total) / count, _now(device) - began


def batch_of(problem: Problem, rows: int, seed: int, number: int, generator: torch.Generator) -> Batch:
    """The number-th batch of a seed: the same whatever was drawn before."""
    return problem.batch(rows, generator.manual_seed(seed * ROUND + number), generator.device)


@torch.no_grad()
def judge(model: LanguageModel, problem: Problem, settings: Settings) -> dict[str, float]:
    """The problem's metrics on held-out rows, the same for every model and seed."""
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    trained, autocast = model.training, settings.autocast(device)
    model.eval()
    sums: list[torch.Tensor] = []
    with _left_alone(device):
        for start in range(0, settings.rows, settings.batch):
            rows = min(settings.batch, settings.rows - start)
            batch = problem.heldout(rows, generator.manual_seed(HELD_OUT_SEED + start), device)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = model(batch.ids)
            sums.append(_counted(logits.float(), batch))
    model.train(trained)
    nats, right, asked, whole = torch.stack(sums).sum(0).tolist()
    return problem.metrics(Tally(nats, int(right), int(asked), int(whole), settings.rows))


def _counted(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Summed loss, right answers, answers, rows without a mistake."""
    there = batch.targets != IGNORE
    hits = (logits.argmax(-1) == batch.targets) & there
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return torch.stack([nats.double(), hits.sum(), there.sum(), (hits | ~there).all(1).sum()])


def steps_in(minutes: float, model: LanguageModel, problem: Problem, settings: Settings, *, warm: int = 6, timed: int = 10) -> int:
    """How many steps fit into some minutes, by a few steps of a copy of the model."""
    if not minutes > 0:
        raise InputError(f"{minutes:g} minutes; give more than 0")
    device = check_device(settings.device)
    with _left_alone(device):
        twin = copy.deepcopy(model).to(device)
        optimizer = adamw(twin, settings.lr)
        step, generator = step_for(twin, optimizer, settings.autocast(device), settings.capture), torch.Generator(device)
        _steps(step, optimizer, problem, settings, 0, warm, generator, lambda _: None)
        _, seconds = _steps(step, optimizer, problem, settings, 0, timed, generator, lambda _: None)
        began = _now(device)
        judge(twin, problem, settings)
        judged = settings.points * (_now(device) - began)
    left = minutes * 60 - judged
    return min(ROUND, max(settings.points, int(left / (seconds / timed))))


def _resumed(file: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> _Run:
    there = checkpoint.peek(file)["identity"]
    other = [f"{name} {there.get(name)} there, {value} here" for name, value in identity.items() if there.get(name) != value]
    if other:
        raise InputError(f"{file} is of another run: {'; '.join(other[:3])}; remove it, or give another file")
    return _Run(**checkpoint.load(file, model, optimizer)["run"])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _left_alone(device: torch.device) -> Iterator[None]:
    """The caller's random states and current GPU are as before afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []), torch.cuda.device(device) if on_gpu else nullcontext():
        yield


def kv_bytes(model: LanguageModel, tokens: int) -> float:
    """Bytes that its caches hold for each token of a prompt of so many, counted; float32.

    Raises: InputError if it keeps none that can be read on from.
    """
    why = cannot(model, "decode")
    if why:
        raise InputError(f"it can't decode: {why}")
    caches = model.new_caches()
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.long, device=device), caches=caches)
    except HeadwiseError as error:
        raise InputError(f"it can't read a prompt of {tokens} tokens: {error}") from error
    return caches.nbytes / tokens
