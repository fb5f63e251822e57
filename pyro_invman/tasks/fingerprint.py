r"""Likeness of tasks, and whether a task is like any, from what is believed of their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Fingerprint(NamedTuple):
    """What is believed of a task's latent, as a normal: mean (L,), covariance (L, L), and how much was learned.

    `information` is KL(belief ‖ prior) in nats: 0 where nothing is known.
    """

    mean: Tensor
    covariance: Tensor
    information: float

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Fingerprint:
        """Of a belief with these moments, against a standard normal prior."""
        mean, covariance = mean.double(), covariance.double()
        trace, log_det = covariance.diagonal().sum(), torch.linalg.slogdet(covariance).logabsdet
        return cls(mean, covariance, max(0.0, float(trace + mean.square().sum() - len(mean) - log_det) / 2))

    @classmethod
    def of_particles(cls, particles: Tensor, log_weights: Tensor) -> Fingerprint:
        """Of weighted latents (S, L) with log-weights (S,)."""
        weights, z = log_weights.double().softmax(0), particles.double()
        mean = weights @ z
        covariance = (z - mean).mT @ (weights.unsqueeze(-1) * (z - mean))
        return cls.of(mean, covariance + 1e-9 * torch.eye(z.shape[-1], dtype=z.dtype))


def similarity(a: Fingerprint, b: Fingerprint) -> float:
    r"""Likeness in [0, 1]: the Bhattacharyya coefficient of two beliefs, discounted by how little either says.

    .. math:: s = BC(a, b)\, \sqrt{(1 - \rho_a)(1 - \rho_b)}, \qquad
              BC = \frac{|\Sigma_a \Sigma_b|^{1/4}}{|\bar\Sigma|^{1/2}}
              \exp\left(-\tfrac18 (m_a - m_b)^T \bar\Sigma^{-1} (m_a - m_b)\right),

    with :math:`\bar\Sigma` the mean of the two covariances and :math:`\rho` the overlap (Bhattacharyya too) of a
    belief with the prior: two tasks of which nothing is known agree in everything, and are not alike.

    References:
        Bhattacharyya, *On a measure of divergence between two statistical populations*, 1943.
    """
    prior = torch.eye(len(a.mean), dtype=a.mean.dtype)
    origin = torch.zeros_like(a.mean)
    said = [1 - math.exp(_log_overlap(t.mean, t.covariance, origin, prior)) for t in (a, b)]
    overlap = math.exp(_log_overlap(a.mean, a.covariance, b.mean, b.covariance))
    return overlap * math.sqrt(max(0.0, said[0]) * max(0.0, said[1]))


def _log_overlap(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    middle = (covariance_a + covariance_b) / 2
    apart = mean_a - mean_b
    dets = [torch.linalg.slogdet(c).logabsdet for c in (covariance_a, covariance_b, middle)]
    distance = apart @ torch.linalg.solve(middle, apart)
    return min(0.0, float(-distance / 8 + (dets[0] + dets[1]) / 4 - dets[2] / 2))


class Likeness(NamedTuple):
    """A known task and how alike it is."""

    task: str
    similarity: float


def nearest(a: Fingerprint, known: dict[str, Fingerprint], number: int) -> list[Likeness]:
    """The `number` known tasks most alike, the most alike first."""
    found = [Likeness(name, similarity(a, other)) for name, other in known.items()]
    return sorted(found, key=lambda likeness: -likeness.similarity)[:number]


def surprise(statistics: Tensor, simulated: Tensor) -> Tensor:
    """How strange statistics (J,) are beside simulated ones (R, J), large being strange: the smallest of their J
    upper-tail shares, as a p-value in (0, 1] against the same smallest share among the simulated."""
    together = torch.cat([statistics.unsqueeze(0), simulated])  # the task is one of R + 1 under the manifold
    above = (together.unsqueeze(0) >= together.unsqueeze(1)).double().mean(1)  # (R + 1, J)
    least = above.min(-1).values
    return (least <= least[0]).double().mean()


def corrected(p_value: float, held_out: Sequence[float]) -> float:
    r"""A simulated p-value corrected by those of held-out tasks of the manifold.

    With scores :math:`s = \Phi^{-1}(p)`, which are standard normal where the manifold is right, mean and spread of the
    held-out scores, shrunk towards 0 and 1 as by ten more tasks that fit, standardise the new one.
    """
    scores = torch.special.ndtri(torch.tensor([p_value, *held_out], dtype=torch.float64).clamp(1e-6, 1 - 1e-6))
    known, new = scores[1:], scores[0]
    number, doubt = len(known), 10.0
    loc = known.sum() / (number + doubt)
    scale = ((known.square().sum() + doubt) / (number + doubt) - loc.square()).clamp_min(0.25).sqrt()
    return float(torch.special.ndtr((new - loc) / scale))
