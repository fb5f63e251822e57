"""Damped oscillations: the folded density against quadrature and simulation, the reference against brute force."""

import math

import pytest
import torch

from pyro_invman.data import to_tensor, validate, variables_of
from pyro_invman.simulators import oscillations
from pyro_invman.simulators.oscillations import (
    NOISE_MM,
    TIME_S,
    VARIABLES,
    Oscillator,
    displacement,
    exact_log_predictive,
    log_prob,
    sample_latent,
    simulate,
)
from pyro_invman.variables import DataError

F64 = torch.float64
NAN = math.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def cells(num_tasks: int, rows: int, seed: int, missing: float = 0.0) -> torch.Tensor:
    return to_tensor(simulate(num_tasks, rows, seed, missing), VARIABLES).reshape(num_tasks, rows, 2)


def test_density_integrates_to_one_and_is_the_fold_of_a_normal():
    task = Oscillator(*(latent.unsqueeze(-1) for latent in sample_latent(50, seed=0)))
    grid = torch.linspace(0.0, 6.0, 20_001, dtype=F64)
    for time in (tensor(0.0), tensor(3.3), tensor(10.0)):
        total = torch.trapezoid(log_prob(grid, time, task).exp(), grid)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)
    normal = torch.distributions.Normal(displacement(tensor(2.0), task), NOISE_MM)
    both = normal.log_prob(tensor(0.03)).exp() + normal.log_prob(tensor(-0.03)).exp()
    torch.testing.assert_close(log_prob(tensor(0.03), tensor(2.0), task).exp(), both)
    assert (log_prob(tensor(-0.1), tensor(2.0), task) == -math.inf).all()


def test_a_missing_time_is_integrated_and_a_missing_amplitude_says_nothing():
    task = sample_latent(3, seed=1)
    times = torch.linspace(*TIME_S, 40_001, dtype=F64).unsqueeze(-1)
    expected = (torch.trapezoid(log_prob(tensor(0.4), times, task).exp(), times, dim=0) / 10).log()
    torch.testing.assert_close(log_prob(tensor(0.4), tensor(NAN), task), expected, rtol=1e-5, atol=0)
    assert (log_prob(tensor(NAN), tensor(1.0), task) == 0).all()


def test_simulated_rows_follow_the_density():
    """The probability integral transform of the recorded size is uniform."""
    values, latent = cells(400, 25, seed=2), sample_latent(400, seed=2)
    mean = displacement(values[..., 0], Oscillator(*(x.unsqueeze(-1) for x in latent)))
    upper, lower = (values[..., 1] - mean) / NOISE_MM, (-values[..., 1] - mean) / NOISE_MM
    rank = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).flatten().sort().values
    n = len(rank)
    distance = (rank - (torch.arange(n, dtype=F64) + 0.5) / n).abs().max() * math.sqrt(n)
    assert distance < 1.95  # Kolmogorov: false alarm 1e-3
    assert abs(values[..., 0].mean() - 5) < 4 * 10 / math.sqrt(12 * n)
    assert abs(latent.amplitude_mm.log().std() - 0.3) < 4 * 0.3 / math.sqrt(800)
    assert abs(latent.decay_per_s.log().mean() - math.log(0.15)) < 4 * 0.4 / math.sqrt(400)


def test_table_follows_the_convention_and_the_seed_and_hiding_cells_changes_no_other():
    ds = simulate(6, 5, seed=3)
    assert variables_of(validate(ds)) == VARIABLES == variables_of(ds)
    assert ds["task"].values.tolist() == [f"task {t}" for t in range(6) for _ in range(5)]
    assert ds.identical(simulate(6, 5, seed=3)) and not ds.identical(simulate(6, 5, seed=4))
    full, holes = cells(100, 20, seed=3), cells(100, 20, seed=3, missing=0.3)
    assert torch.equal(full[~holes.isnan()], holes[~holes.isnan()]) and not full.isnan().any()
    assert abs(holes.isnan().double().mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_reference_agrees_with_plain_draws_from_the_prior(size):
    rows = cells(1, 40, seed=4)[0]
    context, new = rows[:size], rows[20:]
    task = Oscillator(*(latent.unsqueeze(-1) for latent in sample_latent(400_000, seed=5)))
    weight = log_prob(context[:, 1], context[:, 0], task).sum(-1).log_softmax(0)
    expected = (weight.unsqueeze(-1) + log_prob(new[:, 1], new[:, 0], task)).logsumexp(0)
    plain_size = 1 / weight.exp().square().sum()
    found = exact_log_predictive(new[:, 1], new[:, 0], context[:, 1], context[:, 0], seed=0)
    assert found.effective_sample_size > 500
    assert size == 0 or plain_size > 100
    assert (found.log_prob - expected).abs().mean() < (0.15 if size else 0.03)


def test_reference_improves_with_the_context_up_to_knowing_the_task():
    """Expected log scores rise with k; each step exceeds the Monte Carlo error by far."""
    values = cells(10, 50, seed=6)
    scores = []
    for size in (0, 1, 4, 20):
        found = [
            exact_log_predictive(new[:, 1], new[:, 0], context[:, 1], context[:, 0], seed=1, num_samples=5_000)
            for context, new in ((rows[:size], rows[20:]) for rows in values)
        ]
        assert min(f.effective_sample_size for f in found) > 100
        scores.append(torch.stack([f.log_prob for f in found]).mean())
    known = Oscillator(*(latent.unsqueeze(-1) for latent in sample_latent(10, seed=6)))
    truth = log_prob(values[:, 20:, 1], values[:, 20:, 0], known).mean()
    assert scores[0] < scores[1] < scores[2] < scores[3] < truth
    assert truth - scores[3] < 0.4 and scores[3] - scores[0] > 0.5


def test_reference_repeats_with_the_seed_and_passes_over_missing_cells():
    rows = cells(1, 12, seed=7)[0]
    amplitude, time = rows[:8, 1], rows[:8, 0]
    arguments = (rows[8:, 1], rows[8:, 0])
    first = exact_log_predictive(*arguments, amplitude, time, seed=0)
    again = exact_log_predictive(*arguments, amplitude, time, seed=0)
    assert torch.equal(first.log_prob, again.log_prob)
    more = torch.cat([amplitude, tensor(NAN)]), torch.cat([time, tensor(1.0)])
    torch.testing.assert_close(exact_log_predictive(*arguments, *more, seed=0).log_prob, first.log_prob)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_tasks": 0}, "num_tasks is 0; expected at least 1"),
        ({"rows_per_task": 0}, "rows_per_task is 0"),
        ({"missing": 1.0}, "missing is 1.0; expected a share"),
    ],
)
def test_requests_without_meaning_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        oscillations.simulate(**({"num_tasks": 2, "rows_per_task": 3, "seed": 0} | change))
