r"""What is believed of a task's latent before any of its rows is seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_START_SHARE = 0.2
_INDUCING = 32


class NormalPrior(nn.Module):
    r"""Every latent :math:`z_t \sim N(0, I_L)`, whatever the task's conditions."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.one: Tensor
        self.register_buffer("one", torch.ones(()), persistent=False)

    def moments(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (..., L) at conditions (..., C)."""
        shape = (*conditions.shape[:-1], self.latent_dim)
        return self.one.new_zeros(shape), self.one.new_ones(shape)

    def kl(self) -> Tensor:
        """0: there is nothing to be uncertain about."""
        return self.one.new_zeros(())


class GaussianProcessPrior(nn.Module):
    r"""A sparse Gaussian process over task conditions c, one for each coordinate of z:

    .. math:: z_{tl} = \sqrt{a_l}\, f_l(c_t) + \sqrt{1 - a_l}\, e_{tl}, \qquad f_l \sim GP(0, k), \; e_{tl} \sim N(0, 1)

    Each z_t is standard normal on its own; near conditions that were seen it is informed by them, far away it is as
    wide as ever. Given the values u of f at M inducing conditions the latents are independent, so tasks can be
    subsampled; q(u) is a normal, whitened, with a diagonal scale.

    Arguments:
        inducing: conditions (M, C), in standard units.
        latent_dim: L.

    References:
        Titsias, *Variational learning of inducing variables in sparse Gaussian processes*, AISTATS 2009.
        Hensman, Matthews & Ghahramani, *Scalable variational Gaussian process classification*, AISTATS 2015.
    """

    inducing: Tensor

    def __init__(self, inducing: Tensor, latent_dim: int) -> None:
        super().__init__()
        from gpytorch.kernels import RBFKernel  # at first use: it takes a second to import

        self.latent_dim = latent_dim
        self.register_buffer("inducing", inducing.clone())
        self.kernel = RBFKernel(ard_num_dims=inducing.shape[-1])
        self.kernel.initialize(lengthscale=math.sqrt(inducing.shape[-1]))
        share = torch.full((latent_dim,), math.log(_START_SHARE / (1 - _START_SHARE)))
        self.share = nn.Parameter(share)  # logit of a
        self.whitened_loc = nn.Parameter(torch.zeros(len(inducing), latent_dim))
        self.whitened_scale = nn.Parameter(torch.full((len(inducing), latent_dim), math.log(math.e - 1)))

    @classmethod
    def induced_by(cls, conditions: Tensor, latent_dim: int, seed: int) -> GaussianProcessPrior:
        """With up to 32 of the distinct conditions (T, C) of tasks as inducing ones."""
        distinct = conditions.unique(dim=0)
        pick = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:_INDUCING]
        return cls(distinct[pick], latent_dim)

    def moments(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (..., L) at conditions (..., C), with u integrated over q(u)."""
        loc, scale = self.whitened_loc, F.softplus(self.whitened_scale)
        weights = self._weights(conditions)  # (..., M)
        share = self.share.sigmoid()
        explained = weights.square().sum(-1, keepdim=True)
        variance = 1 - share * (explained - weights.square() @ scale.square())
        return share.sqrt() * (weights @ loc), variance.clamp_min(1e-4)

    def given_inducing(self, conditions: Tensor, whitened: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (..., L) at conditions (..., C) given whitened inducing values (M, L)."""
        weights = self._weights(conditions)
        share = self.share.sigmoid()
        variance = 1 - share * weights.square().sum(-1, keepdim=True)
        return share.sqrt() * (weights @ whitened), variance.clamp_min(1e-4)

    def _weights(self, conditions: Tensor) -> Tensor:
        """Of the whitened inducing values in f(c)."""
        among = self.kernel(self.inducing).to_dense()
        factor = torch.linalg.cholesky(among + 1e-4 * torch.eye(len(among), dtype=among.dtype, device=among.device))
        flat = conditions.to(among).reshape(-1, conditions.shape[-1])
        across = self.kernel(self.inducing, flat).to_dense()
        weights = torch.linalg.solve_triangular(factor, across, upper=False).mT
        return weights.reshape(*conditions.shape[:-1], len(among))

    def kl(self) -> Tensor:
        """KL(q(u) ‖ p(u)) in nats."""
        scale = F.softplus(self.whitened_scale)
        return 0.5 * (scale.square() + self.whitened_loc.square() - 1).sum() - scale.log().sum()
