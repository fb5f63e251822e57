r"""Conditionals of a flow inside Pyro's own inference, against closed forms.

The flow here is exact: with one component a cell its heads are normal, so that it is the multivariate normal its base
holds, in working coordinates. `x1`, `x2` are parameters (`x2` positive: log-normal), `y1`, `y2` observations. A user's
model adds :math:`s \sim N(w \cdot (x_1, \log x_2), \sigma^2)`. In :math:`\theta = (x_1, \log x_2)` all is Gaussian:
every posterior, evidence and gap of a mean-field guide is known.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_invman.distributions import ConditionalFlow
from pyro_invman.joint import JointFlow
from pyro_invman.variables import Variable, Variables

VARIABLES = Variables(
    [
        Variable("x1", "parameter"),
        Variable("x2", "parameter", "positive"),
        Variable("y1", "observation"),
        Variable("y2", "observation"),
        Variable("kind", "condition", "categorical", levels=("u", "v", "w")),
    ]
)
REAL = Variables([v for v in VARIABLES if not v.discrete])
WEIGHTS = torch.tensor([0.8, -0.5], dtype=torch.float64)
SIGMA, SEEN = 0.6, 1.1
TARGETS = ["x1", "x2"]


@pytest.fixture(autouse=True)
def double_precision(fresh_state: None) -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@cache
def gaussian() -> tuple[Tensor, Tensor]:
    """Mean and covariance of (x1, log x2, y1, y2)."""
    spread = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.6, 0, 0], [0.7, -0.4, 0.5, 0], [-0.2, 0.5, 0.3, 0.8]]).double()
    return torch.tensor([0.5, -0.3, 1.0, 2.0]).double(), spread @ spread.T


def exact_flow() -> JointFlow:
    """The flow that is this normal."""
    flow = JointFlow(REAL, width=4, trunk_blocks=1, components=1).double()
    mean, covariance = gaussian()
    loc, scale = torch.tensor([0.2, 0.1, -1.0, 1.0]).double(), torch.tensor([2.0, 0.7, 1.5, 0.9]).double()
    with torch.no_grad():
        flow.density.out.bias[2] = math.log1p(-flow.density.min_scale)
        flow.standardization.loc.copy_(loc)
        flow.standardization.scale.copy_(scale)
        base = flow.density.context.base
        base.mean.copy_((mean - loc) / scale)
        base.covariance.copy_(covariance / torch.outer(scale, scale))
    return flow


def normal_given(targets: list[int], given: list[int], value: Tensor) -> MultivariateNormal:
    """The textbook conditional of `gaussian()`."""
    mean, covariance = gaussian()
    gain = torch.linalg.solve(covariance[given][:, given], covariance[given][:, targets]).T
    rest = covariance[targets][:, targets] - gain @ covariance[given][:, targets]
    return MultivariateNormal(mean[targets] + (value - mean[given]) @ gain.T, (rest + rest.T) / 2)


def observe(prior: MultivariateNormal) -> tuple[MultivariateNormal, Tensor]:
    """Posterior over θ after s = SEEN, and the log-evidence of that."""
    variance = WEIGHTS @ prior.covariance_matrix @ WEIGHTS + SIGMA**2
    gain = prior.covariance_matrix @ WEIGHTS / variance
    residual = SEEN - WEIGHTS @ prior.mean
    covariance = prior.covariance_matrix - variance * torch.outer(gain, gain)
    evidence = dist.Normal(WEIGHTS @ prior.mean, variance.sqrt()).log_prob(torch.tensor(SEEN))
    return MultivariateNormal(prior.mean + gain * residual, (covariance + covariance.T) / 2), evidence


Y = torch.tensor([1.4, 1.5], dtype=torch.float64)


@cache
def prior() -> MultivariateNormal:
    """p(θ | y)."""
    return normal_given([0, 1], [2, 3], Y)


def log_second(x: Tensor) -> Tensor:
    """(x1, x2) to θ = (x1, log x2)."""
    return torch.stack([x[..., 0], x[..., 1].log()], -1)


def model_with(flow: JointFlow) -> Callable[[], Tensor]:
    """The flow, given two observations, is the prior; the likelihood is the user's."""

    def model() -> Tensor:
        x = pyro.sample("x", flow.conditional(TARGETS, {"y1": Y[0], "y2": Y[1]}))
        return pyro.sample("s", dist.Normal(log_second(x) @ WEIGHTS, SIGMA), obs=torch.tensor(SEEN))

    return model


