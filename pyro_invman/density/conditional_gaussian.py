r"""A Gaussian whose mean and covariance follow a condition: what a conditional law is before its shape is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_invman.density.backbones import Block
from pyro_invman.density.velocity import waves


class ConditionalGaussian(nn.Module):
    r"""The law :math:`N(m(c), e^{2 M(c)})` with :math:`M` symmetric, so that :math:`R = e^M` is the symmetric root of
    the covariance, :math:`\log |R| = tr\, M`, and both are smooth in c. Standard normal when new.

    Arguments:
        event_dim: the number D of coordinates.
        context_dim: the number K of conditions, standardised.
        floor: a scale below which no direction is told apart: the law is fitted as if each coordinate carried noise
            of that standard deviation. It keeps a law that is a curve at a condition from a root that is singular.
        width, blocks, frequencies: of the network.
    """

    def __init__(
        self,
        event_dim: int,
        context_dim: int,
        floor: float = 0.02,
        width: int = 64,
        blocks: int = 2,
        frequencies: int = 4,
    ) -> None:
        super().__init__()
        self.event_dim, self.context_dim, self.floor, self.frequencies = event_dim, context_dim, floor, frequencies
        self.register_buffer("_place", _places(event_dim), persistent=False)
        self.enter = nn.Linear(max(1, context_dim * (1 + 2 * frequencies)), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, event_dim + event_dim * (event_dim + 1) // 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    _place: Tensor

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Mean m (..., D) and logarithm M (..., D, D) of the root at conditions `c` (..., K)."""
        known = waves(c, self.frequencies) if self.context_dim else c.new_ones((*c.shape[:-1], 1))
        hidden = self.enter(known)
        for block in self.blocks:
            hidden = block(hidden)
        mean, entries = self.out(hidden).split([self.event_dim, self.out.out_features - self.event_dim], -1)
        return mean, entries[..., self._place]

    def loss(self, x: Tensor, c: Tensor) -> Tensor:
        r"""Mean of :math:`-\log N(x; m, R^2) - \tfrac D2 \log 2 \pi` over rows, in expectation over the noise of the
        floor: :math:`\tfrac12 |R^{-1} (x - m)|^2 + tr\, M + \tfrac12 floor^2\, tr R^{-2}`."""
        mean, log_root = self(c)
        whitener = torch.linalg.matrix_exp(-log_root)
        white = (whitener @ (x - mean).unsqueeze(-1)).squeeze(-1)
        noise = self.floor**2 * whitener.square().sum((-1, -2))
        volume = log_root.diagonal(dim1=-1, dim2=-2).sum(-1)
        return (0.5 * white.square().sum(-1) + 0.5 * noise + volume).mean()

    def log_prob(self, x: Tensor, c: Tensor) -> Tensor:
        """Log-density (...) of `x` (..., D) at conditions `c` (..., K)."""
        mean, log_root = self(c)
        white = (torch.linalg.matrix_exp(-log_root) @ (x - mean).unsqueeze(-1)).squeeze(-1)
        volume = log_root.diagonal(dim1=-1, dim2=-2).sum(-1)
        return -0.5 * white.square().sum(-1) - volume - 0.5 * self.event_dim * math.log(2 * math.pi)


def _places(dim: int) -> Tensor:
    """Where each entry of a symmetric matrix (D, D) stands in a list of its lower triangle."""
    place = torch.zeros(dim, dim, dtype=torch.long)
    rows, columns = torch.tril_indices(dim, dim)
    place[rows, columns] = torch.arange(len(rows))
    place[columns, rows] = torch.arange(len(rows))
    return place


def rotation(matrix: Tensor, iterations: int = 12) -> Tensor:
    r"""The orthogonal polar factor Q of a regular matrix K = Q P (..., D, D), by Newton's iteration
    :math:`Q \leftarrow \tfrac12 (\mu Q + (\mu Q)^{-\top})`, which has gradients where singular values coincide.

    With the symmetric roots :math:`R_0, R_1` of two covariances and :math:`K = R_1 R_0`, the optimal map between the
    Gaussians is :math:`x \mapsto m_1 + R_1\, Q\, R_0^{-1} (x - m_0)`.

    References:
        Higham, *Computing the polar decomposition – with applications*, SIAM J. Sci. Stat. Comput. 1986.
        Dowson & Landau, *The Fréchet distance between multivariate normal distributions*, 1982.
    """
    for _ in range(iterations):
        inverse = torch.linalg.inv(matrix)
        norms = torch.linalg.matrix_norm(inverse), torch.linalg.matrix_norm(matrix)
        scale = (norms[0] / norms[1]).sqrt()[..., None, None]
        matrix = 0.5 * (scale * matrix + inverse.mT / scale)
    return matrix
