"""What sharing heads, keys, weights and matrices costs the embedded model without training, beside the bytes that it frees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..card import Card
from ..mechanisms import Mixer
from ..mechanisms.heads.chai import Chai
from ..mechanisms.heads.gqa import pool
from ..mechanisms.heads.moh import Moh
from ..models.inputs import text_rows
from ..models.subject import open_model
from ..nn import Transformer, from_transformers
from ..nn.architectures import masa, mlkv, shared_attention
from ._measure import Row, Table, collected

CARD = Card(
    paper="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    year=2023,
    room="heads",
    source=(
        "arXiv:2305.13245, sec. 2.1, and the conversions of MoH, CHAI, MLKV, SharedAttention and MASA, each from its own card; "
        "loss on held-out text right after the conversion, where papers go on training"
    ),
)
SHAPES = "the embedded model tiny (8 layers x 8 heads), loss a token of held-out text in rows of 512"


def conversions(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """Loss, KV bytes of a token and parameters of the embedded model after each conversion; quick: on fewer rows."""
    return collected("conversions", device, SHAPES, _rows(device, 4 if quick else 24), report)


def _rows(device: torch.device, rows: int) -> Iterator[Row]:
    subject = open_model(device=device)
    plain = from_transformers(subject.model)
    ids, seen = text_rows(subject, None, 2 * rows, 512).to(device).chunk(2)  # judged on, and fitted to
    base = None
    for what, model in _models(plain, seen):
        loss, kept = _loss(model, ids), _kept(model, ids[:1, :256])
        base = base or (loss, kept)
        note = f"loss {loss:.3f} ({loss - base[0]:+.3f}), {kept:,.0f} KV bytes a token ({kept / base[1]:.0%})"
        yield Row("conversion", what, ids.shape[1], None, note=f"{note}, {model.parameter_count:,} parameters")


def _models(plain: Transformer, seen: Tensor) -> Iterator[tuple[str, Transformer]]:
    yield "as it was trained", plain
    heads = 8
    for kv_heads in (4, 2, 1):
        yield f"GQA: {kv_heads} key/value heads, means", plain.changed(_each(lambda mixer, n=kv_heads: pool(mixer, n)))
    for shared, active in ((4, 2), (4, 0)):
        told = f"MoH: {shared} heads and {active} of {heads - shared} by token"
        yield told, plain.changed(_each(lambda mixer, s=shared, a=active: Moh.of(mixer, s, a)))
    for clusters in (7, 6, 4):
        yield f"CHAI: {clusters} clusters of heads", plain.changed(_each(lambda mixer, n=clusters: Chai.of(mixer, n)))
    late = plain.changed(lambda block, mixer: Chai.of(mixer, 6) if block >= 4 else mixer)  # type: ignore[arg-type]
    yield "CHAI: 6 clusters in the last four layers", late
    for owners in (6, 4):
        yield f"MLKV: {owners} of 8 layers have keys and values", mlkv.merge(plain, owners, heads)
    for followers in ([4], [7], [6, 7]):
        told = ", ".join(f"L{layer}" for layer in followers)
        yield f"SharedAttention: {told} by weights of the layer before", shared_attention.share(plain, followers)
    for atoms in (6, 4):
        yield f"MASA: {atoms} matrices for 8 layers", masa.fit(plain, atoms)
    yield "MASA: 4, and a rest of rank 32 each", masa.fit(plain, 4, rank=32)
    yield "MASA: 4, and a rest of rank 32 fitted to inputs", masa.fit(plain, 4, rank=32, ids=seen)


def _each(change: Callable[..., Mixer]) -> Callable[[int, Mixer], Mixer]:
    return lambda _block, mixer: change(mixer)


@torch.no_grad()
def _loss(model: Transformer, ids: Tensor) -> float:
    parts = [F.cross_entropy(model(part)[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten()) for part in ids.split(4)]
    return float(torch.stack(parts).mean())


@torch.no_grad()
def _kept(model: Transformer, ids: Tensor) -> float:
    caches = model.new_caches()
    model(ids, caches=caches)
    return caches.nbytes / ids.shape[1]