def of_log(normal: MultivariateNormal) -> dist.TransformedDistribution:
    """A normal over θ as a law over x."""
    second = dist.transforms.CatTransform([dist.transforms.identity_transform, dist.transforms.ExpTransform()], -1)
    return dist.TransformedDistribution(dist.MultivariateNormal(normal.mean, normal.covariance_matrix), [second])


def exact_guide() -> Tensor:
    """The posterior of `model_with(exact_flow())`."""
    return pyro.sample("x", of_log(observe(prior())[0]))


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------- the ground all below stands on
def test_the_exact_flow_is_the_normal() -> None:
    flow = exact_flow()
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(20, 4, generator=generator)
    x = theta.clone()
    x[:, 1] = theta[:, 1].exp()
    for targets, given in (([0, 1], [2, 3]), ([2, 3], [0, 1]), ([1], [0, 3]), ([0, 1, 2, 3], []), ([3], [])):
        d = flow.conditional([REAL.names[j] for j in targets], {REAL.names[j]: x[:, j] for j in given})
        log_det = theta[:, 1] if 1 in targets else 0.0
        expected = normal_given(targets, given, theta[:, given]).log_prob(theta[:, targets]) - log_det
        close(d.log_prob(x[:, targets]), expected, 1e-9)


# ---------------------------------------------------------------------- the evidence lower bound
ELBOS = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "vectorised particles": lambda: Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=0),
    "looped particles": lambda: Trace_ELBO(num_particles=3),
    "JitTrace_ELBO": lambda: JitTrace_ELBO(ignore_jit_warnings=True),
    "JitTrace_ELBO, vectorised": lambda: JitTrace_ELBO(
        num_particles=7, vectorize_particles=True, max_plate_nesting=0, ignore_jit_warnings=True
    ),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "RenyiELBO": lambda: RenyiELBO(alpha=0.5, num_particles=3),
}
every_elbo = pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)


@every_elbo
def test_flow_as_prior_with_the_posterior_as_guide(elbo: Callable[[], Any]) -> None:
    """With the posterior for a guide every estimate of the bound is the log-evidence, without noise."""
    flow = exact_flow()
    model = model_with(flow)
    flow.requires_grad_(False)
    dummy = pyro.param("dummy", torch.tensor(0.0))  # jit differentiates what is in the store
    svi = SVI(model, lambda: (exact_guide(), pyro.param("dummy", dummy))[0], pyro.optim.SGD({"lr": 0.0}), elbo())
    for _ in range(3):
        close(svi.evaluate_loss(), -observe(prior())[1].item(), 1e-8)


@every_elbo
def test_flow_as_guide(elbo: Callable[[], Any]) -> None:
    """The flow's own posterior p(x | y), as guide of the model whose posterior it is: the loss is −log p(y), without
    noise; called in the guide, the flow registers its weights."""
    flow = exact_flow()
    mean, covariance = gaussian()
    marginal = MultivariateNormal(mean[:2], covariance[:2, :2])
    gain = torch.linalg.solve(covariance[:2, :2], covariance[:2, 2:]).T
    rest = covariance[2:, 2:] - gain @ covariance[:2, 2:]

    def model() -> None:
        x = pyro.sample("x", of_log(marginal))
        loc = mean[2:] + (gain @ (log_second(x) - mean[:2]).unsqueeze(-1)).squeeze(-1)
        pyro.sample("y", dist.MultivariateNormal(loc, (rest + rest.T) / 2), obs=Y)

    def guide() -> None:
        pyro.sample("x", flow(TARGETS, {"y1": Y[0], "y2": Y[1]}))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo())
    evidence = MultivariateNormal(mean[2:], covariance[2:, 2:]).log_prob(Y).item()
    close(svi.evaluate_loss(), -evidence, 1e-8)
    assert "density$$$out.bias" in pyro.get_param_store()


