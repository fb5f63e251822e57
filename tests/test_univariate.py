"""Heads of one cell: exact integrals, inverses, tails and gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_invman.density.univariate import Mixture, Spline

INF = math.inf
F64 = torch.float64
BOUNDS = {"line": None, "infinite": (-INF, INF), "above": (-0.7, INF), "below": (-INF, 0.9), "interval": (-0.7, 0.9)}
# a spline on half a line is outside what bounds can be in working coordinates: real, log-positive or an interval
CASES = [
    pytest.param(kind, ends, id=f"{kind.__name__}-{name}")
    for kind, (name, ends) in itertools.product([Mixture, Spline], BOUNDS.items())
    if kind is Mixture or name not in ("above", "below")
]
BATCH = 3


def parameters(kind: type, seed: int = 0, dtype: torch.dtype = F64, batch: int = BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    if kind is Mixture:
        return [normal(batch, 5), normal(batch, 5), (0.5 * normal(batch, 5) - 1).exp()]
    return [normal(batch, 8), normal(batch, 8), normal(batch, 9), normal(batch), (0.3 * normal(batch)).exp()]


def head(kind: type, ends: tuple[float, float] | None, given: list[Tensor] | None = None, **kwargs) -> Mixture | Spline:
    given = parameters(kind, **kwargs) if given is None else given
    bounds = () if ends is None else [torch.full((given[0].shape[0],), end, dtype=given[0].dtype) for end in ends]
    return kind(*given, *bounds)


def span(d: Mixture | Spline, ends: tuple[float, float] | None) -> tuple[float, float]:
    lower, upper = ends or (-INF, INF)
    return max(lower, -40.0), min(upper, 40.0)


def grid(d: Mixture | Spline, ends: tuple[float, float] | None, points: int = 200_001) -> Tensor:
    """Points (S, 1) across all of the mass, the ends of a bounded support included."""
    return torch.linspace(*span(d, ends), points, dtype=F64).unsqueeze(-1)


# ------------------------------------------------------------------------------------------------ one law
@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_integrates_to_one(kind, ends):
    d = head(kind, ends)
    x = grid(d, ends)
    mass = torch.trapezoid(d.log_prob(x).exp(), x, dim=0)
    torch.testing.assert_close(mass, torch.ones(BATCH, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_cdf_is_the_integral_of_the_density(kind, ends):
    d = head(kind, ends)
    x = grid(d, ends)
    integral = torch.cumulative_trapezoid(d.log_prob(x).exp(), x, dim=0)
    torch.testing.assert_close(d.cdf(x)[1:], integral, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_slope_of_cdf_is_the_density(kind, ends):
    d = head(kind, ends)
    low, high = span(d, ends)
    x = torch.empty(50, BATCH, dtype=F64).uniform_(max(low, -3.0) + 1e-3, min(high, 3.0) - 1e-3).requires_grad_()
    (slope,) = torch.autograd.grad(d.cdf(x).sum(), x)
    torch.testing.assert_close(slope, d.log_prob(x).exp(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_icdf_inverts_cdf_and_the_other_way_round(kind, ends):
    d = head(kind, ends)
    p = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=F64).unsqueeze(-1).expand(-1, BATCH)
    x = d.icdf(p)
    torch.testing.assert_close(d.cdf(x), p, rtol=0, atol=1e-9)
    inner = p > 1e-3
    torch.testing.assert_close(d.icdf(d.cdf(x))[inner], x[inner], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "ends"), [case for case in CASES if case.values[1] not in (None, (-INF, INF))])
def test_no_mass_outside_the_support(kind, ends):
    d = head(kind, ends)
    for end, side in zip(ends, (-1, 1), strict=True):
        if math.isinf(end):
            continue
        outside = torch.tensor([end + side * step for step in (1e-9, 1e-3, 1.0, 100.0)], dtype=F64).unsqueeze(-1)
        assert (d.log_prob(outside) == -INF).all()
        assert d.log_prob(torch.full((BATCH,), end, dtype=F64)).isfinite().all()
        # up to the rounding of where the last bin of a spline ends
        torch.testing.assert_close(
            d.cdf(outside), torch.full((4, BATCH), float(side > 0), dtype=F64), rtol=0, atol=1e-14
        )
    p = torch.tensor([0.0, 1e-300, 1e-12, 1 - 1e-12, 1.0], dtype=F64).unsqueeze(-1).expand(-1, BATCH)
    quantiles = torch.cat([d.icdf(p), d.sample(shape=torch.Size((2000, BATCH)))])
    assert ((quantiles >= ends[0]) & (quantiles <= ends[1])).all()


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_samples_follow_the_cdf(kind, ends):
    """Kolmogorov–Smirnov at a false-alarm rate of 1e-4 a law, with the seed fixed."""
    d = head(kind, ends)
    draws = d.sample(torch.Generator().manual_seed(0), torch.Size((20_000, BATCH)))
    levels = d.cdf(draws).numpy()
    for column in range(BATCH):
        assert stats.kstest(levels[:, column], "uniform").pvalue > 1e-4


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_the_same_generator_gives_the_same_draws(kind, ends):
    d = head(kind, ends)
    first, second = (d.sample(torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.shape == (BATCH,)
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ extremes, gradients
@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_tails_are_finite_in_single_precision(kind, ends):
    d = head(kind, ends, dtype=torch.float32)
    far = [-1e4, -1e3, -60.0, -9.0, 0.0, 9.0, 60.0, 1e3, 1e4]
    low, high = ends or (-INF, INF)
    x = torch.tensor([v for v in far if low <= v <= high] + [v for v in (low, high) if math.isfinite(v)])
    assert d.log_prob(x.unsqueeze(-1)).isfinite().all()
    cdf = d.cdf(x.sort().values.unsqueeze(-1))
    assert ((cdf >= 0) & (cdf <= 1)).all() and (cdf.diff(dim=0) >= 0).all()
    p = torch.tensor([1.2e-7, 1e-3, 0.5, 1 - 1.2e-7]).unsqueeze(-1).expand(-1, BATCH)
    assert d.icdf(p).isfinite().all()
    assert d.sample(shape=torch.Size((10_000, BATCH))).isfinite().all()


@pytest.mark.parametrize(("kind", "ends"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_with_respect_to_value_and_parameters(kind, ends, dtype):
    given = [p.requires_grad_() for p in parameters(kind, dtype=dtype)]
    low, high = ends or (-INF, INF)
    near = [v for v in (-1e3, -5.0, -0.5, 0.3, 5.0, 1e3) if low <= v <= high] + [v for v in (low, high) if abs(v) < INF]
    x = torch.tensor(near, dtype=dtype).unsqueeze(-1).expand(-1, BATCH).clone().requires_grad_()
    p = torch.tensor([1e-6, 0.3, 1 - 1e-6], dtype=dtype).unsqueeze(-1).expand(-1, BATCH).clone().requires_grad_()
    d = head(kind, ends, given)
    for result, argument in ((d.log_prob(x), x), (d.cdf(x), x), (d.icdf(p), p)):
        used = [argument, *given]
        gradients = torch.autograd.grad(result.sum(), used, retain_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_log_prob_gradients_are_exact(kind, ends):
    given = [p.requires_grad_() for p in parameters(kind, batch=1)]
    x = torch.tensor([-0.5, -0.1, 0.4], dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *given: head(kind, ends, list(given)).log_prob(x), (x, *given))


@pytest.mark.parametrize(("kind", "ends"), CASES)
def test_icdf_gradients_are_exact(kind, ends):
    given = [p.requires_grad_() for p in parameters(kind, batch=1)]
    p = torch.tensor([0.1, 0.45, 0.8], dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, *given: head(kind, ends, list(given)).icdf(p), (p, *given), atol=1e-5, eps=1e-5
    )


def test_a_value_outside_has_finite_gradients():
    for kind in (Mixture, Spline):
        given = [p.requires_grad_() for p in parameters(kind)]
        x = torch.full((BATCH,), 3.0, dtype=F64).requires_grad_()
        log_prob = head(kind, BOUNDS["interval"], given).log_prob(x)
        assert (log_prob == -INF).all()
        gradients = torch.autograd.grad(log_prob.exp().sum(), [x, *given], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


# ------------------------------------------------------------------------------------------------ against scipy
TRUNCATED = [(-1.0, 2.0, 0.3, 1.0), (0.0, 1.0, -4.0, 0.5), (-3.0, -2.0, 4.0, 0.7), (5.0, INF, 0.0, 1.0), (0, 1, 50, 2)]


@pytest.mark.parametrize(("lower", "upper", "loc", "scale"), TRUNCATED)
def test_one_truncated_component_is_scipys(lower, upper, loc, scale):
    exact = stats.truncnorm((lower - loc) / scale, (upper - loc) / scale, loc, scale)
    lower, upper, loc, scale = (torch.tensor([v], dtype=F64) for v in (lower, upper, loc, scale))
    d = Mixture(torch.zeros(1, 1, dtype=F64), loc.unsqueeze(-1), scale.unsqueeze(-1), lower, upper)
    p = np.linspace(0.001, 0.999, 41)
    x = exact.ppf(p)
    np.testing.assert_allclose(d.log_prob(torch.tensor(x)).numpy(), exact.logpdf(x), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(d.cdf(torch.tensor(x)).numpy(), p, atol=1e-7)
    np.testing.assert_allclose(d.icdf(torch.tensor(p)).numpy(), x, atol=1e-6)
    draws = d.sample(torch.Generator().manual_seed(0), torch.Size((20_000, 1)))[:, 0].numpy()
    assert stats.kstest(draws, exact.cdf).pvalue > 1e-4  # its false-alarm rate


def test_a_mixture_of_truncated_normals_is_the_weighted_sum():
    d = head(Mixture, BOUNDS["interval"])
    logits, loc, scale = parameters(Mixture)
    x = torch.linspace(-0.7, 0.9, 41, dtype=F64).unsqueeze(-1)
    expected = np.zeros((41, BATCH))
    weights = logits.softmax(-1).numpy()
    for b, k in itertools.product(range(BATCH), range(5)):
        m, s = loc[b, k].item(), scale[b, k].item()
        expected[:, b] += weights[b, k] * stats.truncnorm((-0.7 - m) / s, (0.9 - m) / s, m, s).pdf(x[:, 0].numpy())
    np.testing.assert_allclose(d.log_prob(x).exp().numpy(), expected, rtol=1e-9)


def test_infinite_bounds_are_no_bounds():
    x = torch.linspace(-8, 8, 101, dtype=F64).unsqueeze(-1)
    for kind in (Mixture, Spline):
        free, bounded = head(kind, None), head(kind, (-INF, INF))
        torch.testing.assert_close(bounded.log_prob(x), free.log_prob(x))
        torch.testing.assert_close(bounded.cdf(x), free.cdf(x))


def test_a_flat_spline_is_its_base():
    flat = [torch.zeros(1, 8, dtype=F64), torch.zeros(1, 8, dtype=F64), torch.zeros(1, 9, dtype=F64)]
    loc, scale = torch.tensor([0.4], dtype=F64), torch.tensor([1.7], dtype=F64)
    x = torch.linspace(-20, 20, 101, dtype=F64)
    normal = torch.distributions.Normal(loc, scale)
    # the smallest slope is added to each, so a flat spline bends by a thousandth
    torch.testing.assert_close(Spline(*flat, loc, scale).log_prob(x), normal.log_prob(x), rtol=0, atol=5e-3)
    bounded = Spline(*flat, loc, scale, torch.tensor([-2.0], dtype=F64), torch.tensor([3.0], dtype=F64))
    inside = torch.linspace(-2, 3, 41, dtype=F64)
    torch.testing.assert_close(bounded.log_prob(inside).exp(), torch.full((41,), 0.2, dtype=F64), rtol=2e-3, atol=0)


def test_parameters_broadcast_against_values():
    for kind in (Mixture, Spline):
        d = head(kind, None)
        x = torch.linspace(-2, 2, 7, dtype=F64).unsqueeze(-1)
        assert d.log_prob(x).shape == d.cdf(x).shape == d.icdf(d.cdf(x)).shape == (7, BATCH)
        each = [head(kind, None, [p[b : b + 1] for p in parameters(kind)]) for b in range(BATCH)]
        torch.testing.assert_close(d.log_prob(x), torch.cat([e.log_prob(x) for e in each], -1))
