"""Random functions against the Gaussian process that they approximate, and the law that draws them."""

import math

import pytest
import torch

from pyro_invman.density.hyperparameters import hyperparameters, kernel
from pyro_invman.density.random_functions import RandomFunctions
from pyro_invman.tasks.effects import TaskEffects
from pyro_invman.tasks.network import truths

F64 = torch.float64
NAN = math.nan


def bent_tasks(tasks: int, rows: int, seed: int, missing: float = 0.0):
    """y1 = sin(2 s) + a s + b, y2 = s² + b, with a and b of the task; settings (N, 1), answers (N, 2), task (N,)."""
    generator = torch.Generator().manual_seed(seed)
    of_task = 0.5 * torch.randn(tasks, 2, generator=generator, dtype=F64)
    task = torch.arange(tasks).repeat_interleave(rows)
    s = 4 * torch.rand(tasks * rows, 1, generator=generator, dtype=F64) - 2
    a, b = of_task[task].unbind(-1)
    y = torch.stack([(2 * s[:, 0]).sin() + a * s[:, 0] + b, s[:, 0].square() + b], -1)
    y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=F64)
    return s, y.masked_fill(torch.rand(y.shape, generator=generator) < missing, NAN), task


@pytest.fixture(scope="module")
def functions() -> RandomFunctions:
    return RandomFunctions.fitted(*bent_tasks(60, 10, seed=0, missing=0.2), latent_dim=3)


def measured(functions: RandomFunctions, s, y):
    return functions.measurements(functions.anchor(s, ~s.isnan()), y.nan_to_num(0.0), ~y.isnan())


@torch.no_grad()
def test_shared_and_task_functions_are_found(functions):
    grid = torch.linspace(-1.8, 1.8, 9, dtype=F64).unsqueeze(-1)
    anchor = functions.anchor(grid, torch.ones_like(grid, dtype=torch.bool))
    slope, offset = (0.5 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=F64)).mean(0)
    truth = torch.stack([(2 * grid[:, 0]).sin() + slope * grid[:, 0] + offset, grid[:, 0].square() + offset], -1)
    torch.testing.assert_close(anchor.mean, truth, atol=0.15, rtol=0)
    assert anchor.scale.max() < 0.25  # noise is 0.1
    span = anchor.directions[:, 0]
    basis = torch.stack([grid[:, 0], torch.ones_like(grid[:, 0])], -1)
    left = basis - span @ torch.linalg.lstsq(span, basis).solution
    assert left.abs().max() < 0.3


@torch.no_grad()
def test_a_new_task_is_predicted_nearly_as_by_its_own_law(functions):
    """Excess of the negative log density of four rows given four others, over the exact Bayesian linear model."""
    s, y, task = bent_tasks(200, 8, seed=1)
    first = torch.arange(len(s)) % 8 < 4
    found = measured(functions, s, y).log_evidence(task, 200) - measured(functions, s[first], y[first]).log_evidence(
        task[first], 200
    )

    def exact(rows) -> torch.Tensor:
        number = int(rows.sum()) // 200
        at, residual = s[rows, 0].reshape(200, number), y[rows].reshape(200, number, 2).clone()
        residual[..., 0] -= (2 * at).sin()
        residual[..., 1] -= at.square()
        design = torch.zeros(200, number, 2, 2, dtype=F64)
        design[..., 0, 0], design[..., 0, 1], design[..., 1, 1] = 0.5 * at, 0.5, 0.5
        design = design.flatten(1, 2)
        law = torch.distributions.LowRankMultivariateNormal(
            torch.zeros(200, 2 * number, dtype=F64), design, torch.full((200, 2 * number), 0.01, dtype=F64)
        )
        return law.log_prob(residual.flatten(1))

    truth = exact(torch.ones_like(first)) - exact(first)
    assert float((truth - found).mean()) / 8 < 0.25


@torch.no_grad()
def test_far_from_all_rows_the_scale_is_that_of_the_prior(functions):
    far = torch.tensor([[50.0]], dtype=F64)
    anchor = functions.anchor(far, torch.ones_like(far, dtype=torch.bool))
    torch.testing.assert_close(anchor.mean[0], functions.offset)
    assert (anchor.scale[0] > functions.variances[:, 0].sqrt()).all()


@torch.no_grad()
def test_observations_that_are_not_seen_say_nothing(functions):
    s, y, _ = bent_tasks(1, 3, seed=2)
    y[1] = NAN
    found = measured(functions, s, y)
    assert not found.directions[1].any() and not found.residuals[1].any()
    assert found.number.tolist() == [2, 0, 2] and found.log_scale[1] == 0


def test_anchors_are_differentiable_in_the_settings(functions):
    s = torch.tensor([[0.3], [1.2]], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: functions.anchor(t, torch.ones_like(t, dtype=torch.bool)), (s,))


