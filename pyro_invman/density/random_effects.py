r"""A linear-Gaussian process with a latent per task, fitted to incomplete rows; everything in it is a closed form.

It is the base under the manifold: what is linear in settings and task is exact before any network is trained.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_invman.density.gaussian import distinct, most_entropic


class Measurements(NamedTuple):
    """What rows measure of their task's latent, with unit noise: directions U (..., M, L), residuals r (..., M), the
    logarithm of what they were divided by (...) and how many there are (...)."""

    directions: Tensor
    residuals: Tensor
    log_scale: Tensor
    number: Tensor

    def posterior(self, task: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Precision (T, L, L) and precision times mean (T, L) of the latents of tasks, from rows (N,) of tasks (N,)."""
        prior = torch.eye(self.directions.shape[-1], dtype=self.directions.dtype, device=self.directions.device)
        precision = prior.repeat(num_tasks, 1, 1).index_add(0, task, self.directions.mT @ self.directions)
        shift = prior.new_zeros(num_tasks, len(prior))
        return precision, shift.index_add(0, task, (self.directions * self.residuals.unsqueeze(-1)).sum(-2))

    def log_evidence(self, task: Tensor, num_tasks: int) -> Tensor:
        """Log-density (T,) of the observations of tasks given their settings, latents integrated out."""
        precision, shift = self.posterior(task, num_tasks)
        factor = torch.linalg.cholesky(precision)
        white = torch.linalg.solve_triangular(factor, shift.unsqueeze(-1), upper=False).squeeze(-1)
        alone = -0.5 * self.residuals.square().sum(-1) - self.log_scale - self.number * 0.5 * math.log(2 * math.pi)
        together = 0.5 * white.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return together.index_add(0, task, alone)


