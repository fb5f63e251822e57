r"""What one more outcome is expected to tell, by a belief of particles.

With particles :math:`\theta_n` of a belief, the information about all latents in the outcome of design :math:`\xi` is

.. math:: I(\xi) = H\Big[\tfrac1N \sum_n p(y \mid \theta_n, \xi)\Big] - \tfrac1N \sum_n H[p(y \mid \theta_n, \xi)]

which is exact, given the particles, for two laws of the outcome, and cheap. A single *normal* number (or a bijection of
one, such as a log-normal) whose noise depends on the design only: the means are binned, and the mixture is their
histogram smoothed by the noise. An outcome that can be *enumerated*: its probabilities are summed. Any other outcome is
nested: some particles draw an outcome each, and all others are contrasted with the one that drew it,

.. math:: I(\xi) \approx \frac1M \sum_m \log \frac{p(y_m \mid \theta_m, \xi)}{\frac1N\sum_n p(y_m \mid \theta_n, \xi)},

a lower bound on average (Foster et al., *A unified stochastic gradient approach to designing Bayesian-optimal
experiments*, AISTATS 2020). All of it is at most log N.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import ExpTransform, SigmoidTransform, TanhTransform

from pyro_invman.design.readings import Model, Reading, at_designs, repeated

_CELL = 0.25  # width of the bins, and
_REACH = 5.0  # where the noise is cut off, in standard deviations of the noise
_MOST_BINS = 4096
_OUTER = 64  # particles that draw an outcome, where outcomes are nested
_AT_ONCE = 1 << 20


def expected_gains(
    model: Model, labels: Sequence[str], positions: Tensor, designs: Tensor, generator: torch.Generator
) -> Tensor:
    """Expected information (R, C), in nats, of the outcomes of designs (R, C, *design_shape) under beliefs of particles
    at real coordinates (R, N, d)."""
    rollouts, candidates = designs.shape[:2]
    particles = positions.shape[1]
    pairs = max(1, _AT_ONCE // particles)
    few, wide = min(candidates, pairs), max(1, pairs // candidates)
    gains = []
    for r in range(0, rollouts, wide):
        row = [
            _gains(model, labels, positions[r : r + wide], designs[r : r + wide, c : c + few], generator)
            for c in range(0, candidates, few)
        ]
        gains.append(torch.cat(row, 1))
    return torch.cat(gains)


def _gains(
    model: Model, labels: Sequence[str], positions: Tensor, designs: Tensor, generator: torch.Generator
) -> Tensor:
    rollouts, candidates = designs.shape[:2]
    particles = positions.shape[1]
    places, coordinates = at_designs(designs, particles), repeated(positions, candidates)
    gains = None
    if len(labels) == 1:
        law = Reading(labels, coordinates, draw=False).of(model, places).laws[labels[0]]
        normal = as_normal(law)
        if normal is not None:
            gains = _normal_gains(*normal)
        elif law.has_enumerate_support and law.shape() == places.shape[:2]:
            gains = _enumerated_gains(law)
    if gains is None:
        gains = _nested_gains(model, labels, coordinates, places, generator)
    return gains.reshape(rollouts, candidates)


def as_normal(law: Any) -> tuple[Tensor, Tensor] | None:
    """Means (B, N) and standard deviations (B,) of one number, or of what a bijection carries to it; None where the law
    is another, or its noise depends on the particle."""
    shape = law.batch_shape
    while isinstance(law, Independent | TransformedDistribution):
        if isinstance(law, Independent) or all(
            isinstance(t, ExpTransform | SigmoidTransform | TanhTransform) for t in law.transforms
        ):
            law = law.base_dist
        else:
            return None
    if not isinstance(law, Normal) or law.loc.numel() != shape[:2].numel():
        return None
    mean, scale = law.loc.reshape(shape[:2]), law.scale.reshape(shape[:2])
    if not torch.equal(scale.amin(-1), scale.amax(-1)):
        return None
    return mean, scale[:, 0]


def _normal_gains(mean: Tensor, scale: Tensor) -> Tensor | None:
    """Information (B,) of normals around means (B, N), with standard deviations (B,); None where the noise is so small
    beside the spread that there would be too many bins."""
    low = mean.amin(-1, keepdim=True)
    place = (mean - low) / scale.unsqueeze(-1) / _CELL
    margin = math.ceil(_REACH / _CELL)
    bins = math.ceil(float(place.max())) + 2
    if bins > _MOST_BINS:
        return None
    left = place.floor()
    right_share = place - left
    index = left.long() + margin
    histogram = mean.new_zeros(len(mean), bins + 2 * margin)
    histogram.scatter_add_(1, index, 1 - right_share).scatter_add_(1, index + 1, right_share)
    # dividing a particle among two bins widens it by a sixth of the squared width on average: the noise is less by it
    grid = _CELL * torch.arange(-margin, margin + 1, dtype=mean.dtype)
    noise = torch.softmax(-0.5 * grid.square() / (1 - _CELL**2 / 6), 0)
    share = torch.nn.functional.conv1d(histogram.unsqueeze(1), noise[None, None], padding=margin).squeeze(1)
    share = share / mean.shape[1]
    return -torch.xlogy(share, share / _CELL).sum(-1) - 0.5 * math.log(2 * math.pi * math.e)


def _enumerated_gains(law: Any) -> Tensor:
    """Information (B,) of an outcome of few values, of batch shape (B, N)."""
    log_each = law.log_prob(law.enumerate_support(expand=False))
    each = log_each.exp()
    mixed = each.mean(-1)
    of_each = torch.where(each > 0, each * log_each, torch.zeros_like(each))
    return of_each.sum(0).mean(-1) - torch.xlogy(mixed, mixed).sum(0)


def _nested_gains(
    model: Model, labels: Sequence[str], coordinates: Tensor, places: Tensor, generator: torch.Generator
) -> Tensor:
    """Contrastive estimates (B,) of the information of any outcome."""
    particles = coordinates.shape[1]
    outer = torch.randperm(particles, generator=generator)[:_OUTER]
    with seeded(generator):
        drawn = Reading(labels, coordinates[:, outer]).of(model, places[:, outer]).outcomes
    total = coordinates.new_zeros(len(coordinates))
    for m, own in enumerate(outer.tolist()):
        put = {label: value[:, m : m + 1] for label, value in drawn.items()}
        log_each = Reading(labels, coordinates, outcomes=put).of(model, places).log_likelihood
        total = total + log_each[:, own] - log_each.logsumexp(-1) + math.log(particles)
    return total / len(outer)


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Pyro draws from torch's global generator: seeded from `generator` within, as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield
