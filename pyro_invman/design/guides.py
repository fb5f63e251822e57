r"""Sites as rows of real numbers, and Gaussian conditionals between them: guides that need no training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_invman.design.experiment import Experiment

_RIDGE = 1e-7  # of the variances, for outcomes that are linear in one another
_WORTH = 0.02  # nats that squares of what is given must bring to be kept
_SQUARED = 16  # given numbers at most that are squared
_FAR = 30.0  # where the coordinates of values at an end of their support stop


class Rows:
    r"""Some sites of an experiment as rows of D real numbers.

    Continuous sites go through the bijection of their support onto the real line (or plane), discrete ones as they
    are; values at the end of a support stop at ± 30.
    """

    def __init__(self, experiment: Experiment, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sites = {name: experiment.sites[name] for name in self.names}
        self.sizes: list[int] = []
        self.bijections = {}
        for name, site in self.sites.items():
            size = site.shape.numel()
            if not site.discrete and site.support is not None:
                self.bijections[name] = biject_to(site.support)
                size = self.bijections[name].inverse_shape(site.shape).numel()
            self.sizes.append(size)

    @property
    def dim(self) -> int:
        """D"""
        return sum(self.sizes)

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """Rows (S, C, D) of sites (S, C, *site shape)."""
        rows = []
        for name in self.names:
            value = values[name]
            if name in self.bijections:
                value = self.bijections[name].inv(value)
            value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
            rows.append(value.reshape(*value.shape[:2], -1))
        found = torch.cat(rows, -1)
        return found.clamp(-1e6, 1e6) if found.isfinite().all() else found.nan_to_num(0.0, _FAR, -_FAR)

    def sites_of(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Sites of rows (S, C, D), all of them continuous, and log |d site / d row| (S, C)."""
        values = {}
        jacobian = rows.new_zeros(rows.shape[:2])
        for name, part in zip(self.names, rows.split(self.sizes, -1), strict=True):
            bijection, site = self.bijections[name], self.sites[name]
            part = part.reshape(*rows.shape[:2], *bijection.inverse_shape(site.shape))
            values[name] = bijection(part)
            change = bijection.log_abs_det_jacobian(part, values[name])
            jacobian = jacobian + change.reshape(*rows.shape[:2], -1).sum(-1)
        return values, jacobian


class GaussianConditional:
    r"""A normal law of rows t (S, C, D) given rows g (S, C, G), one at each candidate, by matching moments:

    .. math:: q_c(t \mid g) = N(a_c + B_c \phi(g),\; \Sigma_c), \qquad
              B = \Sigma_{t\phi} \Sigma_{\phi\phi}^{-1}, \quad
              \Sigma = \Sigma_{tt} - B \Sigma_{\phi t}.

    The best of its kind for the posterior bound, in closed form. φ is g, and its squares where they are worth it.

    Arguments:
        targets: t of the draws it is fitted to; no dimension of it is empty.
        given: g of them.
        log_weight: of the draws (S, C).
        floor: variances (C, G + D) that are added.
        squares: whether squares may be tried.
    """

    coefficients: Tensor
    centre: Tensor
    loc: Tensor
    scale_tril: Tensor

    def __init__(
        self,
        targets: Tensor,
        given: Tensor,
        log_weight: Tensor,
        floor: Tensor | None = None,
        squares: bool = True,
    ) -> None:
        weights = log_weight.softmax(0).to(targets.dtype)
        self._floor = floor
        self.taken = given.shape[-1]  # G
        self._fit(targets, given, weights, squares=False)
        if squares and 0 < given.shape[-1] <= _SQUARED:
            plain = self.coefficients, self.centre, self.loc, self.scale_tril
            before = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            self._fit(targets, given, weights, squares=True)
            after = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            if not (before - after).max() > _WORTH:
                self.squares = False
                self.coefficients, self.centre, self.loc, self.scale_tril = plain
        self._finish()

    def _finish(self) -> None:
        self.log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        eye = torch.eye(self.scale_tril.shape[-1], dtype=self.scale_tril.dtype)
        self.whitening = torch.linalg.solve_triangular(self.scale_tril, eye, upper=False)

    def widened(self, factor: float) -> GaussianConditional:
        """The same law with its scale times `factor`."""
        new = copy.copy(self)
        new.scale_tril = self.scale_tril * factor
        new._finish()
        return new

    def _features(self, given: Tensor) -> Tensor:
        if not self.squares:
            return given
        scaled = (given - self._shift) / self._spread
        return torch.cat([scaled, scaled.clamp(-5, 5).square()], -1)

    def _fit(self, targets: Tensor, given: Tensor, weights: Tensor, squares: bool) -> None:
        self.squares = squares
        if squares:
            self._shift = torch.einsum("sc,scd->cd", weights, given)
            spread = torch.einsum("sc,scd->cd", weights, (given - self._shift).square()).sqrt()
            self._spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        features = self._features(given)
        count = features.shape[-1]
        rows = torch.cat([features, targets], -1)
        mean = torch.einsum("sc,scd->cd", weights, rows)
        centred = (rows - mean).transpose(0, 1)  # (C, S, G + D)
        covariance = ((centred * weights.T.unsqueeze(-1)).mT @ centred).double()
        scale = covariance.diagonal(dim1=-2, dim2=-1)
        tiny = torch.finfo(targets.dtype).tiny ** 0.5
        extra = scale * _RIDGE + tiny
        if self._floor is not None:
            extra = extra + self._floor.double()
        covariance = covariance + torch.diag_embed(extra)
        across = covariance[:, count:, :count]
        within, _ = torch.linalg.cholesky_ex(covariance[:, :count, :count])
        coefficients = torch.cholesky_solve(across.mT, within).mT
        rest = covariance[:, count:, count:] - coefficients @ across.mT
        rest = rest + torch.diag_embed(rest.diagonal(dim1=-2, dim2=-1).abs() * _RIDGE + tiny)
        scale_tril, _ = torch.linalg.cholesky_ex(0.5 * (rest + rest.mT))
        self.coefficients = coefficients.to(targets.dtype)
        self.centre, self.loc = mean[:, :count], mean[:, count:]
        self.scale_tril = scale_tril.to(targets.dtype)

    def mean(self, given: Tensor) -> Tensor:
        """Means (S, C, D)."""
        shift = self._features(given) - self.centre
        return self.loc + torch.einsum("scg,cdg->scd", shift, self.coefficients)

    def standard(self, targets: Tensor, mean: Tensor) -> Tensor:
        """Standard normal numbers (S, C, D) of rows with those means."""
        return torch.einsum("scd,ced->sce", targets - mean, self.whitening)

    def rows(self, standard: Tensor, mean: Tensor) -> Tensor:
        """Rows of standard normal numbers."""
        return mean + torch.einsum("scd,ced->sce", standard, self.scale_tril)

    def score(self, standard: Tensor) -> Tensor:
        """Log-density (S, C) of rows by their standard normal numbers (S, C, D)."""
        constant = 0.9189385332046727 * standard.shape[-1]
        return -0.5 * standard.square().sum(-1) - self.log_scale - constant

    def log_prob(self, targets: Tensor, given: Tensor) -> Tensor:
        """Log-density (S, C)."""
        return self.score(self.standard(targets, self.mean(given)))
