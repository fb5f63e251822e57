r"""Ranks, expected coverage and coverage around random points: is the truth as far out as the model says?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_invman.diagnostics.answers import Answers, answers
from pyro_invman.diagnostics.uniform import POINTS, distribution_function, simultaneous_band, uniformity
from pyro_invman.results import curve_dataset

if TYPE_CHECKING:
    import xarray as xr


def sbc(
    asked: Answers | Distribution, truth: Tensor | None = None, *, level: float = 0.95, seed: int = 0, **how: Any
) -> xr.Dataset:
    r"""Simulation-based calibration: ranks of truths among draws, target by target, as distribution functions.

    With draws :math:`t^{(s)} \sim q(t \mid g_n)` the level :math:`u_n = (\#\{t^{(s)} < t_n\} + v_n) / (S + 1)`, v
    uniform, is uniform for a right q. Curves above the diagonal at the left mean that truths lie lower than said;
    an S that leaves the band at both ends, that they lie further out (over-confidence) or nearer.

    Arguments:
        asked: what :func:`ask` or :func:`answers` gave; or a distribution, batch shape (N,), event shape (n,).
        truth: (N, n), with a distribution.
        level: that all of a curve is within its band, if the model is right.
        how: keywords of :func:`answers`, with a distribution.

    Returns:
        Over ("stratum", "target", "point"): `curve`, `lower`, `upper`; over ("stratum", "target"): `p_value`, `count`;
        over "stratum": `log_loss` and `log_loss_of_nothing` in nats, since a model that says nothing is calibrated too.

    Example::

        >>> d = torch.distributions.Normal(torch.zeros(400), 1.0)
        >>> float(sbc(d, d.sample()).p_value[0, 0]) > 0.01, float(sbc(d, 1.5 * d.sample()).p_value[0, 0]) < 0.01
        (True, True)

    References:
        Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*, 2018.
        Säilynoja, Bürkner & Vehtari, Statistics and Computing 2022 (the bands).
    """
    asked = asked_of(asked, truth, seed, how)
    return _curves("sbc", asked, asked.levels(seed), [v.name for v in asked.variables], level)


def coverage(
    asked: Answers | Distribution, truth: Tensor | None = None, *, level: float = 0.95, seed: int = 0, **how: Any
) -> xr.Dataset:
    r"""Expected coverage: how often the region of highest density with content c holds the truth, by the model's own
    density.

    .. math:: c_n = P_{t \sim q(\cdot \mid g_n)}\left(q(t \mid g_n) > q(t_n \mid g_n)\right),

    uniform for a right q; the curve at c is the share of questions with :math:`c_n \le c`. Below the diagonal the
    model is over-confident. One number for all targets together, whatever their dependence.

    Arguments and results are as in :func:`sbc`, without the dimension "target".

    Example::

        >>> d = torch.distributions.Normal(torch.zeros(400), 1.0)
        >>> float(coverage(d, 2.0 * d.sample()).curve.sel(point=0.9)[0]) < 0.8
        True

    References:
        Hermans et al., *A trust crisis in simulation-based inference?*, TMLR 2022.
        Deistler, Gonçalves & Macke, *Truncated proposals for scalable and hassle-free simulation-based inference*,
        NeurIPS 2022 (by highest density).
    """
    asked = asked_of(asked, truth, seed, how)
    return _curves("expected coverage", asked, asked.credibility(seed).unsqueeze(-1), None, level)


def tarp(
    asked: Answers | Distribution, truth: Tensor | None = None, *, level: float = 0.95, seed: int = 0, **how: Any
) -> xr.Dataset:
    r"""Tests of accuracy with random points: the share of draws nearer to a random point than the truth is.

    .. math:: f_n = \frac{1}{S} \#\{s : \|t^{(s)} - r_n\| < \|t_n - r_n\|\},

    uniform for a right q whatever the points r. They are drawn uniformly in the box of all draws, distances are in
    units of the draws' spread (of logarithms, for positive targets). Needs no density; a bias that is the same at
    every question may average out over the points, which the ranks of :func:`sbc` see.

    Arguments and results are as in :func:`coverage`.

    Example::

        >>> d = torch.distributions.Normal(torch.zeros(400), 1.0)
        >>> float(tarp(d, 2.0 * d.sample()).p_value[0]) < 0.01
        True

    References:
        Lemos et al., *Sampling-based accuracy testing of posterior estimators for general inference*, ICML 2023.
    """
    asked = asked_of(asked, truth, seed, how)
    true, draws = asked.working()
    flat = draws.flatten(0, 1)
    spread = torch.stack([_deviation(column) for column in flat.unbind(-1)])
    ends = torch.stack([_box(column) for column in flat.unbind(-1)], -1)
    uniform = torch.rand(true.shape, generator=torch.Generator().manual_seed(seed), dtype=true.dtype)
    points = ends[0] + (ends[1] - ends[0]) * uniform

    def distance(cells: Tensor) -> Tensor:
        return ((cells - points) / spread).square().nansum(-1)

    nearer, own = distance(draws), distance(true)
    digit = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=true.dtype)
    ties = (nearer == own).sum(0)
    levels = ((nearer < own).sum(0) + digit * (ties + 1)) / (len(draws) + 1)
    return _curves("TARP", asked, levels.unsqueeze(-1), None, level)


def _deviation(column: Tensor) -> Tensor:
    seen = column[~column.isnan()]
    spread = seen.std() if len(seen) > 1 else seen.new_tensor(1.0)
    return torch.where(spread > 0, spread, 1.0)


def _box(column: Tensor) -> Tensor:
    seen = column[~column.isnan()]
    return torch.stack([seen.min(), seen.max()])


def asked_of(asked: Answers | Distribution, truth: Tensor | None, seed: int, how: dict[str, Any]) -> Answers:
    """The answers, or what a distribution answers."""
    if isinstance(asked, Answers):
        if truth is not None or how:
            raise TypeError(f"truth, {', '.join(how)}: belong to a distribution; answers carry theirs")
        return asked
    if truth is None:
        raise TypeError("truth: found none, expected the answers to what the distribution was asked")
    return answers(asked, truth, seed=seed, **how)


def _curves(kind: str, asked: Answers, levels: Tensor, targets: list[str] | None, level: float) -> xr.Dataset:
    """Curves of levels (N, n) by stratum, with bands and p-values, beside the log losses."""
    strata = asked.strata()
    shape = (len(strata), levels.shape[-1])
    curve, lower, upper = (np.full((*shape, len(POINTS)), np.nan) for _ in range(3))
    p_value, count = np.ones(shape), np.zeros(shape, dtype=int)
    for s, which in enumerate(strata.values()):
        for j in range(shape[1]):
            column = levels[which, j]
            found = column[~column.isnan()].numpy()
            count[s, j] = len(found)
            if len(found):
                band = simultaneous_band(len(found), level)
                curve[s, j], lower[s, j], upper[s, j] = distribution_function(found), band.lower, band.upper
                p_value[s, j] = uniformity(found)
    losses = {
        "log_loss": [-float(asked.log_prob[which].mean()) for which in strata.values()],
        "log_loss_of_nothing": [-float(asked.nothing[which].mean()) for which in strata.values()],
    }
    tables = {"curve": curve, "lower": lower, "upper": upper, "p_value": p_value, "count": count}
    attrs = {"diagnostic": kind, "question": asked.name, "band_level": level, "draws": len(asked.draws)}
    return curve_dataset(list(strata), targets, POINTS, tables, losses, attrs)
