"""AdamW as it is used here: decay of matrices only, a warm-up and a cosine, and a rate that may change inside a CUDA graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
DECAY = 0.1
CLIP = 1.0
WARM_UP = 0.1  # the share of all steps during which the rate rises
LEAST = 0.1  # of the highest rate, at the end


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """An optimizer of all parameters that are trained; on a GPU one that can be captured, with its rate as a tensor there."""
    named = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = named[0].device
    on_gpu = device.type == "cuda"
    groups = [
        {"params": [p for p in named if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    rate: float | Tensor = torch.tensor(lr, device=device) if on_gpu else lr
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=BETAS, capturable=on_gpu)


def rate_at(step: int, steps: int, lr: float) -> float:
    """The rate of a step, counted from 0, of so many."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return lr * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return lr * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