def test_gradient_of_the_bound_by_jit_is_that_without() -> None:
    """Of a guide that is not the posterior, with a missing cell in a given, in the weights of the flow."""
    gradients = []
    # loss_and_grads, as SVI does: in Pyro 1.9 JitTrace_ELBO.differentiable_loss has twice the gradient, of any model
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        flow = exact_flow()

        def model(flow: JointFlow = flow) -> None:
            x = pyro.sample("x", flow(TARGETS, {"y1": Y[0], "y2": torch.tensor(math.nan)}))
            pyro.sample("y", flow(["y1", "y2"], {"x1": x[..., 0]}), obs=torch.tensor([1.0, math.nan]))

        def guide() -> None:
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("x", of_log(MultivariateNormal(loc, torch.eye(2))))

        for repeat in range(2):  # the second call runs what the first has traced
            flow.zero_grad()
            pyro.set_rng_seed(repeat)
            elbo.loss_and_grads(model, guide)
        assert flow.density.out.bias.grad is not None
        gradients.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
    assert gradients[0].isfinite().all()
    assert gradients[0].abs().max() > 1e-2
    close(gradients[1], gradients[0], 1e-10)


def test_bound_with_a_categorical_target_in_the_guide() -> None:
    """Not reparametrised: Pyro takes the score-function estimate. Its mean over 4,000 particles against the gradient of
    the exact KL to a uniform prior, within 5 standard errors."""
    flow = JointFlow(VARIABLES, width=4, trunk_blocks=1, components=1).double()

    def model() -> None:
        pyro.sample("kind", dist.Categorical(torch.ones(3) / 3).expand([1]).to_event(1))

    def guide() -> None:
        pyro.sample("kind", flow(["kind"], {"x1": 0.3}))

    bias = flow.density.out_levels.bias
    with torch.no_grad():
        bias.copy_(torch.tensor([0.5, -0.4, 0.2]))
    log_mass = flow.conditional(["kind"], {"x1": 0.3}).log_prob(torch.arange(3.0).unsqueeze(-1))
    kl = (log_mass.exp() * (log_mass + math.log(3))).sum()
    (expected,) = torch.autograd.grad(kl, bias)
    number = 4000
    elbo = Trace_ELBO(num_particles=number, vectorize_particles=True, max_plate_nesting=0)
    loss = elbo.differentiable_loss(model, guide)
    (found,) = torch.autograd.grad(loss, bias)
    mass = log_mass.exp().detach()
    scores = torch.eye(3) - mass
    terms = scores * (log_mass.detach() + math.log(3)).unsqueeze(-1)
    error = ((mass.unsqueeze(-1) * (terms - expected) ** 2).sum(0) / number).sqrt()
    assert ((found - expected).abs() < 5 * error).all()
    assert expected.abs().max() > 10 * error.max()


# ---------------------------------------------------------------------- guides that Pyro makes
def gap_of_mean_field() -> float:
    """KL of the best factorised normal from the posterior over θ."""
    precision = observe(prior())[0].precision_matrix
    return 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()


GUIDES: dict[str, tuple[Callable[[Any], Any], Callable[[], float]]] = {
    "AutoNormal": (lambda m: autoguide.AutoNormal(m, init_scale=0.3), gap_of_mean_field),
    "AutoDiagonalNormal": (lambda m: autoguide.AutoDiagonalNormal(m, init_scale=0.3), gap_of_mean_field),
    "AutoNormalMessenger": (lambda m: autoguide.AutoNormalMessenger(m, init_scale=0.3), gap_of_mean_field),
    "AutoHierarchicalNormalMessenger": (
        lambda m: autoguide.AutoHierarchicalNormalMessenger(m, init_scale=0.3),
        gap_of_mean_field,
    ),
    "AutoMultivariateNormal": (lambda m: autoguide.AutoMultivariateNormal(m, init_scale=0.3), lambda: 0.0),
    "AutoLowRankMultivariateNormal": (
        lambda m: autoguide.AutoLowRankMultivariateNormal(m, init_scale=0.3, rank=1),
        lambda: 0.0,
    ),
    "AutoStructured": (
        lambda m: autoguide.AutoStructured(m, conditionals="mvn", dependencies={}, init_scale=0.3),
        lambda: 0.0,
    ),
    "AutoIAFNormal": (lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[8]), lambda: 0.0),
}


