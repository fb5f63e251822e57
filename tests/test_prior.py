"""Priors on the latent of a task."""

import math

import torch

from pyro_invman.tasks.prior import GaussianProcessPrior, NormalPrior


def test_the_normal_prior_knows_no_conditions():
    mean, variance = NormalPrior(3).moments(torch.randn(5, 2))
    assert torch.equal(mean, torch.zeros(5, 3))
    assert torch.equal(variance, torch.ones(5, 3))


def exact_moments(prior: GaussianProcessPrior, conditions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By conditioning the joint normal of f at inducing and new conditions, and integrating over q(u)."""
    kernel = prior.kernel
    among = kernel(prior.inducing).to_dense() + 1e-4 * torch.eye(len(prior.inducing))
    across = kernel(conditions, prior.inducing).to_dense()
    factor = torch.linalg.cholesky(among)
    scale = torch.nn.functional.softplus(prior.whitened_scale)
    weights = torch.linalg.solve(among, across.mT).mT
    share = prior.share.sigmoid()
    mean = share.sqrt() * (weights @ factor @ prior.whitened_loc)
    spread = torch.stack(
        [(weights @ factor @ scale[:, one].diag()).square().sum(-1) for one in range(prior.latent_dim)], -1
    )
    left = 1 - (weights * across).sum(-1, keepdim=True)
    return mean, share * (left + spread) + 1 - share


def test_moments_are_those_of_the_process_given_q():
    torch.manual_seed(0)
    prior = GaussianProcessPrior(torch.randn(6, 2), 3)
    with torch.no_grad():
        prior.whitened_loc.normal_()
        prior.whitened_scale.uniform_(-3, 0)
        prior.share.fill_(1.0)
    conditions = torch.randn(9, 2)
    for found, expected in zip(prior.moments(conditions), exact_moments(prior, conditions), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_near_what_was_seen_informed_and_far_away_wide():
    prior = GaussianProcessPrior(torch.zeros(1, 1), 1)
    with torch.no_grad():
        prior.whitened_loc.fill_(2.0)
        prior.whitened_scale.fill_(-4.0)
        prior.share.fill_(2.0)
    mean, variance = prior.moments(torch.tensor([[0.0], [50.0]]))
    assert mean[0] > 1.5
    assert variance[0] < 0.2
    torch.testing.assert_close(mean[1], torch.zeros(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance[1], torch.ones(1), atol=1e-5, rtol=0)


def test_given_inducing_values_averages_to_the_moments():
    torch.manual_seed(0)
    prior = GaussianProcessPrior(torch.randn(4, 1), 1)
    with torch.no_grad():
        prior.whitened_loc.normal_()
        prior.whitened_scale.fill_(-1.0)
    scale = math.log1p(math.exp(-1.0))
    conditions = torch.randn(3, 1)
    draws = prior.whitened_loc + scale * torch.randn(20_000, 4, 1)
    means, variances = zip(*[prior.given_inducing(conditions, u) for u in draws[:4000]], strict=True)
    mean, variance = prior.moments(conditions)
    together = torch.stack(means)
    torch.testing.assert_close(together.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(together.var(0) + variances[0], variance, atol=0.03, rtol=0)


def test_the_divergence_of_q_is_that_of_normals():
    torch.manual_seed(0)
    prior = GaussianProcessPrior(torch.randn(4, 1), 2)
    with torch.no_grad():
        prior.whitened_loc.normal_()
        prior.whitened_scale.uniform_(-2, 1)
    q = torch.distributions.Normal(prior.whitened_loc, torch.nn.functional.softplus(prior.whitened_scale))
    p = torch.distributions.Normal(torch.zeros(4, 2), torch.ones(4, 2))
    torch.testing.assert_close(prior.kl(), torch.distributions.kl_divergence(q, p).sum())
