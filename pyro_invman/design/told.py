r"""What whole histories of designs told: bounds on the total information of a way of choosing designs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pyro_invman.design.gains import seeded
from pyro_invman.design.mixtures import Mixtures
from pyro_invman.design.readings import Model, Reading, at_designs, repeated
from pyro_invman.variables import DataError

_AT_ONCE = 1 << 20
_COMPONENTS = 12
_PRIOR = 0.05  # share of the prior in what contrastive draws near a belief are taken from


def total_information(
    model: Model,
    latents: Mapping[str, Tensor],
    designs: Tensor,
    observations: Mapping[str, Tensor],
    num_contrastive: int = 100_000,
    seed: int = 0,
    belief: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A lower and an upper bound, each history's share (R,), in nats, on what T outcomes tell about the latents.

    For histories simulated from latents :math:`\theta_0` of the prior, and L more prior draws,

    .. math::
        \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1{L+1}\sum_{l=0}^{L} p(y_{1:T} \mid \theta_l)} \;\le\; I \;\le\;
        \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1L\sum_{l=1}^{L} p(y_{1:T} \mid \theta_l)}

    on average over histories (sPCE and sNMC). Designs may depend on earlier outcomes in any way. The lower one cannot
    exceed log(L + 1); the upper one is loose where exp(I) is more than L. The contrastive draws are the same for all
    histories, so averages over histories share their (small) error.

    With a `belief` about each history, contrastive draws are taken from a law q fitted to it (a mixture of normals, a
    twentieth of the prior mixed in) and weighed,

    .. math::
        \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1{L+1}\sum_{l=0}^{L} w_l\, p(y_{1:T} \mid \theta_l)} \;\le\; I
        \;\le\; \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1L\sum_{l=1}^{L} w_l\, p(y_{1:T} \mid \theta_l)}, \qquad
        w_l = \frac{p(\theta_l)}{q(\theta_l \mid y_{1:T})},

    bounds whatever q is (adaptive contrastive estimation and variational nested Monte Carlo), which close as q comes
    near the posterior, however large I is.

    Arguments:
        model: as in `Sequential`.
        latents: the values that produced each history, by site, (R, *shape).
        designs: (R, T, *design_shape).
        observations: by site, (R, T, *shape).
        num_contrastive: L.
        seed: of the contrastive draws.
        belief: particles (R, N, d) given each history and not its latents, as `Sequential.positions`; None for
            contrastive draws from the prior.

    Raises:
        DataError: shapes do not agree, an outcome is NaN, or something is observed within the model already.

    References:
        Foster et al., *Deep adaptive design: amortizing sequential Bayesian experimental design*, ICML 2021.
        Foster et al., *A unified stochastic gradient approach to designing Bayesian-optimal experiments*, AISTATS 2020.

    Examples:
        >>> import pyro, pyro.distributions as dist
        >>> def model(designs):
        ...     with pyro.plate_stack("leading", designs.shape):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(theta * designs, 1.0))
        >>> theta, designs = torch.linspace(-1.5, 1.5, 4), torch.ones(4, 2)
        >>> lower, upper = total_information(model, {"theta": theta}, designs, {"y": theta[:, None] * designs}, 1000)
        >>> bool((lower <= upper).all()), lower.shape
        (True, torch.Size([4]))
    """
    histories, steps = designs.shape[:2]
    labels = list(observations)
    for name, value in (*latents.items(), *observations.items()):
        expected = (histories, steps) if name in observations else (histories,)
        if tuple(value.shape[: len(expected)]) != expected or bool(value.isnan().any()):
            raise DataError(f"{name} has shape {tuple(value.shape)} or holds NaN, expected {expected} in front, no NaN")

    def log_likelihood(rows: slice, values: Mapping[str, Tensor] | None, places: Tensor | None = None) -> Tensor:
        """(r, n) in histories `rows`, of values (1 or r, n, *shape) of the latents or of their places (r, n, d)."""
        count = len(designs[rows])
        particles = places.shape[1] if places is not None else next(iter((values or {}).values())).shape[1]
        given = None
        if values is not None:
            given = {k: repeated(v.expand(count, *v.shape[1:]), steps) for k, v in values.items()}
        put = {k: v[rows].reshape(count * steps, 1, *v.shape[2:]) for k, v in observations.items()}
        reading = Reading(labels, None if places is None else repeated(places, steps), given, put)
        reading = reading.of(model, at_designs(designs[rows], particles))
        if reading.known:
            raise DataError(f"site {reading.known[0]!r} is observed within the model: its prior cannot be drawn from")
        return reading.log_likelihood.reshape(count, steps, particles).sum(1)

    generator = torch.Generator().manual_seed(seed)
    truth = log_likelihood(slice(None), {k: v.unsqueeze(1) for k, v in latents.items()})[:, 0]
    at_once = min(num_contrastive, max(1, _AT_ONCE // steps))
    block = max(1, _AT_ONCE // (steps * at_once))
    others = torch.full_like(truth, -math.inf)
    if belief is None:
        for count in _pieces(num_contrastive, at_once):
            drawn = _prior(model, labels, designs[:1], count, generator).latents
            for first in range(0, histories, block):
                rows = slice(first, first + block)
                others[rows] = torch.logaddexp(others[rows], log_likelihood(rows, drawn).logsumexp(-1))
        own = truth
    else:
        if belief.dim() != 3 or len(belief) != histories:
            raise DataError(f"belief has shape {tuple(belief.shape)}, expected ({histories}, N, d)")
        fitted = Mixtures.fit(belief, min(_COMPONENTS, belief.shape[1] // 20 + 1), generator)
        read = Reading(labels, latents={k: v.unsqueeze(1) for k, v in latents.items()})
        true = read.of(model, at_designs(designs[:, :1], 1)).coordinates
        own = truth + _log_weight(model, labels, designs, fitted, true)[:, 0]
        for first in range(0, histories, block):
            rows = slice(first, first + block)
            near = Mixtures(*(part[rows] for part in fitted))
            for count in _pieces(num_contrastive, at_once):
                places = near.sample(count, generator)
                anywhere = _prior(model, labels, designs[rows], count, generator).coordinates
                wide = torch.rand(places.shape[:2], generator=generator) < _PRIOR
                places = torch.where(wide.unsqueeze(-1), anywhere, places)
                found = log_likelihood(rows, None, places) + _log_weight(model, labels, designs[rows], near, places)
                others[rows] = torch.logaddexp(others[rows], found.logsumexp(-1))
    lower = truth - torch.logaddexp(others, own) + math.log(num_contrastive + 1)
    return lower, truth - others + math.log(num_contrastive)


def _pieces(number: int, most: int) -> Iterator[int]:
    for start in range(0, number, most):
        yield min(most, number - start)


def _prior(model: Model, labels: list[str], designs: Tensor, number: int, generator: torch.Generator) -> Reading:
    """`number` draws of the prior for each history."""
    with seeded(generator):
        return Reading(labels).of(model, at_designs(designs[:, :1], number))


def _log_weight(model: Model, labels: list[str], designs: Tensor, near: Mixtures, places: Tensor) -> Tensor:
    """log p(θ) − log q(θ) (r, n) at places (r, n, d), q the fitted law with its share of the prior."""
    reading = Reading(labels, places, draw=False).of(model, at_designs(designs[:, :1], places.shape[1]))
    prior = reading.log_prior
    return prior - torch.logaddexp(near.log_prob(places) + math.log1p(-_PRIOR), prior + math.log(_PRIOR))