@pytest.mark.parametrize("name", GUIDES)
def test_autoguides_reach_their_best(name: str) -> None:
    """After 130 steps the bound is short of the log-evidence by the guide's own gap, 0.54 nats for a factorised guide
    and zero where the family holds the posterior, within 0.09 nats (the noise of 2,000 draws included)."""
    make, gap = GUIDES[name]
    flow = exact_flow().requires_grad_(False)
    model = model_with(flow)
    guide = make(model)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(model, guide, optim, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(130):
        svi.step()
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
    with torch.no_grad():
        short = elbo.loss(model, guide) + observe(prior())[1].item()
    assert gap_of_mean_field() > 0.5  # so that the families are told apart
    close(short, gap(), 0.09)
    draws = torch.stack([guide()["x"] for _ in range(3)])
    assert draws.shape == (3, 2)
    assert (draws[:, 1] > 0).all()


def minimise(model: Callable[[], Tensor], guide: autoguide.AutoGuide) -> None:
    """A guide without noise, to the end."""
    elbo = Trace_ELBO()
    elbo.differentiable_loss(model, guide)  # makes the parameters
    lbfgs = torch.optim.LBFGS(guide.parameters(), max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = elbo.differentiable_loss(model, guide)
        loss.backward()
        return loss

    lbfgs.step(closure)


def test_autodelta_finds_the_mode() -> None:
    """In x, where the density of a log-normal carries 1/x2, so that the mode lies at θ = m − Σ e₂."""
    flow = exact_flow().requires_grad_(False)
    model = model_with(flow)
    guide = autoguide.AutoDelta(model, init_loc_fn=init_to_median)
    minimise(model, guide)
    posterior, _ = observe(prior())
    close(log_second(guide.median()["x"].detach()), posterior.mean - posterior.covariance_matrix[:, 1], 2e-5)


def test_autolaplace_is_exact_for_a_normal() -> None:
    """Takes second derivatives of the flow's log-density."""
    flow = exact_flow().requires_grad_(False)
    model = model_with(flow)
    guide = autoguide.AutoLaplaceApproximation(model)
    minimise(model, guide)
    posterior, _ = observe(prior())
    normal = guide.laplace_approximation().get_posterior()
    close(normal.mean.detach(), posterior.mean, 2e-5)
    close(normal.covariance_matrix.detach(), posterior.covariance_matrix, 1e-6)


# ---------------------------------------------------------------------- Markov chains
def moments_agree(draws: Tensor, expected: MultivariateNormal, effective: float) -> None:
    """Means within 4 standard errors and variances within 4 of theirs, at a number of effective draws the kernel surely
    reaches; for a right chain of at least that many, each test has a false-alarm rate of 6e-5."""
    deviation = expected.variance.sqrt()
    assert ((draws.mean(0) - expected.mean).abs() < 4 * deviation / math.sqrt(effective)).all()
    assert ((draws.var(0) / expected.variance - 1).abs() < 4 * math.sqrt(2 / effective)).all()
    correlation = expected.covariance_matrix[0, 1] / deviation.prod()
    assert (torch.corrcoef(draws.T)[0, 1] - correlation).abs() < 4 * (1 - correlation**2) / math.sqrt(effective)


def test_nuts_with_a_flow_as_prior() -> None:
    flow = exact_flow().requires_grad_(False)
    kernel = NUTS(model_with(flow), jit_compile=True, ignore_jit_warnings=True, max_tree_depth=2)
    chain = MCMC(kernel, num_samples=300, warmup_steps=60, disable_progbar=True)
    chain.run()
    x = chain.get_samples()["x"]
    assert x.shape == (300, 2)
    moments_agree(log_second(x), observe(prior())[0], effective=100)


def test_a_flow_that_is_given_nothing_is_a_prior_under_jit() -> None:
    flow = exact_flow().requires_grad_(False)
    mean, covariance = gaussian()
    marginal = MultivariateNormal(mean[:2], covariance[:2, :2])

    def log_prob(x: Tensor) -> Tensor:
        return flow.conditional(TARGETS).log_prob(x)

    theta = marginal.sample((5,))
    x = torch.stack([theta[:, 0], theta[:, 1].exp()], -1)
    with warnings.catch_warnings():  # of shapes that are taken for constant, as they are
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(log_prob, (x,))
    close(traced(x + 0.0), marginal.log_prob(theta) - theta[:, 1], 1e-9)


def test_nuts_with_a_flow_as_likelihood() -> None:
    """The user's prior on (x1, log x2); three rows of the flow's p(y1, y2 | x1, x2), one with y2 not measured."""
    flow = exact_flow().requires_grad_(False)
    rows = torch.tensor([[1.5, 1.0], [0.6, math.nan], [2.0, 2.5]])
    own = MultivariateNormal(torch.tensor([0.0, 0.2]), torch.tensor([[1.5, 0.3], [0.3, 0.8]]))

    def model() -> None:
        x = pyro.sample("x", dist.MultivariateNormal(own.mean, own.covariance_matrix))
        with pyro.plate("rows", 3):
            pyro.sample("y", flow.conditional(["y1", "y2"], {"x1": x[..., 0], "x2": x[..., 1].exp()}), obs=rows)

    mean, covariance = gaussian()
    gain = torch.linalg.solve(covariance[:2, :2], covariance[:2, 2:]).T
    noise = covariance[2:, 2:] - gain @ covariance[:2, 2:]
    precision, weighted = own.precision_matrix, own.precision_matrix @ own.mean
    for row in rows:
        seen = ~row.isnan()
        inverse = torch.linalg.inv(noise[seen][:, seen])
        precision = precision + gain[seen].T @ inverse @ gain[seen]
        weighted = weighted + gain[seen].T @ inverse @ (row - mean[2:] + gain @ mean[:2])[seen]
    covariance = torch.linalg.inv(precision)
    expected = MultivariateNormal(covariance @ weighted, (covariance + covariance.T) / 2)
    chain = MCMC(NUTS(model, max_tree_depth=2), num_samples=150, warmup_steps=50, disable_progbar=True)
    chain.run()
    moments_agree(chain.get_samples()["x"], expected, effective=60)


# ---------------------------------------------------------------------- prediction
@pytest.mark.parametrize("parallel", [False, True], ids=["looped", "parallel"])
def test_predictive(parallel: bool) -> None:
    """Predictions of y2 for posterior draws of x, within 4 standard errors."""
    flow = exact_flow()

    def model() -> None:
        x = pyro.sample("x", flow.conditional(TARGETS, {"y1": Y[0]}))
        pyro.sample("y", flow.conditional(["y2"], {"x1": x[..., 0], "x2": x[..., 1], "y1": Y[0]}))

    number = 4000 if parallel else 60
    with torch.no_grad():
        found = Predictive(model, num_samples=number, parallel=parallel)()
    assert found["x"].shape[0] == found["y"].shape[0] == number
    assert found["x"].reshape(number, -1).shape == (number, 2)
    y = found["y"].reshape(number)
    expected = normal_given([3], [2], Y[:1])
    assert (y.mean() - expected.mean).abs() < 4 * expected.stddev / math.sqrt(number)
    assert (y.var() / expected.variance - 1).abs() < 4 * math.sqrt(2 / number)


def test_predictive_from_posterior_draws_and_a_guide() -> None:
    flow = exact_flow()

    def model() -> None:
        x = pyro.sample("x", flow.conditional(TARGETS))
        pyro.sample("y", flow.conditional(["y1", "y2"], {"x1": x[..., 0], "x2": x[..., 1]}))

    draws = {"x": torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 0.5]])}
    with torch.no_grad():
        assert Predictive(model, draws)()["y"].shape == (3, 2)
        found = Predictive(model, guide=exact_guide, num_samples=5, return_sites=["x", "y"])()
    assert found["x"].shape == found["y"].shape == (5, 2)


