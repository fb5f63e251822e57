"""The Gaussian base against closed forms, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_invman.density.gaussian import GaussianBase

NAN = math.nan
F64 = torch.float64
MASKS = torch.tensor(list(itertools.product([False, True], repeat=4)))


def normal(dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randn(dim, dim, dtype=F64, generator=generator)
    return torch.randn(dim, dtype=F64, generator=generator), frame @ frame.mT + 0.3 * torch.eye(dim, dtype=F64)


def rows_of(mean: Tensor, covariance: Tensor, number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, len(mean), dtype=F64, generator=generator)
    return mean + noise @ torch.linalg.cholesky(covariance).mT


def base_of(mean: Tensor, covariance: Tensor, ridge: float = 1e-12) -> GaussianBase:
    base = GaussianBase(len(mean), ridge=ridge)
    base.mean.copy_(mean)
    base.covariance.copy_(covariance)
    return base


def brute_force(mean: Tensor, covariance: Tensor, j: int, known: list[int], v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale of cell j given the known cells, from the precision of j and them alone."""
    both = [j, *known]
    precision = torch.linalg.inv(covariance[both][:, both])
    variance = 1 / precision[0, 0]
    return mean[j] - variance * (precision[0, 1:] @ (v[known] - mean[known])), variance.sqrt()


# ------------------------------------------------------------------------------------------------ fit
def test_complete_rows_give_the_sample_moments():
    rows = rows_of(*normal(), 500)
    base = GaussianBase(4, ridge=0.0)
    base.fit(rows)
    torch.testing.assert_close(base.mean, rows.mean(0))
    torch.testing.assert_close(base.covariance, rows.T.cov(correction=0))


def test_the_ridge_is_in_units_of_each_cells_variance():
    rows = rows_of(*normal(), 500) * torch.tensor([1.0, 1e-3, 1e3, 1.0], dtype=F64)
    base = GaussianBase(4, ridge=1e-2)
    base.fit(rows)
    expected = rows.T.cov(correction=0) + 1e-2 * rows.var(0, correction=0).diag()
    torch.testing.assert_close(base.covariance, expected)