class RandomEffects(nn.Module):
    r"""Rows :math:`v_n = \mu + W z + e_n` with :math:`e_n \sim N(0, \Sigma)` and one :math:`z \sim N(0, I_L)` a task.

    Loadings of settings are zero: a setting is no draw from the process, so it says nothing about the task. With
    :math:`K` the known cells of a row, :math:`R R^T = \Sigma_{KK}` (settings first) and

    .. math:: U = R^{-1} W_K, \qquad r = R^{-1} (v_K - \mu_K),

    the row is as many measurements :math:`r = U z + N(0, I)` as it has observations, so rows add :math:`U^T U` to the
    precision of z and :math:`U^T r` to precision times mean.

    Arguments:
        settings: which of the E cells of a row are settings.
        latent_dim: L.
        ridge: smallest residual variance, in units of each cell's variance.

    References:
        Laird & Ware, *Random-effects models for longitudinal data*, Biometrics 1982.
    """

    mean: Tensor
    loading: Tensor
    covariance: Tensor
    order: Tensor

    def __init__(self, settings: list[bool], latent_dim: int, ridge: float = 1e-4) -> None:
        super().__init__()
        self.ridge, self.latent_dim = ridge, latent_dim
        self.num_settings = sum(settings)
        order = sorted(range(len(settings)), key=lambda e: not settings[e])
        cells = len(settings)
        self.register_buffer("order", torch.tensor(order, dtype=torch.long), persistent=False)
        self.register_buffer("mean", torch.zeros(cells, dtype=torch.float64))
        self.register_buffer("loading", torch.zeros(cells, latent_dim, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(cells, dtype=torch.float64))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision."""
        super()._apply(fn, recurse)
        for name in ("mean", "loading", "covariance"):
            setattr(self, name, getattr(self, name).double())
        return self

    @property
    def num_observations(self) -> int:
        """M, the cells that are not settings."""
        return len(self.mean) - self.num_settings

    def joint(self) -> tuple[Tensor, Tensor]:
        """Mean (E + L,) and covariance of a row and its task's latent together."""
        mean = torch.cat([self.mean, self.mean.new_zeros(self.latent_dim)])
        prior = torch.eye(self.latent_dim, dtype=torch.float64, device=self.mean.device)
        above = torch.cat([self.covariance + self.loading @ self.loading.mT, self.loading], -1)
        return mean, torch.cat([above, torch.cat([self.loading.mT, prior], -1)], 0)

    def measurements(self, values: Tensor, known: Tensor) -> Measurements:
        """What rows (..., E) measure of the latent, zero where nothing was measured."""
        seen = known[..., self.order]
        covariance = self.covariance[self.order][:, self.order]
        patterns, of_row = distinct(seen)
        both = patterns.unsqueeze(-1) & patterns.unsqueeze(-2)
        eye = torch.eye(len(self.order), dtype=torch.float64, device=values.device)
        factor = torch.linalg.cholesky(torch.where(both, covariance, eye))[of_row]
        residual = torch.where(seen, values[..., self.order].to(self.mean) - self.mean[self.order], 0.0)
        loading = torch.where(seen.unsqueeze(-1), self.loading[self.order], 0.0).expand(*residual.shape, -1)
        sides = torch.cat([loading, residual.unsqueeze(-1)], -1)
        white = torch.linalg.solve_triangular(factor, sides, upper=False)[..., self.num_settings :, :]
        size = factor.diagonal(dim1=-2, dim2=-1)[..., self.num_settings :].log().sum(-1)
        number = seen[..., self.num_settings :].sum(-1)
        return Measurements(white[..., :-1], white[..., -1], size.expand(residual.shape[:-1]), number)

    def posterior(self, values: Tensor, task: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
        """Precision (T, L, L) and precision times mean (T, L) of the latents of tasks, from rows (N, E) with NaN."""
        return self.measurements(values.nan_to_num(0.0), ~values.isnan()).posterior(task, num_tasks)

    @torch.no_grad()
    def fit(
        self,
        values: Tensor,
        task: Tensor,
        believed: tuple[Tensor, Tensor] | None = None,
        max_iterations: int = 300,
        tolerance: float = 1e-5,
    ) -> None:
        """Maximum likelihood by expectation–maximisation over hidden cells and latents together.

        Arguments:
            values: rows (N, E) with NaN where a cell was not observed.
            task: which task each row is of (N,), from 0.
            believed: precision (T, L, L) and precision times mean (T, L) of the latents, where another model knows
                them; they then stay as they are.
        """
        values = values.to(self.mean)
        known, filled = ~values.isnan(), values.nan_to_num(0.0)
        count = known.sum(0).clamp_min(1)
        self.mean.copy_(filled.sum(0) / count)
        variance = ((filled - self.mean).square() * known).sum(0) / count
        variance = variance.clamp_min(1e-6)
        self.covariance.copy_(torch.diag(variance))
        self._start(values, task, variance)
        patterns, pattern_of = known.unique(dim=0, return_inverse=True)
        tasks, floor = int(task.max()) + 1, self.ridge * variance
        last = self._estimates()
        for _ in range(max_iterations):
            precision, shift = self.posterior(values, task, tasks) if believed is None else believed
            spread = torch.cholesky_inverse(torch.linalg.cholesky(precision))
            latent = (spread @ shift.unsqueeze(-1)).squeeze(-1)
            self._maximise(self._moments(filled, known, patterns, pattern_of, task, latent, spread), floor)
            now = self._estimates()
            change, last = (now - last).abs().max(), now
            if change < tolerance:
                break
        if believed is None:
            self._turn()

    @torch.no_grad()
    def separate(self, linked: Tensor) -> None:
        """Makes pairs of cells that are not `linked` (E, E) independent given the others and the latent, which the
        likelihood of rows that show no such pair together cannot tell."""
        self.covariance.copy_(most_entropic(self.covariance, linked))

    def _estimates(self) -> Tensor:
        between = self.loading @ self.loading.mT
        return torch.cat([self.mean, between.flatten(), self.covariance.flatten()])

    def _start(self, values: Tensor, task: Tensor, variance: Tensor) -> None:
        """Loadings from the principal directions of the tasks' mean observations."""
        scores = ((values - self.mean) / variance.sqrt())[:, self.order[self.num_settings :]]
        known = ~scores.isnan()
        tasks = int(task.max()) + 1
        total = scores.new_zeros(tasks, scores.shape[1]).index_add(0, task, scores.nan_to_num(0.0))
        number = scores.new_zeros(tasks, scores.shape[1]).index_add(0, task, known.to(scores))
        _, size, directions = torch.linalg.svd(total / number.clamp_min(1.0), full_matrices=False)
        shares = 0.5 * directions * (size / max(tasks, 1) ** 0.5).clamp(0.05, 1.0).unsqueeze(-1)
        start = scores.new_zeros(scores.shape[1], self.latent_dim)
        rank = min(self.latent_dim, len(shares))
        start[:, :rank] = shares[:rank].mT
        loading = torch.zeros_like(self.loading)
        loading[self.order[self.num_settings :]] = start * variance[self.order[self.num_settings :]].sqrt().unsqueeze(
            -1
        )
        self.loading.copy_(loading)

    def _moments(
        self,
        filled: Tensor,
        known: Tensor,
        patterns: Tensor,
        pattern_of: Tensor,
        task: Tensor,
        latent: Tensor,
        spread: Tensor,
    ) -> Tensor:
        """Second moments (E + L + 1, E + L + 1), over rows, of the completed row, its latent and one."""
        both = patterns.unsqueeze(-1) & patterns.unsqueeze(-2)
        eye = torch.eye(len(self.mean), dtype=torch.float64, device=filled.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.where(both, self.covariance, eye)))
        gain = self.covariance @ torch.where(both, inverse, 0.0)  # (P, E, E)
        hidden = (~patterns).to(filled)
        left = (self.covariance - gain @ self.covariance) * hidden.unsqueeze(-1) * hidden.unsqueeze(-2)
        times = torch.bincount(pattern_of, minlength=len(patterns)).to(filled)
        offset = torch.where(known, filled - self.mean, 0.0)
        row = self.mean + torch.einsum("nij,nj->ni", gain[pattern_of], offset)
        slope = (self.loading - gain @ (self.loading * patterns.unsqueeze(-1)))[pattern_of]  # (N, E, L)
        row, slope = torch.where(known, filled, row), torch.where(known.unsqueeze(-1), 0.0, slope)
        z, v = latent[task], spread[task]
        row = row + (slope @ z.unsqueeze(-1)).squeeze(-1)
        mean = torch.cat([row, z, torch.ones_like(z[:, :1])], -1)
        moments = mean.mT @ mean
        cells, dim = len(self.mean), self.latent_dim
        moments[:cells, :cells] += (slope @ v @ slope.mT).sum(0) + (left * times[:, None, None]).sum(0)
        across = (slope @ v).sum(0)
        moments[:cells, cells : cells + dim] += across
        moments[cells : cells + dim, :cells] += across.mT
        moments[cells : cells + dim, cells : cells + dim] += v.sum(0)
        return moments / len(filled)

    def _maximise(self, moments: Tensor, floor: Tensor) -> None:
        """Settings by their moments, observations by their regression on settings, latents and one."""
        cells = len(self.mean)
        settings, observations = self.order[: self.num_settings], self.order[self.num_settings :]
        mean = moments[:cells, -1].clone()
        inputs = torch.cat([settings, torch.arange(cells, len(moments), device=moments.device)])
        among = moments[inputs][:, inputs]
        weight = self.ridge * among.diagonal().clone()
        weight[-1] = 0.0  # of the constant
        slopes = torch.linalg.solve(among + torch.diag(weight + 1e-12), moments[inputs][:, observations])
        left = moments[observations][:, observations] - moments[observations][:, inputs] @ slopes
        of_settings = moments[settings][:, settings] - torch.outer(mean[settings], mean[settings])
        of_settings = of_settings + torch.diag(floor[settings])
        by_settings = slopes[: self.num_settings].mT  # (M, S)
        covariance = torch.zeros_like(self.covariance)
        covariance[settings.unsqueeze(-1), settings] = of_settings
        covariance[observations.unsqueeze(-1), settings] = by_settings @ of_settings
        covariance[settings.unsqueeze(-1), observations] = of_settings @ by_settings.mT
        noise = left + torch.diag(floor[observations])
        covariance[observations.unsqueeze(-1), observations] = by_settings @ of_settings @ by_settings.mT + noise
        self.covariance.copy_((covariance + covariance.mT) / 2)
        loading = torch.zeros_like(self.loading)
        loading[observations] = slopes[self.num_settings : -1].mT
        self.loading.copy_(loading)
        mean[observations] = slopes[-1] + by_settings @ mean[settings]
        self.mean.copy_(mean)

    def _turn(self) -> None:
        """Turns the latent so that its directions come apart, the one that observations say most about first."""
        known = torch.ones_like(self.mean, dtype=torch.bool)
        directions = self.measurements(self.mean, known).directions
        _, turn = torch.linalg.eigh(directions.mT @ directions)
        self.loading.copy_(self.loading @ turn.flip(-1))
