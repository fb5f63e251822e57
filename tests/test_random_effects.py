"""The linear process with a latent per task, against its closed forms."""

import math

import pytest
import torch

from pyro_invman.data import to_tensor
from pyro_invman.density.random_effects import RandomEffects
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian

NAN = math.nan


@pytest.fixture
def process() -> HierarchicalLinearGaussian:
    return HierarchicalLinearGaussian.random(seed=0)


def effects_of(process: HierarchicalLinearGaussian) -> RandomEffects:
    effects = RandomEffects([v.role != "observation" for v in process.variables], process.latent_dim)
    effects.mean.copy_(process.mean)
    effects.loading.copy_(process.loading)
    effects.covariance.copy_(process.covariance)
    return effects


def rows_of(process, tasks: int, rows: int, seed: int, missing: float = 0.4) -> torch.Tensor:
    ds = process.sample(tasks, rows, seed=seed, missing=missing)
    return to_tensor(ds, process.variables)


def test_beliefs_are_the_exact_task_posteriors(process):
    rows = rows_of(process, 7, 5, seed=1)
    task = torch.arange(7).repeat_interleave(5)
    precision, shift = effects_of(process).posterior(rows, task, 7)
    exact = process.task_posterior(rows.reshape(7, 5, -1))
    torch.testing.assert_close(precision, exact.precision_matrix)
    torch.testing.assert_close(torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1), exact.loc)


def test_measurements_of_settings_alone_say_nothing(process):
    row = torch.full((6,), NAN, dtype=torch.float64)
    row[:2] = 3.0
    found = effects_of(process).measurements(row.nan_to_num(0.0), ~row.isnan())
    assert not found.directions.any()
    assert not found.residuals.any()
    assert found.log_scale == 0 and found.number == 0


def test_joint_moments_are_those_of_row_and_latent(process):
    mean, covariance = effects_of(process).joint()
    latent = process.sample_latent(40_000, seed=3)
    rows = rows_of(process, 40_000, 1, seed=3, missing=0.0)
    together = torch.cat([rows, latent], -1)
    torch.testing.assert_close(mean, together.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(covariance, together.T.cov(), atol=0.06, rtol=0)


@pytest.mark.parametrize("mechanism", ["completely_at_random", "at_random"])
def test_fit_recovers_the_process_from_incomplete_rows(process, mechanism):
    """Loss of the plug-in above the exact predictive on fresh tasks; empirical Bayes in general loses 0.001–0.012."""
    ds = process.sample(200, 20, seed=1, missing=0.4, mechanism=mechanism)
    effects = RandomEffects([v.role != "observation" for v in process.variables], 2)
    effects.fit(to_tensor(ds, process.variables), torch.arange(200).repeat_interleave(20))
    fitted = HierarchicalLinearGaussian(process.variables, effects.mean, effects.loading, effects.covariance)
    fresh = rows_of(process, 200, 20, seed=9).reshape(200, 20, -1)
    for k in (0, 1, 5):
        losses = [p.log_evidence(fresh) - p.log_evidence(fresh[:, :k]) for p in (process, fitted)]
        cells = (~fresh[:, k:, 2:].isnan()).sum()
        assert (losses[0] - losses[1]).sum() / cells < 0.012


def test_fit_raises_the_evidence(process):
    rows = rows_of(process, 30, 6, seed=4)
    task = torch.arange(30).repeat_interleave(6)
    scores = []
    for iterations in (1, 5, 25):
        effects = RandomEffects([v.role != "observation" for v in process.variables], 2)
        effects.fit(rows, task, max_iterations=iterations)
        found = HierarchicalLinearGaussian(process.variables, effects.mean, effects.loading, effects.covariance)
        scores.append(float(found.log_evidence(rows.reshape(30, 6, -1)).sum()))
    assert scores == sorted(scores)


def test_the_order_of_tasks_is_irrelevant(process):
    rows = rows_of(process, 20, 6, seed=4)
    task = torch.arange(20).repeat_interleave(6)
    order = torch.randperm(len(rows))
    found = []
    for index in (torch.arange(len(rows)), order):
        effects = RandomEffects([v.role != "observation" for v in process.variables], 2)
        effects.fit(rows[index], 19 - task[index], max_iterations=30)
        found.append(effects.loading @ effects.loading.T)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_log_evidence_is_that_of_the_process(process):
    rows = rows_of(process, 7, 5, seed=1)
    task = torch.arange(7).repeat_interleave(5)
    found = effects_of(process).measurements(rows.nan_to_num(0.0), ~rows.isnan()).log_evidence(task, 7)
    torch.testing.assert_close(found, process.log_evidence(rows.reshape(7, 5, -1)))


def test_fit_around_beliefs_that_are_given(process):
    rows, task = rows_of(process, 300, 20, seed=2), torch.arange(300).repeat_interleave(20)
    effects = RandomEffects([v.role != "observation" for v in process.variables], 2)
    effects.fit(rows, task, effects_of(process).posterior(rows, task, 300))
    torch.testing.assert_close(effects.loading, process.loading, atol=0.15, rtol=0)
    torch.testing.assert_close(effects.covariance, process.covariance, atol=0.15, rtol=0)
