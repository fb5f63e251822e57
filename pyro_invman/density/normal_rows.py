r"""Observations of rows as normals given their settings and their task's latent."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Weighed(NamedTuple):
    """What rows say: inverse covariances (N, M, M) given the latent of the cells that were heard, log determinants (N,)
    of the covariances, and precision (T, L, L) and precision times mean (T, L) of the latents afterwards."""

    inverse: Tensor
    log_det: Tensor
    precision: Tensor
    shift: Tensor


class NormalRows(NamedTuple):
    """M observations of each of N rows, :math:`N(m + U z, C)`: `mean` (N, M), `directions` (N, M, L), `covariance`
    (N, M, M)."""

    mean: Tensor
    directions: Tensor
    covariance: Tensor

    def through(self, bias: Tensor, gain: Tensor, noise: Tensor) -> NormalRows:
        """The rows as an instrument shows them, bias + gain · observation + noise of its own, each (N, M)."""
        turned = gain.unsqueeze(-1) * gain.unsqueeze(-2) * self.covariance
        return NormalRows(
            bias + gain * self.mean,
            gain.unsqueeze(-1) * self.directions,
            turned + torch.diag_embed(noise.square()),
        )

    def weighed(self, residual: Tensor, heard: Tensor, task: Tensor, before: tuple[Tensor, Tensor]) -> Weighed:
        """What residuals (N, M) from the mean say, where `heard`, of latents of tasks (N,) with precision (T, L, L) and
        precision times mean (T, L) `before`."""
        both = heard.unsqueeze(-1) & heard.unsqueeze(-2)
        eye = torch.eye(heard.shape[-1], dtype=residual.dtype, device=residual.device)
        factor = torch.linalg.cholesky(torch.where(both, self.covariance, eye))
        inverse = torch.where(both, torch.cholesky_inverse(factor), 0.0)
        weighted = inverse @ self.directions
        precision = before[0].index_add(0, task, self.directions.mT @ weighted)
        shift = before[1].index_add(0, task, (weighted.mT @ residual.unsqueeze(-1)).squeeze(-1))
        return Weighed(inverse, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), precision, shift)

    def log_evidence(self, residual: Tensor, heard: Tensor, task: Tensor, before: tuple[Tensor, Tensor]) -> Tensor:
        """Log-density (T,) of the residuals (N, M) that are `heard`, latents integrated out."""
        found = self.weighed(residual, heard, task, before)
        alone = -0.5 * ((found.inverse @ residual.unsqueeze(-1)).squeeze(-1) * residual).sum(-1) - 0.5 * found.log_det
        alone = alone - HALF_LOG_2PI * heard.sum(-1)
        after, prior = (_log_normaliser(*part) for part in ((found.precision, found.shift), before))
        return (after - prior).index_add(0, task, alone)


def _log_normaliser(precision: Tensor, shift: Tensor) -> Tensor:
    """log ∫ exp(h·z − ½ z·Λ z) dz, but for a constant."""
    factor = torch.linalg.cholesky(precision)
    white = torch.linalg.solve_triangular(factor, shift.unsqueeze(-1), upper=False).squeeze(-1)
    return 0.5 * white.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
