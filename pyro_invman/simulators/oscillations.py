r"""Damped oscillators of which only the size of the displacement is recorded, so that a time has many causes.

A task is an oscillator with latents A, γ, ω and φ; a row is a time and the absolute displacement at it,

.. math::
    y = \left| A e^{-\gamma t} \cos(\omega t + \varphi) + e \right|, \qquad e \sim N(0, \sigma^2)

with times uniform over `TIME_S`. The density of y is a folded normal. The inverse p(t | y) has a mode on each flank
of each swing. Times are settings, so they are no evidence about the oscillator.
Everything is computed in float64.

References:
    | The folded normal distribution (Leone, Nelson & Nottingham, 1961)
    | Adaptive importance sampling in general mixture classes (Cappé et al., 2008)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_invman.data import from_tensor
from pyro_invman.variables import DataError, Variable, Variables

if TYPE_CHECKING:
    import xarray as xr

TIME_S = (0.0, 10.0)
AMPLITUDE_MM = (1.0, 0.3)  # median, and standard deviation of the logarithm
DECAY_PER_S = (0.15, 0.4)  # likewise
FREQUENCY_RAD_S = (1.0, 2.0)  # uniform
NOISE_MM = 0.05

VARIABLES = Variables(
    [
        Variable("time_s", "parameter", "interval", "s", *TIME_S),
        Variable("amplitude", "observation", "positive", "mm"),
    ]
)
_NODES = 600  # over an unknown time; at most 0.026 s apart, where the density has an sd of 0.025 s or more


class Oscillator(NamedTuple):
    """Latents of tasks, each of one shape: mm, 1/s, rad/s and rad."""

    amplitude_mm: Tensor
    decay_per_s: Tensor
    frequency_rad_s: Tensor
    phase_rad: Tensor


class Predictive(NamedTuple):
    """Log-density (M,) of new rows, and the effective number of draws that it rests on."""

    log_prob: Tensor
    effective_sample_size: float


def sample_latent(num_tasks: int, seed: int) -> Oscillator:
    """Latents (T,) of the tasks that `simulate` draws with the same seed."""
    return _oscillator(_standard(num_tasks, torch.Generator().manual_seed(seed)))


def displacement(time: Tensor, task: Oscillator) -> Tensor:
    """Signed displacement without noise, mm; time and latents broadcast."""
    swing = torch.cos(task.frequency_rad_s * time + task.phase_rad)
    return task.amplitude_mm * torch.exp(-task.decay_per_s * time) * swing


def log_prob(amplitude: Tensor, time: Tensor, task: Oscillator) -> Tensor:
    r"""log p(amplitude | time, task), the folded normal :math:`\log [N(y; m, \sigma^2) + N(-y; m, \sigma^2)]`.

    A missing (NaN) amplitude contributes 0, a missing time is integrated over `TIME_S`.

    Arguments:
        amplitude: Recorded absolute displacement, mm.
        time: s; the three arguments broadcast.
        task: Latents.

    Example:
        >>> task = Oscillator(*torch.tensor([1.0, 0.1, 1.5, 0.0], dtype=torch.float64))
        >>> log_prob(torch.tensor(1.0), torch.tensor([0.0, 2.0]), task)
        tensor([ 2.0768, -5.1024], dtype=torch.float64)
    """
    amplitude, time = torch.broadcast_tensors(amplitude.double(), time.double())
    density = _folded(amplitude.nan_to_num(0.0), displacement(time.nan_to_num(0.0), task))
    if time.isnan().any():
        nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(_NODES))
        nodes = TIME_S[0] + (TIME_S[1] - TIME_S[0]) * (nodes + 1) / 2
        swing = displacement(nodes, Oscillator(*(latent.unsqueeze(-1) for latent in task)))
        average = (_folded(amplitude.nan_to_num(0.0).unsqueeze(-1), swing) + (weights / 2).log()).logsumexp(-1)
        density = torch.where(time.isnan(), average, density)
    return density.masked_fill(amplitude.isnan(), 0.0)


def simulate(num_tasks: int, rows_per_task: int, seed: int, missing: float = 0.0) -> xr.Dataset:
    """Rows of many oscillators, ordered by task, with coordinate `task`.

    Arguments:
        num_tasks: Number of tasks T.
        rows_per_task: Rows of each task.
        seed: Of values and mask; the same seed gives the same values whatever is missing.
        missing: Share of the cells that are left out, completely at random.

    Raises:
        DataError: If a count is below 1 or `missing` is no share below 1.

    Example:
        >>> simulate(num_tasks=3, rows_per_task=4, seed=0).sizes["row"]
        12
    """
    for label, count in (("num_tasks", num_tasks), ("rows_per_task", rows_per_task)):
        if count < 1:
            raise DataError(f"{label} is {count}; expected at least 1")
    if not 0 <= missing < 1:
        raise DataError(f"missing is {missing}; expected a share of at least 0 and below 1")
    generator = torch.Generator().manual_seed(seed)
    task = _oscillator(_standard(num_tasks, generator).unsqueeze(1))
    shape = (num_tasks, rows_per_task)
    time = TIME_S[0] + (TIME_S[1] - TIME_S[0]) * torch.rand(shape, dtype=torch.float64, generator=generator)
    noise = NOISE_MM * torch.randn(shape, dtype=torch.float64, generator=generator)
    values = torch.stack([time, (displacement(time, task) + noise).abs()], -1)
    left_out = torch.rand(values.shape, dtype=torch.float64, generator=generator) < missing
    rows = from_tensor(values.masked_fill(left_out, math.nan).flatten(0, 1), VARIABLES)
    return rows.assign_coords(task=("row", [f"task {t}" for t in range(num_tasks) for _ in range(rows_per_task)]))


def exact_log_predictive(
    amplitude: Tensor,
    time: Tensor,
    context_amplitude: Tensor,
    context_time: Tensor,
    seed: int,
    num_samples: int = 20_000,
) -> Predictive:
    r"""log p(amplitude | time, context rows) of a new task, by self-normalised importance sampling of its latents,

    .. math:: p(y | t, C) \approx \sum_s w_s\, p(y | t, z_s) \Big/ \sum_s w_s, \quad w_s = p(z_s) p(C | z_s) / q(z_s)

    which is exact as the draws grow in number. q is the prior p(z) where at least a twentieth of its draws count;
    with more context, q is a normal mixture, adapted to tempered posteriors and mixed with the prior.

    Arguments:
        amplitude, time: New rows (M,) to score, each given the context alone.
        context_amplitude, context_time: Rows (K,) of the task; K may be 0. NaN is integrated out.
        seed: Of the draws.
        num_samples: Draws S.

    Returns:
        Log-densities (M,) and the effective sample size, between 1 and S; below some hundreds draw more.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = _standard(num_samples, generator)
    draws = torch.cat([draws[:, :3], draws[:, 3:] / 2], -1)  # a phase and its opposite record the same
    log_proposal = _log_prior(draws)
    for _ in range(_STAGES):
        likelihood = _log_likelihood(context_amplitude, context_time, draws).sum(0)
        log_ratio = _log_prior(draws) - log_proposal
        if _effective(log_ratio + likelihood) >= _LEAST_SHARE * num_samples:
            break
        low, high = 0.0, 1.0  # the coldest posterior of which enough draws count
        for _ in range(30):
            power = (low + high) / 2
            enough = _effective(log_ratio + power * likelihood) >= _LEAST_SHARE * num_samples
            low, high = (power, high) if enough else (low, power)
        mixture = _Mixture.around(draws, (log_ratio + low * likelihood).softmax(0), generator)
        draws = mixture.sample(num_samples, generator)
        log_proposal = mixture.log_prob(draws)
    log_weight = _log_prior(draws) - log_proposal + _log_likelihood(context_amplitude, context_time, draws).sum(0)
    found = _log_likelihood(amplitude, time, draws)
    return Predictive((found + log_weight.log_softmax(0)).logsumexp(-1), _effective(log_weight))


