"""Evidence about a task adds up."""

import math

import pytest
import torch

from pyro_invman.data import to_tensor
from pyro_invman.density.context import Layout
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian
from pyro_invman.tasks.encoder import Belief
from pyro_invman.tasks.network import ManifoldNetwork

NAN = math.nan
PROCESS = HierarchicalLinearGaussian.random(seed=0)


@pytest.fixture
def network() -> ManifoldNetwork:
    """Untrained but for its linear base, which is the exact process; corrections are not zero."""
    torch.manual_seed(0)
    free = torch.full((6,), math.inf)
    roles = torch.tensor([0, 0, 1, 1, 1, 1])
    layout = Layout((0,) * 6, -free, free)
    network = ManifoldNetwork(layout, roles, roles == 1, 2, {"width": 16, "components": 2}, {"width": 16})
    network.base.effects.mean.copy_(PROCESS.mean)
    network.base.effects.loading.copy_(PROCESS.loading)
    network.base.effects.covariance.copy_(PROCESS.covariance)
    mean, covariance = network.base.effects.joint()
    network.flow.context.base.mean.copy_(mean)
    network.flow.context.base.covariance.copy_(covariance)
    return network


def rows_of(number: int, seed: int = 1) -> torch.Tensor:
    return to_tensor(PROCESS.sample(1, number, seed=seed, missing=0.4), PROCESS.variables).float()


def test_no_row_gives_the_prior_back(network):
    before = Belief(torch.tensor([[2.0, 0.5], [0.5, 3.0]]), torch.tensor([1.0, -1.0]))
    for rows in (torch.empty(0, 6), torch.full((4, 6), NAN)):
        after = network.infer(rows, before)
        assert torch.equal(after.precision, before.precision)
        assert torch.equal(after.shift, before.shift)


def test_settings_alone_are_no_evidence(network):
    rows = torch.full((3, 6), NAN)
    rows[:, :2] = torch.randn(3, 2)
    before = network.before(torch.empty(0))
    assert torch.equal(network.infer(rows, before).precision, before.precision)


def test_order_never_matters(network):
    rows, before = rows_of(9), network.before(torch.empty(0))
    turned = network.infer(rows[torch.randperm(9)], before)
    torch.testing.assert_close(turned, network.infer(rows, before), atol=1e-4, rtol=1e-4)


def test_a_row_of_nan_is_a_row_left_out(network):
    rows, before = rows_of(5), network.before(torch.empty(0))
    padded = torch.cat([rows, torch.full((3, 6), NAN)])
    torch.testing.assert_close(network.infer(padded, before), network.infer(rows, before), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_that_fill_a_task_up_are_worth_nothing_and_move_no_other(network):
    few, many = rows_of(3), rows_of(5, seed=2)
    batch = torch.stack([torch.cat([few, torch.full((2, 6), NAN)]), many])
    latent = torch.randn(7, 2, 1, 2)
    found = network.evidence_of(batch, latent)
    assert found.shape == (7, 2, 5)
    torch.testing.assert_close(found[:, 0, :3], network.evidence_of(few, latent[:, 0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 1], network.evidence_of(many, latent[:, 1]), atol=1e-4, rtol=1e-4)
    assert (found[:, 0, 3:] == 0).all()


def test_duplicates_count_as_evidence(network):
    rows, before = rows_of(4), network.before(torch.empty(0))
    once, twice = (network.infer(part, before) for part in (rows, rows.repeat(2, 1)))
    gained = torch.linalg.slogdet(twice.precision).logabsdet - torch.linalg.slogdet(once.precision).logabsdet
    assert gained > 0.3


def test_without_corrections_the_belief_is_the_exact_posterior(network):
    with torch.no_grad():
        network.encoder.out.weight.zero_()
    rows = rows_of(12)
    belief = network.infer(rows, network.before(torch.empty(0)))
    exact = PROCESS.task_posterior(rows.double())
    torch.testing.assert_close(belief.mean().double(), exact.loc, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(belief.precision.double(), exact.precision_matrix, atol=1e-3, rtol=1e-3)


def test_ten_thousand_rows(network):
    with torch.no_grad():
        belief = network.infer(rows_of(10_000), network.before(torch.empty(0)))
    assert belief.precision.isfinite().all()
    assert torch.linalg.eigvalsh(belief.precision).min() > 1e3


def test_gradients_stay_finite_with_missing_cells(network):
    belief = network.infer(rows_of(6), network.before(torch.empty(0)))
    belief.log_prob(torch.zeros(2)).backward()
    gradients = [p.grad for p in network.encoder.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


def test_log_prob_of_a_belief_is_that_of_the_normal():
    precision = torch.tensor([[2.0, 0.3], [0.3, 1.5]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    belief = Belief(precision, precision @ mean)
    point = torch.randn(5, 2, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(point)
    torch.testing.assert_close(belief.log_prob(point), expected)
    found, factor = belief.scale_tril()
    torch.testing.assert_close(found, mean)
    torch.testing.assert_close(factor @ factor.mT, torch.linalg.inv(precision))
