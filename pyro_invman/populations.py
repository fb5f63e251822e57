"""Points and conditions of populations as they come in: checked, and warned of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

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
    x, c = _parts(table, name, ("points", "conditions"), like)
    if not x.numel():
        raise DataError(f"{name}: 0 rows, expected at least {_LEAST_ROWS}; a population must have been measured")
    check_finite(x, dim, f"{name} points")
    check_finite(c, context_dim, f"{name} conditions")
    if x.dim() != 2 or c.dim() != 2 or len(x) != len(c):
        raise DataError(
            f"{name}: points of shape {tuple(x.shape)} and conditions of shape {tuple(c.shape)}, expected "
            f"(N, {dim}) and (N, {context_dim})"
        )
    if len(x) < _LEAST_ROWS:
        raise DataError(f"{name}: {len(x)} rows, expected at least {_LEAST_ROWS} to learn a law from; measure more")
    return x, c


def checked_pairs(
    pairs: tuple[Tensor, Tensor, Tensor], dim: int, context_dim: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points before and after (P, D) and conditions (P, K), in the precision of `like`.

    Raises:
        DataError: no pair, other shapes, or a value that is not finite.
    """
    x0, x1, c = _parts(pairs, "pairs", ("before", "after", "conditions"), like)
    if not x0.numel():
        raise DataError("pairs: 0 of them, expected at least 1; leave `pairs` out where none is known")
    for part, size, name in ((x0, dim, "before"), (x1, dim, "after"), (c, context_dim, "conditions")):
        check_finite(part, size, f"pairs, {name}")
        if part.dim() != 2 or len(part) != len(x0):
            raise DataError(
                f"pairs, {name}: shape {tuple(part.shape)}, expected ({len(x0)}, {size}), one row for each pair"
            )
    return x0, x1, c


def _parts(table: Sequence[Tensor], name: str, parts: Sequence[str], like: Tensor) -> list[Tensor]:
    if not isinstance(table, (tuple, list)) or len(table) != len(parts):
        found = f"{len(table)} parts" if isinstance(table, (tuple, list)) else type(table).__name__
        raise DataError(f"{name}: found {found}, expected a tuple ({', '.join(parts)})")
    return [torch.as_tensor(part).to(like) for part in table]


def check_finite(values: Tensor, dim: int, name: str) -> None:
    """That values (..., D) have D = `dim` and are finite.

    Raises:
        DataError: they do not, or are not.
    """
    if values.dim() == 0 or values.shape[-1] != dim:
        raise DataError(
            f"{name}: shape {tuple(values.shape)}, expected {dim} in the last dimension, which the map was made for"
        )
    bad = ~values.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{name} at {where}: found {values[where].item()}, expected a finite number; leave out what was not "
            "measured"
        )


def warn_if_small(source: int, target: int) -> None:
    """Of one population with more than 20 times fewer rows than the other."""
    if max(source, target) > _MUCH_SMALLER * min(source, target):
        warnings.warn(
            f"source: {source} rows, target: {target}; the map is no better known than the law of the smaller, of "
            "which to measure more",
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
        f"both populations were seen; that is {beyond[where] / scale[k]:.2g} of its standard deviations. The map is a "
        "guess there: ask within, or measure there",
        UnfamiliarCondition,
        stacklevel=4,
    )
