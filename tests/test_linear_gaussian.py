"""Closed forms against independent routes: dense joint Gaussians, numerical integration, Monte Carlo."""

import itertools
import math

import pytest
import torch
from scipy import integrate
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from pyro_invman.data import to_tensor
from pyro_invman.simulators.linear_gaussian import HierarchicalLinearGaussian, LinearGaussian
from pyro_invman.variables import DataError, Variable, Variables

NAN = math.nan
F64 = torch.float64


@pytest.fixture
def process() -> LinearGaussian:
    return LinearGaussian.random(num_parameters=2, num_observations=3, seed=3)


@pytest.fixture
def tasks() -> HierarchicalLinearGaussian:
    return HierarchicalLinearGaussian.random(num_parameters=2, num_observations=3, latent_dim=2, seed=5)


def rows_with_holes(*shape: int, seed: int = 0, missing: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * torch.randn(*shape, dtype=F64, generator=generator)
    return rows.masked_fill(torch.rand(*shape, generator=generator) < missing, NAN)


def by_precision(mean, covariance, targets, given, values):
    """N(targets | given) from the precision matrix of both, not from the covariance."""
    both = [*targets, *given]
    precision = torch.linalg.inv(covariance[both][:, both])
    n = len(targets)
    covariance_t = torch.linalg.inv(precision[:n, :n])
    return mean[targets] - covariance_t @ precision[:n, n:] @ (values - mean[given]), covariance_t


# ------------------------------------------------------------------------------------------------ one row
def test_log_prob_is_the_marginal_of_the_observed_cells_for_every_mask(process):
    masks = torch.tensor(list(itertools.product([True, False], repeat=5)))
    values = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(0)).expand(32, 5)
    found = process.log_prob(values.masked_fill(~masks, NAN))
    for mask, log_prob in zip(masks, found, strict=True):
        if not mask.any():
            assert log_prob == 0
            continue
        marginal = MultivariateNormal(process.mean[mask], process.covariance[mask][:, mask])
        torch.testing.assert_close(log_prob, marginal.log_prob(values[0, mask]))


def test_log_prob_has_finite_gradients_beside_missing_cells(process):
    values = rows_with_holes(20, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(process.log_prob(values).sum(), values)
    assert gradient.isfinite().all()
    assert (gradient[values.isnan()] == 0).all()


@pytest.mark.parametrize(
    "targets, given", [(["y1"], ["x1"]), (["x2", "y3"], ["y1", "x1"]), (["y2", "x1", "x2"], ["y3"])]
)
def test_conditional_agrees_with_the_precision_route(process, targets, given):
    values = torch.tensor([0.3, -1.2][: len(given)], dtype=F64)
    found = process.conditional(targets, dict(zip(given, values, strict=True)))
    columns, known = process.variables.indices(targets), process.variables.indices(given)
    loc, covariance = by_precision(process.mean, process.covariance, columns, known, values)
    assert found.event_shape == (len(targets),)
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.covariance_matrix, covariance)


def test_conditional_of_a_batch_with_unknown_givens_equals_each_by_itself(process):
    x1 = torch.tensor([0.5, NAN, -1.0, NAN], dtype=F64)
    y2 = torch.tensor([[0.1], [NAN]], dtype=F64)
    found = process.conditional(["y3", "y1"], {"x1": x1, "y2": y2})
    assert found.batch_shape == (2, 4)
    for i, j in itertools.product(range(2), range(4)):
        given = {name: v.item() for name, v in (("x1", x1[j]), ("y2", y2[i, 0])) if not v.isnan()}
        alone = process.conditional(["y3", "y1"], given)
        torch.testing.assert_close(found.loc[i, j], alone.loc)
        torch.testing.assert_close(found.covariance_matrix[i, j], alone.covariance_matrix)


