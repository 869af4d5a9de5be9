"""Head statistics beside fused attention alone, folds over it, and eager weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import attend
from ..attention import statistics as gather
from ..attention.statistic import Distance, Entropy, KeyMass, MaxWeight, PositionMass, RecentMass, Statistic
from ..card import Card
from ..models.capture import capture
from ..models.subject import Subject
from ..stages.causal import Causal
from ._measure import Row, Table, collected, measured

CARD = Card(
    paper="FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    year=2022,
    room="bench",
    source="arXiv:2205.14135: tiles with an online softmax, here with statistics for accumulators; peers run in the same process",
)
WINDOW = 1024
FIVE: Mapping[str, Statistic] = {
    "max_weight": MaxWeight(),
    "entropy": Entropy(),
    "distance": Distance(),
    "sink": PositionMass(0, 4),
    "recent": RecentMass(WINDOW),
}
GPU_SHAPES = "bfloat16, 32 query and 8 key/value heads of size 128, causal; model: 32 such layers, width 4096, random weights"
CPU_SHAPES = "float32, 16 heads of size 64, causal"
EAGER_BYTES = 6 << 30  # of weights that the eager peer may hold on a CPU


def statistics(device: torch.device, *, quick: bool = False, report: Callable[[Row], None] = lambda row: None) -> Table:
    """One layer with and without its output, and on a GPU a whole model of 8 billion parameters, at several lengths.

    Args:
        quick: the shortest length only. report: is given each row when it is measured.
    """
    return collected("statistics", device, GPU_SHAPES if device.type == "cuda" else CPU_SHAPES, _rows(device, quick), report)


def _rows(device: torch.device, quick: bool) -> Iterator[Row]:
    if device.type == "cuda":
        for tokens in (8192,) if quick else (8192, 32768, 131072):
            yield from _layer_gpu(device, tokens)
        yield from _model(device, (2048,) if quick else (8192, 32768))
        return
    for tokens in (1024,) if quick else (2048, 4096, 8192):
        yield from _layer_cpu(device, tokens)


def _tensors(
    device: torch.device, heads: int, kv: int, tokens: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, size, device=device, dtype=dtype, generator=generator) for h in (heads, kv, kv))
    return q, k, v


def _eager(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The weights whole, as `attn_implementation="eager"` keeps them: softmax in float32, cast back."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores + torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, device=q.device, dtype=q.dtype).triu(1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    entropy = -torch.xlogy(weights, weights).sum(-1)
    return torch.matmul(weights, v), entropy


def _folds(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What fused calls alone can give: the output, P k for the mean score, and P place, P span; no maximum, no log-sum-exp."""
    place = torch.arange(k.shape[2], device=k.device)
    columns = [place // 256, place % 256, place < 4]
    table = torch.stack([column.to(k.dtype) for column in columns], -1).expand(*k.shape[:3], -1)
    padded = F.pad(table, (0, k.shape[3] - table.shape[-1]))
    return [F.scaled_dot_product_attention(q, k, x, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]) for x in (v, k, padded)]


def _layer_gpu(device: torch.device, tokens: int) -> Iterator[Row]:
    q, k, v = _tensors(device, 32, 8, tokens, 128, torch.bfloat16)

    def fused(kind: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    causal = Causal()
    base = measured("layer", "cuDNN attention alone", tokens, fused(SDPBackend.CUDNN_ATTENTION), device)
    yield base
    took = base.milliseconds
    yield measured("layer", "flash attention alone", tokens, fused(SDPBackend.FLASH_ATTENTION), device, base=took)
    yield measured(
        "layer",
        "output + 5 statistics",
        tokens,
        lambda: attend(q, k, v, causal, statistics=FIVE),
        device,
        base=took,
        goal={32768: 1.7, 131072: 1.6}.get(tokens),
    )
    yield measured(
        "layer",
        "5 statistics",
        tokens,
        lambda: gather(q, k, causal, want=FIVE),
        device,
        base=took,
        goal={32768: 0.75, 131072: 0.7}.get(tokens),
    )
    mass = {"key_mass": KeyMass(per="key_value_head")}
    yield measured("layer", "key mass of 8 key heads", tokens, lambda: gather(q, k, causal, want=mass), device, base=took)

    def folds() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _folds(q, k, v)

    note = "no maximum, no log-sum-exp; places in bfloat16"
    yield measured("layer", "peer: folds over cuDNN attention", tokens, folds, device, base=took, note=note)
    yield measured("layer", "peer: eager weights", tokens, lambda: _eager(q, k, v), device, base=took, note="entropy only")


def _layer_cpu(device: torch.device, tokens: int) -> Iterator[Row]:
    q, k, v = _tensors(device, 16, 16, tokens, 64, torch.float32)
    causal = Causal()
    base = measured(
        "layer",
        "fused attention alone",
        tokens,
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        device,
        seconds=3.0,
    )
    yield base
    took = base.milliseconds
    yield measured(
        "layer",
        "output + 5 statistics",
        tokens,
        lambda: attend(q, k, v, causal, statistics=FIVE),
        device,
        base=took,
        goal=1.8,
        seconds=3.0,
    )
    yield measured("layer", "5 statistics", tokens, lambda: gather(q, k, causal, want=FIVE), device, base=took, seconds=3.0)
    yield measured("layer", "key mass", tokens, lambda: gather(q, k, causal, want={"m": KeyMass()}), device, base=took, seconds=3.0)
    if 2 * q.shape[1] * tokens * tokens * 4 > EAGER_BYTES:
        yield Row("layer", "peer: eager weights", tokens, None, note=f"would hold {2 * q.shape[1] * tokens**2 * 4 / 2**30:.0f} GiB")
        return
    yield measured("layer", "peer: eager weights", tokens, lambda: _eager(q, k, v), device, base=took, note="entropy only")


def _model(device: torch.device, lengths: tuple[int, ...]) -> Iterator[Row]:
    """A decoder of 8 billion parameters' shape with random weights: a plain pass, and one with statistics of all heads."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=131072,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    subject = Subject(model, name="8B-shaped")
    with torch.no_grad():
        for tokens in lengths:
            ids = torch.randint(0, 32000, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(1))
            inputs = {"input_ids": ids}
            base = measured("model", "plain forward", tokens, partial(subject.run, inputs), device)
            yield base
            with_statistics = partial(capture, subject, FIVE, inputs=inputs, mean=True)
            yield measured(
                "model", "forward + 5 statistics of 1024 heads", tokens, with_statistics, device, base=base.milliseconds, goal=1.3
            )
            yield _output_attentions(model, inputs, tokens, device, base.milliseconds)


def _output_attentions(model: Any, inputs: Mapping[str, Tensor], tokens: int, device: torch.device, base: float | None) -> Row:
    model.set_attn_implementation("eager")
    try:
        return measured(
            "model",
            "peer: output_attentions=True",
            tokens,
            lambda: model(**inputs, output_attentions=True, use_cache=False, logits_to_keep=1),
            device,
            base=base,
        )
    finally:
        model.set_attn_implementation("sdpa")
