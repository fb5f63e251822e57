r"""Which cells of a linear-Gaussian process are gross errors: closed forms, iterated with the belief."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invman.density.normal_rows import HALF_LOG_2PI, NormalRows

_MOST = 1 - 1e-4  # probability beyond which a cell weighs no less


class GrossErrors(NamedTuple):
    """With probability `chance` (M,) a cell is a draw of a broad normal, `centre` and `scale` (M,), instead."""

    chance: Tensor
    centre: Tensor
    scale: Tensor

    def log_prob(self, answers: Tensor) -> Tensor:
        """Log-density (N, M) of cells (N, M) that are gross errors."""
        return _log_normal(answers, self.centre, self.scale.square())


def outlier_probabilities(
    rows: NormalRows,
    answers: Tensor,
    seen: Tensor,
    task: Tensor,
    before: tuple[Tensor, Tensor],
    errors: GrossErrors,
    rounds: int = 12,
) -> Tensor:
    r"""Probability (N, M) that each cell is a gross error, 0 where it is not `seen`.

    A cell j that is an outlier with probability :math:`w_j` is heard with the variance
    :math:`C_{jj} w_j / (1 - w_j)` added to its own. With V the covariance of all cells of a task so weighted, latent
    integrated out, leaving the cell itself out gives it the normal

    .. math:: y_j - (V^{-1} r)_j / (V^{-1})_{jj}, \qquad 1 / (V^{-1})_{jj} - C_{jj} w_j / (1 - w_j),

    and Bayes' rule against the broad law gives :math:`w_j` anew. Of two starts, one that trusts every cell and one that
    trusts none but on its own, each task keeps the fixed point whose outliers, taken for sure, explain its cells best:
    a task far from the others is not a task of outliers.

    Arguments:
        answers, seen: cells (N, M), read where `seen`.
        task: which of the T tasks each row is of (N,).
        before: precision (T, L, L) and precision times mean (T, L) of the latents.
        errors: how often cells are gross errors, and where these lie.
        rounds: of the iteration, at most.

    References:
        Little, *Robust estimation of the mean and covariance matrix from data with missing values*, JRSS C 1988.
        Tipping & Lawrence, *Variational inference for Student-t models: robust Bayesian interpolation*, 2005.
    """
    residual = torch.where(seen, answers - rows.mean, 0.0)
    odds = torch.where(seen, errors.chance.logit() + errors.log_prob(answers), -math.inf)
    prior = torch.cholesky_inverse(torch.linalg.cholesky(before[0]))
    expected = (prior @ before[1].unsqueeze(-1))[task]
    alone = rows.covariance.diagonal(dim1=-2, dim2=-1) + ((rows.directions @ prior[task]) * rows.directions).sum(-1)
    off = residual - (rows.directions @ expected).squeeze(-1)
    starts = [torch.zeros_like(residual), torch.sigmoid(odds - _log_normal(off, 0.0, alone))]
    found, scores = [], []
    for weight in starts:
        for _ in range(rounds):
            mean, variance = _left_out(rows, residual, seen, task, before, weight)
            last, weight = weight, torch.sigmoid(odds - _log_normal(residual, mean, variance))
            if bool(((weight - last).abs() < 1e-4).all()):
                break
        found.append(weight)
        outlier = weight > 0.5
        apart = torch.where(outlier, errors.chance.log() + errors.log_prob(answers), errors.chance.neg().log1p())
        clean = rows.log_evidence(torch.where(outlier, 0.0, residual), seen & ~outlier, task, before)
        scores.append(clean.index_add(0, task, torch.where(seen, apart, 0.0).sum(-1)))
    suspicious = (scores[1] > scores[0])[task].unsqueeze(-1)
    return torch.where(suspicious, found[1], found[0])


def _log_normal(value: Tensor, mean: Tensor | float, variance: Tensor) -> Tensor:
    return -0.5 * (value - mean).square() / variance - 0.5 * variance.log() - HALF_LOG_2PI


def _left_out(
    rows: NormalRows, residual: Tensor, seen: Tensor, task: Tensor, before: tuple[Tensor, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance (N, M) of the residual of each cell, were it clean, given all others of its task."""
    own = rows.covariance.diagonal(dim1=-2, dim2=-1)
    weight = weight.clamp_max(_MOST)
    extra = own * weight / (1 - weight)
    softened = rows._replace(covariance=rows.covariance + torch.diag_embed(extra))
    inverse, _, precision, shift = softened.weighed(residual, seen, task, before)
    factor = torch.linalg.cholesky(precision)
    latent = torch.cholesky_solve(shift.unsqueeze(-1), factor)[task]
    weighted = torch.linalg.solve_triangular(factor[task], (inverse @ rows.directions).mT, upper=False)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1) - weighted.square().sum(-2)
    diagonal = torch.where(seen, diagonal, 1.0)
    pulled = (inverse @ (residual.unsqueeze(-1) - rows.directions @ latent)).squeeze(-1)
    return residual - pulled / diagonal, (1 / diagonal - extra).maximum(1e-6 * own)
