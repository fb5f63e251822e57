r"""Does which cells are missing depend on what was observed? Rank tests of a mask against values.

Where cells are missing completely at random, the rows that show column j and those of them that hide column i are a
random choice, so that ranks of j among the hidden are a sample without replacement. Its mean has, over all choices,

.. math:: E[T] = \bar s, \qquad Var[T] = \frac{n - n_i}{n_i (n - 1)} \overline{(s - \bar s)^2},

ties included, for scores s that are the ranks (Wilcoxon: is the hidden part higher?) or the squares of centred ranks
(Mood: is it further out?). Over all pairs and both scores the false alarms are bounded by Holm's procedure.

References:
    Little, *A test of missing completely at random for multivariate data with missing values*, JASA 1988.
    Mood, *On the asymptotic efficiency of certain nonparametric two-sample tests*, Ann. Math. Statist. 1954.
    Holm, *A simple sequentially rejective multiple test procedure*, Scand. J. Statist. 1979.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_FEWEST = 10  # rows on either side, for sums to be about normal


class Dependence(NamedTuple):
    """Column `hidden` goes missing by the value of column `on`; `p_value` is adjusted for the number of tests."""

    hidden: int
    on: int
    p_value: float


def dependences(values: Tensor, levels: tuple[int, ...], false_alarm: float = 0.01) -> list[Dependence]:
    """The pairs of columns of `values` (N, D), NaN where missing, that speak against missing completely at random.

    If cells are, then with probability 1 − `false_alarm` there is none. `levels[j]` is the number of levels of a
    categorical column, whose indicators are tested instead of ranks; 0 for others.
    """
    observed = ~values.isnan()
    scores, of = [], []
    for j, number in enumerate(levels):
        for column in _scores(values[:, j], number):
            scores.append(column)
            of.append(j)
    p_values = _p_values(torch.stack(scores, -1), observed[:, of], ~observed)
    p_values[of, torch.arange(len(of))] = math.nan
    hidden, score = (~p_values.isnan()).nonzero(as_tuple=True)
    found: dict[tuple[int, int], float] = {}
    adjusted = 0.0
    tested = p_values[hidden, score]
    order = tested.argsort()
    for place, k in enumerate(order.tolist()):
        adjusted = max(adjusted, min(1.0, float(tested[k]) * (len(order) - place)))
        if adjusted > false_alarm:
            break
        found.setdefault((int(hidden[k]), of[int(score[k])]), adjusted)
    return [Dependence(i, j, p) for (i, j), p in found.items()]


def _scores(column: Tensor, levels: int) -> list[Tensor]:
    """Centred scores (N,) of one column, zero where it is missing."""
    seen = ~column.isnan()
    cells = column[seen].double()
    if levels:
        raw = [(cells == level).double() for level in range(levels)]
    else:
        _, place, times = cells.unique(return_inverse=True, return_counts=True)
        rank = (times.cumsum(0) - 0.5 * (times - 1)).double()[place]
        centred = (rank - rank.mean()) / max(1, len(cells)) if len(cells) else rank
        raw = [centred, centred.square()]
    filled = []
    for score in raw:
        whole = torch.zeros(len(column), dtype=torch.float64)
        whole[seen] = score - score.mean() if len(score) else score
        filled.append(whole)
    return filled


def _p_values(scores: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
    """Two-sided (D, E) for columns hidden (N, D) by scores (N, E) that are centred where seen (N, E); NaN where rows
    are too few or the scores all alike."""
    sides = hidden.double()
    total, apart = sides.mT @ scores, sides.mT @ seen.double()
    number = seen.double().sum(0)
    rest = number - apart
    variance = apart * rest / (number * (number - 1)).clamp_min(1.0) * scores.square().sum(0)
    tested = (apart >= _FEWEST) & (rest >= _FEWEST) & (variance > 1e-12 * number)
    z = total.abs() / variance.clamp_min(1e-300).sqrt()
    return torch.where(tested, torch.special.erfc(z / math.sqrt(2)), math.nan)
