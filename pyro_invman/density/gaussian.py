r"""A Gaussian over incomplete rows, whose every conditional is a closed form.

It is the base under the any-order flow: what is linear in the data is exact before any network is trained, and the
network has only to learn the difference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Conditional(NamedTuple):
    """What the known cells of a row say about every cell.

    `mean` and `scale` (..., D) are those of :math:`p(v_j \\mid v_{known \\setminus j})`: for an unknown cell its
    conditional given all that is known, for a known cell its leave-one-out conditional.
    """

    mean: Tensor
    scale: Tensor


class GaussianBase(nn.Module):
    r"""A multivariate normal :math:`N(\mu, \Sigma)` fitted to rows with missing cells.

    With :math:`K` the known cells of a row and :math:`P = \Sigma_{KK}^{-1}`, an unknown cell :math:`j` has

    .. math:: E[v_j \mid v_K] = \mu_j + \Sigma_{jK} P (v_K - \mu_K), \qquad
              Var[v_j \mid v_K] = \Sigma_{jj} - \Sigma_{jK} P \Sigma_{Kj},

    and a known cell, given the other known ones, :math:`v_i - (P (v_K - \mu_K))_i / P_{ii}` and :math:`1 / P_{ii}`.

    Arguments:
        num_cells: the number D of cells in a row.
        ridge: added to the diagonal of the covariance, in units of each cell's variance; it keeps cells that are
            linear combinations of others (fractions that sum to one) apart.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, num_cells: int, ridge: float = 1e-5) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(num_cells, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(num_cells, dtype=torch.float64))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the module, but stays in double precision: inverses of near-singular blocks need it."""
        super()._apply(fn, recurse)
        self.mean, self.covariance = self.mean.double(), self.covariance.double()
        return self

    @torch.no_grad()
    def fit(self, values: Tensor, max_iterations: int = 200, tolerance: float = 1e-6, chunk: int = 4096) -> None:
        """Maximum likelihood from the observed cells by expectation–maximisation.

        The estimate is right when cells are missing completely at random or at random given the observed ones
        (Dempster, Laird & Rubin 1977). `values` (N, D) holds NaN where a cell was not observed.
        """
        values = values.to(self.mean)
        observed = ~values.isnan()
        filled = values.nan_to_num(0.0)
        count = observed.sum(0).clamp_min(1)
        mean = filled.sum(0) / count
        variance = ((filled - mean) ** 2 * observed).sum(0) / count
        floor = self.ridge * variance.clamp_min(1e-12)
        covariance = torch.diag(variance.clamp_min(1e-12) + floor)
        complete = bool(observed.all())
        for _ in range(max_iterations):
            first, second = torch.zeros_like(mean), torch.zeros_like(covariance)
            for rows in range(0, len(values), chunk):
                v, o = filled[rows : rows + chunk], observed[rows : rows + chunk]
                imputed, spread = v, torch.zeros_like(covariance)
                if not complete:
                    gain, _ = _gain(covariance, o)
                    imputed = torch.where(o, v, mean + (gain @ ((v - mean) * o).unsqueeze(-1)).squeeze(-1))
                    hidden = (~o).to(v)
                    unexplained = covariance - gain @ covariance
                    spread = (unexplained * hidden.unsqueeze(-1) * hidden.unsqueeze(-2)).sum(0)
                first = first + imputed.sum(0)
                second = second + imputed.mT @ imputed + spread
            new_mean = first / len(values)
            new_covariance = second / len(values) - torch.outer(new_mean, new_mean) + torch.diag(floor)
            new_covariance = (new_covariance + new_covariance.mT) / 2
            change = (new_covariance - covariance).abs().max() + (new_mean - mean).abs().max()
            mean, covariance = new_mean, new_covariance
            if complete or change < tolerance:
                break
        self.mean.copy_(mean)
        self.covariance.copy_(covariance)

    @torch.no_grad()
    def separate(self, linked: Tensor) -> None:
        """Makes pairs that are not `linked` (D, D) independent given the others, which the likelihood of rows that
        show no such pair together cannot tell (:func:`most_entropic`)."""
        self.covariance.copy_(most_entropic(self.covariance, linked))

    @torch.no_grad()
    def exchange(self, members: Tensor) -> None:
        """Averages mean and covariance over all orders of the `members` (M, C), each its C cells."""
        number, size = members.shape
        flat = members.flatten()
        rest = torch.tensor([j for j in range(len(self.mean)) if j not in set(flat.tolist())], dtype=torch.long)
        blocks = self.covariance[flat][:, flat].reshape(number, size, number, size)
        within = torch.einsum("minj,mn->ij", blocks, torch.eye(number).to(blocks)) / number
        between = (blocks.sum((0, 2)) - number * within) / (number * (number - 1))
        same = torch.eye(number, dtype=torch.bool).reshape(number, 1, number, 1)
        mixed = torch.where(same, within.reshape(1, size, 1, size), between.reshape(1, size, 1, size))
        across = self.covariance[flat][:, rest].reshape(number, size, -1).mean(0).repeat(number, 1)
        self.covariance[flat.unsqueeze(-1), flat] = mixed.reshape(number * size, number * size)
        self.covariance[flat.unsqueeze(-1), rest] = across
        self.covariance[rest.unsqueeze(-1), flat] = across.mT
        self.mean[flat] = self.mean[members].mean(0).repeat(number)

    def condition(self, values: Tensor, known: Tensor) -> Conditional:
        """Mean and scale of every cell given the known ones (leave-one-out where the cell is itself known).

        `values` (..., D) is read where `known` (..., D) is true, and may hold anything finite elsewhere. The two
        broadcast, and a block is inverted once for each distinct row of `known`.
        Differentiable in `values`; comes back in their dtype.
        """
        centred = torch.where(known, values.to(self.mean) - self.mean, 0.0)
        patterns, of_row = distinct(known)
        gain, precision = _gain(self.covariance, patterns)
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        explained = (gain * self.covariance).sum(-1)
        variance = torch.where(patterns, 1.0 / diagonal, self.covariance.diagonal() - explained)
        scale = variance.maximum(self.ridge * self.covariance.diagonal()).sqrt()[of_row]
        weighted = torch.einsum("...ij,...j->...i", precision[of_row], centred)
        mean = self.mean + torch.where(known, centred - weighted / diagonal[of_row], weighted @ self.covariance)
        return Conditional(mean.to(values), scale.to(values).expand(mean.shape))

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density (...,) of the observed cells of `values` (..., D); NaN cells are marginalised."""
        observed = ~values.isnan()
        centred = torch.where(observed, values, self.mean.to(values)).to(self.mean) - self.mean
        both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
        block = torch.where(both, self.covariance, torch.eye(len(self.mean), dtype=self.mean.dtype))
        factor = torch.linalg.cholesky(block)
        white = torch.linalg.solve_triangular(factor, centred.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        dimension = observed.sum(-1)
        return (-0.5 * white.square().sum(-1) - log_det - 0.5 * dimension * math.log(2 * math.pi)).to(values)


def most_entropic(covariance: Tensor, linked: Tensor, tolerance: float = 1e-12, max_sweeps: int = 1000) -> Tensor:
    r"""The matrix (D, D) of greatest entropy that agrees with `covariance` on the diagonal and where `linked` (D, D):

    .. math:: \hat\Sigma_{ij} = \Sigma_{ij} \text{ where linked}, \qquad (\hat\Sigma^{-1})_{ij} = 0 \text{ elsewhere.}

    References:
        Dempster, *Covariance selection*, Biometrics 1972.
        Hastie, Tibshirani & Friedman, *The elements of statistical learning*, 2009, algorithm 17.1.
    """
    found = covariance.clone()
    size = covariance.diagonal().sqrt()
    cells = torch.arange(len(covariance), device=covariance.device)
    for _ in range(max_sweeps):
        before = found.clone()
        for j in range(len(covariance)):
            others, beside = cells != j, linked[j] & (cells != j)
            slopes = torch.linalg.solve(found[beside][:, beside], covariance[beside, j])
            found[others, j] = found[others][:, beside] @ slopes
            found[j, others] = found[others, j]
        if ((found - before) / torch.outer(size, size)).abs().max() < tolerance:
            break
    return found


def distinct(known: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows (U, D) of a mask (..., D), and which of them each is (...)."""
    shape, dim = known.shape[:-1], known.shape[-1]
    flat = known.reshape(-1, dim)
    if torch._C._get_tracing_state() or len(flat) == 1:  # a trace must not depend on values
        return flat, torch.arange(len(flat), device=known.device).reshape(shape)
    if dim > 62:
        patterns, index = flat.unique(dim=0, return_inverse=True)
        return patterns, index.reshape(shape)
    code = (flat.long() << torch.arange(dim, device=known.device)).sum(-1)
    codes, index = code.unique(return_inverse=True)
    return (codes.unsqueeze(-1) >> torch.arange(dim, device=known.device)) & 1 == 1, index.reshape(shape)


def _gain(covariance: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Regression of every cell on the known ones (..., D, D), zero in the columns of unknown cells, and the inverse of
    the known block, zero outside it but one on the diagonal of unknown cells."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    both = known.unsqueeze(-1) & known.unsqueeze(-2)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(torch.where(both, covariance, eye)))
    return covariance @ torch.where(both, precision, 0.0), precision