_STAGES = 12
_LEAST_SHARE = 0.05  # of the draws that count in each stage
_COMPONENTS = 200
_PRIOR_SHARE = 0.1


class _Mixture(NamedTuple):
    """Normals about centres (C, 4), one covariance, wrapped in the phase; a share of the draws is the prior's."""

    centres: Tensor
    scale_tril: Tensor

    @classmethod
    def around(cls, draws: Tensor, weights: Tensor, generator: torch.Generator) -> _Mixture:
        best = draws[weights.argmax()]
        deviation = _wrapped(draws - best)
        deviation = deviation - weights @ deviation
        covariance = (weights.unsqueeze(-1) * deviation).mT @ deviation + 1e-12 * torch.eye(4, dtype=torch.float64)
        centres = draws[torch.multinomial(weights, _COMPONENTS, replacement=True, generator=generator)]
        return cls(centres, _COMPONENTS**-0.125 * torch.linalg.cholesky(covariance))

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        centres = self.centres[torch.randint(_COMPONENTS, (num_samples,), generator=generator)]
        draws = centres + torch.randn(num_samples, 4, dtype=torch.float64, generator=generator) @ self.scale_tril.mT
        draws[:, 3] = draws[:, 3].remainder(0.5)
        prior = _standard(num_samples, generator)
        prior[:, 3] /= 2
        from_prior = torch.rand(num_samples, 1, dtype=torch.float64, generator=generator) < _PRIOR_SHARE
        return torch.where(from_prior, prior, draws)

    def log_prob(self, draws: Tensor) -> Tensor:
        whiten = torch.linalg.inv(self.scale_tril)
        turns = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64) * whiten[3, 3]
        c = self.centres[:, :3] @ whiten[:, :3].mT
        found = []
        for block in draws.split(2_000):  # the phase comes last, so that turns move the last score alone
            x = block[:, :3] @ whiten[:, :3].mT
            phase = whiten[3, 3] * (block[:, 3:] - self.centres[:, 3]) + x[:, 3:] - c[:, 3]
            kernel = -torch.cdist(x[:, :3], c[:, :3]).square().unsqueeze(-1) - (phase.unsqueeze(-1) + turns).square()
            found.append((kernel / 2).flatten(1).logsumexp(-1))
        constant = whiten.diagonal().log().sum() - 2 * math.log(2 * math.pi) - math.log(_COMPONENTS)
        prior = _log_prior(draws) + math.log(_PRIOR_SHARE)
        return torch.logaddexp(torch.cat(found) + constant + math.log1p(-_PRIOR_SHARE), prior)


