r"""Mixtures of normals fitted to clouds of particles, many at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDS = 40
_WIDER = 1.2  # what fitted variances are multiplied by: weights by a law that is too narrow have no variance


class Mixtures(NamedTuple):
    """R mixtures of K normals over d coordinates: log-shares (R, K), means (R, K, d), roots of covariances
    (R, K, d, d)."""

    log_share: Tensor
    mean: Tensor
    root: Tensor

    @classmethod
    def fit(cls, clouds: Tensor, components: int, generator: torch.Generator) -> Mixtures:
        """By expectation–maximisation from means drawn among the particles (R, N, d), each far from those before it;
        variances come out a fifth wider."""
        histories, particles, dim = clouds.shape
        scale = clouds.std(1, keepdim=True).clamp_min(torch.finfo(clouds.dtype).tiny)
        centre = clouds.mean(1, keepdim=True)
        white = ((clouds - centre) / scale).double()
        ridge = 1e-6 * torch.eye(dim, dtype=torch.float64)
        mean = _apart(white, components, generator)
        made = cls(
            white.new_full((histories, components), -math.log(components)),
            mean,
            0.3 * torch.eye(dim, dtype=torch.float64).expand(histories, components, dim, dim),
        )
        for _ in range(_ROUNDS):
            member = made.joint(white).softmax(-1)  # (R, N, K)
            total = member.sum(1).clamp_min(1e-8)
            mean = torch.einsum("rnk,rnd->rkd", member, white) / total.unsqueeze(-1)
            apart = white.unsqueeze(2) - mean.unsqueeze(1)
            spread = torch.einsum("rnk,rnki,rnkj->rkij", member, apart, apart) / total[..., None, None]
            share = (total + 1.0).log() - math.log(particles + components)
            made = cls(share, mean, torch.linalg.cholesky(spread + ridge))
        across = scale.double().unsqueeze(-1) * math.sqrt(_WIDER)
        return cls(made.log_share.to(clouds), centre + scale * made.mean.to(clouds), (across * made.root).to(clouds))

    def joint(self, places: Tensor) -> Tensor:
        """Log-share and log-density of each component (R, n, K) at places (R, n, d)."""
        apart = (places.unsqueeze(2) - self.mean.unsqueeze(1)).movedim(1, -1)  # (R, K, d, n)
        white = torch.linalg.solve_triangular(self.root, apart, upper=False)
        constant = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + places.shape[-1] * math.log(2 * math.pi) / 2
        return (self.log_share - constant).unsqueeze(1) - white.square().sum(-2).mT / 2

    def log_prob(self, places: Tensor) -> Tensor:
        """Log-density (R, n) at places (R, n, d)."""
        return self.joint(places).logsumexp(-1)

    def sample(self, number: int, generator: torch.Generator) -> Tensor:
        """Draws (R, number, d)."""
        pick = torch.multinomial(self.log_share.exp(), number, replacement=True, generator=generator)
        noise = torch.randn(*pick.shape, self.mean.shape[-1], generator=generator, dtype=self.mean.dtype)
        history = torch.arange(len(pick)).unsqueeze(-1)
        return self.mean[history, pick] + (self.root[history, pick] @ noise.unsqueeze(-1)).squeeze(-1)


def _apart(white: Tensor, components: int, generator: torch.Generator) -> Tensor:
    """Particles (R, K, d) that lie far from each other: each drawn by its squared distance to those before it."""
    rows = torch.arange(len(white))
    first = torch.randint(white.shape[1], (len(white),), generator=generator)
    chosen = [white[rows, first]]
    nearest = white.new_full(white.shape[:2], math.inf)
    for _ in range(components - 1):
        nearest = torch.minimum(nearest, (white - chosen[-1].unsqueeze(1)).square().sum(-1))
        pick = torch.multinomial(nearest + 1e-12, 1, generator=generator)[:, 0]
        chosen.append(white[rows, pick])
    return torch.stack(chosen, 1)
