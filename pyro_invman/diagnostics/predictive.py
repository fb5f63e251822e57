"""Posterior predictive checks: do tables drawn from the answers look like the one that was measured?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_invman.diagnostics.answers import Answers
from pyro_invman.diagnostics.calibration import asked_of
from pyro_invman.results import check_dataset

if TYPE_CHECKING:
    import xarray as xr

Statistic = Callable[[Tensor], Tensor]


def _deviation(cells: Tensor) -> Tensor:
    return cells.std(-1, correction=0)


STATISTICS: Mapping[str, Statistic] = {
    "mean": lambda cells: cells.mean(-1),
    "standard deviation": _deviation,
    "least": lambda cells: cells.min(-1).values,
    "median": lambda cells: cells.median(-1).values,
    "greatest": lambda cells: cells.max(-1).values,
}
"""What is compared, unless told otherwise."""


def predictive_check(
    asked: Answers | Distribution,
    truth: Tensor | None = None,
    statistics: Mapping[str, Statistic] = STATISTICS,
    *,
    seed: int = 0,
    **how: Any,
) -> xr.Dataset:
    r"""Statistics of measured cells beside those of the same cells drawn from the answers.

    Each of the S draws of all N answers is a table that might have been measured; a statistic T of it has the p-value

    .. math:: p = 2 \min(\pi, 1 - \pi), \qquad \pi = (\#\{T(t^{(s)}) < T(t)\} + v) / (S + 1).

    Arguments:
        asked, truth, how: as in :func:`pyro_invman.diagnostics.sbc`.
        statistics: name to a function of cells (..., N) in natural units, none of them missing, which gives (...).

    Returns:
        Over ("stratum", "target", "statistic"): `measured`, `lower`, `median`, `upper` (90 % of the drawn tables) and
        `p_value`; NaN where fewer than two cells are measured.

    Example::

        >>> d = torch.distributions.Normal(torch.zeros(200), 1.0)
        >>> check = predictive_check(d, d.sample() + 2.0)
        >>> float(check.p_value.sel(stratum="all", statistic="mean")[0]) < 0.02
        True

    References:
        Gelman, Meng & Stern, *Posterior predictive assessment of model fitness via realized discrepancies*, 1996.
    """
    asked = asked_of(asked, truth, seed, how)
    strata = asked.strata()
    shape = (len(strata), len(asked.variables), len(statistics))
    found = {name: np.full(shape, np.nan) for name in ("measured", "lower", "median", "upper", "p_value")}
    generator = torch.Generator().manual_seed(seed)
    for s, which in enumerate(strata.values()):
        for j in range(shape[1]):
            cells = asked.truth[which, j]
            seen = ~cells.isnan()
            if int(seen.sum()) < 2:
                continue
            drawn = asked.draws[:, which, j][:, seen]
            for t, statistic in enumerate(statistics.values()):
                measured, tables = float(statistic(cells[seen])), statistic(drawn)
                digit = float(torch.rand((), generator=generator, dtype=torch.float64))
                ties = int((tables == measured).sum())
                level = (int((tables < measured).sum()) + digit * (ties + 1)) / (len(tables) + 1)
                quantiles = np.quantile(tables.numpy(), [0.05, 0.5, 0.95])
                values = (measured, *quantiles, 2 * min(level, 1 - level))
                for name, value in zip(found, values, strict=True):
                    found[name][s, j, t] = value
    attrs = {"diagnostic": "posterior predictive check", "question": asked.name, "draws": len(asked.draws)}
    return check_dataset(list(strata), asked.variables, list(statistics), found, attrs)