def test_marginal_times_conditional_is_the_joint_in_any_order_of_targets(process):
    values = torch.randn(7, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    given = {"x2": values[:, 1], "y1": values[:, 2]}
    conditional = process.conditional(["y3", "x1", "y2"], given).log_prob(values[:, [4, 0, 3]])
    marginal = process.conditional(["y1", "x2"]).log_prob(values[:, [2, 1]])
    torch.testing.assert_close(marginal + conditional, process.log_prob(values))


def test_kl_conditional_is_zero_for_itself_and_by_draws_close_to_the_closed_form(process):
    given = {"x1": torch.tensor([0.0, 1.0], dtype=F64), "y3": 0.5}
    exact = process.conditional(["y1", "y2"], given)
    torch.testing.assert_close(process.kl_conditional(["y1", "y2"], given, exact), torch.zeros(2, dtype=F64))
    wider = Independent(Normal(exact.loc + 0.1, 1.2 * exact.stddev), 1)
    closed = kl_divergence(exact, MultivariateNormal(wider.mean, torch.diag_embed(wider.variance)))
    found = process.kl_conditional(["y1", "y2"], given, wider, num_samples=40_000)
    torch.testing.assert_close(found, closed, atol=0.01, rtol=0)
    again = process.kl_conditional(["y1", "y2"], given, wider, num_samples=40_000)
    assert torch.equal(found, again)


def test_mutual_information_is_the_expected_fall_in_entropy(process):
    for given in ([], ["y2"]):
        values = dict.fromkeys(given, 0.7)
        less = process.conditional(["y1", "y3"], values).entropy()
        more = process.conditional(["y1", "y3"], {**values, "x1": -0.4, "x2": 2.0}).entropy()
        found = process.mutual_information(["x1", "x2"], ["y1", "y3"], given)
        torch.testing.assert_close(found, less - more)
    independent = LinearGaussian(process.variables, torch.zeros(5), torch.eye(5))
    assert independent.mutual_information(["x1"], ["y1"], ["y2"]).abs() < 1e-12


def test_random_covariance_is_as_well_conditioned_as_asked_before_scaling():
    for seed in range(5):
        covariance = LinearGaussian.random(4, 4, seed, condition_number=30.0).covariance
        assert torch.linalg.cond(covariance) < 30.0 * math.exp(4)
        assert not torch.allclose(covariance, LinearGaussian.random(4, 4, seed + 1).covariance)


def test_sample_has_the_moments_of_the_process(process):
    values = to_tensor(process.sample(20_000, seed=0), process.variables)
    error = (values.mean(0) - process.mean) / (process.covariance.diagonal() / 20_000).sqrt()
    assert error.abs().max() < 4  # false alarm in 5 variables: 3e-4
    torch.testing.assert_close(values.T.cov(), process.covariance, rtol=0.05, atol=0.05)


def test_cells_missing_completely_at_random(process):
    ds = process.sample(20_000, seed=1, missing=0.5)
    missing = to_tensor(ds, process.variables).isnan()
    assert (missing.double().mean(0) - 0.5).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    correlation = torch.corrcoef(missing.T.double()) - torch.eye(5)
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)
    complete = to_tensor(process.sample(20_000, seed=1), process.variables)
    assert torch.equal(to_tensor(ds, process.variables)[~missing], complete[~missing])


