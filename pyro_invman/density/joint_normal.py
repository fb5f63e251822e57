r"""Many cells that are normal together, and what some of them tell of others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_JITTER = 1e-9  # of a cell's variance


class JointNormal(NamedTuple):
    """E cells with `covariance` (E, E); means play no part in what one tells of another."""

    covariance: Tensor

    def information(self, cells: Tensor, seen: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        r"""Mutual information (G, C), in nats, of each of G groups of targets with each of C groups of cells,

        .. math:: I(T; Y) = \tfrac12 \log \det \Sigma_{YY} - \tfrac12 \log \det (\Sigma_{YY} - \Sigma_{YT}
                  \Sigma_{TT}^{-1} \Sigma_{TY}).

        Arguments:
            cells, seen: numbers of cells (C, M), of which those that are `seen` count.
            targets, wanted: the same of the targets (G, P).
        """
        among = _only(self.covariance[cells.unsqueeze(-1), cells.unsqueeze(-2)], seen)  # (C, M, M)
        alone = _only(self.covariance[targets.unsqueeze(-1), targets.unsqueeze(-2)], wanted)  # (G, P, P)
        across = self.covariance[targets[:, None, :, None], cells[None, :, None, :]]  # (G, C, P, M)
        across = torch.where(wanted[:, None, :, None] & seen[None, :, None, :], across, 0.0)
        factor = torch.linalg.cholesky(alone).unsqueeze(1)
        white = torch.linalg.solve_triangular(factor, across, upper=False)
        left = _floored(among - white.mT @ white, among)
        return 0.5 * (_log_det(among) - _log_det(left)).clamp_min(0.0)

    def after(self, cells: Tensor) -> JointNormal:
        """The cells once some of them (M,) are known."""
        if not len(cells):
            return self
        among = self.covariance[cells][:, cells]
        factor = torch.linalg.cholesky(_floored(among, among))
        white = torch.linalg.solve_triangular(factor, self.covariance[cells], upper=False)
        left = self.covariance - white.mT @ white
        diagonal = left.diagonal().maximum(_JITTER * self.covariance.diagonal())
        return JointNormal(left - torch.diag(left.diagonal()) + torch.diag(diagonal))


def _only(covariance: Tensor, seen: Tensor) -> Tensor:
    """Covariances (..., M, M) of the cells `seen` (..., M), others independent with variance one."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(seen.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return _floored(torch.where(both, covariance, eye), covariance)


def _floored(covariance: Tensor, like: Tensor) -> Tensor:
    """With a little more of each cell's variance in `like`: cells that nothing is left to say of can be factored."""
    return covariance + torch.diag_embed(_JITTER * like.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12))


def _log_det(covariance: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky(covariance).diagonal(dim1=-2, dim2=-1).log().sum(-1)
