r"""Whether numbers are uniform on [0, 1]: bands that the whole empirical distribution stays in, and a p-value."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr
from torch import Tensor

_SIMULATIONS = 9_999
_ROUNDING = 1e-9  # tail probabilities of discrete counts that are equal differ by so much
POINTS = np.arange(1, 100) / 100
"""Where distribution functions are looked at."""


class Band(NamedTuple):
    """At `points` (P,) in (0, 1), the least and greatest value (P,) of an empirical distribution function."""

    points: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def simultaneous_band(number: int, level: float = 0.95) -> Band:
    r"""Band that holds all of the empirical distribution function of `number` uniform draws, with probability `level`.

    At a point z the count of draws below z is binomial, so each point gets the central interval of Binomial(N, z) with
    the same tail probability γ/2, and γ is such that all points hold at once. γ is found from 9,999 simulations, which
    are the same at every call.

    Raises:
        ValueError: no draw, or a level outside (0, 1).

    Example::

        >>> band = simultaneous_band(50)
        >>> bool((band.lower < band.points).all() and (band.upper > band.points).all())
        True

    References:
        Säilynoja, Bürkner & Vehtari, *Graphical test for discrete uniformity and its applications in goodness-of-fit
        evaluation and multiple sample comparison*, Statistics and Computing 2022.
    """
    if number < 1 or not 0 < level < 1:
        raise ValueError(f"number, level: found {number} and {level:g}, expected at least 1 and a share in (0, 1)")
    table, tails = _null(number)
    tail = np.quantile(tails, 1 - level, method="lower")
    inside = table >= tail * (1 - _ROUNDING)  # (P, N + 1), a run of counts at each point
    least = inside.argmax(-1)
    most = number - inside[:, ::-1].argmax(-1)
    return Band(POINTS, least / number, most / number)


def uniformity(levels: Tensor | np.ndarray) -> float:
    """p-value that numbers (N,) in [0, 1] are independent uniform draws, by the same statistic as the band's: the
    smallest tail probability that the empirical distribution function reaches anywhere. 1 where there are none."""
    found = np.asarray(levels, dtype=float)
    if not len(found):
        return 1.0
    table, tails = _null(len(found))
    reached = table[np.arange(len(POINTS)), _counts(found)].min()
    return float((1 + np.count_nonzero(tails <= reached * (1 + _ROUNDING))) / (1 + len(tails)))


def distribution_function(levels: Tensor | np.ndarray) -> np.ndarray:
    """Share of numbers (N,) that is at most each of `POINTS`."""
    found = np.asarray(levels, dtype=float)
    return _counts(found) / max(1, len(found))


def _counts(found: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(found), POINTS, side="right")


@lru_cache(maxsize=256)
def _null(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The two-sided tail probability of each count there (P, N + 1), and the least that simulated draws
    reach (R,)."""
    counts = np.arange(number + 1)
    below = bdtr(counts, number, POINTS[:, None])
    above = 1 - np.pad(below, ((0, 0), (1, 0)))[:, :-1]
    table = 2 * np.minimum(below, above)
    shares = np.full(len(POINTS) + 1, 1 / (len(POINTS) + 1))
    simulated = np.random.default_rng(0).multinomial(number, shares, size=_SIMULATIONS).cumsum(-1)[:, :-1]
    return table, table[np.arange(len(POINTS)), simulated].min(-1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (m,) adjusted for their number: to reject those below α errs once or more with probability at most α.

    References:
        Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of Statistics 1979.
    """
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(scaled)
    adjusted[order] = np.maximum.accumulate(np.minimum(scaled, 1.0))
    return adjusted