@torch.no_grad()
def test_rows_of_which_nothing_is_told_are_worked_out_once_and_stand_where_they_stood(functions):
    settings = torch.linspace(-1.5, 1.5, 6, dtype=F64).unsqueeze(-1)
    known = torch.tensor([[False], [True], [False], [False], [True], [False]])
    together = functions.features(settings, known)
    for row in range(6):
        for whole, alone in zip(
            together, functions.features(settings[row : row + 1], known[row : row + 1]), strict=True
        ):
            torch.testing.assert_close(whole[:, row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_missing_settings_are_read_as_such_where_training_rows_miss_them():
    s, y, task = bent_tasks(40, 10, seed=3)
    extra = torch.randn(len(s), 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    extra[::3] = NAN
    functions = RandomFunctions.fitted(torch.cat([s, extra], -1), y, task, latent_dim=2)
    assert functions.optional.tolist() == [False, True]
    known = torch.tensor([[True, True], [True, False], [False, True]])
    assert functions.readable(known).tolist() == [True, True, False]
    settings = torch.tensor([[0.5, NAN]], dtype=F64)
    assert functions.anchor(settings, ~settings.isnan()).mean.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("bends", [True, False])
def test_functions_are_kept_where_held_out_tasks_are_better_described_by_them(bends):
    s, y, task = bent_tasks(40, 10, seed=4)
    if not bends:
        generator = torch.Generator().manual_seed(1)
        y = s @ torch.tensor([[1.0, -0.5]], dtype=F64) + torch.randn(40, 2, generator=generator, dtype=F64)[task]
        y = y + 0.5 * torch.randn(y.shape, generator=generator, dtype=F64)
    base = TaskEffects([True, False, False], 2)
    base.fit(torch.cat([s, y], -1), task)
    assert (base.functions is not None) == bends


def test_many_tasks_of_few_rows_tell_the_length_scales_of_their_own_functions():
    generator, tasks, each = torch.Generator().manual_seed(0), 300, 12
    x = torch.randn(tasks, each, 2, generator=generator, dtype=torch.float64)
    length, noise = 0.4, 0.02
    own = 0.5 * kernel(x / length, x / length) + 0.3 + noise * torch.eye(each, dtype=torch.float64)
    draw = torch.randn(tasks, each, 1, generator=generator, dtype=torch.float64)
    y = x[..., 0].sin() + (torch.linalg.cholesky(own) @ draw).squeeze(-1)
    x, y, task = x.flatten(0, 1), y.flatten(), torch.arange(tasks).repeat_interleave(each)
    everywhere = torch.ones(2, dtype=torch.bool)
    found = hyperparameters(x, everywhere, y, torch.ones(len(y), dtype=torch.bool), task, 0)
    assert (found.own - math.log(length)).abs().max() < 0.3
    assert (found.variances[1:] / torch.tensor([0.5, 0.3, noise])).log().abs().max() < 0.5


@torch.no_grad()
def test_a_truth_shown_in_one_row_of_a_task_is_what_further_rows_tell_of_it():
    """Of y1 = sin(2 s) + a s + b and y2 = s² + b, with a and b in the first row of every task that is learned from."""

    def with_truths(tasks: int, seed: int):
        s, y, task = bent_tasks(tasks, 10, seed=seed)
        truth = 0.5 * torch.randn(tasks, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)
        return s, y, task, truth

    s, y, task, truth = with_truths(120, 0)
    first = torch.arange(len(s)) % 10 == 0
    shown = torch.where(first.unsqueeze(-1), truth[task], NAN)
    whole = torch.tensor([False, False, True, True])
    functions = RandomFunctions.fitted(s, torch.cat([y, shown], -1), task, latent_dim=2, constant=whole)
    s, y, task, truth = with_truths(100, 1)
    blank = torch.full_like(y, NAN)
    precision, shift = measured(functions, s, torch.cat([y, blank], -1)).posterior(task, 100)
    anchor = functions.anchor(s[::10], torch.ones_like(s[::10], dtype=torch.bool))
    directions, spread = anchor.directions[:, 2:], torch.linalg.inv(precision)
    mean = anchor.mean[:, 2:] + (directions @ spread @ shift.unsqueeze(-1)).squeeze(-1)
    variance = (directions @ spread @ directions.mT).diagonal(dim1=-2, dim2=-1) + functions.variances[2:, 3]
    off = mean - truth
    assert off.square().mean().sqrt() < 0.08  # of truths that vary by 0.5
    assert variance.sqrt().max() < 0.2
    assert 0.3 < float((off.square() / variance).mean()) < 2.0


def test_a_parameter_that_no_task_shows_twice_is_a_truth_of_it_and_an_observation_is_not():
    rows, task = torch.tensor([[1.0, 2.0, 3.0], [NAN, NAN, 4.0], [5.0, 6.0, NAN]]), torch.tensor([0, 0, 1])
    roles, constant = torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.bool)
    assert truths(rows, task, constant, roles).tolist() == [True, False, False]
