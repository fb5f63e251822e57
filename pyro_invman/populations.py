"""Points and conditions of populations as they come in: checked, and warned of."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyro_invman.variables import DataError

_LEAST_ROWS = 10
_MUCH_SMALLER = 20


class UnfamiliarCondition(UserWarning):
    """A condition lies outside those that both populations were seen at."""


class SmallPopulation(UserWarning):
    """One population has many times fewer rows than the other."""


def checked_table(
    table: tuple[Tensor, Tensor], name: str, dim: int, context_dim: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Points (N, D) and conditions (N, K) of the population `name`, in the precision of `like`.

    Raises:
        DataError: too few rows, other shapes, or a value that is not finite.
    """
    x, c = (torch.as_tensor(part).to(like) for part in table)
    check_finite(x, dim, f"{name} points")
    check_finite(c, context_dim, f"{name} conditions")
    if x.dim() != 2 or c.dim() != 2 or len(x) != len(c):
        raise DataError(
            f"{name}: points of shape {tuple(x.shape)} and conditions of shape {tuple(c.shape)}, expected "
            f"(N, {dim}) and (N, {context_dim})"
        )
    if len(x) < _LEAST_ROWS:
        raise DataError(f"{name}: {len(x)} rows, expected at least {_LEAST_ROWS}")
    return x, c


def checked_pairs(
    pairs: tuple[Tensor, Tensor, Tensor], dim: int, context_dim: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points before and after (P, D) and conditions (P, K), in the precision of `like`.

    Raises:
        DataError: no pair, other shapes, or a value that is not finite.
    """
    x0, x1, c = (torch.as_tensor(part).to(like) for part in pairs)
    for part, size, name in ((x0, dim, "before"), (x1, dim, "after"), (c, context_dim, "conditions")):
        check_finite(part, size, f"pairs, {name}")
        if part.dim() != 2 or len(part) != len(x0) or not len(part):
            raise DataError(f"pairs, {name}: shape {tuple(part.shape)}, expected ({len(x0) or 'P'}, {size})")
    return x0, x1, c


def check_finite(values: Tensor, dim: int, name: str) -> None:
    """That values (..., D) have D = `dim` and are finite.

    Raises:
        DataError: they do not, or are not.
    """
    if values.dim() == 0 or values.shape[-1] != dim:
        raise DataError(f"{name}: shape {tuple(values.shape)}, expected {dim} in the last dimension")
    bad = ~values.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise DataError(f"{name} at {where}: found {values[where].item()}, expected a finite number")


def warn_if_small(source: int, target: int) -> None:
    """Of one population with more than 20 times fewer rows than the other."""
    if max(source, target) > _MUCH_SMALLER * min(source, target):
        warnings.warn(
            f"source: {source} rows, target: {target}; the map is no better known than the law of the smaller",
            SmallPopulation,
            stacklevel=3,
        )


def warn_if_unfamiliar(c: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> None:
    """Of conditions (..., K) outside those from `low` to `high` (K,), with how far in units of `scale` (K,)."""
    beyond = (low - c).maximum(c - high).clamp_min(0)
    if not bool((beyond > 1e-6 * scale).any()):
        return
    where = tuple((beyond / scale == (beyond / scale).max()).nonzero()[0].tolist())
    k = where[-1]
    warnings.warn(
        f"condition {k} at {where[:-1]}: {c[where]:g} lies {beyond[where]:g} outside [{low[k]:g}, {high[k]:g}], where "
        f"both populations were seen; that is {beyond[where] / scale[k]:.2g} of its standard deviations",
        UnfamiliarCondition,
        stacklevel=4,
    )
