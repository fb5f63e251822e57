r"""Ways from rows of one task to a belief about its latent: amortised, by importance weights, by SVI, by NUTS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.network import ManifoldNetwork

METHODS = ("amortized", "importance", "svi", "nuts")
_DEFENSIVE = 0.2  # share of importance proposals from the prior


class Found(NamedTuple):
    """A belief as a distribution, as weighted latents (S, L) with log-weights (S,), and the weights' tail shape."""

    latent: TorchDistribution
    particles: Tensor
    log_weights: Tensor
    k_hat: float


def infer(network: ManifoldNetwork, rows: Tensor, before: Belief, method: str, draws: int | None, seed: int) -> Found:
    """The belief about a task with working rows (K, D) and prior belief `before`, by one of `METHODS`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            belief = network.infer(rows, before)
        if method == "amortized" or len(rows) == 0:
            return _amortized(belief, draws, seed)
        if method == "importance":
            with torch.no_grad():
                return _importance(network, rows, before, belief, draws or 1024)
        if method == "svi":
            return _svi(network, rows, before, belief, draws, seed)
        return _nuts(network, rows, before, belief, draws or 500)


def normal(belief: Belief) -> dist.MultivariateNormal:
    """The belief as a Pyro distribution with event shape (L,)."""
    mean, factor = belief.scale_tril()
    covariance = factor @ factor.mT
    return dist.MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance))


def number_of_particles(belief: Belief) -> int:
    """How many latents stand for a belief: 1,024 where it is as wide as the prior, fewer where it is narrow."""
    _, factor = belief.scale_tril()
    width = float(factor.square().sum(-1).sqrt().clamp_max(1.0).mean())
    return 2 ** math.ceil(6 + 4 * min(1.0, 1.5 * width))


def quasi_draws(belief: Belief, number: int, seed: int) -> Tensor:
    """Latents (S, L) that cover a normal belief evenly (scrambled Sobol points)."""
    mean, factor = belief.scale_tril()
    points = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=seed).draw(number, dtype=torch.float64)
    scores = torch.special.ndtri(points.clamp(1e-6, 1 - 1e-6)).to(mean)
    return mean + scores @ factor.mT


def _even(number: int, like: Tensor) -> Tensor:
    return like.new_full((number,), -math.log(number))


def _amortized(belief: Belief, draws: int | None, seed: int) -> Found:
    particles = quasi_draws(belief, draws or number_of_particles(belief), seed)
    return Found(normal(belief), particles, _even(len(particles), particles), math.nan)


def _importance(network: ManifoldNetwork, rows: Tensor, before: Belief, belief: Belief, draws: int) -> Found:
    from_prior = max(1, round(_DEFENSIVE * draws))
    proposals = torch.cat([quasi_draws(belief, draws - from_prior, 0), quasi_draws(before, from_prior, 1)])
    share = from_prior / draws
    proposed = torch.logaddexp(
        math.log1p(-share) + belief.log_prob(proposals), math.log(share) + before.log_prob(proposals)
    )
    anchor, parts = network.sequence(rows), proposals.split(max(1, 65_536 // len(rows)))
    evidence = torch.cat([network.evidence_of(rows, z.unsqueeze(-2), anchor).sum(-1) for z in parts])
    log_weights = (before.log_prob(proposals) + evidence - proposed).double()
    log_weights, k_hat = _smoothed(log_weights - log_weights.max())
    log_weights = log_weights.to(proposals)
    return Found(dist.Empirical(proposals, log_weights), proposals, log_weights, k_hat)


def _smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """Log-weights whose largest are replaced by the order statistics of the generalized Pareto fitted to them."""
    number = min(len(log_weights) // 5, round(3 * math.sqrt(len(log_weights))))
    tail = log_weights.argsort()[-number:]
    below = log_weights.sort().values[-number - 1]
    excess = log_weights[tail].exp() - below.exp()
    if number < 5 or not bool(excess[-1] > 0) or bool((excess <= 0).any()):
        return log_weights.log_softmax(0), math.inf
    k, sigma = (float(part) for part in fit_generalized_pareto(excess))
    level = (torch.arange(number, dtype=excess.dtype, device=excess.device) + 0.5) / number
    quantile = sigma * (-level.neg().log1p() if abs(k) < 1e-6 else ((-k * level.neg().log1p()).expm1() / k))
    smooth = log_weights.clone()
    smooth[tail] = (below.exp() + quantile).log().clamp_max(0.0)
    return smooth.log_softmax(0), k


def _posterior(network: ManifoldNetwork, rows: Tensor, before: Belief) -> Callable[[], None]:
    prior, anchor = normal(before), network.sequence(rows)

    def model() -> None:
        latent = pyro.sample("z", prior)
        pyro.factor("rows", network.evidence_of(rows, latent.unsqueeze(-2), anchor).sum(-1))

    return model


class _Frozen:
    """The weights need no gradient inside, and are as they were outside."""

    def __init__(self, network: ManifoldNetwork) -> None:
        self.trained = [p for p in network.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)


def _svi(network: ManifoldNetwork, rows: Tensor, before: Belief, belief: Belief, draws: int | None, seed: int) -> Found:
    model = _posterior(network, rows, before)
    start = normal(belief)
    kept = pyro.get_param_store().get_state()
    with _Frozen(network):
        pyro.clear_param_store()
        guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values={"z": start.loc}), init_scale=1.0)
        guide()
        scale = start.scale_tril.diagonal(dim1=-2, dim2=-1)
        with torch.no_grad():
            setattr(guide, "scale", scale.clone())  # noqa: B010  (PyroParams, which mypy takes for their declaration)
            setattr(guide, "scale_tril", start.scale_tril / scale.unsqueeze(-1))  # noqa: B010
        loss = Trace_ELBO(num_particles=16, vectorize_particles=True)
        optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.985})
        svi = SVI(model, guide, optimizer, loss)
        for _ in range(300):
            svi.step()
        with torch.no_grad():
            precision = guide.get_posterior().precision_matrix.detach()
            found = Belief(precision, (precision @ guide.loc.detach().unsqueeze(-1)).squeeze(-1))
    pyro.get_param_store().set_state(kept)
    return _amortized(found, draws, seed)


def _nuts(network: ManifoldNetwork, rows: Tensor, before: Belief, belief: Belief, draws: int) -> Found:
    with _Frozen(network):
        kernel = NUTS(_posterior(network, rows, before), init_strategy=init_to_value(values={"z": belief.mean()}))
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=max(100, draws // 2), disable_progbar=True)
        mcmc.run()
    particles = mcmc.get_samples()["z"].detach()
    weights = _even(len(particles), particles)
    return Found(dist.Empirical(particles, weights), particles, weights, math.nan)
