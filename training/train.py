"""Trains an embedded model of headwise: a small Llama-shaped decoder, on one GPU in a few minutes.

    python training/corpus.py download --into build/archives
    python training/corpus.py build --archives build/archives --out build/corpus
    python training/train.py --corpus build/corpus --out build/tiny --minutes 7.5
    python training/train.py --corpus build/corpus --out build/tiny-gqa --minutes 7.5 --key-value-heads 2

Writes a Hugging Face folder (config.json, model.safetensors in bfloat16, tokenizer) and figures.json. The number of
steps is set after a warm-up from the minutes given, and recorded; `--steps` repeats a run of that many steps.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from rows import RowMaker

SYNTHETIC = 0.16  # share of rows


class Attention(nn.Module):
    """Named and shaped as transformers' LlamaAttention, so that the weights load there unchanged."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        if keep is not None:
            out = out * keep[:, :, None, None]
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.self_attn = Attention(width, heads, kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = Mlp(width, inner)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: dict, length: int) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(
            Layer(width, config["intermediate_size"], heads, config["num_key_value_heads"])
            for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        size = width // heads
        rates = config["rope_parameters"]["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(length), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(self.layers)) if deep else 0.02)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if keep is None else keep[index])
        return F.linear(self.norm(x), self.embed_tokens.weight)


def loss_of(model: nn.Module, ids: Tensor, weights: Tensor, keep: Tensor | None) -> Tensor:
    logits = model(ids, keep)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


class SyntheticRows(torch.utils.data.IterableDataset):
    def __init__(self, stream: np.ndarray, tokenizer: str, length: int, rows: int, seed: int) -> None:
        self.stream, self.tokenizer, self.length, self.rows, self.seed = stream, tokenizer, length, rows, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        seed = self.seed * 1000 + (worker.id if worker else 0)
        maker = RowMaker(self.stream, Tokenizer.from_str(self.tokenizer), self.length, seed)
        while True:
            made = [maker.row() for _ in range(self.rows)]
            yield torch.from_numpy(np.stack([m[0] for m in made])), torch.from_numpy(np.stack([m[1] for m in made]))


def read_stream(corpus: Path, name: str) -> np.ndarray:
    packed = corpus / f"{name}.bin.xz"
    if packed.exists():
        return np.frombuffer(lzma.decompress(packed.read_bytes()), dtype=np.uint16).copy()
    return np.fromfile(corpus / f"{name}.bin", dtype=np.uint16)


@torch.no_grad()
def heldout_loss(model: nn.Module, stream: np.ndarray, length: int, device: str, rows: int = 256) -> float:
    count = min(rows, len(stream) // (length - 1))
    ids = torch.from_numpy(stream[: count * (length - 1)].astype(np.int64)).view(count, length - 1).to(device)
    ids = torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)
    losses = []
    for part in ids.split(16):
        with torch.autocast(device, torch.bfloat16):
            logits = model(part)[:, :-1]
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten()).item() * len(part))
    return sum(losses) / count


def save(model: Decoder, config: dict, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": w.detach().to(torch.bfloat16).cpu().contiguous() for n, w in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
        "pad_token": "<|pad|>", "model_max_length": config["max_position_embeddings"], "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = options.device
    tokenizer = Tokenizer.from_file(str(options.corpus / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": options.key_value_heads, "head_dim": 32, "hidden_act": "silu",
        "max_position_embeddings": options.context, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    stream = read_stream(options.corpus, "train")
    heldout = read_stream(options.corpus, "heldout")
    text = torch.from_numpy(stream.astype(np.int32)).to(device)
    synthetic_rows = max(1, round(options.rows * SYNTHETIC))
    data = SyntheticRows(stream, tokenizer.to_str(), options.length, synthetic_rows, options.seed)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        num_workers=options.workers,
        pin_memory=device == "cuda",
        prefetch_factor=8 if options.workers else None,
    )
    synthetic = iter(loader)

    model = Decoder(config, options.length).to(device)
    run = torch.compile(model) if options.compile else model
    decayed = [w for w in model.parameters() if w.dim() == 2]
    others = [w for w in model.parameters() if w.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=options.rate, betas=(0.9, 0.95), fused=device == "cuda",
    )  # fmt: skip
    window = torch.arange(options.length - 1, device=device)
    text_rows = options.rows - synthetic_rows
    steps, warmup, calibration = options.steps or 10**9, 100, 60
    losses: list[float] = []
    started = mark = time.time()
    step = 0
    while step < steps:
        starts = torch.randint(len(text) - options.length, (text_rows, 1), device=device)
        ids = torch.cat([torch.zeros(text_rows, 1, device=device, dtype=torch.long), text[starts + window].long()], 1)
        made, counts = next(synthetic)
        ids = torch.cat([ids, made.to(device, non_blocking=True)])
        weights = torch.cat([torch.ones(text_rows, options.length, device=device), counts.to(device, non_blocking=True)])
        keep = None
        if options.head_dropout:
            shape = (config["num_hidden_layers"], options.rows, config["num_attention_heads"])
            keep = (torch.rand(shape, device=device) >= options.head_dropout).to(torch.bfloat16)
        progress = step / steps
        factor = min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * max(factor, 1e-3)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(run, ids, weights, keep)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if options.steps is None and step == calibration:
            mark = time.time()
        if options.steps is None and step == 2 * calibration:  # the pace is known: fix the number of steps
            loss.item()
            now = time.time()
            pace = (now - mark) / calibration
            steps = step + max(1, int((options.minutes * 60 - (now - started)) / pace))
            print(
                f"{pace * 1e3:.1f} ms a step, {options.rows * options.length / pace / 1e6:.2f} M tokens/s, {steps} steps",
                flush=True,
            )
        if step % 200 == 0 or step == steps:
            losses.append(loss.item())
            print(f"step {step} loss {losses[-1]:.4f} after {time.time() - started:.0f} s", flush=True)
            if step % 1000 == 0:
                save(model, config, tokenizer, options.out)
    save(model, config, tokenizer, options.out)
    figures = {
        "steps": steps, "rows": options.rows, "length": options.length, "context": options.context,
        "tokens": steps * options.rows * options.length, "seconds": round(time.time() - started, 1),
        "seed": options.seed, "rate": options.rate, "head_dropout": options.head_dropout,
        "synthetic_share": synthetic_rows / options.rows, "parameters": sum(w.numel() for w in model.parameters()),
        "heldout_loss": heldout_loss(model, heldout, options.context, device), "losses": losses,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
    }  # fmt: skip
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print({k: v for k, v in figures.items() if k != "losses"}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5, help="wall-clock budget; sets the number of steps")
    parser.add_argument("--steps", type=int, help="train exactly this many steps")
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--head-dropout", type=float, default=0.06, help="share of heads silenced in each row")
    parser.add_argument("--rows", type=int, default=56)
    parser.add_argument(
        "--length",
        type=int,
        default=2304,
        help="tokens of a training row: more than the context, so that its longest distances are not rare",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens that the model is released for")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())