@pytest.mark.parametrize("driver", [None, "y2"])
def test_cells_missing_at_random_depend_on_the_driver_alone(process, driver):
    ds = process.sample(40_000, seed=2, missing=0.4, mechanism="at_random", driver=driver)
    values = to_tensor(ds, process.variables)
    column = process.variables.index(driver or "x1")
    others = [i for i in range(5) if i != column]
    missing = values.isnan()
    assert not missing[:, column].any()
    # rows share their driver, so the mean over rows and cells has at most the variance of one cell a row
    assert abs(missing[:, others].double().mean() - 0.4) < 4 * math.sqrt(0.24 / 40_000)
    score = (values[:, column] - process.mean[column]) / process.covariance[column, column].sqrt()
    low, high = missing[score < -1][:, others].double().mean(), missing[score > 1][:, others].double().mean()
    assert low < 0.05 and high > 0.85
    complete = to_tensor(process.sample(40_000, seed=2), process.variables)
    middle = (score.abs() < 0.1).nonzero().squeeze(-1)
    for a, b in itertools.permutations(others, 2):  # given the driver, a cell is missing whatever its value
        residual = complete[middle, a] - complete[middle, a].mean()
        seen, gone = residual[~missing[middle, a]], residual[missing[middle, a]]
        error = (seen.var() / len(seen) + gone.var() / len(gone)).sqrt()
        assert abs(seen.mean() - gone.mean()) < 4.5 * error
        both = torch.corrcoef(missing[middle][:, [a, b]].T.double())[0, 1]
        assert abs(both) < 4.5 / math.sqrt(len(middle))


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda p: p.conditional(["z"]), "unknown variable 'z'"),
        (lambda p: p.conditional(["y1"], {"y1": 0.0}), "y1 is a target and also given"),
        (lambda p: p.conditional([]), "at least one name"),
        (lambda p: p.log_prob(torch.zeros(3)), r"shape \(3,\); expected \(\.\.\., 5\)"),
        (lambda p: p.mutual_information(["x1"], ["x1"]), "each once"),
        (lambda p: p.sample(3, seed=0, missing=1.0), "missing is 1.0"),
        (lambda p: p.sample(3, seed=0, missing=0.1, mechanism="by chance"), "mechanism is 'by chance'"),
        (lambda p: LinearGaussian(p.variables, torch.zeros(5), -torch.eye(5)), "positive definite"),
        (lambda p: LinearGaussian(p.variables, torch.zeros(4), torch.eye(4)), "shapes"),
        (
            lambda p: LinearGaussian(Variables([Variable("t", "parameter", "positive")]), torch.zeros(1), torch.eye(1)),
            "t has support positive",
        ),
    ],
)
def test_bad_requests_say_what_was_found_and_expected(process, ask, message):
    with pytest.raises(DataError, match=message):
        ask(process)


