r"""A map between the variables of two models, inside one Pyro model: a conditional of the first is the base
distribution, pushed through the map at a condition, and what comes out is given to the second.

Joint flows with one component a cell are the normals that their bases hold, and the map between two Gaussians is
linear, so that density, posterior and evidence of the whole are closed forms; then a bent map, and task manifolds, for
what must hold of any.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import Tensor

import pyro_invman as pim
from pyro_invman.density.velocity import Solver
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian, LinearGaussian
from pyro_invman.tasks.posterior import TaskPosterior

F64 = torch.float64
BEFORE = pim.Variables(
    [pim.Variable("power", "parameter"), pim.Variable("width", "observation"), pim.Variable("depth", "observation")]
)
AFTER = pim.Variables(
    [pim.Variable("width", "parameter"), pim.Variable("depth", "parameter"), pim.Variable("strength", "observation")]
)
FIRST = LinearGaussian(
    BEFORE, torch.tensor([0.5, 1.0, -1.0]), torch.tensor([[1.0, 0.5, 0.3], [0.5, 1.2, 0.2], [0.3, 0.2, 0.7]])
)
SECOND = LinearGaussian(
    AFTER, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([[1.5, 0.4, 0.9], [0.4, 0.9, -0.5], [0.9, -0.5, 1.6]])
)
M0, M1 = torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([2.0, 1.0], dtype=F64)
ROOT = torch.tensor([[1.3, 0.4], [0.4, 0.8]], dtype=F64)  # the optimal map from N(M0, I) to N(M1, ROOT²)
POWER, SEEN = torch.tensor(1.1, dtype=F64), torch.tensor(2.5, dtype=F64)
FEW = Solver("euler", 1)  # exact where the flow stands still


@pytest.fixture(autouse=True)
def double_precision(fresh_state: None) -> None:
    torch.set_default_dtype(F64)


def exact_flow(process: LinearGaussian) -> pim.JointFlow:
    """The joint flow that is this normal."""
    flow = pim.JointFlow(process.variables, width=4, trunk_blocks=1, components=1)
    with torch.no_grad():
        flow.density.out.bias[2] = math.log1p(-flow.density.min_scale)
        flow.density.context.base.mean.copy_(process.mean)
        flow.density.context.base.covariance.copy_(process.covariance)
    return flow


def linear_map() -> pim.ConditionalTransport:
    """x ↦ M1 + ROOT (x − M0) at every condition: flows untrained between N(M0, I) and N(M1, ROOT²)."""
    transport = pim.ConditionalTransport(2, 1, width=8)
    rows, columns = torch.tril_indices(2, 2)
    values, vectors = torch.linalg.eigh(ROOT)
    log_root = vectors @ values.log().diag() @ vectors.mT
    for law, mean, log in zip(transport.laws, (M0, M1), (torch.zeros(2, 2), log_root), strict=True):
        law.gaussian.out.bias.data = torch.cat([mean, log[rows, columns]])
    return transport


def bent_map(dim: int) -> pim.ConditionalTransport:
    torch.manual_seed(1)
    transport = pim.ConditionalTransport(dim, 1, engine="batch", width=16)
    for parameter in transport.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return transport


class Chain(PyroModule):
    """before | power from the first model, after by the map, strength | after from the second."""

    def __init__(self, transport: pim.ConditionalTransport) -> None:
        super().__init__()
        self.first, self.second, self.transport = exact_flow(FIRST), exact_flow(SECOND), transport

    def forward(self) -> Tensor:
        base = self.first(["width", "depth"], {"power": POWER})
        go = self.transport.condition(torch.tensor([0.4]), FEW)
        after = pyro.sample("after", dist.TransformedDistribution(base, [go]))
        law = self.second(["strength"], {"width": after[..., 0], "depth": after[..., 1]})
        pyro.sample("strength", law, obs=SEEN.unsqueeze(-1))
        return after


def closed_form() -> tuple[dist.MultivariateNormal, dist.MultivariateNormal, Tensor]:
    """Law of `after`, its posterior, and the log-evidence of the strength seen."""
    before = FIRST.conditional(["width", "depth"], {"power": POWER})
    mean, spread = M1 + ROOT @ (before.mean - M0), ROOT @ before.covariance_matrix @ ROOT.mT
    slopes = torch.linalg.solve(SECOND.covariance[:2, :2], SECOND.covariance[:2, 2])
    left = SECOND.covariance[2, 2] - slopes @ SECOND.covariance[:2, 2]
    expected = SECOND.mean[2] + slopes @ (mean - SECOND.mean[:2])
    variance = slopes @ spread @ slopes + left
    gain = spread @ slopes / variance
    posterior = spread - variance * torch.outer(gain, gain)
    return (
        dist.MultivariateNormal(mean, spread),
        dist.MultivariateNormal(mean + gain * (SEEN - expected), (posterior + posterior.mT) / 2),
        dist.Normal(expected, variance.sqrt()).log_prob(SEEN),
    )


# ------------------------------------------------------------------------------------------------ closed forms
def test_the_density_of_the_chain_and_its_slope() -> None:
    """log p(after, strength) is log p(after | strength) + log p(strength)."""
    model, (law, posterior, evidence) = Chain(linear_map()), closed_form()
    for point in law.sample((5,)):
        point.requires_grad_()
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data={"after": point})).get_trace()
        score = trace.log_prob_sum()
        torch.testing.assert_close(score, posterior.log_prob(point) + evidence, atol=1e-7, rtol=0)
        (slope,) = torch.autograd.grad(score, point)
        (expected,) = torch.autograd.grad(posterior.log_prob(point), point)
        torch.testing.assert_close(slope, expected, atol=1e-6, rtol=0)


def test_draws_of_the_chain_follow_the_pushed_law() -> None:
    law = closed_form()[0]
    site = pyro.poutine.trace(Chain(linear_map())).get_trace().nodes["after"]
    number = 4000
    draws = site["fn"].sample((number,))
    white = torch.linalg.solve_triangular(law.scale_tril, (draws - law.mean).mT, upper=False)
    assert white.mean(-1).abs().max() < 4.5 / number**0.5
    assert (white.cov() - torch.eye(2)).abs().max() < 4.5 * (2 / number) ** 0.5


def test_a_variational_posterior_of_the_chain() -> None:
    """A full normal guide holds the posterior, so that the evidence lower bound reaches the evidence."""
    model, (prior, posterior, evidence) = Chain(linear_map()), closed_form()
    model.eval().requires_grad_(False)
    guide = AutoMultivariateNormal(model, init_to_value(values={"after": prior.mean}), init_scale=0.5)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.02 ** (1 / 300)}), elbo)
    losses = [svi.step() for _ in range(300)]
    assert all(math.isfinite(loss) for loss in losses)
    found = guide.get_posterior()
    assert torch.distributions.kl_divergence(found, posterior) < 0.05
    with torch.no_grad():
        bound = -sum(svi.evaluate_loss() for _ in range(50)) / 50
    assert abs(bound - evidence.item()) < 0.1


def test_weights_of_both_models_and_of_the_map_are_trained() -> None:
    model = Chain(linear_map())
    guide = AutoMultivariateNormal(model)
    guide()
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).loss_and_grads(model, guide)
    for part in (model.first.density.out.bias, model.second.density.out.bias, model.transport.fields[0].out.weight):
        assert part.grad is not None and part.grad.isfinite().all() and part.grad.abs().max() > 0
    for name, value in model.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), name


def test_nuts_finds_the_posterior_of_the_chain() -> None:
    model, (prior, posterior, _) = Chain(linear_map()), closed_form()
    model.eval().requires_grad_(False)
    kernel = NUTS(model, max_tree_depth=3, init_strategy=init_to_value(values={"after": prior.mean}))
    mcmc = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["after"]
    assert draws.isfinite().all()
    assert ((posterior.mean - prior.mean).abs() / prior.stddev).max() > 0.5  # the strength does tell
    effective = pyro.ops.stats.effective_sample_size(draws.unsqueeze(0))
    error = (draws.mean(0) - posterior.mean) / posterior.stddev
    assert (error.abs() < 4.5 / effective.sqrt()).all() and (effective > 12).all()
    assert ((draws.std(0) / posterior.stddev).log().abs() < 0.5).all()


# ------------------------------------------------------------------------------------------------ any map
def test_a_pushed_conditional_integrates_to_one() -> None:
    """Two cells of a joint flow, in a plate, through a bent map at a condition for each."""
    axis = torch.linspace(-9, 9, 121)
    points, cell = torch.cartesian_prod(axis, axis), float((axis[1] - axis[0]) ** 2)
    first, transport = exact_flow(FIRST), bent_map(2)
    base = first.conditional(["width", "depth"], {"power": torch.tensor([-1.0, 0.5])})
    law = dist.TransformedDistribution(base, [transport.condition(torch.tensor([[-0.7], [0.9]]), Solver("adams", 12))])
    assert (law.batch_shape, law.event_shape) == ((2,), (2,))
    with torch.no_grad():
        total = law.log_prob(points.unsqueeze(1)).exp().sum(0) * cell
        moved = transport.condition(torch.tensor([-0.7]))(base.mean[0]) - base.mean[0]
    torch.testing.assert_close(total, torch.ones(2), atol=1e-3, rtol=0)
    assert moved.abs().max() > 0.05
    with pyro.plate("specimen", 2):
        assert pyro.sample("after", law).shape == (2, 2)


def test_positive_cells_go_through_the_map_as_logarithms() -> None:
    """A map learned between logarithms stands between an inverse exponential and an exponential."""
    variables = pim.Variables([pim.Variable("power", "parameter"), pim.Variable("depth", "observation", "positive")])
    flow = pim.JointFlow(variables, width=8, trunk_blocks=1)
    log = dist.transforms.ExpTransform()
    go = [log.inv, bent_map(1).condition(torch.tensor([0.2]), Solver("adams", 12)), log]
    law = dist.TransformedDistribution(flow.conditional(["depth"], {"power": POWER}), go)
    grid = torch.linspace(-12, 12, 4001)  # of the logarithm
    with torch.no_grad():
        density = (law.log_prob(grid.exp().unsqueeze(-1)) + grid).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-3)
    assert (law.sample((50,)) > 0).all()


# ------------------------------------------------------------------------------------------------ manifolds
@pytest.fixture(scope="module")
def tasks() -> list[TaskPosterior]:
    """Beliefs about a new task of each of two manifolds."""
    torch.set_default_dtype(torch.float32)
    found = []
    for seed in (0, 1):
        process = HierarchicalLinearGaussian.random(1, 2, 1, seed=seed)
        ds = process.sample(16, 6, seed=1)
        settings = {"flow": {"width": 16, "components": 3}, "encoder": {"width": 16}}
        manifold = pim.ProcessManifold.from_dataset(ds, latent_dim=1, **settings)
        schedule = pim.Schedule(steps=10, learning_rate=5e-4, batch_size=8, warmup=2, evaluate_every=10)
        manifold.fit(ds, progress=False, schedule=schedule)
        found.append(manifold.infer_task(process.sample(1, 4, seed=7)))
    return found


def test_between_two_manifolds(tasks: list[TaskPosterior]) -> None:
    """What a task of the first shows, moved at a condition, is what a task of the second is asked with: what is moved
    has a law that integrates to one, slopes are those of the density, and SVI reaches the evidence by quadrature."""
    torch.set_default_dtype(torch.float32)
    go = bent_map(1).float().requires_grad_(False).condition(torch.tensor([0.3]), Solver("adams", 8))
    law = dist.TransformedDistribution(tasks[0].conditional(["y1"], {"x1": 0.3}), [go])
    grid, seen = torch.linspace(-10, 10, 1001), torch.tensor([1.0])

    def joint(after: Tensor) -> Tensor:
        out = tasks[1].conditional(["y2"], {"x1": after[..., 0]})
        return law.log_prob(after) + out.log_prob(seen.expand(*after.shape[:-1], 1))

    with torch.no_grad():
        total = torch.trapezoid(law.log_prob(grid.unsqueeze(-1)).exp(), grid)
        evidence = torch.trapezoid(joint(grid.unsqueeze(-1)).exp(), grid).log()
    assert total.item() == pytest.approx(1.0, abs=2e-3)

    def model() -> None:
        after = pyro.sample("after", law)
        pyro.sample("out", tasks[1].conditional(["y2"], {"x1": after[..., 0]}), obs=seen)

    for place in (-1.0, 0.3, 1.5):
        after = torch.tensor([place], requires_grad=True)
        score = pyro.poutine.trace(pyro.poutine.condition(model, data={"after": after})).get_trace().log_prob_sum()
        (slope,) = torch.autograd.grad(score, after)
        with torch.no_grad():
            left, right = joint(torch.tensor([[place - 0.05], [place + 0.05]]))
        assert slope.item() == pytest.approx((right - left).item() / 0.1, rel=0.05, abs=0.05)
    guide = AutoMultivariateNormal(model, init_scale=0.5)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / 60)}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert all(math.isfinite(loss) for loss in losses)
    with torch.no_grad():
        gap = evidence.item() + sum(svi.evaluate_loss() for _ in range(20)) / 20
    assert -0.02 < gap < 0.1  # the posterior is nearly normal
