r"""What batches of estimates from below and above say of a number, with how much error."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def limits(found: list[tuple[Tensor, Tensor, Tensor]], num: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One-sided 97.5 % limits (C,), the middle of the two sides, its standard error, over batches of `num` draws."""
    low, high = (torch.stack([f[k] for f in found]).double() for k in (0, 1))
    quantile = _student(len(found) - 1)
    root = math.sqrt(len(found))
    lower = low.mean(0) - quantile * low.std(0) / root
    upper = high.mean(0) + quantile * high.std(0) / root + _unseen(len(found) * num)
    middle = (low + high) / 2
    return lower, upper, middle.mean(0), middle.std(0) / root


def _unseen(draws: float) -> float:
    """What outcomes too rare for so many draws may tell: a set of latents of probability p is missed by all with chance
    exp(−p n), 2.5 % at p = log 40 / n, and to learn whether they are of it is worth the entropy of that."""
    p = min(math.log(40) / draws, 0.5)
    return p * (1 - math.log(p))


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's law, by bisection of its distribution function (regularised by quadrature)."""
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64) * math.pi / 2
    density = x.cos().pow(freedom - 1)  # t = sqrt(ν) tan x
    reached = torch.cumulative_trapezoid(density, x)
    reached = 0.5 + 0.5 * reached / reached[-1]
    index = int((reached < 0.975).sum())
    return math.sqrt(freedom) * math.tan(float(x[index + 1]))