def test_monotone_missing_cells_give_the_factored_maximum_likelihood():
    """x2 missing where x1 is high: slope and residual from the complete rows, moments of x1 from all of them."""
    generator = torch.Generator().manual_seed(3)
    x1 = 1 + torch.randn(4000, dtype=F64, generator=generator)
    x2 = 0.5 + 0.8 * x1 + 0.6 * torch.randn(4000, dtype=F64, generator=generator)
    seen = torch.rand(4000, dtype=F64, generator=generator) > torch.special.ndtr(2 * (x1 - 1))
    base = GaussianBase(2, ridge=0.0)
    base.fit(torch.stack([x1, x2.where(seen, NAN)], -1), max_iterations=5000, tolerance=1e-14)

    design = torch.stack([torch.ones_like(x1), x1], -1)[seen]
    (intercept, slope), *_ = torch.linalg.lstsq(design, x2[seen])
    residual = (x2[seen] - design @ torch.stack([intercept, slope])).square().mean()
    variance = x1.var(correction=0)
    expected_mean = torch.stack([x1.mean(), intercept + slope * x1.mean()])
    expected = torch.stack(
        [torch.stack([variance, slope * variance]), torch.stack([slope * variance, slope**2 * variance + residual])]
    )
    torch.testing.assert_close(base.mean, expected_mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(base.covariance, expected, rtol=1e-6, atol=1e-8)
    # and so the truth within sampling error (4 standard errors), where the mean of the observed x2 is far off
    spread = 0.6 / ((x1[seen] - x1[seen].mean()).square().sum().sqrt())
    found = base.covariance[0, 1] / base.covariance[0, 0]
    assert abs(found - 0.8) < 4 * spread
    assert abs((base.covariance[1, 1] - found * base.covariance[0, 1]).sqrt() - 0.6) < 4 * 0.6 / math.sqrt(
        2 * int(seen.sum())
    )
    assert abs(base.mean[1] - 1.3) < 0.1 < 0.3 < abs(x2[seen].mean() - 1.3)


def test_a_general_pattern_is_a_stationary_point_of_the_observed_likelihood():
    rows = rows_of(*normal(), 300)
    generator = torch.Generator().manual_seed(1)
    rows = rows.masked_fill(torch.rand(300, 4, generator=generator) < 0.4, NAN)
    rows[0] = NAN  # a row that says nothing
    base = GaussianBase(4, ridge=0.0)
    base.fit(rows, max_iterations=5000, tolerance=1e-13)
    reached = base.log_prob(rows).sum()
    for step in (-1e-3, 1e-3):
        for j, k in itertools.product(range(4), range(4)):
            moved = base_of(base.mean, base.covariance)
            moved.covariance[j, k] += step
            moved.covariance[k, j] += step
            assert moved.log_prob(rows).sum() < reached
        for j in range(4):
            moved = base_of(base.mean, base.covariance)
            moved.mean[j] += step
            assert moved.log_prob(rows).sum() < reached


def test_chunks_and_the_order_of_rows_do_not_matter():
    rows = rows_of(*normal(), 200)
    rows = rows.masked_fill(torch.rand(200, 4) < 0.3, NAN)
    whole, parts = GaussianBase(4), GaussianBase(4)
    whole.fit(rows)
    parts.fit(rows.flip(0), chunk=17)
    torch.testing.assert_close(whole.covariance, parts.covariance)
    torch.testing.assert_close(whole.mean, parts.mean)


# ------------------------------------------------------------------------------------------------ condition
def test_condition_is_brute_force_conditioning_for_every_mask():
    mean, covariance = normal()
    base, v = base_of(mean, covariance), torch.randn(4, dtype=F64)
    found = base.condition(v.expand(16, 4), MASKS)
    for row, mask in enumerate(MASKS):
        for j in range(4):
            known = [i for i in range(4) if mask[i] and i != j]  # leave-one-out where j itself is known
            expected = brute_force(mean, covariance, j, known, v)
            torch.testing.assert_close((found.mean[row, j], found.scale[row, j]), expected, rtol=1e-9, atol=1e-9)


def test_what_stands_in_unknown_cells_is_not_read():
    base, v = base_of(*normal()), torch.randn(16, 4, dtype=F64)
    other = torch.where(MASKS, v, 1e6)
    torch.testing.assert_close(base.condition(v, MASKS), base.condition(other, MASKS))


def test_values_and_masks_broadcast():
    base, v = base_of(*normal()), torch.randn(5, 1, 4, dtype=F64)
    found = base.condition(v, MASKS)
    assert found.mean.shape == found.scale.shape == (5, 16, 4)
    full = base.condition(v.expand(5, 16, 4), MASKS.expand(5, 16, 4))
    torch.testing.assert_close(found.mean, full.mean)
    torch.testing.assert_close(found.scale, full.scale)


def test_condition_keeps_the_dtype_of_the_values_and_its_own():
    base = base_of(*normal()).float()
    assert base.covariance.dtype == F64
    found = base.condition(torch.zeros(4), torch.tensor([True, False, True, False]))
    assert found.mean.dtype == found.scale.dtype == torch.float32


def test_gradients_with_respect_to_values_are_exact_and_zero_at_unknown_cells():
    base = base_of(*normal())
    v = torch.randn(16, 4, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: base.condition(values, MASKS).mean, (v,))
    (gradient,) = torch.autograd.grad(base.condition(v, MASKS).mean.square().sum(), v)
    assert gradient.isfinite().all()
    assert (gradient[~MASKS] == 0).all()


def test_fractions_that_sum_to_one_stay_finite():
    shares = torch.rand(400, 3, dtype=F64).softmax(-1)
    assert torch.linalg.matrix_rank(shares.T.cov()) == 2
    base = GaussianBase(3)
    for rows in (shares, shares.masked_fill(torch.rand(400, 3) < 0.3, NAN), shares[:2]):
        base.fit(rows)
        masks = torch.tensor(list(itertools.product([False, True], repeat=3)))
        values = shares[0].expand(8, 3).float().requires_grad_()
        found = base.condition(values, masks)
        (gradient,) = torch.autograd.grad(found.mean.sum(), values)
        assert found.mean.isfinite().all() and (found.scale > 0).all() and gradient.isfinite().all()
        assert base.log_prob(shares).isfinite().all()
    base.fit(shares)
    last = base.condition(shares, torch.tensor([True, True, False]))
    torch.testing.assert_close(last.mean[:, 2], shares[:, 2], rtol=0, atol=0.01 * shares[:, 2].std().item())


# ------------------------------------------------------------------------------------------------ log_prob
def test_log_prob_is_that_of_the_observed_cells():
    mean, covariance = normal()
    base, v = base_of(mean, covariance), torch.randn(4, dtype=F64)
    found = base.log_prob(v.expand(16, 4).masked_fill(~MASKS, NAN))
    assert found[0] == 0
    for mask, log_prob in zip(MASKS[1:], found[1:], strict=True):
        exact = MultivariateNormal(mean[mask], covariance[mask][:, mask]).log_prob(v[mask])
        torch.testing.assert_close(log_prob, exact)


def test_log_prob_has_finite_gradients_beside_missing_cells():
    base = base_of(*normal())
    v = torch.randn(16, 4, dtype=F64).masked_fill(~MASKS, NAN).requires_grad_()
    (gradient,) = torch.autograd.grad(base.log_prob(v).sum(), v)
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------ exchange
def test_exchange_is_the_average_over_all_orders_of_the_members():
    mean, covariance = normal(8, seed=2)
    members = torch.tensor([[1, 5], [2, 6], [4, 7]])
    base = base_of(mean, covariance)
    base.exchange(members)
    means, covariances = [], []
    for order in itertools.permutations(range(3)):
        move = torch.arange(8)
        move[members.flatten()] = members[list(order)].flatten()
        means.append(mean[move])
        covariances.append(covariance[move][:, move])
    torch.testing.assert_close(base.mean, torch.stack(means).mean(0))
    torch.testing.assert_close(base.covariance, torch.stack(covariances).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_without_observed_cells_does_not_spoil_the_others(dtype):
    rows = rows_of(*normal(), 300).to(dtype)
    rows[:, 2] = NAN
    base, without = GaussianBase(4), GaussianBase(3)
    base.fit(rows)
    without.fit(rows[:, [0, 1, 3]])
    torch.testing.assert_close(base.mean[[0, 1, 3]], without.mean, rtol=1e-3, atol=1e-3)
    known = torch.tensor([True, False, False, False])
    assert all(part.isfinite().all() for part in base.condition(rows[0].nan_to_num(0), known))
