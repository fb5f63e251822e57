"""The problems of the benchmark against exact answers and against the published reference posteriors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.sbi_problems import (
    PROBLEMS,
    REFERENCES,
    Problem,
    dataset,
    infected_fraction,
    log_populations,
)
from pyro_invman.data import to_tensor, variables_of

needs_references = pytest.mark.skipif(
    not REFERENCES.is_dir(), reason=f"the reference posteriors of the sbi benchmark are not at {REFERENCES}"
)
OBSERVATIONS = (1, 2, 3, 4, 5)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
class TestEveryProblem:
    def test_simulations_have_the_declared_shapes_and_stay_in_support(self, problem: Problem) -> None:
        theta, x = problem.simulate(300, seed=3)
        assert theta.shape == (300, len(problem.parameters))
        assert x.shape == (300, len(problem.observations))
        assert theta.dtype == x.dtype == torch.float32
        for support, values in ((problem.parameter_support, theta), (problem.observation_support, x)):
            assert values.isfinite().all()
            if support.kind == "positive":
                assert (values > 0).all()
            if support.kind == "interval":
                assert support.lower is not None and support.upper is not None
                assert ((values > support.lower) & (values < support.upper)).all()
            if support.resolution:
                assert (values % support.resolution == 0).all()

    def test_dataset_declares_the_problem(self, problem: Problem) -> None:
        theta, x = problem.simulate(300, seed=3)
        if problem.name == "sir":
            x[0, 0] = 1.0  # else constant
        ds = dataset(problem, theta, x)
        variables = variables_of(ds)
        assert variables.with_role("parameter") == problem.parameters
        assert variables.with_role("observation") == problem.observations
        for variable in variables:
            is_parameter = variable.name in problem.parameters
            support = problem.parameter_support if is_parameter else problem.observation_support
            assert (variable.support, variable.lower, variable.upper) == (
                support.kind,
                support.lower,
                support.upper,
            )
            assert variable.resolution == support.resolution
        assert torch.equal(to_tensor(ds, variables), torch.cat([theta, x], -1).double())

    def test_the_same_seed_gives_the_same_rows_and_leaves_the_global_generator_alone(self, problem: Problem) -> None:
        before = torch.random.get_rng_state()
        first, again, other = (problem.simulate(20, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[1], other[1])
        assert torch.equal(before, torch.random.get_rng_state())

    def test_simulator_and_likelihood_agree(self, problem: Problem) -> None:
        r"""The score has mean zero under the simulator, :math:`E_x[\partial_\theta \log p(x|\theta)] = 0`;
        for moons, whose support moves with theta, mass and moments of the density are the simulator's."""
        torch.manual_seed(0)
        theta = problem.simulate(1, seed=5)[0].double()
        if problem.name != "two_moons":
            rows = theta.expand(500, -1)
            _assert_mean_zero(_scores(problem, rows, problem.simulator(rows).double())[0])
            return
        side = (torch.arange(800, dtype=torch.double) + 0.5) / 2_000 - 0.2
        centre = problem.simulator(theta.expand(20_000, 2)).mean(0)
        x = centre + torch.cartesian_prod(side, side)
        mass = problem.log_likelihood(theta, x).exp() / 2_000**2
        assert abs(mass.sum().item() - 1) < 2e-3
        seen = problem.simulator(theta.expand(20_000, 2)) - centre
        for power in (1, 2, 3):
            exact = (mass[:, None] * (x - centre) ** power).sum(0)
            error = (seen**power).std(0) / math.sqrt(len(seen)) + 1e-5
            assert (((seen**power).mean(0) - exact).abs() < 5 * error).all()