def test_predictive_of_a_categorical_target() -> None:
    """Shares of the levels against their probabilities, χ² within its 1e-5 quantile (23 for 2 degrees of freedom)."""
    flow = JointFlow(VARIABLES, width=4, trunk_blocks=1, components=1).double()
    with torch.no_grad():
        flow.density.out_levels.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))

    def model() -> None:
        pyro.sample("kind", flow.conditional(["kind", "x1"], {"y1": 0.0}))

    with torch.no_grad():
        codes = Predictive(model, num_samples=3000, parallel=True)()["kind"][..., 0].flatten()
        mass = flow.conditional(["kind"], {"y1": 0.0}).log_prob(torch.arange(3.0).unsqueeze(-1)).exp()
    counts = torch.bincount(codes.long(), minlength=3)
    assert ((counts - 3000 * mass) ** 2 / (3000 * mass)).sum() < 23


# ---------------------------------------------------------------------- effect handlers and plates
def test_trace_condition_and_replay() -> None:
    flow = exact_flow()

    def model() -> Tensor:
        x = pyro.sample("x", flow.conditional(TARGETS))
        return pyro.sample("y", flow.conditional(["y1", "y2"], {"x1": x[..., 0], "x2": x[..., 1]}))

    trace = poutine.trace(model).get_trace()
    x, y = trace.nodes["x"]["value"], trace.nodes["y"]["value"]
    whole = flow.conditional(REAL.names)
    close(trace.log_prob_sum(), whole.log_prob(torch.cat([x, y])), 1e-10)
    held = poutine.trace(poutine.condition(model, data={"y": Y})).get_trace()
    assert held.nodes["y"]["is_observed"]
    x = held.nodes["x"]["value"]
    close(held.log_prob_sum(), whole.log_prob(torch.cat([x, Y])), 1e-10)
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    assert torch.equal(again.nodes["x"]["value"], trace.nodes["x"]["value"])
    assert torch.equal(again.nodes["y"]["value"], trace.nodes["y"]["value"])
    close(again.log_prob_sum(), trace.log_prob_sum(), 1e-12)
    scaled = poutine.trace(poutine.scale(poutine.replay(model, trace=trace), 0.25)).get_trace()
    close(scaled.log_prob_sum(), 0.25 * trace.log_prob_sum(), 1e-12)
    done = poutine.trace(poutine.do(model, data={"x": torch.tensor([0.0, 1.0])})).get_trace()
    expected = flow.conditional(["y1", "y2"], {"x1": 0.0, "x2": 1.0}).log_prob(done.nodes["y"]["value"])
    done.compute_log_prob()
    close(done.nodes["y"]["log_prob_sum"], expected, 1e-12)