# ------------------------------------------------------------------------------------------------ tasks
def dense_joint(tasks: HierarchicalLinearGaussian, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of (z, row 1, …, row n) stacked into one vector, built cell by cell."""
    dim, latent = len(tasks.variables), tasks.latent_dim
    mapping = torch.cat([torch.eye(latent, dtype=F64), *[tasks.loading] * num_rows])
    covariance = mapping @ mapping.T
    for n in range(num_rows):
        block = slice(latent + n * dim, latent + (n + 1) * dim)
        covariance[block, block] += tasks.covariance
    return torch.cat([torch.zeros(latent, dtype=F64), *[tasks.mean] * num_rows]), covariance


def test_task_posterior_is_the_dense_joint_conditioned_on_the_observed_cells(tasks):
    rows = rows_with_holes(6, 5, seed=1)
    mean, covariance = dense_joint(tasks, 6)
    seen = (2 + (~rows.flatten().isnan()).nonzero().squeeze(-1)).tolist()
    loc, expected = by_precision(mean, covariance, [0, 1], seen, rows.flatten()[~rows.flatten().isnan()])
    found = tasks.task_posterior(rows)
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.covariance_matrix, expected)


def test_posterior_predictive_is_the_dense_joint_with_the_new_row_appended(tasks):
    rows = rows_with_holes(4, 5, seed=2)
    mean, covariance = dense_joint(tasks, 5)
    new = 2 + 4 * 5
    seen = (2 + (~rows.flatten().isnan()).nonzero().squeeze(-1)).tolist()
    known = torch.cat([rows.flatten()[~rows.flatten().isnan()], torch.tensor([0.4, -1.0], dtype=F64)])
    loc, expected = by_precision(mean, covariance, [new + 3, new + 0], [*seen, new + 1, new + 4], known)
    found = tasks.posterior_predictive(["y2", "x1"], {"x2": 0.4, "y3": -1.0}, rows)
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.covariance_matrix, expected)


def test_log_evidence_is_the_dense_density_of_observations_given_settings(tasks):
    rows = rows_with_holes(5, 5, seed=3)
    mean, covariance = dense_joint(tasks, 5)
    seen = (~rows.flatten().isnan()).nonzero().squeeze(-1)
    settings = seen[seen % 5 < 2]
    everything = MultivariateNormal(mean[2 + seen], covariance[2 + seen][:, 2 + seen])
    only_settings = MultivariateNormal(mean[2 + settings], covariance[2 + settings][:, 2 + settings])
    expected = everything.log_prob(rows.flatten()[seen]) - only_settings.log_prob(rows.flatten()[settings])
    torch.testing.assert_close(tasks.log_evidence(rows), expected)


def test_log_evidence_and_posterior_agree_with_integration_over_the_latent():
    tasks = HierarchicalLinearGaussian.random(1, 2, latent_dim=1, seed=8)
    rows = to_tensor(tasks.sample(1, 4, seed=4, missing=0.3), tasks.variables)
    settings = rows.clone()
    settings[:, 1:] = NAN
    base = LinearGaussian(tasks.variables, tasks.mean, tasks.covariance)

    def integrand(z: float, power: int = 0) -> float:
        given_z = tasks.row_given_latent(torch.tensor([z], dtype=F64))
        log_y_given_x = (given_z.log_prob(rows) - base.log_prob(settings)).sum()
        log_prior = -(z**2 + math.log(2 * math.pi)) / 2
        return z**power * math.exp(log_y_given_x.item() + log_prior)

    evidence, _ = integrate.quad(integrand, -10, 10, epsrel=1e-10)
    assert tasks.log_evidence(rows).item() == pytest.approx(math.log(evidence), abs=1e-8)
    first, _ = integrate.quad(integrand, -10, 10, args=(1,), epsrel=1e-10)
    assert tasks.task_posterior(rows).loc.item() == pytest.approx(first / evidence, abs=1e-8)


def test_evidence_of_one_row_is_its_predictive_and_chains_over_rows(tasks):
    rows = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    chained = torch.zeros((), dtype=F64)
    for n in range(3):
        given = {"x1": rows[n, 0], "x2": rows[n, 1]}
        predictive = tasks.posterior_predictive(["y1", "y2", "y3"], given, rows[:n])
        chained = chained + predictive.log_prob(rows[n, 2:])
    torch.testing.assert_close(tasks.log_evidence(rows), chained)


def test_nothing_observed_of_y_is_no_evidence(tasks):
    prior = tasks.task_posterior(torch.empty(0, 5))
    assert torch.equal(prior.covariance_matrix, torch.eye(2, dtype=F64)) and not prior.loc.any()
    settings = torch.tensor([[3.0, -2.0, NAN, NAN, NAN], [NAN, 5.0, NAN, NAN, NAN]])
    torch.testing.assert_close(tasks.task_posterior(settings).loc, prior.loc)
    torch.testing.assert_close(tasks.task_posterior(settings).covariance_matrix, prior.covariance_matrix)
    assert tasks.log_evidence(settings).abs() < 1e-12
    assert tasks.information_gain(~settings.isnan()).abs() < 1e-12


def test_order_of_rows_empty_rows_and_batches_of_tasks_do_not_matter(tasks):
    rows = rows_with_holes(3, 6, 5, seed=6)
    batch, evidence = tasks.task_posterior(rows), tasks.log_evidence(rows)
    assert batch.batch_shape == (3,)
    for t in range(3):
        shuffled = torch.cat([rows[t, [4, 2, 0, 5, 1, 3]], torch.full((2, 5), NAN, dtype=F64)])
        alone = tasks.task_posterior(shuffled)
        torch.testing.assert_close(alone.loc, batch.loc[t])
        torch.testing.assert_close(alone.covariance_matrix, batch.covariance_matrix[t])
        torch.testing.assert_close(tasks.log_evidence(shuffled), evidence[t])
    settings = torch.linspace(-1, 1, 3)
    together = tasks.posterior_predictive(["y1"], {"x1": settings}, rows)
    for t in range(3):
        alone = tasks.posterior_predictive(["y1"], {"x1": settings[t]}, rows[t])
        torch.testing.assert_close(together.loc[t], alone.loc)
        torch.testing.assert_close(together.scale_tril[t], alone.scale_tril)


def test_information_gain_is_the_fall_in_entropy_of_the_latent(tasks):
    known, new = rows_with_holes(3, 5, seed=7), rows_with_holes(4, 2, 5, seed=8)
    gains = tasks.information_gain(~new.isnan(), known)
    before = tasks.task_posterior(known).entropy()
    for gain, rows in zip(gains, new, strict=True):
        after = tasks.task_posterior(torch.cat([known, rows])).entropy()
        torch.testing.assert_close(gain, before - after)
    assert (gains > 0).all()


def test_information_gain_is_the_mean_log_ratio_of_posterior_to_prior(tasks):
    measured = torch.tensor([[True, False, True, False, True], [True, True, False, True, False]])
    latent = tasks.sample_latent(4000, seed=0)
    rows = to_tensor(tasks.sample(4000, 2, seed=0), tasks.variables).reshape(4000, 2, 5)
    rows = rows.masked_fill(~measured, NAN)
    prior = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    ratio = tasks.task_posterior(rows).log_prob(latent) - prior.log_prob(latent)
    error = ratio.std() / math.sqrt(4000)
    assert abs(ratio.mean() - tasks.information_gain(measured)) < 4 * error  # false alarm: 6e-5


def test_posterior_of_simulated_tasks_is_calibrated(tasks):
    latent = tasks.sample_latent(2000, seed=4)
    ds = tasks.sample(2000, 5, seed=4, missing=0.4, mechanism="at_random")
    posterior = tasks.task_posterior(to_tensor(ds, tasks.variables).reshape(2000, 5, 5))
    white = torch.linalg.solve_triangular(
        posterior.scale_tril, (latent - posterior.loc).unsqueeze(-1), upper=False
    ).squeeze(-1)
    assert white.mean(0).abs().max() < 4 / math.sqrt(2000)
    torch.testing.assert_close(white.T.cov(), torch.eye(2, dtype=F64), atol=4 * math.sqrt(2 / 2000), rtol=0)


def test_task_share_is_the_share_of_variance_between_tasks():
    tasks = HierarchicalLinearGaussian.random(2, 4, 3, seed=1, task_share=0.3)
    settings = {"x1": 0.0, "x2": 0.0}
    names = ["y1", "y2", "y3", "y4"]
    total = tasks.posterior_predictive(names, settings).variance
    within = tasks.row_given_latent(torch.zeros(3)).conditional(names, settings).variance
    torch.testing.assert_close(1 - within / total, torch.full((4,), 0.3, dtype=F64))


def test_sample_labels_tasks_and_repeats_with_the_seed(tasks):
    ds = tasks.sample(7, 3, seed=11, missing=0.2)
    assert ds.sizes["row"] == 21 and len(set(ds["task"].values.tolist())) == 7
    assert ds["task"].values.tolist() == [f"task {t}" for t in range(7) for _ in range(3)]
    assert ds.identical(tasks.sample(7, 3, seed=11, missing=0.2))
    assert not ds.identical(tasks.sample(7, 3, seed=12, missing=0.2))
    assert ds["x1"].attrs["role"] == "parameter" and ds["y1"].attrs["role"] == "observation"


def test_settings_cannot_load_on_the_task(tasks):
    loading = tasks.loading.clone()
    loading[1, 0] = 0.1
    with pytest.raises(DataError, match="x2 is a parameter with loading"):
        HierarchicalLinearGaussian(tasks.variables, tasks.mean, loading, tasks.covariance)
    with pytest.raises(DataError, match=r"task_share is 1\.0"):
        HierarchicalLinearGaussian.random(task_share=1.0)
    with pytest.raises(DataError, match=r"rows has shape \(5,\)"):
        tasks.task_posterior(torch.zeros(5))
    with pytest.raises(DataError, match=r"torch\.bool"):
        tasks.information_gain(torch.ones(1, 5))