def _scores(problem: Problem, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of log-likelihood and log-prior by theta, each ``(N, D)``, by central differences."""
    dimension = theta.shape[-1]
    step = 1e-4 * theta.abs().clamp(min=1e-2)
    shift = torch.eye(dimension, dtype=theta.dtype)[:, None] * step
    moved = torch.stack([theta + shift, theta - shift]).flatten(0, 2)
    observed = x.expand(2, dimension, len(theta), -1).flatten(0, 2)

    def gradient(values: Tensor) -> Tensor:
        up, down = values.unflatten(0, (2, dimension, len(theta)))
        return (up - down).T / (2 * step)

    return gradient(problem.log_likelihood(moved, observed)), gradient(problem.prior.log_prob(moved))


def _assert_mean_zero(values: Tensor, errors: float = 4.5) -> None:
    """Each column's mean within `errors` standard errors of zero: a false alarm in 7e-6 a column."""
    standardised = values.mean(0) / (values.std(0) / math.sqrt(len(values)))
    assert (standardised.abs() < errors).all(), f"means in standard errors: {standardised.tolist()}"


class TestDifferentialEquations:
    def test_epidemic_agrees_with_an_adaptive_solver(self) -> None:
        integrate = pytest.importorskip("scipy.integrate", reason="scipy, the other solver, is not installed")
        theta = torch.tensor([[0.6, 0.1], [1.5, 0.2], [0.2, 0.15]], dtype=torch.double)
        found = infected_fraction(theta)
        for (beta, gamma), row in zip(theta.tolist(), found, strict=True):

            def field(t: float, u: list[float], beta: float = beta, gamma: float = gamma) -> list[float]:
                return [-beta * u[0] * u[1], beta * u[0] * u[1] - gamma * u[1]]

            exact = integrate.solve_ivp(
                field,
                (0, 153),
                [1 - 1e-6, 1e-6],
                "DOP853",
                [17 * i for i in range(10)],
                rtol=1e-11,
                atol=1e-14,
            )
            torch.testing.assert_close(row, torch.from_numpy(exact.y[1]), atol=1e-6, rtol=1e-5)

    def test_predators_keep_the_invariant_and_converge(self) -> None:
        r"""Along every orbit :math:`\delta x - \gamma \log x + \beta y - \alpha \log y` is kept."""
        theta = PROBLEMS["lotka_volterra"].simulate(200, seed=0)[0].double()
        alpha, beta, gamma, delta = (column[:, None] for column in theta.unbind(-1))
        prey, predators = log_populations(theta).split(10, -1)
        assert ((prey > -23) & (predators > -23)).all(-1).sum() > 150
        constant = delta * prey.exp() - gamma * prey + beta * predators.exp() - alpha * predators
        within = ((prey > -23) & (predators > -23)).all(-1)
        drift = (constant - constant[:, :1]).abs() / constant[:, :1].abs()
        assert drift[within].max() < 1e-6
        torch.testing.assert_close(log_populations(theta, 840), log_populations(theta), atol=1e-4, rtol=0)


class TestExactPosteriors:
    @pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.log_posterior])
    def test_posterior_is_proportional_to_prior_times_likelihood(self, name: str) -> None:
        problem = PROBLEMS[name]
        assert problem.log_posterior is not None
        theta, x = problem.simulate(200, seed=1)
        nearby = theta * 0.999
        ours = problem.log_posterior(nearby, x) - problem.log_posterior(theta, x)
        joint = problem.prior.log_prob(nearby) + problem.log_likelihood(nearby, x)
        joint = joint - problem.prior.log_prob(theta) - problem.log_likelihood(theta, x)
        both = ours.isfinite()
        assert both.float().mean() > 0.9
        torch.testing.assert_close(ours[both], joint[both], atol=2e-3, rtol=1e-3)

    @pytest.mark.parametrize(("name", "bound"), [("two_moons", 1.0), ("gaussian_mixture", 10.0)])
    def test_posterior_integrates_to_one(self, name: str, bound: float) -> None:
        problem = PROBLEMS[name]
        assert problem.log_posterior is not None
        for x in problem.simulate(5, seed=2)[1]:
            side = (2 * (torch.arange(1500) + 0.5) / 1500 - 1) * bound
            theta = torch.cartesian_prod(side, side)
            mass = problem.log_posterior(theta, x).exp().sum() * (side[1] - side[0]).square()
            assert abs(mass.item() - 1) < 0.01


@needs_references
@pytest.mark.parametrize("observation", OBSERVATIONS)
class TestReferencePosteriors:
    """Our prior and likelihood against published draws from each posterior."""

    @pytest.mark.parametrize("name", ["slcp", "sir", "lotka_volterra", "gaussian_linear"])
    def test_score_identity(self, name: str, observation: int) -> None:
        r"""For any g that vanishes on the boundary
        :math:`E[g_i \partial_i \log p(\theta, x) + \partial_i g_i] = 0`; with ``g = theta`` on the
        half-line, ``9 - theta²`` on SLCP's box, and once more times theta."""
        problem = PROBLEMS[name]
        x, _, draws = problem.reference(observation)
        theta = draws[:500].double()
        if name == "slcp":
            theta = theta[(theta.abs() < 2.999).all(-1)]
        likelihood, prior = _scores(problem, theta, x.double())
        score = likelihood + prior
        centre = theta.mean(0)
        if name == "slcp":
            g, slope = 9 - theta.square(), -2 * theta
        elif name == "gaussian_linear":
            g, slope = torch.ones_like(theta), torch.zeros_like(theta)
        else:
            g, slope = theta, torch.ones_like(theta)
        _assert_mean_zero(g * score + slope)
        _assert_mean_zero(g * (theta - centre) * score + slope * (theta - centre) + g)

    @pytest.mark.parametrize("name", ["two_moons", "gaussian_mixture"])
    def test_weighted_draws_from_the_prior(self, name: str, observation: int) -> None:
        """Moments of theta under prior draws weighted by our likelihood, within five standard errors."""
        problem = PROBLEMS[name]
        x, _, draws = problem.reference(observation)
        torch.manual_seed(observation)
        theta = problem.prior.sample((1_000_000,))
        weights = problem.log_likelihood(theta, x).softmax(0)
        effective = 1 / weights.square().sum().item()
        assert effective > 500
        for features in (lambda t: t, lambda t: t.square(), lambda t: t.prod(-1, keepdim=True)):
            ours, theirs = features(theta), features(draws)
            mean = (weights[:, None] * ours).sum(0)
            error = theirs.std(0) * math.sqrt(1 / len(theirs) + 1 / effective)
            assert ((mean - theirs.mean(0)).abs() < 5 * error).all()

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_observation_is_as_likely_as_simulations_at_its_true_parameters(self, name: str, observation: int) -> None:
        """Its log-likelihood lies within what 400 simulations at the same parameters reach."""
        problem = PROBLEMS[name]
        x, theta, _ = problem.reference(observation)
        torch.manual_seed(observation)
        many = theta.expand(400, -1)
        typical = problem.log_likelihood(many, problem.simulator(many))
        found = problem.log_likelihood(theta[None], x[None])
        assert typical.min() <= found + 1e-3 and found <= typical.max() + 1e-3