def table(number: int = 12) -> Tensor:
    """Rows (N, 4) drawn from the flow, some cells missing."""
    pyro.set_rng_seed(5)
    with torch.no_grad():
        rows = exact_flow().conditional(REAL.names).sample((number,))
    return torch.where(torch.rand(rows.shape) < 0.2, math.nan, rows)


def test_subsampling_in_a_plate_is_unbiased() -> None:
    """The mean over the parts of a partition is the whole, exactly."""
    flow, rows = exact_flow(), table()

    def model(part: Tensor | None) -> None:
        with pyro.plate("rows", len(rows), subsample=part) as index:
            pyro.sample("row", flow.conditional(REAL.names), obs=rows[index])

    def score(part: Tensor | None) -> Tensor:
        return poutine.trace(model).get_trace(part).log_prob_sum()

    whole = score(None)
    close(whole, flow.conditional(REAL.names).log_prob(rows).sum(), 1e-10)
    parts = [score(part) for part in torch.randperm(len(rows)).split(4)]
    close(torch.stack(parts).mean(), whole, 1e-9)


def test_a_local_latent_in_a_subsampled_plate() -> None:
    """x for each row, given the row's own (partly missing) y, with the flow itself for an amortised guide: the bound of
    every part of a partition is the scaled evidence of its rows, without noise."""
    flow, rows = exact_flow(), table()
    y = rows[:, 2:]

    def model(part: Tensor) -> None:
        with pyro.plate("rows", len(y), subsample=part) as index:
            x = pyro.sample("x", flow.conditional(TARGETS))
            pyro.sample("y", flow.conditional(["y1", "y2"], {"x1": x[..., 0], "x2": x[..., 1]}), obs=y[index])

    def guide(part: Tensor) -> None:
        with pyro.plate("rows", len(y), subsample=part) as index:
            pyro.sample("x", flow.conditional(TARGETS, {"y1": y[index, 0], "y2": y[index, 1]}))

    evidence = flow.conditional(["y1", "y2"]).log_prob(y)
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)):
        for part in torch.arange(len(y)).split(4):
            with torch.no_grad():
                loss = elbo.loss(model, guide, part)
            close(loss, -evidence[part].sum().item() * len(y) / 4, 1e-7)