def _standard(num: int, generator: torch.Generator) -> Tensor:
    """Draws (num, 4): standard scores of log A and log γ, shares of the ranges of ω and φ."""
    scores = torch.randn(num, 2, dtype=torch.float64, generator=generator)
    return torch.cat([scores, torch.rand(num, 2, dtype=torch.float64, generator=generator)], -1)


def _oscillator(standard: Tensor) -> Oscillator:
    a, g, w, p = standard.unbind(-1)
    amplitude, decay = (median * (sd * z).exp() for z, (median, sd) in ((a, AMPLITUDE_MM), (g, DECAY_PER_S)))
    low, high = FREQUENCY_RAD_S
    return Oscillator(amplitude, decay, low + (high - low) * w, 2 * math.pi * p)


def _log_prior(draws: Tensor) -> Tensor:
    """Density with the phase in half a turn; -inf for a frequency out of range."""
    a, g, w, _ = draws.unbind(-1)
    density = -(a.square() + g.square()) / 2 - math.log(2 * math.pi) + math.log(2)
    return density.masked_fill((w < 0) | (w > 1), -math.inf)


def _wrapped(difference: Tensor) -> Tensor:
    phase = (difference[..., 3:] + 0.25).remainder(0.5) - 0.25
    return torch.cat([difference[..., :3], phase], -1)


def _log_likelihood(amplitude: Tensor, time: Tensor, draws: Tensor) -> Tensor:
    """Log-densities (M, S) of rows (M,) under draws (S, 4), a row at a time to spare memory."""
    task = _oscillator(draws)
    rows = [log_prob(y, t, task) for y, t in zip(amplitude, time, strict=True)]
    return torch.stack([r.expand(len(draws)) for r in rows]) if rows else draws.new_zeros(0, len(draws))


def _folded(amplitude: Tensor, mean: Tensor) -> Tensor:
    """Log-density of |N(mean, NOISE_MM^2)|."""
    sides = [-(((amplitude - sign * mean) / NOISE_MM) ** 2) / 2 for sign in (1, -1)]
    density = torch.logaddexp(*sides) - math.log(NOISE_MM * math.sqrt(2 * math.pi))
    return density.masked_fill(amplitude < 0, -math.inf)


def _effective(log_weight: Tensor) -> float:
    return float((2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp())
