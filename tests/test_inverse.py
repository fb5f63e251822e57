"""A sought setting by Bayes' rule, beside a fine grid of the forward conditional that it turns round."""

import math
import pickle

import pytest
import torch
from scipy.stats import kstest

import pyro_invman as pim
from pyro_invman.density.univariate import Blend, Mixture
from pyro_invman.tasks.designs import evidence_to_follow, learned, marginal, share_that_follows
from pyro_invman.tasks.inverse import Ratio, TaskInverse

F64 = torch.float64
TASKS, ROWS = 61, 12


def _rows(seed: int = 0):
    """y = sin(2 x) + a x + b + 0.3 v of tasks, with v chosen near x in the first 50 of them."""
    generator = torch.Generator().manual_seed(seed)
    slope, offset = 0.5 * torch.randn(2, TASKS, 1, generator=generator, dtype=F64)
    x = 4 * torch.rand(TASKS, ROWS, generator=generator, dtype=F64) - 2
    v = 0.5 * torch.randn(TASKS, ROWS, generator=generator, dtype=F64)
    v[:50] += x[:50]
    y = (2 * x).sin() + slope * x + offset + 0.3 * v
    return x, v, y + 0.1 * torch.randn(y.shape, generator=generator, dtype=F64)


@pytest.fixture(scope="module")
def data():
    x, v, y = _rows()
    return pim.from_columns(
        {"x": x.flatten(), "v": v.flatten(), "y": y.flatten()},
        {"x": "parameter", "v": "parameter", "y": "observation"},
        task=[f"{t:02d}" for t in range(TASKS) for _ in range(ROWS)],
    )


@pytest.fixture(scope="module")
def manifold(data):
    small = {"flow": {"width": 32, "components": 4}, "encoder": {"width": 32}}
    manifold = pim.ProcessManifold.from_dataset(data.isel(row=slice(0, 50 * ROWS)), latent_dim=2, **small)
    assert manifold.network.base.functions is not None
    return manifold


@pytest.fixture(scope="module")
def task(manifold, data):
    return manifold.infer_task(data.isel(row=slice(60 * ROWS, 60 * ROWS + 6)), num_particles=32)


