"""Features whose products are the first terms of exp: sum over l up to an order of (q . k)^l / l!."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, factorial, prod

import torch
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=64)
def _monomials(size: int, degree: int) -> tuple[list[list[int]], list[float]]:
    """The channels of each monomial of a degree, by factor; and 1 / sqrt(a! b! ...) of their powers a, b, ..."""
    found = list(combinations_with_replacement(range(size), degree))
    scales = [prod(factorial(each.count(channel)) for channel in set(each)) ** -0.5 for each in found]
    return [list(factor) for factor in zip(*found, strict=True)], scales


def taylor(x: Float[Tensor, "... d"], order: int, packed: bool = True) -> Float[Tensor, "... f"]:
    """Features of x: taylor(q) . taylor(k) is sum_(l <= order) (q . k)^l / l!.

    packed: each monomial once, `size_of(d, order)` of them; else all products x_a x_b ... / sqrt(l!), d^l of each degree.
    """
    features = [torch.ones_like(x[..., :1])]
    if not packed:
        for degree in range(1, order + 1):
            features.append((features[-1][..., :, None] * x[..., None, :]).flatten(-2) * degree**-0.5)
        return torch.cat(features, -1)
    for degree in range(1, order + 1):
        factors, terms = _placed(x.shape[-1], degree, x.device, x.dtype)
        for channels in factors:
            terms = terms * x[..., channels]
        features.append(terms)
    return torch.cat(features, -1)


@lru_cache(maxsize=32)
def _placed(size: int, degree: int, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """Channels of each factor and scales of all monomials, where they are used: nothing is sent there again."""
    factors, scales = _monomials(size, degree)
    with torch.inference_mode(False):  # they are kept for calls with gradients, too
        places = tuple(torch.tensor(channels, device=device) for channels in factors)
        return places, torch.tensor(scales, device=device, dtype=dtype)


def size_of(size: int, order: int, packed: bool = True) -> int:
    """How many features there are of so many channels."""
    return comb(size + order, order) if packed else sum(size**degree for degree in range(order + 1))
