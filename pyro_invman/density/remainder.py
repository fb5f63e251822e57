r"""What rows of a task say of its function beyond the latent, by kriging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_invman.density.hyperparameters import JITTER
from pyro_invman.density.random_functions import Anchor, Features, RandomFunctions

MOST = 512  # rows that are looked at together, of which the cost grows with the cube
_SHARE = 0.05  # of the noise that a drawn function keeps, so that rows alike stay apart


class Remainder:
    r"""Rows of tasks, against which others of the same task are predicted.

    Given the latent, an observation of a task is its mean :math:`m(s) + U(s) z`, a function :math:`r(s)` of which the
    latent knows nothing, and noise. The rows' own observations say where that function runs: with :math:`K` its
    covariance at the rows plus noise, :math:`c(s)` that to a setting, and :math:`e` and :math:`U` of the rows,

    .. math:: m'(s) = m(s) + c K^{-1} e, \qquad U'(s) = U(s) - c K^{-1} U, \qquad
              \sigma'^2(s) = \sigma^2(s) - c K^{-1} c^T,

    exact for the closed form whatever the latent. Far from the rows, and without any, nothing changes.

    Arguments:
        functions: of the M observations.
        settings, known: of the rows (..., K, S).
        answers, seen: their observations (..., K, M), read where `seen`.

    References:
        Rasmussen & Williams, *Gaussian processes for machine learning*, 2006, chapter 2.
    """

    @torch.no_grad()
    def __init__(self, functions: RandomFunctions, settings: Tensor, known: Tensor, answers: Tensor, seen: Tensor):
        self.functions = functions
        rows = self.rows = functions.features(settings, known).unflatten(settings.shape[:-1])
        self.seen = (seen & functions.readable(known).unsqueeze(-1)).movedim(-1, 0)  # (M, ..., K)
        both = self.seen.unsqueeze(-1) & self.seen.unsqueeze(-2)
        eye = torch.eye(settings.shape[-2], dtype=rows.mean.dtype, device=rows.mean.device)
        covariance = functions.left_over(rows, rows)
        covariance = covariance + torch.diag_embed(rows.scale.square() - covariance.diagonal(dim1=-2, dim2=-1))
        self.factor = torch.linalg.cholesky(torch.where(both, covariance, eye))
        self.answers = answers.movedim(-1, 0).to(rows.mean)
        off = torch.where(self.seen, self.answers - rows.mean, 0.0)
        sides = torch.cat([torch.where(self.seen.unsqueeze(-1), rows.directions, 0.0), off.unsqueeze(-1)], -1)
        self.white = torch.linalg.solve_triangular(self.factor, sides, upper=False)  # (M, ..., K, L + 1)

    def sequence(self) -> Anchor:
        """Of every row given the rows before it: their densities multiply to that of all."""
        size = self.factor.diagonal(dim1=-2, dim2=-1)
        found = self.rows._replace(
            mean=torch.where(self.seen, self.answers - size * self.white[..., -1], self.rows.mean),
            scale=torch.where(self.seen, size, self.rows.scale),
            directions=torch.where(
                self.seen.unsqueeze(-1), size.unsqueeze(-1) * self.white[..., :-1], self.rows.directions
            ),
        )
        return found.anchor()

    def anchor(self, settings: Tensor, known: Tensor) -> Anchor:
        """Of further rows of the tasks with settings (..., N, S), read where `known`; of one task's, of any shape."""
        near = self._near(settings, known)[0]
        return (near.unflatten(settings.shape[:-1]) if self.seen.dim() == 2 else near).anchor()

    def together(self, settings: Tensor, known: Tensor) -> tuple[Anchor, Tensor]:
        """Of further rows (N, S) of one task: each alone, and their covariances (M, N, N) given the latent."""
        near, here, through = self._near(settings, known)
        covariance = self.functions.left_over(here, here) - through.mT @ through
        return near.anchor(), covariance + torch.diag_embed(near.scale.square() - covariance.diagonal(dim1=-2, dim2=-1))

    def _near(self, settings: Tensor, known: Tensor) -> tuple[Features, Features, Tensor]:
        """Rows as they are seen from the task's, as they are alone, and their whitened covariance (M, ..., K, N)."""
        here = self.functions.features(settings, known)
        if self.seen.dim() > 2:
            here = here.unflatten(settings.shape[:-1])
        towards = torch.where(self.seen.unsqueeze(-2), self.functions.left_over(here, self.rows), 0.0)
        through = torch.linalg.solve_triangular(self.factor, towards.mT, upper=False)
        moved = through.mT @ self.white
        noise = self.functions.variances[:, 3].reshape(-1, *[1] * (here.mean.dim() - 1))
        variance = (here.scale.square() - through.square().sum(-2)).maximum(noise).clamp_min(1e-12)
        near = here._replace(
            mean=here.mean + moved[..., -1], scale=variance.sqrt(), directions=here.directions - moved[..., :-1]
        )
        return near, here, through


@torch.no_grad()
def drawn(
    functions: RandomFunctions, settings: Tensor, known: Tensor, shape: Sequence[int], generator: torch.Generator | None
) -> Anchor:
    """Anchors of rows (..., K) with that function drawn for each of `shape` (..., ..., K), and noise alone about it."""
    rows = functions.features(settings, known).unflatten(settings.shape[:-1])
    noise = functions.variances[:, 3].clamp_min(1e-12).reshape(-1, *[1] * (rows.mean.dim() - 1))
    covariance = functions.left_over(rows, rows)
    spare = (rows.scale.square() - noise - covariance.diagonal(dim1=-2, dim2=-1)).clamp_min(0.0)
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(_SHARE * noise + spare + JITTER))
    white = torch.randn(*shape, len(noise), generator=generator, dtype=factor.dtype)
    white = white @ torch.linalg.cholesky(functions.residuals.covariance).mT
    apart = [len(noise), *[1] * (len(shape) - rows.mean.dim() + 1)]  # draws stand before the tasks
    factor, mean = (part.reshape(*apart, *part.shape[1:]) for part in (factor, rows.mean))
    moved = (factor @ white.movedim(-1, 0).unsqueeze(-1)).squeeze(-1)
    scale = ((1 - _SHARE) * noise).sqrt().expand_as(rows.mean)
    return rows._replace(scale=scale).anchor()._replace(mean=(mean + moved).movedim(0, -1))
