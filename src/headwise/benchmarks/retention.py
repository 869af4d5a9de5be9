"""What heads keep and what the embedded model still finds: needle recall against the bytes of the cache, by method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..card import Card
from ..models.cache import cache_argument, cache_of
from ..models.subject import Subject, open_model
from ..plans import Plan
from ..plans.recipes.ada_kv import ada_kv
from ..plans.recipes.duo import duo
from ..plans.recipes.expected_attention import expected_attention
from ..plans.recipes.h2o import h2o
from ..plans.recipes.key_norm import key_norm
from ..plans.recipes.pyramid_kv import pyramid_kv
from ..plans.recipes.snap_kv import snap_kv
from ..plans.recipes.streaming import streaming
from ..plans.recipes.task_kv import task_kv
from ..plans.recipes.tova import tova
from ..probes import probe
from ..tasks.continuation import Continuation
from ..tasks.kv_bytes import KvBytes
from ..tasks.needle import Needle
from ..types import Heads, HeadTable
from ._measure import Row, Table, collected

CARD = Card(
    paper="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    room="bench",
    source=(
        "arXiv:2410.10819, sec. 3.2, draws needle recall against the share of the cache; here on the embedded model, its cache "
        "measured after the prompt, with the question at the prompt's end, and after it, which heads then don't know of"
    ),
)
SHAPES = "the embedded model tiny (8 layers x 8 heads), prompts of 2048 tokens: a needle among three like it, ten depths"
LENGTH = 2048
SHARES = (0.1, 0.2, 0.35)
SINK, RECENT = 16, 112  # of streaming heads beside heads that keep everything
Make = Callable[[Subject, float], Plan]


def _duo(table: HeadTable) -> Make:
    """The heads with the largest gates keep everything, so many that the budget is met; the others stream."""

    def make(subject: Subject, share: float) -> Plan:
        most = subject.main.exists().count()
        count = max(0, round((share * LENGTH - SINK - RECENT) / (LENGTH - SINK - RECENT) * most))
        best = table.values.nan_to_num(-torch.inf).flatten().topk(count).indices
        chosen = torch.zeros(table.values.numel(), dtype=torch.bool)
        chosen[best] = True
        heads = Heads(chosen.view(table.values.shape), table.stack)
        return duo(subject, heads, sink=SINK, recent=RECENT, show_progress=False)

    return make


def _streaming(subject: Subject, share: float) -> Plan:
    return streaming(subject, sink=SINK, recent=round(share * LENGTH) - SINK, show_progress=False)


def _recipe(recipe: Callable[..., Plan], **options: Any) -> Make:
    return lambda subject, share: recipe(subject, budget=share, show_progress=False, **options)


def methods(subject: Subject) -> dict[str, Make]:
    """Each method's name, and what makes its plan for a share of the cache."""
    return {
        "streaming": _streaming,
        "key_norm": _recipe(key_norm),
        "h2o": _recipe(h2o),
        "tova": _recipe(tova),
        "snap_kv": _recipe(snap_kv),
        "snap_kv, pooled over 31": _recipe(snap_kv, kernel=31),
        "pyramid_kv": _recipe(pyramid_kv),
        "ada_kv, pooled over 31": _recipe(ada_kv, kernel=31),
        "expected_attention": _recipe(expected_attention),
        "task_kv": _recipe(task_kv),
        "duo": _duo(probe("duo_gate", subject, show_progress=False)),
    }


@torch.no_grad()
def asked_later(subject: Subject, task: Needle) -> float:
    """Recall if the question comes in a call of its own, after the context was read and heads had to choose without it."""
    hits, prompts, name = 0, task.prompts(subject, None), str(cache_argument(subject.model))
    for prompt in prompts:
        line = subject.tokenizer.decode(prompt.input_ids[-64:]).rsplit("\n", 1)[-1]  # type: ignore[union-attr]
        asked = len(prompt.input_ids) - len(subject.encode_raw(line))
        ids = torch.tensor([prompt.input_ids], device=subject.device)
        cache = {name: cache_of(subject.model(input_ids=ids[:, :asked], use_cache=True, logits_to_keep=1))}
        logits = subject.model(input_ids=ids[:, asked:], **cache).logits[0, -1]
        for place, token in enumerate(prompt.answer):
            if int(logits.argmax()) != token:
                break
            hits += place + 1 == len(prompt.answer)
            logits = subject.model(input_ids=ids.new_tensor([[token]]), **cache).logits[0, -1]
    return hits / len(prompts)


def retention(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """Needle recall, loss and bytes of the embedded model's cache under each method; quick: two depths."""
    return collected("retention", device, SHAPES, _rows(device, quick), report)


def _rows(device: torch.device, quick: bool) -> Iterator[Row]:
    subject = open_model(device=device)
    tasks = (
        Needle(depths=(0.2, 0.8), length=LENGTH) if quick else Needle(length=LENGTH),
        Continuation(rows=1 if quick else 4, length=LENGTH), KvBytes(length=LENGTH),
    )  # fmt: skip

    def row(what: str, share: float, base: float | None) -> Row:
        found: dict[str, Any] = {}
        for task in tasks:
            found |= task.run(subject, None, lambda _: None)
        size, later = float(found["kv_bytes"]), asked_later(subject, tasks[0])
        figures = {"needle": found["needle"], "later": later, "loss": found["continuation_loss"], "bytes": size, "share": share}
        told = f"needle {found['needle']:.2f}, asked later {later:.2f}, loss {found['continuation_loss']:.3f}"
        told = f"{told}, {size / 2**20:.2f} MiB"
        return Row("retention", what, LENGTH, None, note=told if base is None else f"{told} ({size / base:.0%})", figures=figures)

    whole = row("full cache", 1.0, None)
    yield whole
    assert whole.figures is not None
    for name, make in methods(subject).items():
        for share in SHARES[1:2] if quick else SHARES:
            with make(subject, share)(subject):
                yield row(f"{name} {share:g}", share, whole.figures["bytes"])


def plot(table: Table, file: Path) -> Path:
    """Writes an SVG: needle recall, and loss after the prompt, against the bytes of the cache, a curve for each method."""
    from ..training.plot import COLOURS, GREY, MARKERS, STYLES, saved

    curves: dict[str, list[dict[str, float]]] = {}
    for row in table.rows:
        curves.setdefault(row.what.rsplit(" ", 1)[0], []).append(dict(row.figures or {}))
    (whole,) = curves.pop("full")

    def draw(figures: Any) -> Any:
        figure = figures.Figure(figsize=(13.0, 4.2), layout="constrained")
        for axes, metric, title in zip(
            figure.subplots(1, 3), ("needle", "later", "loss"),
            ("needle recall, asked in the prompt", "asked after it", "loss after the prompt, nats a token"), strict=True,
        ):  # fmt: skip
            for number, (name, points) in enumerate(curves.items()):
                points.sort(key=lambda point: point["bytes"])
                look = {
                    "color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
                    "marker": MARKERS[number % len(MARKERS)], "markersize": 4, "linewidth": 2.2 if name == "duo" else 1.3,
                }  # fmt: skip
                axes.plot([p["bytes"] / 2**20 for p in points], [p[metric] for p in points], label=name, **look)
            axes.axhline(whole[metric], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"full cache, {whole['bytes'] / 2**20:.1f} MiB", (1, whole[metric]), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", color=GREY, fontsize=8,
            )  # fmt: skip
            axes.set_xlabel("MiB of keys and values after 2048 tokens")
            axes.set_title(title)
        figure.axes[0].legend(frameon=False, fontsize=8)
        return figure

    return saved(draw, "What heads keep, and what the embedded model still finds", file)