def test_masked_rows_leave_no_trace_in_the_gradient() -> None:
    """Where a mask hides a row, neither its score nor its gradient counts, whatever stands there."""
    flow, rows = exact_flow(), table(6)
    kept = torch.tensor([True, False, True, True, False, True])

    def model(rows: Tensor, kept: Tensor) -> None:
        with pyro.plate("rows", len(rows)), poutine.mask(mask=kept):
            pyro.sample("row", flow(REAL.names), obs=rows)

    gradients = []
    hidden = torch.where(kept.unsqueeze(-1), rows, math.nan)
    for values, mask in ((hidden, kept), (rows, kept), (rows[kept], torch.ones(4, dtype=torch.bool))):
        flow.zero_grad()
        trace = poutine.trace(model).get_trace(values, mask)
        trace.log_prob_sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
        assert gradients[-1].isfinite().all()
    close(gradients[0], gradients[2], 1e-10)
    close(gradients[1], gradients[2], 1e-10)


def test_relations_of_a_model() -> None:
    """What `render_model` draws: which site hangs on which, and whether it was observed."""
    relations = get_model_relations(model_with(exact_flow()))
    assert relations["sample_sample"] == {"x": [], "s": ["x"]}
    assert relations["sample_dist"] == {"x": "ConditionalFlow", "s": "Normal"}
    assert relations["observed"] == ["s"]


def test_render_model() -> None:
    if importlib.util.find_spec("graphviz") is None:
        pytest.skip("the graphviz package, which pyro.render_model needs, is not installed")
    graph = pyro.render_model(model_with(exact_flow()), render_distributions=True)
    assert "ConditionalFlow" in graph.source


# ---------------------------------------------------------------------- training with everything else
class Process(PyroModule):
    """A user's model with a flow as a part."""

    def __init__(self, flow: JointFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, rows: Tensor) -> None:
        with pyro.plate("rows", len(rows)):
            pyro.sample("row", self.flow.conditional(REAL.names), obs=rows)


def by_attribute(flow: JointFlow) -> Callable[[Tensor], None]:
    return Process(flow)


def by_call(flow: JointFlow) -> Callable[[Tensor], None]:
    def model(rows: Tensor) -> None:
        with pyro.plate("rows", len(rows)):
            pyro.sample("row", flow(REAL.names), obs=rows)

    return model