# ------------------------------------------------------------------------------------------------ its parts
def test_a_ratio_is_a_density_and_its_quantiles_undo_it():
    nodes = torch.tensor([0.0, 0.1, 0.15, 0.6, 1.0], dtype=F64).expand(3, -1)
    height = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ratio = Ratio(nodes, height)
    level = torch.linspace(0, 1, 20_001, dtype=F64).unsqueeze(-1)
    density = ratio.log_prob(level).exp()
    reached = torch.cumulative_trapezoid(density, level, dim=0)
    torch.testing.assert_close(reached[-1], torch.ones(3, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(ratio.icdf(reached[::500]), level[1::500].expand(-1, 3), atol=1e-5, rtol=0)
    middle = torch.rand(3, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda h: Ratio(nodes, h).icdf(middle), height)
    assert torch.autograd.gradcheck(lambda h: Ratio(nodes, h).log_prob(middle), height)


def test_a_flat_ratio_changes_nothing():
    flat = Ratio(torch.tensor([0.0, 0.3, 1.0], dtype=F64), torch.full((3,), -700.0, dtype=F64))
    level = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=F64)
    torch.testing.assert_close(flat.log_prob(level), torch.zeros(4, dtype=F64))
    torch.testing.assert_close(flat.icdf(level), level)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_blend_is_either(share):
    def law(loc: float) -> Mixture:
        return Mixture(*(torch.tensor([cell], dtype=F64) for cell in (0.0, loc, 0.5)))

    blend = Blend(law(-1.0), law(2.0), torch.tensor(share, dtype=F64))
    x = torch.linspace(-5, 6, 20_001, dtype=F64)
    reached = torch.cumulative_trapezoid(blend.log_prob(x).exp(), x)
    torch.testing.assert_close(blend.cdf(x)[1:], reached, atol=1e-6, rtol=0)
    level = torch.tensor([0.01, 0.3, 0.5, 0.98], dtype=F64, requires_grad=True)
    torch.testing.assert_close(blend.cdf(blend.icdf(level)), level, atol=1e-9, rtol=0)
    (slope,) = torch.autograd.grad(blend.icdf(level).sum(), level)
    torch.testing.assert_close(slope, 1 / blend.log_prob(blend.icdf(level)).exp())


# ------------------------------------------------------------------------------------------------ chosen settings
def test_habits_are_told_from_their_absence(manifold, data):
    rows, _ = manifold.padded(data)
    working = manifold.standardization(rows).to(manifold.network.flow.dtype)
    latent = torch.zeros(TASKS, 2)
    gain = evidence_to_follow(manifold.network, working, latent, 0)
    assert (gain[:50] > 0).float().mean() > 0.9
    assert (gain[50:] < 0).float().mean() > 0.6
    share = share_that_follows(manifold.network, working[40:60], latent[40:60])
    kept = (10 + 1) / (20 + 2)
    assert share[0] == pytest.approx(kept, abs=0.2)
    assert share[2] == 0.5  # an observation is not chosen


def test_the_marginal_has_the_quantiles_of_the_data(manifold, data):
    law = marginal(manifold.network, 1)
    working = manifold.standardization(torch.from_numpy(data["v"].values[: 50 * ROWS, None]), index=[1])
    for level in (0.1, 0.5, 0.9):
        at = working.quantile(level).float()
        assert float(law.cdf(at)) == pytest.approx(level, abs=0.03)


# ------------------------------------------------------------------------------------------------ the law
def _by_grid(manifold, task, given: dict[str, float], points: int = 4001):
    """x and its posterior density on a grid: prior times forward conditional, nothing else shared with the code."""
    x = torch.linspace(-6, 6, points, dtype=F64)
    with torch.no_grad():
        likelihood = task.conditional(["y"], {"x": x, "v": given["v"]}).log_prob(
            torch.full((points, 1), given["y"], dtype=F64)
        )
        row = manifold.standardization(torch.tensor([math.nan, given["v"], math.nan], dtype=F64)).float()
        centre = (task.log_weights.exp().unsqueeze(-1) * task.particles).sum(0)
        share = task._follows("x")
        working = manifold.standardization(x.unsqueeze(-1), index=[0]).squeeze(-1).float()
        follows = learned(manifold.network, row.nan_to_num(0.0), ~row.isnan(), centre, 0).log_prob(working).exp()
        alone = marginal(manifold.network, 0).log_prob(working).exp()
    density = (share * follows + (1 - share) * alone) * (likelihood - likelihood.max()).exp()
    return x, density / torch.trapezoid(density.double(), x)


@pytest.mark.parametrize("y", [-1.5, 0.2, 1.0])
def test_it_is_bayes_rule_on_the_forward_conditional(manifold, task, y):
    given = {"v": 0.3, "y": y}
    x, exact = _by_grid(manifold, task, given)
    d = task.conditional(["x"], given)
    assert isinstance(d, TaskInverse)
    with torch.no_grad():
        found = d.log_prob(x.unsqueeze(-1)).exp()
    assert float(torch.trapezoid(found, x)) == pytest.approx(1.0, abs=2e-3)
    assert float(torch.trapezoid((found - exact).abs(), x)) / 2 < 0.03  # total variation
    reached = torch.cumulative_trapezoid(found.double(), x)
    with torch.no_grad():
        draws = d.sample((4000,))[:, 0]
    level = reached[torch.searchsorted(x[1:].contiguous(), draws).clamp_max(len(reached) - 1)]
    assert kstest(level.numpy(), "uniform").pvalue > 1e-3


def test_two_answers_stay_two(manifold, task):
    """sin(2 x) takes a value at several x: the law has mass about each and little between."""
    x, exact = _by_grid(manifold, task, {"v": 0.0, "y": 0.3})
    d = task.conditional(["x"], {"v": 0.0, "y": 0.3})
    with torch.no_grad():
        found = d.log_prob(x.unsqueeze(-1)).exp()
    peaks = ((exact[1:-1] > exact[:-2]) & (exact[1:-1] > exact[2:]) & (exact[1:-1] > 0.2 * exact.max())).nonzero() + 1
    assert len(peaks) >= 2
    for at in peaks[:, 0]:
        assert float(found[at]) == pytest.approx(float(exact[at]), rel=0.15)


def test_gradients_reach_value_givens_and_draws(task):
    y = torch.tensor([0.2, 1.0], requires_grad=True)
    value = torch.tensor([[0.4], [-0.3]], requires_grad=True)
    d = task.conditional(["x"], {"v": 0.1, "y": y})
    d.log_prob(value).sum().backward()
    assert y.grad.isfinite().all()
    assert (y.grad != 0).all()
    assert (value.grad != 0).all()
    setting = torch.tensor(0.1, requires_grad=True)
    draws = task.conditional(["x"], {"v": setting, "y": 0.2}).rsample((200,))
    (slope,) = torch.autograd.grad(draws.sum(), setting)
    assert slope.isfinite()
    assert slope != 0


def test_batches_expand_pickle_and_forget_missing_values(task):
    y = torch.tensor([0.2, 1.0])
    together = task.conditional(["x"], {"v": 0.1, "y": y})
    value = torch.tensor([0.4])
    for b in range(2):
        alone = task.conditional(["x"], {"v": 0.1, "y": y[b]})
        torch.testing.assert_close(together.log_prob(value)[b], alone.log_prob(value), atol=1e-4, rtol=1e-4)
    wide = together.expand((3, 2))
    torch.testing.assert_close(wide.log_prob(value), together.log_prob(value).expand(3, 2))
    assert wide.sample((5,)).shape == (5, 3, 2, 1)
    again = pickle.loads(pickle.dumps(together))
    torch.testing.assert_close(again.log_prob(value), together.log_prob(value))
    assert (together.log_prob(torch.tensor([math.nan])) == 0).all()
    error = together.log_prob_std_error(torch.rand(4, 2, 1))
    assert error.shape == (4, 2)
    assert ((error > 0) & (error < 1)).all()


def test_what_is_not_one_setting_given_observations_is_asked_directly(task):
    for targets, given in ((["x", "v"], {"y": 0.2}), (["x"], {"v": 0.1}), (["y"], {"x": 0.1})):
        assert type(task.conditional(targets, given)) is not TaskInverse
