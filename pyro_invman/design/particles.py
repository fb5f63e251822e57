r"""Beliefs as clouds of particles, many at once: sequential Monte Carlo that anneals each observation in.

A belief is R clouds of N equally weighted particles of d real coordinates, `positions` (R, N, d), one cloud for each
of R independent histories. An observation with log-likelihood l turns a cloud of the target :math:`\pi` into one of
:math:`\pi e^{l}` through powers :math:`0 < \beta_1 < \dots < 1` of :math:`e^l`, each as large as leaves a stated share
of the particles effective; every power is followed by resampling and by moves that leave it invariant.

Moves are those of differential evolution: a particle steps along the difference of two others. Differences know the
shape, the scale and the distances between modes of the cloud, so nothing is tuned, and a cloud of several modes keeps
them. Steps are drawn over two decades, along a random subset of the coordinates; each half of the cloud moves along
differences of the other half, which keeps the move reversible.

References:
    Del Moral, Doucet & Jasra, *Sequential Monte Carlo samplers*, JRSS B 2006.
    ter Braak & Vrugt, *Differential evolution Markov chain with snooker updater and fewer chains*, 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_invman.variables import DataError

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
_DECADES = 2.0
_JITTER = 1e-4
_BISECTIONS = 20


class Cloud(NamedTuple):
    """Particles (R, N, d), with their log-density before the last observation and its log-likelihood, both (R, N)."""

    positions: Tensor
    past: Tensor
    news: Tensor

    def take(self, index: Tensor) -> Cloud:
        """Particles `index` (R, n) of each cloud."""
        wide = index.unsqueeze(-1).expand(*index.shape, self.positions.shape[-1])
        return Cloud(self.positions.gather(1, wide), self.past.gather(1, index), self.news.gather(1, index))


def assimilate(
    positions: Tensor, target: Target, generator: torch.Generator, sweeps: int = 3, effective: float = 0.5
) -> Cloud:
    """The clouds after an observation.

    Arguments:
        positions: particles (R, N, d) of the belief before it.
        target: gives, for positions (R, n, d), their log-density before the observation, up to a constant, and the
            log-likelihood of the observation, both (R, n).
        sweeps: moves of every particle after each power.
        effective: share of effective particles that each power leaves.

    Raises:
        DataError: no particle of some history can have produced its observation, or a log-likelihood is NaN.
    """
    cloud = Cloud(positions, *target(positions))
    for name, term in (("log-likelihood of the observation", cloud.news), ("log-density of the belief", cloud.past)):
        if bool(term.isnan().any()):
            raise DataError(f"history {int(term.isnan().any(-1).nonzero()[0])}: the {name} is NaN at some particles")
    impossible = torch.isneginf(cloud.news).all(-1)
    if bool(impossible.any()):
        raise DataError(
            f"history {int(impossible.nonzero()[0])}: the observation has probability zero at all "
            f"{positions.shape[1]:,} particles; check it against the support of the model's outcome"
        )
    power = cloud.news.new_zeros(len(positions))
    while bool((power < 1).any()):
        step = _next_step(cloud.news, 1 - power, effective)
        cloud = cloud.take(_systematic(_weights(cloud.news, step), generator))
        # a step that reached the end of the bisection's interval ends at one exactly
        power = torch.where(power + step >= 1 - 1e-6, torch.ones_like(power), power + step)
        cloud = moved(cloud, target, power, generator, sweeps)
    return cloud


def moved(cloud: Cloud, target: Target, power: Tensor, generator: torch.Generator, sweeps: int) -> Cloud:
    """The clouds after `sweeps` moves that leave past + `power` (R,) · news invariant."""
    particles = cloud.positions.shape[1]
    if particles < 4:
        raise DataError(f"{particles} particles: a cloud moves along differences of its own, it takes at least 4")
    half = particles // 2
    for _ in range(sweeps):
        order = torch.randperm(particles, generator=generator)
        cloud = Cloud(cloud.positions[:, order], cloud.past[:, order], cloud.news[:, order])
        spread = cloud.positions.std(1, keepdim=True)
        for mine, others in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            old = Cloud(*(term[:, mine] for term in cloud))
            steps = _differences(cloud.positions[:, others], old.positions.shape[1], generator)
            proposal = old.positions + steps + _JITTER * spread * _normal_like(steps, generator)
            new = Cloud(proposal, *target(proposal))
            gain = new.past - old.past + power.unsqueeze(-1) * (new.news - old.news)
            # NaN, where both are impossible or a proposal left what floats can tell, is no acceptance
            accept = _uniform_like(gain, generator).log() < gain
            cloud.positions[:, mine] = torch.where(accept.unsqueeze(-1), new.positions, old.positions)
            cloud.past[:, mine] = torch.where(accept, new.past, old.past)
            cloud.news[:, mine] = torch.where(accept, new.news, old.news)
    return cloud


def _differences(others: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Steps (R, count, d) along differences of `others` (R, n, d), over two decades of length, some coordinates 0."""
    available = others.shape[1]
    first = torch.randint(available, (count,), generator=generator)
    second = (first + 1 + torch.randint(available - 1, (count,), generator=generator)) % available
    difference = others[:, first] - others[:, second]
    length = 10 ** (-_DECADES * _uniform_like(difference[..., :1], generator))
    crossed = _uniform_like(difference, generator) < _uniform_like(difference[..., :1], generator)
    return length * crossed * difference


def _next_step(news: Tensor, remaining: Tensor, effective: float) -> Tensor:
    """The largest steps (R,) up to `remaining` that leave a share `effective` of the particles, by bisection."""

    def enough(step: Tensor) -> Tensor:
        return 1 / _weights(news, step).square().sum(-1) >= effective * news.shape[-1]

    low, high = torch.zeros_like(remaining), remaining
    whole = enough(remaining)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = enough(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    # particles that the observation rules out may be more than the share at any power: `high` still goes forward
    return torch.where(whole, remaining, high)


def _weights(news: Tensor, step: Tensor) -> Tensor:
    # a step of zero times -inf would be NaN
    tempered = torch.where(step.unsqueeze(-1) > 0, step.unsqueeze(-1) * news, torch.zeros_like(news))
    return torch.softmax(tempered, -1)


def _systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (R, N) of particles resampled by `weights` (R, N), with one uniform draw a cloud."""
    histories, particles = weights.shape
    start = torch.rand(histories, 1, generator=generator, dtype=weights.dtype)
    places = (torch.arange(particles, dtype=weights.dtype) + start) / particles
    cumulated = weights.cumsum(-1)
    return torch.searchsorted(cumulated / cumulated[:, -1:], places).clamp(max=particles - 1)


def _uniform_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