def by_module(flow: JointFlow) -> Callable[[Tensor], None]:
    def model(rows: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", len(rows)):
            pyro.sample("row", flow.conditional(REAL.names), obs=rows)

    return model


def by_closure(flow: JointFlow) -> Callable[[Tensor], None]:
    def model(rows: Tensor) -> None:
        with pyro.plate("rows", len(rows)):
            pyro.sample("row", flow.conditional(REAL.names), obs=rows)

    return model


def nothing(rows: Tensor) -> None:
    """The guide of a model without latents."""


@pytest.mark.parametrize("held", [by_attribute, by_call, by_module])
def test_svi_trains_a_flow(held: Callable[[JointFlow], Callable[[Tensor], None]]) -> None:
    """From a standard normal the loss falls to that of the law the rows are from, −E log p, within 0.1 nats a row."""
    flow = JointFlow(REAL, width=16, trunk_blocks=1, components=1).double()
    rows = table(300)
    model = held(flow)
    trace = poutine.trace(model).get_trace(rows)
    names = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    assert len(names) == len(list(flow.parameters()))
    before = [p.detach().clone() for p in flow.parameters()]
    svi = SVI(model, nothing, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.97}), Trace_ELBO())
    first = svi.evaluate_loss(rows) / len(rows)
    for _ in range(80):
        svi.step(rows)
    last = svi.evaluate_loss(rows) / len(rows)
    with torch.no_grad():
        best = -exact_flow().conditional(REAL.names).log_prob(rows).mean().item()
    assert first > best + 0.5
    assert last < best + 0.1
    moved = [not torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True)]
    assert sum(moved) >= len(moved) - 1
    # the store holds the flow's own weights, so that the flow answers with what was learned
    assert -flow.conditional(REAL.names).log_prob(rows).mean().item() == pytest.approx(last)


def test_a_closure_registers_nothing() -> None:
    """`conditional` alone is a distribution like any other: a flow that should train must be called, be an attribute of
    a `PyroModule`, or be registered."""
    flow = exact_flow()
    trace = poutine.trace(by_closure(flow)).get_trace(table())
    assert [site["type"] for site in trace.nodes.values() if site["type"] == "param"] == []
    assert len(pyro.get_param_store()) == 0


def test_two_flows_of_one_model_train_apart() -> None:
    """As attributes of one `PyroModule` each has its own names in the store."""

    class Two(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = exact_flow(), exact_flow()

        def forward(self) -> None:
            pyro.sample("a", self.one(["x1"]), obs=torch.tensor([3.0]))
            pyro.sample("b", self.two(["x1"]), obs=torch.tensor([-3.0]))

    model = Two()
    names = [name for name, site in poutine.trace(model).get_trace().nodes.items() if site["type"] == "param"]
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    svi = SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    svi.step()
    start = exact_flow().density.out.bias
    assert (model.one.density.out.bias - start)[1] > 0 > (model.two.density.out.bias - start)[1]


def test_a_fitted_flow_can_be_frozen() -> None:
    """With `requires_grad_(False)` a flow in a model is left as it is, while the rest learns (Pyro warns of it unless
    the flow is in `eval` mode)."""
    flow = exact_flow().requires_grad_(False).eval()

    def model() -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        pyro.sample("y", flow(["y1"], {"x1": shift}), obs=torch.tensor([2.0]))

    before = [p.clone() for p in flow.parameters()]
    svi = SVI(model, lambda: None, pyro.optim.ClippedAdam({"lr": 0.3, "lrd": 0.96}), Trace_ELBO())
    for _ in range(120):
        svi.step()
    assert list(pyro.get_param_store()) == ["shift"]
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))
    # the maximum over a given cell of p(y1 | x1): its mean is what was seen
    mean, covariance = gaussian()
    slope = covariance[2, 0] / covariance[0, 0]
    close(pyro.param("shift").detach(), mean[0] + (2.0 - mean[2]) / slope, 0.01)
    assert isinstance(flow(["y1"]), ConditionalFlow)


def test_a_second_flow_under_the_same_name_is_refused():
    """Pyro would hand back the first one's weights and leave the second untrained, without a word."""
    first, second = a_flow_pair()

    def model(flow):
        flow(["x1"]).log_prob(torch.zeros(1))

    pyro.clear_param_store()
    model(first)
    model(first)
    with pytest.raises(RuntimeError, match="another flow"):
        model(second)
    pyro.clear_param_store()
    model(second)


def a_flow_pair():
    variables = Variables([Variable("x1", "parameter"), Variable("y1", "observation")])
    return JointFlow(variables, width=8), JointFlow(variables, width=8)
