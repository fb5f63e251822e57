r"""What whole histories of designs told: bounds on the total information of a way of choosing designs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_invman.design.gains import seeded
from pyro_invman.design.readings import Model, Reading, at_designs, repeated
from pyro_invman.variables import DataError

_AT_ONCE = 1 << 20


def total_information(
    model: Model,
    latents: Mapping[str, Tensor],
    designs: Tensor,
    observations: Mapping[str, Tensor],
    num_contrastive: int = 100_000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""A lower and an upper bound, each history's share (R,), in nats, on what T outcomes tell about the latents.

    For histories simulated from latents :math:`\theta_0` of the prior, and L more prior draws,

    .. math::
        \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1{L+1}\sum_{l=0}^{L} p(y_{1:T} \mid \theta_l)} \;\le\; I \;\le\;
        \log \frac{p(y_{1:T} \mid \theta_0)}{\frac1L\sum_{l=1}^{L} p(y_{1:T} \mid \theta_l)}

    on average over histories (sPCE and sNMC). Designs may depend on earlier outcomes in any way. The lower one cannot
    exceed log(L + 1); the upper one is loose where exp(I) is more than L. The contrastive draws are the same for all
    histories, so averages over histories share their (small) error.

    Arguments:
        model: as in `Sequential`.
        latents: the values that produced each history, by site, (R, *shape).
        designs: (R, T, *design_shape).
        observations: by site, (R, T, *shape).
        num_contrastive: L.
        seed: of the contrastive draws.

    Raises:
        DataError: shapes do not agree, an outcome is NaN, or something is observed within the model already.

    References:
        Foster et al., *Deep adaptive design: amortizing sequential Bayesian experimental design*, ICML 2021.

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

    def log_likelihood(values: Mapping[str, Tensor], rows: slice) -> Tensor:
        """(r, n) of values (1 or r, n, *shape) of the latents in histories `rows`."""
        count = len(designs[rows])
        particles = next(iter(values.values())).shape[1]
        given = {k: repeated(v.expand(count, *v.shape[1:]), steps) for k, v in values.items()}
        put = {k: v[rows].reshape(count * steps, 1, *v.shape[2:]) for k, v in observations.items()}
        reading = Reading(labels, latents=given, outcomes=put).of(model, at_designs(designs[rows], particles))
        if reading.known:
            raise DataError(f"site {reading.known[0]!r} is observed within the model: its prior cannot be drawn from")
        return reading.log_likelihood.reshape(count, steps, particles).sum(1)

    truth = log_likelihood({k: v.unsqueeze(1) for k, v in latents.items()}, slice(None))[:, 0]
    others = torch.full_like(truth, -math.inf)
    generator = torch.Generator().manual_seed(seed)
    at_once = min(num_contrastive, max(1, _AT_ONCE // steps))
    block = max(1, _AT_ONCE // (steps * at_once))
    for start in range(0, num_contrastive, at_once):
        count = min(at_once, num_contrastive - start)
        with seeded(generator):
            drawn = Reading(labels).of(model, at_designs(designs[:1, :1], count)).latents
        for first in range(0, histories, block):
            rows = slice(first, first + block)
            others[rows] = torch.logaddexp(others[rows], log_likelihood(drawn, rows).logsumexp(-1))
    lower = truth - torch.logaddexp(others, truth) + math.log(num_contrastive + 1)
    return lower, truth - others + math.log(num_contrastive)
